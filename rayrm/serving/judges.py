"""Judges behind the gateway: verdicts, and the language models themselves, by any OpenAI-compatible endpoint."""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections.abc import Sequence
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field, ValidationError

from rayrm.errors import ConfigError
from rayrm.rows import Message
from rayrm.scoring.judge import (
    Judgement,
    Judging,
    Placing,
    Question,
    combine,
    judge_messages,
    labels,
    load_judge_template,
    placings,
    read_labels,
    read_text,
)
from rayrm.serving.config import JudgeModel
from rayrm.serving.native import Asking, Body, Prompt, turns
from rayrm.serving.service import MAX_RETRY_AFTER_S, RequestError, Service

RETRY_CODES = (408, 429, 500, 502, 503, 504)
MAX_TOKENS = 2048
TOP_LOGPROBS = 20
VERDICT = "verdict"
ANY_OBJECT = {"requestBody": {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}}}
"""What OpenAPI tells of requests that go on to an endpoint as they are."""


class Endpoint:
    """A judge's endpoint: bounded requests, tried again as long as there is time."""

    def __init__(self, config: JudgeModel) -> None:
        """Raises ConfigError when the environment variable with its key is not set."""
        import httpx

        self.config = config
        headers = {}
        if config.key_variable is not None:
            key = os.environ.get(config.key_variable)
            if not key:
                raise ConfigError(
                    f"The judge '{config.name}' needs the key of its endpoint, and the environment variable "
                    f"{config.key_variable} holds none; set it, or leave key_variable out."
                )
            headers["authorization"] = f"Bearer {key}"
        self._http = httpx.AsyncClient(base_url=config.url.rstrip("/"), headers=headers)
        self._limit = asyncio.Semaphore(config.max_in_flight)

    async def ask(self, path: str, body: dict[str, Any], deadline_s: float) -> dict[str, Any]:
        """The endpoint's reply to a request about this judge's model.

        Raises RequestError: 503 when there was none in time, and 422 when the endpoint refuses the request.
        """
        import httpx

        end, pause = time.monotonic() + deadline_s, 0.5
        told = "it did not answer in time"
        while (left := end - time.monotonic()) > 0:
            wait_s = pause * random.uniform(0.5, 1.0)
            try:
                async with asyncio.timeout(left), self._limit:
                    reply = await self._http.post(path, json={**body, "model": self.config.model}, timeout=left)
                if reply.status_code == 200:
                    found: dict[str, Any] = reply.json()
                    return found
                told = f"it answered {reply.status_code}: {reply.text[:300]}"
                if reply.status_code not in RETRY_CODES:
                    raise RequestError(422, "UnscoredError", f"The judge '{self.config.name}' refuses: {told}")
                wait_s = _retry_after(reply.headers.get("retry-after"), wait_s)
            except TimeoutError:
                break
            except (httpx.TransportError, json.JSONDecodeError) as error:
                told = str(error) or repr(error)
            if time.monotonic() + wait_s > end:
                break
            await asyncio.sleep(wait_s)
            pause = min(2 * pause, 15.0)
        raise RequestError(
            503, "OverloadedError", f"The judge '{self.config.name}' cannot be had now: {told}.", MAX_RETRY_AFTER_S / 4
        )


def _retry_after(given: str | None, otherwise: float) -> float:
    try:
        return max(0.0, float(given or ""))
    except ValueError:
        return otherwise


class JudgementItem(Body):
    """A prompt and the answers that are judged."""

    prompt: Prompt
    answers: list[str] = Field(min_length=1, max_length=8)
    id: str = ""
    """Draws the placing of the answers; the same id has the same placing."""


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


class Judges:
    """All judges of a gateway, by name."""

    def __init__(self, configs: Sequence[JudgeModel]) -> None:
        self.endpoints = [Endpoint(config) for config in configs]
        self._by_name = {name: each for each in self.endpoints for name in (each.config.name, *each.config.aliases)}

    def knows(self, name: str) -> bool:
        """Whether there is a judge of that name."""
        return name in self._by_name

    def find(self, name: str | None) -> Endpoint:
        """The judge of a name; the first one without. Raises RequestError 404, with the names there are."""
        if name is None and self.endpoints:
            return self.endpoints[0]
        if name is None or name not in self._by_name:
            known = ", ".join(sorted(self._by_name)) or "none"
            raise RequestError(404, "NotFoundError", f"There is no judge '{name}'; there are {known}.")
        return self._by_name[name]


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
        items = await asyncio.gather(*(_judge(judge, judging, template, body, item, deadline_s) for item in body.items))
        for item in items:
            for placed in item.judgements:
                service.metrics.statuses.labels(judge.config.name, placed.status).inc()
        failed = [placed for item in items for placed in item.judgements]
        if failed and all(placed.status == "timeout" for placed in failed):
            raise RequestError(503, "OverloadedError", f"No item has a verdict: {failed[0].detail}", 15.0)
        return JudgementsReply(id=request.state.request_id, model=judge.config.name, items=list(items))

    async def forward(path: str, request: Request) -> Response:
        try:
            body = await request.json()
        except ValueError:
            raise RequestError(400, "BadRequestError", "The body is no JSON.") from None
        if not isinstance(body, dict):
            raise RequestError(400, "BadRequestError", "The body is no JSON object.")
        name = body.get("model")
        judge = judges.find(name if isinstance(name, str) else None)
        if body.get("stream"):
            raise RequestError(400, "BadRequestError", "Judges are not streamed; leave 'stream' out.")
        reply = await judge.ask(path, body, service.deadline_s(None))
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
    orders = placings(judging, len(item.answers), item.id)
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
    body = _request(judging, judge_messages(judging, template, question, placing), len(placing.order))
    try:
        reply = await judge.ask("/chat/completions", body, deadline_s)
        choice = reply["choices"][0]
        text = choice["message"]["content"] or ""
        found = _read(judging, choice, text, placing)
    except RequestError as error:
        status = "timeout" if error.retry_after_s is not None else "error"
        return _unplaced(placing, status, str(error))
    except (KeyError, IndexError, TypeError) as error:
        return _unplaced(placing, "error", f"the endpoint's reply is no chat completion ({error!r})")
    return Placed(
        order=list(placing.order),
        status=found.status,
        detail=None if found.status == "ok" else "no verdict can be read from the judge's words",
        verdict=found.verdict,
        probabilities=None if found.probabilities is None else list(found.probabilities),
        label_mass=found.label_mass,
        text=text,
    )


def _request(judging: Judging, messages: Sequence[Message], num_answers: int) -> dict[str, Any]:
    body: dict[str, Any] = {"messages": list(messages), "temperature": 0.0, "max_tokens": MAX_TOKENS}
    if judging.method == "labels":
        return body | {"max_tokens": 1, "logprobs": True, "top_logprobs": TOP_LOGPROBS}
    if judging.method == "constrained":
        allowed = labels(judging, num_answers)
        schema = {
            "type": "object",
            "properties": {VERDICT: {"type": "string", "enum": allowed}},
            "required": [VERDICT],
            "additionalProperties": False,
        }
        wanted = {"type": "json_schema", "json_schema": {"name": VERDICT, "strict": True, "schema": schema}}
        return body | {"response_format": wanted, "max_tokens": 64}
    return body


def _read(judging: Judging, choice: dict[str, Any], text: str, placing: Placing) -> Judgement:
    if judging.method == "labels":
        (first, *_) = choice["logprobs"]["content"]
        told = first["top_logprobs"] or [first]
        return read_labels(judging, {each["token"]: each["logprob"] for each in told}, text, placing)
    if judging.method == "constrained":
        try:
            verdict = str(json.loads(text)[VERDICT])
        except (ValueError, KeyError, TypeError):
            verdict = ""
        return read_text(judging, verdict, placing)._replace(text=text)
    return read_text(judging, text, placing)


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
