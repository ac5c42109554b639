"""Requests that are sent again until one is answered, or their time is over."""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from typing import Any

from rayrm.client.replies import no_reply, shorten
from rayrm.errors import ServiceError
from rayrm.retrying import read_retry_after

RETRY_CODES = (408, 429, 500, 502, 503, 504)
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 15.0
CONNECT_S = 10.0
"""Seconds in which a connection must be there, before another one is tried."""

SERVERS_SHARE = 0.9
"""Share of the time that is left in which the service is to answer: what it has until then is better than nothing."""


class RefusedError(ServiceError):
    """A request that the service does not take, and would not take later either."""

    def __init__(self, message: str, code: int, told: str) -> None:
        # All of them, so that it can be pickled.
        super().__init__(message, code, told)
        self.code = code
        """Status code of HTTP."""
        self.told = told
        """What the service says."""

    def __str__(self) -> str:
        return str(self.args[0])


class LateError(ServiceError):
    """A request that was not answered in time."""


class Sender:
    """Connections to one address. Raises ServiceError for what is none."""

    def __init__(self, url: str, key: str | None, timeout_s: float, max_in_flight: int) -> None:
        import httpx

        key = key or os.environ.get("RAYRM_API_KEY")
        headers = {"content-type": "application/json", **({"authorization": f"Bearer {key}"} if key else {})}
        limits = httpx.Limits(max_connections=max_in_flight, max_keepalive_connections=max_in_flight)
        self.url = url.rstrip("/")
        self.timeout_s = timeout_s
        # All else is bounded by the deadline of what is sent.
        timeout = httpx.Timeout(None, connect=min(CONNECT_S, timeout_s))
        try:
            self._http = httpx.AsyncClient(base_url=self.url, headers=headers, limits=limits, timeout=timeout)
        except httpx.InvalidURL as error:
            raise ServiceError(f"'{url}' is no address of a service: {error}.") from None

    def end(self) -> float:
        """When what begins now must be done."""
        return time.monotonic() + self.timeout_s

    def where(self, path: str) -> str:
        """What errors call a path."""
        return f"'{path}' at '{self.url}'"

    async def send(self, method: str, path: str, body: dict[str, Any] | None, end: float) -> Any:
        """The JSON of the answer, sent for again until `end` while there is none.

        Raises RefusedError, LateError, and ServiceError for an answer that is no JSON and an address that is none.
        """
        import httpx

        pause, told = FIRST_PAUSE_S, ""
        while (left := end - time.monotonic()) > 0:
            wanted_s = None
            # With escapes, so that halves of characters cost their own item and not the request.
            content = None if body is None else json.dumps({**body, "deadline_s": SERVERS_SHARE * left})
            try:
                async with asyncio.timeout(left):
                    reply = await self._http.request(method, path, content=content)
                if reply.status_code == 200:
                    return _read_json(reply, self.where(path))
                told, wanted_s = _message(reply), read_retry_after(reply.headers.get("retry-after"))
                if reply.status_code not in RETRY_CODES:
                    refused = f"{self.url} refuses {path} ({reply.status_code}): {told}"
                    raise RefusedError(refused, reply.status_code, told)
            except TimeoutError:
                break
            except (httpx.UnsupportedProtocol, httpx.LocalProtocolError, httpx.DecodingError) as error:
                raise ServiceError(f"{path} cannot be asked for at '{self.url}': {error}.") from None
            except httpx.TransportError as error:
                told = str(error) or repr(error)
            left = end - time.monotonic()
            wait_s = self._wait_s(wanted_s, pause, left)
            if wait_s > left:
                break
            await asyncio.sleep(wait_s)
            pause = min(2 * pause, LONGEST_PAUSE_S)
        raise LateError(
            f"{self.url} has not answered {path} within {self.timeout_s:g} s ({told or 'it was still at work'}); see whether it runs, or raise "
            "timeout_s."
        )

    @staticmethod
    def _wait_s(wanted_s: float | None, pause: float, left: float) -> float:
        """Seconds until it is sent again: as the service asks, or so that the last try is shortly before the end."""
        own_s = pause * random.uniform(0.5, 1.0)
        if wanted_s is not None:
            return max(wanted_s, min(own_s, FIRST_PAUSE_S))
        return max(min(own_s, left / 2), FIRST_PAUSE_S / 2)

    async def close(self) -> None:
        """Give up all connections."""
        await self._http.aclose()


def _read_json(reply: Any, where: str) -> Any:
    try:
        return reply.json()
    except (ValueError, RecursionError):
        kind = reply.headers.get("content-type", "no type")
        raise no_reply(where, f"no JSON but {kind}, {shorten(reply.text)!r}") from None


def _message(reply: Any) -> str:
    try:
        return str(reply.json()["error"]["message"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return shorten(reply.text, 200) or str(reply.reason_phrase)
