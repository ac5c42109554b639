"""Language models behind OpenAI-compatible endpoints, ours and outside ones: bounded requests, tried again."""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from typing import Any

from pydantic import Field

from rayrm.config import Config
from rayrm.errors import ConfigError
from rayrm.retrying import read_retry_after

RETRY_CODES = (408, 429, 500, 502, 503, 504)


class EndpointConfig(Config):
    """A language model behind an OpenAI-compatible endpoint."""

    url: str = Field(pattern=r"^https?://")
    """Address of its API, up to and with `/v1`."""
    model: str
    """What the endpoint calls it."""
    key_variable: str | None = None
    """Environment variable with the endpoint's key; null for an endpoint that wants none."""
    max_in_flight: int = Field(64, ge=1)
    """Requests to the endpoint at the same time."""


class EndpointError(Exception):
    """An endpoint gave no answer."""

    def __init__(self, message: str, may_help: bool) -> None:
        super().__init__(message)
        self.may_help = may_help
        """Whether asking again may help."""


class Endpoint:
    """A connection to one of them."""

    def __init__(self, config: EndpointConfig, name: str) -> None:
        """`name` is what messages call it. Raises ConfigError when the environment variable with its key is not set."""
        import httpx

        self.config = config
        self.name = name
        headers = {"content-type": "application/json"}
        if config.key_variable is not None:
            key = os.environ.get(config.key_variable)
            if not key:
                raise ConfigError(
                    f"'{name}' needs the key of its endpoint, and the environment variable "
                    f"{config.key_variable} holds none; set it, or leave key_variable out."
                )
            headers["authorization"] = f"Bearer {key}"
        self._http = httpx.AsyncClient(base_url=config.url.rstrip("/"), headers=headers)
        self._limit = asyncio.Semaphore(config.max_in_flight)

    async def ask(self, path: str, body: dict[str, Any], deadline_s: float) -> dict[str, Any]:
        """The endpoint's reply to a request about its model, within `deadline_s` seconds.

        Raises EndpointError, and ValueError for a body that no JSON can hold, such as one with NaN.
        """
        import httpx

        content = json.dumps({**body, "model": self.config.model}, allow_nan=False)
        end, pause = time.monotonic() + deadline_s, 0.5
        told = "it did not answer in time"
        while (left := end - time.monotonic()) > 0:
            wait_s = pause * random.uniform(0.5, 1.0)
            try:
                async with asyncio.timeout(left), self._limit:
                    reply = await self._http.post(path, content=content, timeout=left)
                if reply.status_code == 200:
                    return _read(reply.content)
                told = f"it answered {reply.status_code}: {reply.text[:300]}"
                if reply.status_code not in RETRY_CODES:
                    raise EndpointError(f"'{self.name}' refuses: {told}", False)
                told_s = read_retry_after(reply.headers.get("retry-after"))
                wait_s = wait_s if told_s is None else told_s
            except TimeoutError:
                break
            except (httpx.RequestError, ValueError) as error:
                told = str(error) or repr(error)
            if time.monotonic() + wait_s > end:
                break
            await asyncio.sleep(wait_s)
            pause = min(2 * pause, 15.0)
        raise EndpointError(f"'{self.name}' cannot be had now: {told}.", True)


def _read(content: bytes) -> dict[str, Any]:
    found = json.loads(content)
    if not isinstance(found, dict):
        raise ValueError("it answered with JSON that is no object")
    return found
