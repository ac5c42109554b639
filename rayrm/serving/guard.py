"""What stands before every request: its id, its key, its size, its time, and a line in the log."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import os
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from rayrm.errors import ConfigError
from rayrm.serving.config import Gateway
from rayrm.serving.metrics import Metrics
from rayrm.serving.service import RequestError
from rayrm.serving.tracing import end_span, find_tracer, start_span

log = logging.getLogger("rayrm.requests")
KEYS = "RAYRM_API_KEYS"
"""Environment variable with the keys, `name=key` and a comma between two."""
OPEN = ("/health", "/ready", "/")
"""Paths that need no key. The page holds nothing; what it asks for needs one."""
BODY_TIMEOUT_S = 30.0
"""Seconds for a client to send its body."""

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


def read_keys(gateway: Gateway, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Names of the keys by key, empty where none is wanted.

    Raises ConfigError when keys are wanted and there are none, or when a quota names none of them.
    """
    if gateway.auth == "none":
        return {}
    keys: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in environment.get(KEYS, "").split(","))):
        name, _, key = part.rpartition("=")
        keys[key] = name or "default"
    if not keys:
        raise ConfigError(
            f"gateway.auth is 'keys', and the environment variable {KEYS} holds none; set it to name=key, with a comma "
            "between two, or set gateway.auth to 'none' where nobody else can reach the server."
        )
    if unknown := sorted(gateway.quotas.keys() - keys.values()):
        raise ConfigError(f"gateway.quotas names {', '.join(unknown)}, and {KEYS} has no key of that name.")
    return keys


class Guard:
    """ASGI middleware. Refused requests are answered here and never reach the application."""

    def __init__(self, app: Any, gateway: Gateway, keys: Mapping[str, str], metrics: Metrics) -> None:
        self.app = app
        self.gateway = gateway
        self.metrics = metrics
        self._keys = [(key.encode(), name) for key, name in keys.items()]
        self._tracer = find_tracer()
        # Each copy of the gateway has its share.
        self._quotas = {name: max(1, quota // gateway.num_replicas) for name, quota in gateway.quotas.items()}
        self._recent: dict[str, deque[float]] = {name: deque() for name in gateway.quotas}
        self._in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        request_id = headers.get(b"x-request-id", b"").decode("latin-1")[:128] or uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        span = start_span(self._tracer, headers, request_id)
        began, code = time.monotonic(), 500
        who = "-"

        async def answer(message: MutableMapping[str, Any]) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode("latin-1"))]
            await send(message)

        self._in_flight += 1
        self.metrics.in_flight.set(self._in_flight)
        scope["state"]["in_flight"] = lambda: self._in_flight
        try:
            who = self._admit(scope, headers)
            await self.app(scope, self._bounded(receive), answer)
        except RequestError as error:
            await _refuse(error, answer)
        finally:
            self._in_flight -= 1
            self.metrics.in_flight.set(self._in_flight)
            path = getattr(scope.get("route"), "path", "other")
            seconds = time.monotonic() - began
            self.metrics.requests.labels(path, str(code)).inc()
            self.metrics.request_s.labels(path).observe(seconds)
            line = {"id": request_id, "key": who, "path": path, "code": code, "ms": round(1000 * seconds, 1)}
            log.info(json.dumps(line))
            end_span(span, path, code, {"key": who})

    def _admit(self, scope: Scope, headers: Mapping[bytes, bytes]) -> str:
        """Name of the key that a request has. A key in the path is taken out of it."""
        given = b""
        kind, _, token = headers.get(b"authorization", b"").partition(b" ")
        if kind.lower() == b"bearer":
            given = token.strip()
        parts = scope["path"].split("/", 3)
        if len(parts) > 2 and parts[1] == "key":
            given = parts[2].encode()
            scope["path"] = "/" + (parts[3] if len(parts) > 3 else "")
            scope["raw_path"] = scope["path"].encode()
        if not self._keys or scope["path"] in OPEN or scope["method"] == "OPTIONS":
            return "-"
        # All keys are compared, so that the time tells nothing.
        names = [name for key, name in self._keys if hmac.compare_digest(key, given)]
        if not names:
            raise RequestError(
                401, "AuthenticationError", "The request has no valid key; send 'Authorization: Bearer <key>'."
            )
        self._count(names[0])
        return names[0]

    def _count(self, name: str) -> None:
        recent, now = self._recent.get(name), time.monotonic()
        if recent is None:
            return
        while recent and recent[0] <= now - 60:
            recent.popleft()
        if len(recent) >= self._quotas[name]:
            raise RequestError(
                429,
                "RateLimitError",
                f"The key '{name}' has used up its {self.gateway.quotas[name]:,} requests a minute.",
                recent[0] + 60 - now,
            )
        recent.append(now)

    def _bounded(self, receive: Receive) -> Receive:
        size, whole, end = 0, False, time.monotonic() + BODY_TIMEOUT_S

        async def bounded() -> MutableMapping[str, Any]:
            nonlocal size, whole
            if whole:
                # What follows the body is the client's leaving, for which there is all the time.
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), end - time.monotonic())
            except TimeoutError:
                raise RequestError(
                    408, "BadRequestError", f"The body did not come within {BODY_TIMEOUT_S:g} s."
                ) from None
            if message["type"] == "http.request":
                size += len(message.get("body", b""))
                whole = not message.get("more_body", False)
                if size > self.gateway.max_body_bytes:
                    raise RequestError(
                        413,
                        "BadRequestError",
                        f"The body has more than {self.gateway.max_body_bytes:,} bytes; send it in parts.",
                    )
            return message

        return bounded


def envelope(error: RequestError) -> tuple[dict[str, Any], dict[str, str]]:
    """Body and headers of an error, as OpenAI's and vLLM's clients read it."""
    # What is repeated of a request may hold halves of surrogate pairs, which no reply can.
    message = str(error).encode(errors="replace").decode()
    body = {"error": {"message": message, "type": error.kind, "param": None, "code": error.code}}
    headers = {} if error.retry_after_s is None else {"retry-after": str(max(1, round(error.retry_after_s)))}
    if error.code == 401:
        headers["www-authenticate"] = "Bearer"
    return body, headers


async def _refuse(error: RequestError, send: Send) -> None:
    body, headers = envelope(error)
    content = json.dumps(body).encode()
    listed = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    listed += [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.code, "headers": listed})
    await send({"type": "http.response.body", "body": content})
