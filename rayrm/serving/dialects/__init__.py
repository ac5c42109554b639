"""The dialects that others' trainers and clients speak, and the routes on which they are understood."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Union

from fastapi import APIRouter, Request
from pydantic import Discriminator, Tag

from rayrm.serving.dialects import llama_factory, openai, openrlhf, rerank, sglang, slime, vllm
from rayrm.serving.dialects.base import Asked, Dialect
from rayrm.serving.service import RequestError, Service, require_rewards

DIALECTS = [
    dialect for module in (openrlhf, vllm, sglang, openai, llama_factory, slime, rerank) for dialect in module.DIALECTS
]
"""All dialects."""


def dialect_routes(service: Service) -> APIRouter:
    """A route for each path; where several dialects share one, the keys of the body tell them apart."""
    router = APIRouter(tags=["dialects"])
    paths: dict[str, list[Dialect]] = defaultdict(list)
    for dialect in DIALECTS:
        for path in dialect.paths:
            paths[path].append(dialect)
    for path, dialects in paths.items():
        methods = sorted({method for dialect in dialects for method in dialect.methods})
        endpoint = _endpoint(service, dialects)
        for method in methods:
            # Each alone, since OpenAPI wants a name for each.
            router.add_api_route(path, endpoint, methods=[method], response_model=None, name=f"{method} {path}")
    return router


def _endpoint(service: Service, dialects: Sequence[Dialect]) -> Callable[..., Any]:
    by_body = {dialect.body: dialect for dialect in dialects}

    async def ask(body: Any, request: Request) -> Any:
        dialect = by_body[type(body)]
        name = body.model if dialect.names_model else None
        try:
            questions = dialect.questions(body)
        except ValueError as error:
            raise RequestError(400, "BadRequestError", str(error)) from None
        found = await service.answer(name, questions)
        answers = [answer for each in found for answer in each]
        model = service.find(name).config.name
        rewards, now = require_rewards(answers), int(time.time())
        asked = Asked(request.state.request_id, model, answers, rewards, now, request.query_params)
        return dialect.reply(body, asked)

    ask.__doc__ = " ".join(dialect.reply.__doc__ or "" for dialect in dialects)
    ask.__annotations__ = {"body": _body_type(dialects), "request": Request}
    return ask


def _body_type(dialects: Sequence[Dialect]) -> Any:
    if len(dialects) == 1:
        return dialects[0].body

    def find(body: Any) -> str:
        keys = body.keys() if isinstance(body, dict) else set()
        return next((d.body.__module__ for d in dialects if d.keys & keys), other)

    other = next(dialect.body.__module__ for dialect in dialects if not dialect.keys)
    tagged = tuple(Annotated[dialect.body, Tag(dialect.body.__module__)] for dialect in dialects)
    return Annotated[Union[tagged], Discriminator(find)]  # noqa: UP007 - made of a tuple.
