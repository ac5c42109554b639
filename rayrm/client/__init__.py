"""A typed client of the scoring service, for programs of any kind: no part of it needs torch or Ray.

    with RewardClient("http://localhost:8000", key="…") as client:
        client.rewards([Query("Which city is the capital of France?", ["Paris.", "Rome."])])

What the service could not score comes back as null with its status. Requests that it had no time for, and single items
of them, are sent again until `timeout_s` have passed, after as long as the service asks for. What is refused for one item
is sent again in halves, so that this item alone has no reward. Every reply is read as what it must be, and must come from
the same revision of the model as the first one.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rayrm.client.asking import AnswerT, Asking, AskLikeness, AskPairs, AskRewards, QuestionT
from rayrm.client.replies import SCORED, Answered, ModelsReply, read_reply
from rayrm.client.sending import FIRST_PAUSE_S, LONGEST_PAUSE_S, LateError, RefusedError, Sender
from rayrm.client.values import Comparison, Pair, Prompt, Query, Reference, Reward
from rayrm.errors import ServiceError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["AsyncRewardClient", "Comparison", "Pair", "Prompt", "Query", "Reference", "Reward", "RewardClient"]
RETRY_STATUSES = ("overloaded", "timeout")
SPLIT_CODES = (400, 413, 422)
"""Refusals that one item may be the reason of, for all that it came with."""
log = logging.getLogger("rayrm")


class AsyncRewardClient:
    """The client for asynchronous programs."""

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        model: str | None = None,
        timeout_s: float = 120.0,
        batch_size: int = 32,
        max_in_flight: int = 16,
    ) -> None:
        """`key` is that of the environment variable RAYRM_API_KEY where it is null; `model` the server's first one.

        A request holds at most `batch_size` queries, has `timeout_s` for all times that it is sent, and at most
        `max_in_flight` of them run at a time.
        """
        self.revision: str | None = None
        """What all replies must come from, as the service calls it; null until the first one, unless it is set."""
        self._sender = Sender(url, key, timeout_s, max_in_flight)
        self._model = model
        self._batch_size = batch_size
        self._limit = asyncio.Semaphore(max_in_flight)

    async def rewards(self, queries: Sequence[Query], *, outputs: Sequence[str] = ()) -> list[list[Reward]]:
        """A reward for each completion of each query; `outputs` may ask for `calibrated` and `ratings`.

        Raises ServiceError when the service refuses the key or the model, cannot be reached in time, gives a reply that
        is none, or answers with another revision of the model.
        """
        return await self._all(AskRewards(outputs), queries)

    async def compare(self, pairs: Sequence[Pair]) -> list[Comparison]:
        """Which completion of each pair is better. Raises ServiceError as `rewards` does."""
        return [found for (found,) in await self._all(AskPairs(), pairs)]

    async def bleurt(self, references: Sequence[Reference]) -> list[list[Reward]]:
        """How like its reference each candidate is, by a BLEURT model. Raises ServiceError as `rewards` does."""
        return await self._all(AskLikeness(), references)

    async def reward_frame(
        self, frame: pd.DataFrame, *, prompt: str = "prompt", completion: str = "completion", lang: str = "lang"
    ) -> pd.DataFrame:
        """`frame` with the columns reward, status and detail for each row; `lang` is used where there is such a column.

        Raises ServiceError as `rewards` does, and ValueError when a column is missing, or a text.
        """
        missing = [name for name in (prompt, completion) if name not in frame.columns]
        if missing:
            raise ValueError(f"The frame has no column '{missing[0]}'; it has {', '.join(map(str, frame.columns))}.")
        for name in (prompt, completion):
            if gaps := frame.index[frame[name].isna()].tolist():
                raise ValueError(f"Row {gaps[0]} of the frame has no {name}; drop such rows, or fill them in.")
        langs = frame[lang] if lang in frame.columns else [None] * len(frame)
        rows = zip(frame[prompt], frame[completion], langs, strict=True)
        found = await self.rewards(
            [Query(text, [answer], code if isinstance(code, str) else None) for text, answer, code in rows]
        )
        told = [rewards[0] for rewards in found]
        return frame.assign(
            reward=[r.reward for r in told], status=[r.status for r in told], detail=[r.detail for r in told]
        )

    async def models(self) -> list[dict[str, Any]]:
        """The service's models and what it tells of them. Raises ServiceError as `rewards` does."""
        found: dict[str, Any] = await self._sender.send("GET", "/v1/models", None, self._sender.end())
        read_reply(ModelsReply, found, self._sender.where("/v1/models"))
        models: list[dict[str, Any]] = found["data"]
        return models

    async def close(self) -> None:
        """Give up all connections."""
        await self._sender.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def _all(self, asking: Asking[QuestionT, AnswerT], questions: Sequence[QuestionT]) -> list[list[AnswerT]]:
        """Answers to all that is asked, in batches."""
        starts = range(0, len(questions), self._batch_size)
        parts = [questions[start : start + self._batch_size] for start in starts]
        tasks = [asyncio.create_task(self._batch(asking, part)) for part in parts]
        try:
            return [answers for found in await asyncio.gather(*tasks) for answers in found]
        finally:
            for task in tasks:
                task.cancel()

    async def _batch(self, asking: Asking[QuestionT, AnswerT], part: Sequence[QuestionT]) -> list[list[AnswerT]]:
        """Answers to a batch; what there was no time for is asked again alone, until the batch's time is over."""
        async with self._limit:
            # The time that a batch waits for others is not its own.
            end, pause = self._sender.end(), FIRST_PAUSE_S
            found = await self._ask(asking, part, end)
            while again := [i for i, answers in enumerate(found) if any(a.status in RETRY_STATUSES for a in answers)]:
                if time.monotonic() + pause > end:
                    break
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))
                pause = min(2 * pause, LONGEST_PAUSE_S)
                try:
                    later = await self._ask(asking, [part[index] for index in again], end)
                except LateError:
                    # The others have their answers, and these say why they have none.
                    break
                for index, answers in zip(again, later, strict=True):
                    found[index] = [
                        new if old.status in RETRY_STATUSES else old
                        for old, new in zip(found[index], answers, strict=True)
                    ]
            return found

    async def _ask(
        self, asking: Asking[QuestionT, AnswerT], part: Sequence[QuestionT], end: float
    ) -> list[list[AnswerT]]:
        """Answers to some questions; of a request that is refused for what it holds, to each half by itself.

        What is refused alone has none, and says why.
        """
        try:
            found = await self._post(asking.path, asking.body(part), end)
        except RefusedError as error:
            if error.code not in SPLIT_CODES:
                raise
            if len(part) > 1:
                half = len(part) // 2
                first = await self._ask(asking, part[:half], end)
                return first + await self._ask(asking, part[half:], end)
            if pieces := asking.halve(part[0]):
                answers = [each for piece in pieces for each in await self._ask(asking, [piece], end)]
                return [[answer for each in answers for answer in each]]
            log.warning("%s", error)
            return [[asking.fail(error.told)] * asking.num_items(part[0])]
        where = self._sender.where(asking.path)
        reply = read_reply(asking.kind, found, where)
        answers = asking.read(reply, part, where)
        if reply.revision is not None or any(answer.status in SCORED for each in answers for answer in each):
            self._hold(reply)
        return answers

    async def _post(self, path: str, body: dict[str, Any], end: float) -> Any:
        return await self._sender.send("POST", path, {"model": self._model, **body}, end)

    def _hold(self, reply: Answered) -> None:
        """Raise ServiceError for a reply of another revision than those before: the server may have been changed."""
        self.revision = self.revision or reply.revision
        if reply.revision != self.revision:
            raise ServiceError(
                f"'{reply.model}' at '{self._sender.url}' was revision {self.revision} when this run began and is "
                f"{reply.revision or 'one that it does not tell'} now, and rewards of two models must not be mixed; serve "
                "the first one again, or begin a new run."
            )


class RewardClient:
    """The same client for programs that wait. It works from any thread, in notebooks too."""

    def __init__(self, url: str, **settings: Any) -> None:
        """`settings` are those of AsyncRewardClient."""
        from anyio.from_thread import start_blocking_portal

        self._thread = start_blocking_portal()
        self._portal = self._thread.__enter__()
        self._client: AsyncRewardClient = self._portal.call(lambda: AsyncRewardClient(url, **settings))

    def rewards(self, queries: Sequence[Query], *, outputs: Sequence[str] = ()) -> list[list[Reward]]:
        """As `AsyncRewardClient.rewards`."""
        return self._portal.call(lambda: self._client.rewards(queries, outputs=outputs))

    def compare(self, pairs: Sequence[Pair]) -> list[Comparison]:
        """As `AsyncRewardClient.compare`."""
        return self._portal.call(lambda: self._client.compare(pairs))

    def bleurt(self, references: Sequence[Reference]) -> list[list[Reward]]:
        """As `AsyncRewardClient.bleurt`."""
        return self._portal.call(lambda: self._client.bleurt(references))

    def reward_frame(self, frame: pd.DataFrame, **columns: str) -> pd.DataFrame:
        """As `AsyncRewardClient.reward_frame`."""
        return self._portal.call(lambda: self._client.reward_frame(frame, **columns))

    def models(self) -> list[dict[str, Any]]:
        """As `AsyncRewardClient.models`."""
        return self._portal.call(self._client.models)

    def close(self) -> None:
        """Give up all connections and the thread that serves them."""
        self._portal.call(self._client.close)
        self._thread.__exit__(None, None, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
