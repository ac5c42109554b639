"""vLLM's pooling server: `/classify`, `/score`, `/pooling`."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import AliasChoices, Field, field_validator, model_validator

from rayrm.serving.dialects.base import (
    Asked,
    Dialect,
    ForeignBody,
    ForeignTurn,
    Inputs,
    as_conversation,
    as_questions,
    one_of,
    sigmoid,
    token_usage,
    user_turn,
)
from rayrm.serving.questions import Completions, Question

Texts = str | list[str]


class Activated(ForeignBody):
    """A body with vLLM's flag; older clients call it `activation`."""

    use_activation: bool | None = Field(None, validation_alias=AliasChoices("use_activation", "activation"))
    """Whether to give σ(reward); left out, vLLM gives it for models with one output."""

    def activated(self, reward: float) -> float:
        """The number that is told for a reward."""
        return reward if self.use_activation is False else sigmoid(reward)


class Classify(Activated):
    """Rendered texts, token ids, or one conversation."""

    model_config = one_of("input", "messages")

    input: Inputs | None = None
    messages: list[ForeignTurn] | None = None
    truncate_prompt_tokens: Any = None
    normalize: Any = None

    @field_validator("truncate_prompt_tokens")
    @classmethod
    def _is_not_cut(cls, given: Any) -> Any:
        if given is not None:
            raise ValueError("texts are not cut here, since half of one has another reward; send it shorter")
        return given

    @field_validator("normalize")
    @classmethod
    def _is_gone(cls, given: Any) -> Any:
        if given is not None:
            raise ValueError("this flag is gone, there as here; use use_activation")
        return given

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.input is None) == (self.messages is None):
            raise ValueError("give either 'input' or 'messages'")
        return self


class Pooling(Classify):
    """As classify; other tasks are none of a reward model."""

    task: Literal["classify"] = "classify"
    encoding_format: Literal["float"] = "float"


class Score(Activated):
    """Prompts and completions, under any of the four pairs of names that vLLM takes."""

    queries: Texts = Field(validation_alias=AliasChoices("queries", "data_1", "text_1"))
    documents: Texts = Field(validation_alias=AliasChoices("documents", "items", "data_2", "text_2"))


def classified(body: Classify) -> list[Question]:
    """Texts are rendered already; messages get the model's template."""
    if body.messages is not None:
        return [as_conversation(body.messages)]
    assert body.input is not None
    return as_questions(body.input)


def classify_reply(body: Classify, asked: Asked) -> dict[str, Any]:
    """One class, with the reward, or its σ, for a probability."""
    data = [
        {"index": index, "label": "LABEL_0", "probs": [body.activated(reward)], "num_classes": 1}
        for index, reward in enumerate(asked.rewards)
    ]
    return _listed("classify", asked, data)


def pooling_reply(body: Pooling, asked: Asked) -> dict[str, Any]:
    """The reward, or its σ, as the only number of a vector."""
    data = [
        {"index": index, "object": "pooling", "data": [body.activated(reward)]}
        for index, reward in enumerate(asked.rewards)
    ]
    return _listed("pool", asked, data)


def scored(body: Score) -> list[Question]:
    """A prompt and a completion each; one prompt goes with all completions."""
    queries, documents = ([texts] if isinstance(texts, str) else texts for texts in (body.queries, body.documents))
    if len(queries) == 1:
        return [Completions(user_turn(queries[0]), documents)]
    if len(queries) != len(documents):
        raise ValueError(f"There are {len(queries)} queries and {len(documents)} documents; give one query or as many.")
    return [Completions(user_turn(query), [text]) for query, text in zip(queries, documents, strict=True)]


def score_reply(body: Score, asked: Asked) -> dict[str, Any]:
    """A score a pair."""
    data = [
        {"index": index, "object": "score", "score": body.activated(reward)}
        for index, reward in enumerate(asked.rewards)
    ]
    return _listed("score", asked, data)


def _listed(kind: str, asked: Asked, data: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": f"{kind}-{asked.id}",
        "object": "list",
        "created": asked.created,
        "model": asked.model,
        "data": data,
        "usage": token_usage(asked),
    }


DIALECTS = [
    Dialect(("/classify",), Classify, classified, classify_reply),
    Dialect(("/pooling",), Pooling, classified, pooling_reply),
    Dialect(("/score", "/v1/score"), Score, scored, score_reply),
]
