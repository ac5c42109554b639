"""OpenRLHF's remote reward model: `POST /get_reward`."""

from __future__ import annotations

from typing import Any

from rayrm.serving.dialects.base import Asked, Dialect, ForeignBody, sigmoid
from rayrm.serving.questions import Question, Text


class GetReward(ForeignBody):
    """Rendered conversations; an empty list is what a client with more servers than queries sends."""

    query: list[str]


def questions(body: GetReward) -> list[Question]:
    """Each query is rendered already."""
    return [Text(text) for text in body.query]


def reply(body: GetReward, asked: Asked) -> dict[str, Any]:
    """`rewards` are raw; `scores`, which the client filters by, lie between 0 and 1: σ of the calibrated reward."""
    calibrated = [
        a.calibrated if a.calibrated is not None else r for a, r in zip(asked.answers, asked.rewards, strict=True)
    ]
    return {"rewards": asked.rewards, "scores": [sigmoid(value) for value in calibrated], "extra_logs": {}}


DIALECTS = [Dialect(("/get_reward",), GetReward, questions, reply)]
