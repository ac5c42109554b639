"""The HTTP application: our own API, the dialects, and what operators ask for."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from importlib import metadata, resources
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import model_validator
from starlette.exceptions import HTTPException

from rayrm.rows import Message
from rayrm.serving.dialects import dialect_routes
from rayrm.serving.dialects.base import ForeignBody, ForeignTurn, as_conversation, one_of
from rayrm.serving.guard import Guard, envelope
from rayrm.serving.judges import Judge, Judges, judge_routes
from rayrm.serving.native import native_routes
from rayrm.serving.questions import Completions, Question, Text
from rayrm.serving.service import RequestError, Service

KINDS = {400: "BadRequestError", 404: "NotFoundError", 405: "MethodNotAllowedError"}


class Tokenize(ForeignBody):
    """A rendered text, or a conversation."""

    model_config = one_of("prompt", "messages")

    prompt: str | None = None
    messages: list[ForeignTurn] | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Tokenize:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either 'prompt' or 'messages'")
        return self

    def question(self) -> Question:
        """What is read; messages whose last is not the assistant's are a prompt without a completion."""
        if self.prompt is not None:
            return Text(self.prompt)
        if self.messages and self.messages[-1].role == "assistant":
            return as_conversation(self.messages)
        turns: list[Message] = [{"role": turn.role, "content": turn.content} for turn in self.messages or []]
        return Completions(turns, [])


def make_app(service: Service, keys: Mapping[str, str]) -> Any:
    """The ASGI application for a service, behind its guard."""
    version = metadata.version("rayrm")
    app = FastAPI(
        title="rayrm",
        version=version,
        description="Rewards for completions, in every dialect.",
        docs_url=None,
        redoc_url=None,
    )
    app.include_router(native_routes(service))
    app.include_router(dialect_routes(service))
    judges = Judges(service.config.judges)
    app.include_router(judge_routes(service, judges))
    _add_operations(app, service, judges, version)
    app.add_exception_handler(RequestError, _on_refusal)
    app.add_exception_handler(UnicodeEncodeError, _on_half_characters)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)
    return Guard(app, service.config.gateway, keys, service.metrics)


def _add_operations(app: FastAPI, service: Service, judges: Judges, version: str) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse((resources.files("rayrm.serving") / "page.html").read_text(encoding="utf-8"))

    @app.get("/health", tags=["operations"])
    async def health() -> Response:
        """Whether the server runs; it asks no model."""
        return Response()

    @app.get("/ready", tags=["operations"])
    async def ready() -> Response:
        """Whether every model that runs all the time answers: 200, or 503."""
        return Response(status_code=200 if await service.is_ready() else 503)

    @app.get("/load", tags=["operations"])
    async def load(request: Request) -> dict[str, int]:
        """Requests in work, this one left out."""
        return {"server_load": request.state.in_flight() - 1}

    @app.get("/version", tags=["operations"])
    async def get_version() -> dict[str, str]:
        """Version of rayrm."""
        return {"version": version}

    @app.get("/metrics", tags=["operations"])
    async def metrics() -> Response:
        """What this gateway has counted, for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models", tags=["operations"])
    async def models() -> dict[str, Any]:
        """All models and judges; those that do not run now tell their name alone."""
        found = await asyncio.gather(*(_describe(service, each.config.name) for each in service.models))
        return {"object": "list", "data": [*found, *map(_describe_judge, judges.judges)]}

    @app.get("/v1/models/{name:path}", tags=["operations"])
    async def model(name: str) -> dict[str, Any]:
        """A model by its name or alias."""
        if judges.knows(name):
            return _describe_judge(judges.find(name))
        return await _describe(service, service.find(name).config.name)

    @app.post("/tokenize", tags=["operations"])
    async def tokenize(body: Tokenize) -> dict[str, Any]:
        """The token ids that the model reads, with its template and its BOS."""
        model = service.find(body.model)
        (ids,) = await model.backend.tokenize(body.question())
        if body.messages is not None and not ids:
            raise RequestError(422, "UnscoredError", "The model cannot read these messages, or there is no text.")
        facts = await model.backend.facts()
        return {"count": len(ids), "max_model_len": facts["max_length"], "tokens": ids, "token_strs": None}


async def _describe(service: Service, name: str) -> dict[str, Any]:
    model = service.find(name)
    # Of what kind it is hangs on no replica.
    facts: dict[str, Any] = {"readout": "bleurt"} if model.config in service.config.bleurt else {}
    if model.config.is_always_on:
        facts = await model.backend.facts()
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "rayrm",
        "root": name,
        "parent": None,
        "permission": [],
        "aliases": list(model.config.aliases),
        "max_model_len": facts.get("max_length"),
        "revision": facts.get("revision"),
        "verified": facts.get("verified"),
        "readout": facts.get("readout"),
        "calibration": facts.get("calibration"),
    }


def _describe_judge(judge: Judge) -> dict[str, Any]:
    return {
        "id": judge.config.name,
        "object": "model",
        "created": 0,
        "owned_by": "rayrm",
        "root": judge.config.model,
        "parent": None,
        "permission": [],
        "aliases": list(judge.config.aliases),
        "readout": "judge",
    }


async def _on_refusal(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestError)
    body, headers = envelope(error)
    return JSONResponse(body, error.code, headers)


async def _on_half_characters(request: Request, error: Exception) -> JSONResponse:
    """A reply that repeats what was asked, such as the name of a model that is not there."""
    message = "The request holds half of a surrogate pair, which is no character."
    return await _on_refusal(request, RequestError(400, KINDS[400], message))


async def _on_invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    message = f"{where}: {first['msg']}." if where else f"{first['msg']}."
    return await _on_refusal(request, RequestError(400, KINDS[400], message.replace("..", ".")))


async def _on_http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, RequestError):
        # Raised while FastAPI read the body, which it takes for a body that is none.
        return await _on_refusal(request, error.__cause__)
    kind = KINDS.get(error.status_code, "BadRequestError")
    return await _on_refusal(request, RequestError(error.status_code, kind, f"{error.detail}: {request.url.path}."))
