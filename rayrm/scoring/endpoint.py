"""Language models behind OpenAI-compatible endpoints, ours and outside ones: bounded requests, tried again."""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from typing import Any, Literal

from pydantic import Field

from rayrm.config import NOT_IDENTITY, Config
from rayrm.errors import ConfigError
from rayrm.retrying import read_retry_after

RETRY_CODES = (408, 409, 425, 429, *range(500, 600))
BUSY_CODES = (408, 429, 503, 504, 529)
"""Those that fewer requests at once would help."""
REQUEST_CODES = (400, 413, 422)
"""Those that tell of a request and nothing of the endpoint."""
MAX_PAUSE_S = 15.0
"""Longest pause before asking again of an endpoint that does not say when."""
Fault = Literal["busy", "late", "broken", "request", "refused"]


class EndpointConfig(Config):
    """A language model behind an OpenAI-compatible endpoint."""

    url: str = Field(pattern=r"^https?://", json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Address of its API, up to and with `/v1`."""
    model: str
    """What the endpoint calls it."""
    key_variable: str | None = Field(None, json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Environment variable with the endpoint's key; null for an endpoint that wants none."""
    max_in_flight: int = Field(64, ge=1, json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Requests to the endpoint at the same time."""


class EndpointError(Exception):
    """An endpoint gave no answer."""

    def __init__(self, message: str, fault: Fault, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.fault = fault
        """busy: it has too much to do; late: it did not answer in time; broken: it cannot be reached, or says what makes
        no sense; request: it will not have this request; refused: it will have none, for want of a key or a route."""
        self.retry_after_s = retry_after_s
        """Seconds after which it wants to be asked again; null where it does not say."""

    @property
    def may_help(self) -> bool:
        """Whether asking again may help."""
        return self.fault in ("busy", "late", "broken")


class Endpoint:
    """A connection to one of them."""

    def __init__(self, config: EndpointConfig, name: str) -> None:
        """`name` is what messages call it. Raises ConfigError when the environment variable with its key is not set."""
        import httpx

        self.config = config
        self.name = name
        headers = {"content-type": "application/json"}
        self._key = read_key(config, name)
        if self._key is not None:
            headers["authorization"] = f"Bearer {self._key}"
        # No bound but our own: httpx's would make requests wait where their seconds run already.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=config.max_in_flight)
        self._http = httpx.AsyncClient(base_url=config.url.rstrip("/"), headers=headers, limits=limits)
        self._limit = asyncio.Semaphore(config.max_in_flight)

    async def ask(self, path: str, body: dict[str, Any], deadline_s: float) -> dict[str, Any]:
        """The endpoint's reply to a request about its model, within `deadline_s` seconds, asked again where it helps.

        Raises EndpointError, and ValueError for a body that no JSON can hold, such as one with NaN.
        """
        end, pause = time.monotonic() + deadline_s, 0.5
        last = EndpointError(f"'{self.name}' cannot be had now: it did not answer in time.", "late")
        while (left := end - time.monotonic()) > 0:
            try:
                async with asyncio.timeout(left), self._limit:
                    return await self.try_once(path, body, left)
            except TimeoutError:
                break
            except EndpointError as error:
                if not error.may_help:
                    raise
                last = error
            wait_s = pause_before(last, pause)
            if time.monotonic() + wait_s > end:
                break
            await asyncio.sleep(wait_s)
            pause = min(2 * pause, MAX_PAUSE_S)
        raise last

    async def try_once(self, path: str, body: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """The reply to one request, not bounded and not repeated. Raises as `ask` does."""
        import httpx

        content = json.dumps({**body, "model": self.config.model}, allow_nan=False)
        missing = f"'{self.name}' cannot be had now"
        try:
            async with asyncio.timeout(timeout_s):
                reply = await self._http.post(path, content=content, timeout=timeout_s)
        except (TimeoutError, httpx.TimeoutException):
            raise EndpointError(f"{missing}: it did not answer in time.", "late") from None
        except httpx.RequestError as error:
            raise EndpointError(f"{missing}: {str(error) or repr(error)}.", "broken") from None
        if reply.status_code == 200:
            try:
                return _read(reply.content)
            except (ValueError, RecursionError) as error:
                raise EndpointError(f"{missing}: {error}.", "broken") from None
        told = f"it answered {reply.status_code}: {self.without_key(reply.text)[:300]}"
        if reply.status_code in RETRY_CODES:
            fault: Fault = "busy" if reply.status_code in BUSY_CODES else "broken"
            raise EndpointError(f"{missing}: {told}.", fault, read_retry_after(reply.headers.get("retry-after")))
        fault = "request" if reply.status_code in REQUEST_CODES else "refused"
        raise EndpointError(f"'{self.name}' refuses: {told}", fault)

    async def close(self) -> None:
        """Give the connections back."""
        await self._http.aclose()

    def without_key(self, text: str) -> str:
        """A text without the endpoint's key, should it hold that."""
        return text if self._key is None else text.replace(self._key, "…")


def read_key(config: EndpointConfig, name: str) -> str | None:
    """The endpoint's key. Raises ConfigError when the environment variable that should hold it is not set."""
    if config.key_variable is None:
        return None
    key = os.environ.get(config.key_variable)
    if not key:
        raise ConfigError(
            f"'{name}' needs the key of its endpoint, and the environment variable "
            f"{config.key_variable} holds none; set it, or leave key_variable out."
        )
    return key


def pause_before(error: EndpointError, pause_s: float) -> float:
    """Seconds to wait before asking again: `pause_s` or down to half of it, by chance; more if the endpoint said so."""
    return max(error.retry_after_s or 0.0, pause_s * random.uniform(0.5, 1.0))


def _read(content: bytes) -> dict[str, Any]:
    found = json.loads(content)
    if not isinstance(found, dict):
        raise ValueError("it answered with JSON that is no object")
    return found
