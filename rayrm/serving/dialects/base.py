"""What a dialect is: a body type, a way in, and a way out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict

from rayrm.rows import Message
from rayrm.serving.questions import Answer, Completions, Ids, Question, Text

Inputs = str | list[str] | list[int] | list[list[int]]
"""Rendered texts or token ids, one or several."""


class ForeignBody(BaseModel):
    """Of a request of others: what we do not know (user, priority, rid …) is taken and left alone, as they do."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, protected_namespaces=())

    model: str | None = None


def one_of(*names: str) -> ConfigDict:
    """For OpenAPI: one of these fields is there."""
    return ConfigDict(json_schema_extra={"oneOf": [{"required": [name]} for name in names]})


class ForeignTurn(BaseModel):
    """A message of a conversation."""

    model_config = ConfigDict(extra="ignore")

    role: str
    content: str


class Asked(NamedTuple):
    """What a way out has to go by."""

    id: str
    model: str
    """Name of the model that answered."""
    answers: list[Answer]
    """All answers, in the order that was asked; those of a question with several follow one another."""
    rewards: list[float]
    """Their rewards; a request with an answer that has none never comes this far."""
    created: int
    """Seconds since 1970."""
    query: Mapping[str, str]
    """What stood behind the `?` of the address."""


class Dialect(NamedTuple):
    """How the clients of one program ask for rewards."""

    paths: tuple[str, ...]
    body: type[BaseModel]
    questions: Callable[[Any], Sequence[Question]]
    """The way in. A ValueError is an answer of 400 with its words."""
    reply: Callable[[Any, Asked], Any]
    """The way out, as JSON."""
    keys: frozenset[str] = frozenset()
    """A body with one of these keys is of this dialect, where several share a path; empty for all others."""
    names_model: bool = True
    """Whether `model` is a name of ours; without, the first model answers."""
    methods: tuple[str, ...] = ("POST",)
    """Methods of HTTP that its clients use."""


def as_questions(given: Inputs) -> list[Question]:
    """A question for each text or row of ids."""
    if isinstance(given, str):
        return [Text(given)]
    if given and all(isinstance(each, int) for each in given):
        return [Ids([int(each) for each in given])]  # type: ignore[arg-type]
    return [Text(each) if isinstance(each, str) else Ids(list(each)) for each in given]  # type: ignore[arg-type]


def as_conversation(messages: Sequence[ForeignTurn]) -> Completions:
    """A conversation whose last turn is the completion. Raises ValueError when that is not the assistant's."""
    if not messages or messages[-1].role != "assistant":
        raise ValueError("The last of 'messages' must be the assistant's, for that is what is rewarded.")
    prompt: list[Message] = [{"role": turn.role, "content": turn.content} for turn in messages[:-1]]
    return Completions(prompt, [messages[-1].content])


def user_turn(text: str) -> list[Message]:
    """A text as one turn of the user."""
    return [{"role": "user", "content": text}]


def sigmoid(value: float) -> float:
    """1 / (1 + exp(−value)), without overflow."""
    return (1 + math.tanh(value / 2)) / 2


def token_usage(asked: Asked) -> dict[str, Any]:
    """Tokens that were read, as vLLM and OpenAI tell them."""
    total = sum(answer.num_tokens for answer in asked.answers)
    return {"prompt_tokens": total, "total_tokens": total, "completion_tokens": 0, "prompt_tokens_details": None}
