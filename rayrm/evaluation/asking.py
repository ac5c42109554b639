"""Questions to one endpoint, many at once: bounded, tried again, stored as they are answered."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pydantic import Field

from rayrm.config import Config
from rayrm.errors import EvaluationError
from rayrm.evaluation.answers import Answer, AnswerStatus, AnswerStore
from rayrm.evaluation.concurrency import Limit
from rayrm.scoring.endpoint import MAX_PAUSE_S, Endpoint, EndpointConfig, EndpointError, Fault, pause_before

FIRST_PAUSE_S = 0.5
"""Longest pause before the second request of a call; each further one is twice as long."""
LONGEST_PAUSE_S = 60.0
"""Longest pause that an endpoint can ask for."""
STATUSES: dict[Fault, AnswerStatus] = {"busy": "overloaded", "late": "timeout"}
"""Status of a call that failed for good; any other fault is an error."""


class Asking(Config):
    """How endpoints are asked; it changes when answers come, and not what they are."""

    max_attempts: int = Field(7, ge=1)
    """Requests for one answer, but for those that come back since the endpoint has too much to do; the pauses between
    seven come to about 23 seconds."""
    max_busy_s: float = Field(300.0, ge=0)
    """Seconds after which a call is given up that an endpoint with too much to do sends back again and again."""
    timeout_s: float = Field(300.0, gt=0)
    """Seconds for one request."""
    max_failures_in_a_row: int = Field(20, ge=1)
    """Calls, one after the other, that fail for good: with so many the run stops, and goes on when it is started again."""


class Call(NamedTuple):
    """A question to a judge, asked once however many rows have it."""

    key: str
    body: Callable[[], dict[str, Any]]
    """Makes the request, when its turn comes."""
    read: Callable[[Mapping[str, Any]], object]
    """Raises ValueError for a completion without what was asked for, such as probabilities."""


def ask_all(config: EndpointConfig, name: str, calls: Mapping[str, Call], store: AnswerStore, asking: Asking) -> None:
    """Ask what the store has no answer to, those that failed before included, and store what comes.

    Raises EvaluationError when the endpoint is gone or refuses everything; what was stored stays.
    """
    asyncio.run(_Asker(config, name, store, asking).run(list(calls.values())))


class _Asker:
    def __init__(self, config: EndpointConfig, name: str, store: AnswerStore, asking: Asking) -> None:
        self._config = config
        self._name = name
        self._store = store
        self._asking = asking
        self._limit = Limit(config.max_in_flight)
        self._replies: dict[str, dict[str, Any]] = {}
        """Replies that do not say what was asked for, by their calls."""
        self._failures_in_a_row = self._num_failed = self._num_answered = 0
        self._last_words: str | None = None
        """Why the run stops; requests that are under way are waited for, since they will be paid for."""

    async def run(self, calls: list[Call]) -> None:
        from tqdm import tqdm

        missing = [call for call in calls if not self._store.is_answered(call.key)]
        self._endpoint = Endpoint(self._config, f"judge {self._name}")
        bar = {"total": len(calls), "initial": len(calls) - len(missing), "unit": "call", "desc": self._name}
        with tqdm(**bar, disable=not sys.stderr.isatty()) as self._bar:
            try:
                async with asyncio.TaskGroup() as group:
                    for call in missing:
                        number = await self._limit.enter()
                        if self._last_words is not None:
                            self._limit.leave()
                            break
                        group.create_task(self._ask(call, number))
            except BaseExceptionGroup as errors:
                raise errors.exceptions[0] from None
            finally:
                await self._endpoint.close()
        if self._last_words is not None:
            raise EvaluationError(self._last_words)

    async def _ask(self, call: Call, number: int) -> None:
        """One call that has its place.

        It keeps the place for a first pause, and for as long as the endpoint wants to be left alone: a place that went
        on at once would be sent back at once.
        """
        body, pause = call.body(), FIRST_PAUSE_S
        first, attempt, num_busy = time.monotonic(), 0, 0
        while True:
            attempt += 1
            began = time.monotonic()
            try:
                answer = await self._try(call, body, attempt, began)
                self._limit.note(number, came_back=False)
                break
            except EndpointError as error:
                self._limit.note(number, came_back=error.may_help)
                num_busy += error.fault == "busy"
                is_over = attempt - num_busy >= self._asking.max_attempts or began - first > self._asking.max_busy_s
                if is_over or not error.may_help:
                    status = STATUSES.get(error.fault, "error")
                    seconds = round(time.monotonic() - began, 3)
                    answer = Answer(call.key, status, self._replies.pop(call.key, None), str(error), attempt, seconds)
                    self._judge_failure(error)
                    break
                if self._last_words is not None:
                    return
                wait_s = min(pause_before(error, pause), LONGEST_PAUSE_S)
                held_s = wait_s if error.retry_after_s is not None else min(wait_s, FIRST_PAUSE_S)
                await asyncio.sleep(held_s)
                pause = min(2 * pause, MAX_PAUSE_S)
            finally:
                self._limit.leave()
            await asyncio.sleep(wait_s - held_s)
            number = await self._limit.enter()
        self._store.add(answer)
        self._show(answer)
        if self._last_words is None and self._failures_in_a_row >= self._asking.max_failures_in_a_row:
            self._last_words = (
                f"Judge '{self._name}' gave no answer to {self._failures_in_a_row} calls in a row ({answer.detail}); all "
                "answers so far are stored, and the same command goes on from there."
            )

    async def _try(self, call: Call, body: dict[str, Any], attempt: int, began: float) -> Answer:
        reply = await self._endpoint.try_once("/chat/completions", body, self._asking.timeout_s)
        if not is_completion(reply):
            shown = self._endpoint.without_key(str(reply))[:300]
            told = f"'{self._name}' answers, and not with a chat completion: {shown}."
            raise EndpointError(told, "broken")
        try:
            call.read(reply)
        except ValueError as error:
            # It is paid for.
            self._replies[call.key] = reply
            raise EndpointError(f"'{self._name}' does not answer what it was asked: {error}.", "refused") from None
        self._failures_in_a_row = 0
        self._num_answered += 1
        return Answer(call.key, "ok", reply, None, attempt, round(time.monotonic() - began, 3))

    def _judge_failure(self, error: EndpointError) -> None:
        self._num_failed += 1
        # A request that is not to an endpoint's taste says nothing of the next one, where it has answered others.
        if error.fault != "request" or not self._num_answered:
            self._failures_in_a_row += 1

    def _show(self, answer: Answer) -> None:
        self._bar.update()
        if self._bar.disable:
            return
        cost = self._store.cost
        shown = {"failed": self._num_failed, "in flight": self._limit.in_flight, "most": self._limit.size}
        self._bar.set_postfix(shown | ({} if cost is None else {"cost": f"{cost:.4f}"}), refresh=False)


def is_completion(reply: Mapping[str, Any]) -> bool:
    """Whether a reply has a message with text, or with none."""
    try:
        content = reply["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        return False
    return content is None or isinstance(content, str)
