"""The models behind a gateway, by name: where requests of all dialects meet."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from rayrm.serving.config import Directory, ModelNames
from rayrm.serving.metrics import Metrics
from rayrm.serving.questions import RETRYABLE, Answer, Completions, Question, Verdict

CHUNK = 64
"""Most questions that go to one replica together; more are shared out."""
MAX_RETRY_AFTER_S = 60.0
MAX_DEATHS = 4
"""Replicas that may die while they have a request, before it is given up."""


class RequestError(Exception):
    """A request that gets an error instead of an answer."""

    def __init__(self, code: int, kind: str, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.code = code
        """Status code of HTTP."""
        self.kind = kind
        """Name of the kind of error, as OpenAI's clients know it."""
        self.retry_after_s = retry_after_s
        """Seconds after which asking again may help; null where it will not."""


class Backend(Protocol):
    """A model's replicas, or one of them."""

    async def answer(self, questions: list[Question], deadline_s: float) -> list[list[Answer]]:
        """As `RewardReplica.answer`."""

    async def compare(self, questions: list[Completions], deadline_s: float) -> list[Verdict]:
        """As `RewardReplica.compare`."""

    async def tokenize(self, question: Question) -> list[list[int]]:
        """As `RewardReplica.tokenize`."""

    async def facts(self) -> dict[str, Any]:
        """As `RewardReplica.facts`."""


class Served(NamedTuple):
    """A model, and what answers for it."""

    config: ModelNames
    backend: Backend


class Named(Protocol):
    """What has a config with a name and aliases."""

    @property
    def config(self) -> Any:
        """With `name` and `aliases`."""


NamedT = TypeVar("NamedT", bound=Named)


def by_name(models: Sequence[NamedT]) -> dict[str, NamedT]:
    """Models by all their names, in order."""
    return {name: each for each in models for name in (each.config.name, *each.config.aliases)}


def find_by_name(models: Mapping[str, NamedT], name: str | None, kind: str) -> NamedT:
    """The model of a name or alias; the first one without. Raises RequestError 404, with the names there are."""
    if name is None and models:
        return next(iter(models.values()))
    if name is None or name not in models:
        known = ", ".join(sorted(models)) or "none"
        raise RequestError(404, "NotFoundError", f"There is no {kind} '{name}'; there are {known}.")
    return models[name]


class Service:
    """All models, the answers to their questions, and what is counted of them."""

    def __init__(self, config: Directory, backends: Mapping[str, Backend], metrics: Metrics) -> None:
        self.config = config
        self.metrics = metrics
        # Those of `/v1/bleurt` stand last, so that a request which names no model goes to a reward model.
        self.models = [Served(model, backends[model.name]) for model in (*config.models, *config.bleurt)]
        self._by_name = by_name(self.models)

    def find(self, name: str | None) -> Served:
        """The model of a name or alias; the first one without. Raises RequestError 404, with the names there are."""
        return find_by_name(self._by_name, name, "model")

    def deadline_s(self, wanted: float | None) -> float:
        """Seconds for a request that asks for `wanted`."""
        longest = self.config.gateway.deadline_s
        return longest if wanted is None else min(wanted, longest)

    async def answer(
        self, name: str | None, questions: Sequence[Question], deadline_s: float | None = None
    ) -> list[list[Answer]]:
        """An answer for each completion or conversation of each question. Raises RequestError."""
        model = self.find(name)
        self._check_size(sum(question.num_items for question in questions))
        allowed = self.deadline_s(deadline_s)
        chunks = [list(questions[start : start + CHUNK]) for start in range(0, len(questions), CHUNK)]
        found = await asyncio.gather(*(model.backend.answer(chunk, allowed) for chunk in chunks))
        answers = [answers for chunk in found for answers in chunk]
        for question, each in zip(questions, answers, strict=True):
            self.metrics.count_answers(model.config.name, getattr(question, "lang", None), each)
        return answers

    async def compare(
        self, name: str | None, questions: Sequence[Completions], deadline_s: float | None = None
    ) -> list[Verdict]:
        """Which of the two completions of each question is better. Raises RequestError."""
        model = self.find(name)
        self._check_size(2 * len(questions))
        allowed = self.deadline_s(deadline_s)
        chunks = [list(questions[start : start + CHUNK]) for start in range(0, len(questions), CHUNK)]
        found = await asyncio.gather(*(model.backend.compare(chunk, allowed) for chunk in chunks))
        verdicts = [verdict for chunk in found for verdict in chunk]
        self.metrics.count_verdicts(model.config.name, verdicts)
        return verdicts

    def _check_size(self, num_items: int) -> None:
        if num_items > self.config.gateway.max_items:
            raise RequestError(
                413,
                "BadRequestError",
                f"The request has {num_items:,} items, and the most are {self.config.gateway.max_items:,}; send it in "
                "parts.",
            )

    async def is_ready(self) -> bool:
        """Whether every model that has to run all the time answers."""
        always = [model.backend for model in self.models if model.config.is_always_on]
        try:
            await asyncio.wait_for(asyncio.gather(*(backend.facts() for backend in always)), 10.0)
        except Exception:
            return False
        return True


def require_rewards(answers: Sequence[Answer]) -> list[float]:
    """All rewards, for a dialect that cannot say that there is none.

    Raises RequestError: 503 where asking again may help, and 422 where it will not.
    """
    for index, answer in enumerate(answers):
        if answer.reward is None:
            refuse(answer, f"Item {index}")
    return [answer.reward for answer in answers if answer.reward is not None]


def refuse(answer: Answer | Verdict, what: str) -> None:
    """Raise the RequestError for an answer that is not there."""
    message = f"{what} has no reward ({answer.status}): {answer.detail}."
    if answer.status in RETRYABLE:
        raise RequestError(503, "OverloadedError", message, min(max(answer.retry_after_s, 1.0), MAX_RETRY_AFTER_S))
    raise RequestError(422, "UnscoredError", message)


class ServeBackend:
    """The replicas of a model behind a Serve handle; a request whose replica dies goes to another one."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def answer(self, questions: list[Question], deadline_s: float) -> list[list[Answer]]:
        """As `RewardReplica.answer`."""
        try:
            found: list[list[Answer]] = await self._call("answer", deadline_s, questions)
        except RequestError as error:
            sizes = [question.num_items for question in questions]
            return [
                [Answer(None, *_status(error))._replace(retry_after_s=error.retry_after_s or 0.0)] * n for n in sizes
            ]
        return found

    async def compare(self, questions: list[Completions], deadline_s: float) -> list[Verdict]:
        """As `RewardReplica.compare`."""
        try:
            found: list[Verdict] = await self._call("compare", deadline_s, questions)
        except RequestError as error:
            return [Verdict(None, *_status(error))._replace(retry_after_s=error.retry_after_s or 0.0)] * len(questions)
        return found

    async def tokenize(self, question: Question) -> list[list[int]]:
        """As `RewardReplica.tokenize`."""
        found: list[list[int]] = await self._call("tokenize", 10.0, question, tells_deadline=False)
        return found

    async def facts(self) -> dict[str, Any]:
        """As `RewardReplica.facts`."""
        found: dict[str, Any] = await self._call("facts", 10.0, tells_deadline=False)
        return found

    async def _call(self, method: str, deadline_s: float, *given: Any, tells_deadline: bool = True) -> Any:
        """Raises RequestError when no replica has answered within the deadline."""
        from ray.exceptions import RayActorError
        from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

        end, num_deaths = time.monotonic() + deadline_s, 0
        while (left := end - time.monotonic()) > 0:
            try:
                call = getattr(self._handle, method).remote(*given, *([left] if tells_deadline else []))
                return await asyncio.wait_for(call, left)
            except RayActorError:
                # The replica died or was taken away. Nothing that it was asked for has an effect, so ask another, but
                # not all of them: it may be this request that they die of.
                num_deaths += 1
                if num_deaths == MAX_DEATHS:
                    raise RequestError(503, "error", f"{MAX_DEATHS} replicas died of it", MAX_RETRY_AFTER_S) from None
                await asyncio.sleep(0.05)
            except BackPressureError:
                raise RequestError(503, "overloaded", "all replicas are full", 1.0) from None
            except DeploymentUnavailableError as error:
                raise RequestError(503, "overloaded", f"the model does not start: {error}", MAX_RETRY_AFTER_S) from None
            except TimeoutError:
                break
        raise RequestError(503, "timeout", "the deadline passed", 1.0)


def _status(error: RequestError) -> tuple[str, str]:
    return error.kind, str(error)
