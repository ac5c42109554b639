"""Our own HTTP API: rewards, pairs and best of n, with a status for each item instead of a made-up number."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request

from rayrm.serving.bodies import (
    BestOfNBody,
    BestOfNReply,
    BleurtBody,
    BleurtReply,
    ComparedPair,
    PairsBody,
    PairsReply,
    Ranked,
    Rewarded,
    RewardedItem,
    RewardsBody,
    RewardsReply,
    Scored,
    Unranked,
    turns,
    usage,
)
from rayrm.serving.questions import RETRYABLE, Answer, Completions, Reference, Verdict
from rayrm.serving.service import RequestError, Service, refuse


def native_routes(service: Service) -> APIRouter:
    """The routes of this API."""
    router = APIRouter(tags=["rayrm"])

    @router.post("/v1/rewards")
    async def rewards(body: RewardsBody, request: Request) -> RewardsReply:
        """Reward every completion of every item. A request none of whose items can be had in time is a 503."""
        questions = [
            Completions(
                turns(item.prompt), item.completions, item.lang, None if item.tools is None else json.dumps(item.tools)
            )
            for item in body.items
        ]
        found = await service.answer(body.model, questions, body.deadline_s)
        model = service.find(body.model)
        flat = [answer for answers in found for answer in answers]
        _refuse_if_all_may_be_had_later(flat)
        wants_ids = "tokens" in body.outputs
        ids = [
            await model.backend.tokenize(question)
            if wants_ids and question.completions
            else [None] * len(question.completions)
            for question in questions
        ]
        items = [
            RewardedItem(
                lang=question.lang,
                completions=[_rewarded(a, row, body.outputs) for a, row in zip(answers, rows, strict=True)],
            )
            for question, answers, rows in zip(questions, found, ids, strict=True)
        ]
        return RewardsReply(
            id=_id(request), model=model.config.name, revision=_revision(flat), items=items, usage=usage(flat)
        )

    @router.post("/v1/rewards/pairs")
    async def pairs(body: PairsBody, request: Request) -> PairsReply:
        """Which completion of each pair is better, and with what probability."""
        questions = [Completions(turns(pair.prompt), [pair.first, pair.second]) for pair in body.pairs]
        found = await service.compare(body.model, questions, body.deadline_s)
        _refuse_if_all_may_be_had_later(found)
        name = service.find(body.model).config.name
        compared = [_compared(v) for v in found]
        return PairsReply(id=_id(request), model=name, revision=_revision(found), pairs=compared, usage=usage(found))

    @router.post("/v1/best_of_n")
    async def best_of_n(body: BestOfNBody, request: Request) -> BestOfNReply:
        """The completions with the highest rewards."""
        question = Completions(turns(body.prompt), body.completions, body.lang)
        (answers,) = await service.answer(body.model, [question], body.deadline_s)
        _refuse_if_all_may_be_had_later(answers)
        ranked = [
            Ranked(index=index, completion=body.completions[index], reward=answer.reward)
            for index, answer in enumerate(answers)
            if answer.reward is not None
        ]
        ranked.sort(key=lambda each: -each.reward)
        unscored = [
            Unranked(index=index, status=answer.status, detail=answer.detail)
            for index, answer in enumerate(answers)
            if answer.reward is None
        ]
        name = service.find(body.model).config.name
        return BestOfNReply(
            id=_id(request),
            model=name,
            revision=_revision(answers),
            best=ranked[: body.n],
            unscored=unscored,
            usage=usage(answers),
        )

    @router.post("/v1/bleurt")
    async def bleurt(body: BleurtBody, request: Request) -> BleurtReply:
        """How like its reference each candidate is."""
        name = body.model
        if name is None and service.config.bleurt:
            name = service.config.bleurt[0].name
        questions = [Reference(item.reference, item.candidates, item.lang) for item in body.items]
        found = await service.answer(name, questions, body.deadline_s)
        flat = [answer for answers in found for answer in answers]
        _refuse_if_all_may_be_had_later(flat)
        items = [
            [Scored(score=a.reward, status=a.status, detail=a.detail, num_tokens=a.num_tokens) for a in answers]
            for answers in found
        ]
        model = service.find(name).config.name
        return BleurtReply(id=_id(request), model=model, revision=_revision(flat), items=items, usage=usage(flat))

    return router


def _id(request: Request) -> str:
    found: str = request.state.request_id
    return found


def _refuse_if_all_may_be_had_later(answers: Sequence[Answer | Verdict]) -> None:
    if answers and all(answer.status in RETRYABLE for answer in answers):
        refuse(answers[0], "Every item")


def _revision(answers: Sequence[Answer | Verdict]) -> str | None:
    """What gave all answers. Raises RequestError 503 where replicas of two revisions did, of which one is on its way."""
    found = sorted({answer.revision for answer in answers if answer.revision is not None})
    if len(found) > 1:
        told = f"The model is being replaced, and revisions {' and '.join(found)} answered; ask again."
        raise RequestError(503, "OverloadedError", told, 1.0)
    return found[0] if found else None


def _rewarded(answer: Answer, ids: list[int] | None, outputs: Sequence[str]) -> Rewarded:
    return Rewarded(
        reward=answer.reward,
        status=answer.status,
        detail=answer.detail,
        num_tokens=answer.num_tokens,
        raw=answer.outputs if "raw" in outputs else None,
        calibrated=answer.calibrated if "calibrated" in outputs else None,
        ratings=answer.ratings if "ratings" in outputs else None,
        tokens=ids,
    )


def _compared(verdict: Verdict) -> ComparedPair:
    gap = verdict.log_odds
    probability = None if gap is None else (1 + math.tanh(gap / 2)) / 2
    better: Any = None if gap is None else "first" if gap > 0 else "second" if gap < 0 else "tie"
    return ComparedPair(
        better=better,
        probability=probability,
        rewards=None if verdict.rewards is None else list(verdict.rewards),
        status=verdict.status,
        detail=verdict.detail,
        num_tokens=verdict.num_tokens,
    )
