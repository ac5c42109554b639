"""LLaMA-Factory's reward server, as its PPO asks it: `POST /v1/score/evaluation`."""

from __future__ import annotations

from typing import Any

from rayrm.serving.dialects.base import Asked, Dialect, ForeignBody
from rayrm.serving.questions import Question, Text


class ScoreEvaluation(ForeignBody):
    """Conversations as text with their special tokens. The client's `model` is the word "model"."""

    messages: list[str]


def questions(body: ScoreEvaluation) -> list[Question]:
    """Each message is a whole conversation, rendered already."""
    return [Text(text) for text in body.messages]


def reply(body: ScoreEvaluation, asked: Asked) -> dict[str, Any]:
    """Raw rewards."""
    return {
        "id": f"scoreval-{asked.id}",
        "object": "score.evaluation",
        "model": body.model or asked.model,
        "scores": asked.rewards,
    }


DIALECTS = [Dialect(("/v1/score/evaluation",), ScoreEvaluation, questions, reply, names_model=False)]
