"""Judges behind the gateway: verdicts, and the language models themselves, by any OpenAI-compatible endpoint."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field, ValidationError

from rayrm.scoring.endpoint import Endpoint, EndpointError
from rayrm.scoring.judge import (
    Judgement,
    Judging,
    Placing,
    Question,
    chat_request,
    combine,
    judge_messages,
    load_judge_template,
    placings,
    read_reply,
)
from rayrm.serving.bodies import Asking, Body, Prompt, turns
from rayrm.serving.config import JudgeModel
from rayrm.serving.service import RequestError, Service, by_name, find_by_name

RETRY_AFTER_S = 15.0
"""What a gateway can tell of an endpoint that gave no answer."""
ANY_OBJECT = {"requestBody": {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}}}
"""What OpenAPI tells of requests that go on to an endpoint as they are."""


class JudgementItem(Body):
    """A prompt and the answers that are judged."""

    prompt: Prompt
    answers: list[str] = Field(min_length=1, max_length=8)
    id: str = ""
    """Draws the placing of the answers; the same id has the same placing. Left out, prompt and answers draw it."""


class JudgementsBody(Asking):
    """Items to be judged; `model` names a judge."""

    items: list[JudgementItem]
    kind: Literal["pairwise", "four_way", "rating"] = "pairwise"
    """The better of two answers, the best of several, or a rating of each from 1 to 10."""
    method: Literal["text", "constrained", "labels"] = "text"
    """Reasons and a marked verdict; a verdict that the engine cannot miss; or the probabilities of the verdicts."""
    orders: Literal["one", "both"] = "one"
    """One placing of the answers, or that one and its reverse."""
    rule: Literal["strict", "reward_bench"] = "strict"
    """How a text is read."""
    source_language: str | None = Field(None, max_length=60)
    """English name of the prompts' language, for the judge to be told."""
    target_language: str | None = Field(None, max_length=60)
    """That of the answers."""


class Placed(BaseModel):
    """What the judge said to one placing, or of one answer that was to be rated."""

    order: list[int]
    """Numbers of the answers in the order in which they stood."""
    status: str
    """ok, parse_error (no verdict can be read), timeout or error (the endpoint gave none)."""
    detail: str | None
    verdict: int | None
    """Number of the best answer, or the rating."""
    probabilities: list[float] | None
    label_mass: float | None
    text: str | None
    """The judge's own words."""


class JudgedItem(BaseModel):
    """The verdict on an item."""

    winner: int | None
    """Number of the best answer; null for a tie, and where there is no verdict."""
    ratings: list[int | None] | None
    """Of each answer, where ratings were asked for."""
    is_consistent: bool | None
    probabilities: list[float] | None
    status: str
    judgements: list[Placed]


class JudgementsReply(BaseModel):
    """The items in their order."""

    id: str
    model: str
    items: list[JudgedItem]


class Judge(NamedTuple):
    """A judge and the way to it."""

    config: JudgeModel
    endpoint: Endpoint


class Judges:
    """All judges of a gateway, by name."""

    def __init__(self, configs: Sequence[JudgeModel]) -> None:
        """Raises ConfigError when the key of an endpoint is not set."""
        self.judges = [Judge(config, Endpoint(config, f"judge {config.name}")) for config in configs]
        self._by_name = by_name(self.judges)

    def knows(self, name: str) -> bool:
        """Whether there is a judge of that name."""
        return name in self._by_name

    def find(self, name: str | None) -> Judge:
        """The judge of a name or alias; the first one without. Raises RequestError 404, with the names there are."""
        return find_by_name(self._by_name, name, "judge")


def judge_routes(service: Service, judges: Judges) -> APIRouter:
    """The routes of judges."""
    router = APIRouter(tags=["judges"])

    @router.post("/v1/judgements")
    async def judgements(body: JudgementsBody, request: Request) -> JudgementsReply:
        """A verdict on every item, with the judge's own words. No verdict is null with its status."""
        judge = judges.find(body.model)
        judging = _judging(body)
        _check_items(body, service.config.gateway.max_items)
        template = load_judge_template(judging)
        deadline_s = service.deadline_s(body.deadline_s)
        items = await asyncio.gather(
            *(_judge(judge.endpoint, judging, template, body, item, deadline_s) for item in body.items)
        )
        for item in items:
            for placed in item.judgements:
                service.metrics.statuses.labels(judge.config.name, placed.status).inc()
        failed = [placed for item in items for placed in item.judgements]
        if failed and all(placed.status == "timeout" for placed in failed):
            raise RequestError(503, "OverloadedError", f"No item has a verdict: {failed[0].detail}", RETRY_AFTER_S)
        return JudgementsReply(id=request.state.request_id, model=judge.config.name, items=list(items))

    async def forward(path: str, request: Request) -> Response:
        try:
            body = await request.json()
        except (ValueError, RecursionError):
            raise RequestError(400, "BadRequestError", "The body is no JSON.") from None
        if not isinstance(body, dict):
            raise RequestError(400, "BadRequestError", "The body is no JSON object.")
        name = body.get("model")
        judge = judges.find(name if isinstance(name, str) else None)
        if body.get("stream"):
            raise RequestError(400, "BadRequestError", "Judges are not streamed; leave 'stream' out.")
        try:
            reply = await judge.endpoint.ask(path, body, service.deadline_s(None))
        except EndpointError as error:
            if error.may_help:
                raise RequestError(503, "OverloadedError", str(error), RETRY_AFTER_S) from None
            raise RequestError(422, "UnscoredError", str(error)) from None
        except ValueError as error:
            raise RequestError(400, "BadRequestError", f"The body cannot be sent on: {error}.") from None
        return Response(json.dumps({**reply, "model": judge.config.name}), media_type="application/json")

    @router.post("/v1/chat/completions", openapi_extra=ANY_OBJECT)
    async def chat_completions(request: Request) -> Response:
        """The judge's own chat, as OpenAI's clients ask for it."""
        return await forward("/chat/completions", request)

    @router.post("/v1/completions", openapi_extra=ANY_OBJECT)
    async def completions(request: Request) -> Response:
        """The judge's own completions."""
        return await forward("/completions", request)

    return router


def _judging(body: JudgementsBody) -> Judging:
    try:
        return Judging(kind=body.kind, method=body.method, orders=body.orders, rule=body.rule)
    except ValidationError as error:
        raise RequestError(400, "BadRequestError", str(error.errors()[0]["msg"])) from None


def _check_items(body: JudgementsBody, max_items: int) -> None:
    num = sum(len(item.answers) for item in body.items)
    if num > max_items:
        raise RequestError(413, "BadRequestError", f"The request has {num:,} answers, and the most are {max_items:,}.")
    for index, item in enumerate(body.items):
        if body.kind == "pairwise" and len(item.answers) != 2:
            raise RequestError(
                400,
                "BadRequestError",
                f"items.{index}.answers: a pair has 2 answers, and there are {len(item.answers)}.",
            )


async def _judge(
    judge: Endpoint, judging: Judging, template: str, body: JudgementsBody, item: JudgementItem, deadline_s: float
) -> JudgedItem:
    prompt, languages = turns(item.prompt), (body.source_language, body.target_language)
    if judging.kind == "rating":
        alone = Placing((0,))
        placed = await asyncio.gather(
            *(
                _ask(judge, judging, template, Question(prompt, [answer], *languages), alone, deadline_s)
                for answer in item.answers
            )
        )
        ratings = [each.verdict for each in placed]
        known = [rating for rating in ratings if rating is not None]
        best = [index for index, rating in enumerate(ratings) if known and rating == max(known)]
        whole = len(known) == len(ratings)
        return JudgedItem(
            winner=best[0] if whole and len(best) == 1 else None,
            ratings=ratings,
            is_consistent=None,
            probabilities=None,
            status="ok" if whole else next(each.status for each in placed if each.verdict is None),
            judgements=list(placed),
        )
    question = Question(prompt, item.answers, *languages)
    orders = placings(judging, len(item.answers), item.id or json.dumps([prompt, item.answers]))
    placed = await asyncio.gather(*(_ask(judge, judging, template, question, each, deadline_s) for each in orders))
    failed = next((each.status for each in placed if each.status not in ("ok", "parse_error")), None)
    if failed is not None:
        return JudgedItem(
            winner=None, ratings=None, is_consistent=None, probabilities=None, status=failed, judgements=list(placed)
        )
    combined = combine([_judgement(each) for each in placed])
    return JudgedItem(
        winner=combined.winner,
        ratings=None,
        is_consistent=combined.is_consistent,
        probabilities=None if combined.probabilities is None else list(combined.probabilities),
        status=combined.status,
        judgements=list(placed),
    )


async def _ask(
    judge: Endpoint, judging: Judging, template: str, question: Question, placing: Placing, deadline_s: float
) -> Placed:
    body = chat_request(judging, judge_messages(judging, template, question, placing), len(placing.order))
    try:
        found = read_reply(judging, await judge.ask("/chat/completions", body, deadline_s), placing)
    except EndpointError as error:
        return _unplaced(placing, "timeout" if error.may_help else "error", str(error))
    except ValueError as error:
        return _unplaced(placing, "error", str(error))
    return Placed(
        order=list(placing.order),
        status=found.status,
        detail=None if found.status == "ok" else "no verdict can be read from the judge's words",
        verdict=found.verdict,
        probabilities=None if found.probabilities is None else list(found.probabilities),
        label_mass=found.label_mass,
        text=found.text,
    )


def _unplaced(placing: Placing, status: str, detail: str) -> Placed:
    return Placed(
        order=list(placing.order),
        status=status,
        detail=detail,
        verdict=None,
        probabilities=None,
        label_mass=None,
        text=None,
    )


def _judgement(placed: Placed) -> Judgement:
    probabilities = None if placed.probabilities is None else tuple(placed.probabilities)
    status: Any = placed.status
    return Judgement(status, placed.verdict, probabilities, placed.label_mass, placed.text or "")
