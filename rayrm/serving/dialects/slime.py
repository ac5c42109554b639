"""slime's remote reward model: the JSON of the answer is the reward, or holds it under its `--reward-key`."""

from __future__ import annotations

from typing import Any

from rayrm.rows import Message
from rayrm.serving.dialects.base import Asked, Dialect, ForeignBody, ForeignTurn, user_turn
from rayrm.serving.questions import Completions, Question


class Sample(ForeignBody):
    """A prompt, as text or messages, and its response."""

    prompt: str | list[ForeignTurn]
    response: str


def questions(body: Sample) -> list[Question]:
    """One completion of one prompt."""
    if isinstance(body.prompt, str):
        return [Completions(user_turn(body.prompt), [body.response])]
    prompt: list[Message] = [{"role": turn.role, "content": turn.content} for turn in body.prompt]
    return [Completions(prompt, [body.response])]


def reply(body: Sample, asked: Asked) -> Any:
    """The raw reward, for `--reward-key score` or `reward`; with `?format=scalar`, the number itself."""
    (reward,) = asked.rewards
    return reward if asked.query.get("format") == "scalar" else {"score": reward, "reward": reward}


DIALECTS = [Dialect(("/rm/slime",), Sample, questions, reply)]
