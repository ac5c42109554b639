"""A typed client of the scoring service, for programs of any kind: no part of it needs torch or Ray.

    with RewardClient("http://localhost:8000", key="…") as client:
        client.rewards([Query("Which city is the capital of France?", ["Paris.", "Rome."])])

What the service could not score comes back as null with its status. Requests that it had no time for, and single items
of them, are sent again until `timeout_s` have passed, after as long as the service asks for.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar

from rayrm.errors import ServiceError
from rayrm.retrying import read_retry_after

if TYPE_CHECKING:
    import pandas as pd

Prompt = str | Sequence[dict[str, str]]
"""A text, taken for one user turn, or messages with `role` and `content`."""
RETRY_CODES = (408, 429, 500, 502, 503, 504)
RETRY_STATUSES = ("overloaded", "timeout")
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 15.0
T = TypeVar("T")


class Query(NamedTuple):
    """A prompt and its completions."""

    prompt: Prompt
    completions: Sequence[str]
    lang: str | None = None
    """Language of the completions, `de`, or languages of a translation, `en-de`."""


class Reward(NamedTuple):
    """A completion's reward, or why it has none."""

    reward: float | None
    status: str
    """`ok` or `truncated` with a reward; `overlength`, `empty`, `error`, `nan`, `timeout`, `overloaded` without."""
    detail: str | None
    num_tokens: int
    calibrated: float | None = None
    """Standard deviations from the mean reward, for a model that is calibrated."""
    ratings: dict[str, float] | None = None
    """The reward's parts by name, for a model of several objectives."""


class Pair(NamedTuple):
    """Two completions of one prompt."""

    prompt: Prompt
    first: str
    second: str


class Comparison(NamedTuple):
    """Which of two completions is better."""

    better: str | None
    """`first`, `second`, `tie`, or null."""
    probability: float | None
    """That the first is the better one."""
    status: str
    """As that of a reward."""
    detail: str | None


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

        A request holds at most `batch_size` queries, and at most `max_in_flight` requests run at a time.
        """
        import httpx

        key = key or os.environ.get("RAYRM_API_KEY")
        headers = {"content-type": "application/json", **({"authorization": f"Bearer {key}"} if key else {})}
        limits = httpx.Limits(max_connections=max_in_flight, max_keepalive_connections=max_in_flight)
        self._http = httpx.AsyncClient(
            base_url=url.rstrip("/"), headers=headers, limits=limits, timeout=httpx.Timeout(timeout_s, pool=None)
        )
        self._model = model
        self._timeout_s = timeout_s
        self._batch_size = batch_size
        self._limit = asyncio.Semaphore(max_in_flight)

    async def rewards(self, queries: Sequence[Query], *, outputs: Sequence[str] = ()) -> list[list[Reward]]:
        """A reward for each completion of each query; `outputs` may ask for `calibrated` and `ratings`.

        Raises ServiceError when the service refuses the request, or cannot be reached in time.
        """

        async def ask(batch: Sequence[Query]) -> list[list[Reward]]:
            items = [{"prompt": _prompt(q.prompt), "completions": list(q.completions), "lang": q.lang} for q in batch]
            found = await self._post("/v1/rewards", {"items": items, "outputs": list(outputs)})
            return [[_reward(each) for each in item["completions"]] for item in found["items"]]

        return await self._all(queries, ask, lambda rewards: any(r.status in RETRY_STATUSES for r in rewards))

    async def compare(self, pairs: Sequence[Pair]) -> list[Comparison]:
        """Which completion of each pair is better. Raises ServiceError as `rewards` does."""

        async def ask(batch: Sequence[Pair]) -> list[Comparison]:
            asked = [{**pair._asdict(), "prompt": _prompt(pair.prompt)} for pair in batch]
            found = await self._post("/v1/rewards/pairs", {"pairs": asked})
            return [Comparison(p["better"], p["probability"], p["status"], p["detail"]) for p in found["pairs"]]

        return await self._all(pairs, ask, lambda comparison: comparison.status in RETRY_STATUSES)

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
        found: list[dict[str, Any]] = (await self._send("GET", "/v1/models", None, self._end()))["data"]
        return found

    async def close(self) -> None:
        """Give up all connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    def _end(self) -> float:
        return time.monotonic() + self._timeout_s

    async def _all(
        self,
        asked: Sequence[Any],
        ask: Callable[[Sequence[Any]], Awaitable[list[T]]],
        is_worth_a_retry: Callable[[T], bool],
    ) -> list[T]:
        """Answers to all that is asked, in batches; what there was no time for is asked again alone."""

        async def batch(part: Sequence[Any]) -> list[T]:
            async with self._limit:
                # The time that a batch waits for others is not its own.
                end, pause = self._end(), FIRST_PAUSE_S
                found = await ask(part)
            while again := [index for index, each in enumerate(found) if is_worth_a_retry(each)]:
                if time.monotonic() + pause > end:
                    break
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))
                pause = min(2 * pause, LONGEST_PAUSE_S)
                async with self._limit:
                    later = await ask([part[index] for index in again])
                for index, each in zip(again, later, strict=True):
                    found[index] = each
            return found

        parts = [asked[start : start + self._batch_size] for start in range(0, len(asked), self._batch_size)]
        return [each for found in await asyncio.gather(*map(batch, parts)) for each in found]

    async def _post(self, path: str, body: dict[str, Any]) -> Any:
        return await self._send("POST", path, {"model": self._model, **body}, self._end())

    async def _send(self, method: str, path: str, body: dict[str, Any] | None, end: float) -> Any:
        import httpx

        pause = FIRST_PAUSE_S
        while True:
            try:
                # With escapes, so that halves of characters cost their own item and not the request.
                content = None if body is None else json.dumps(body)
                reply = await self._http.request(method, path, content=content)
                if reply.status_code == 200:
                    return reply.json()
                told, wait_s = _message(reply), read_retry_after(reply.headers.get("retry-after"))
                if reply.status_code not in RETRY_CODES:
                    raise ServiceError(f"{self._http.base_url} refuses {path} ({reply.status_code}): {told}")
            except httpx.TransportError as error:
                told, wait_s = str(error) or repr(error), None
            wait_s = pause * random.uniform(0.5, 1.0) if wait_s is None else wait_s
            if time.monotonic() + wait_s > end:
                raise ServiceError(
                    f"{self._http.base_url} has not answered {path} within {self._timeout_s:g} s ({told}); see whether "
                    "it runs, or raise timeout_s."
                )
            await asyncio.sleep(wait_s)
            pause = min(2 * pause, LONGEST_PAUSE_S)


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


def _prompt(prompt: Prompt) -> Any:
    return prompt if isinstance(prompt, str) else list(prompt)


def _reward(found: dict[str, Any]) -> Reward:
    return Reward(*(found[name] for name in Reward._fields))


def _message(reply: Any) -> str:
    try:
        return str(reply.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return str(reply.text[:200] or reply.reason_phrase)
