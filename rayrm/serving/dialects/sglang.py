"""SGLang's reward models: `/classify` with `text` or `input_ids`."""

from __future__ import annotations

from typing import Any, Self

from pydantic import model_validator

from rayrm.serving.dialects.base import Asked, Dialect, ForeignBody, as_questions, one_of
from rayrm.serving.questions import Question


class Classify(ForeignBody):
    """Rendered texts or token ids, one or several."""

    model_config = one_of("text", "input_ids")

    text: str | list[str] | None = None
    input_ids: list[int] | list[list[int]] | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.text is None) == (self.input_ids is None):
            raise ValueError("give either 'text' or 'input_ids'")
        return self

    @property
    def is_single(self) -> bool:
        """Whether one object is wanted instead of a list."""
        ids = self.input_ids
        return isinstance(self.text, str) or (bool(ids) and isinstance((ids or [0])[0], int))


def questions(body: Classify) -> list[Question]:
    """What is to be read is rendered already."""
    return as_questions(body.text if body.text is not None else body.input_ids or [])


def reply(body: Classify, asked: Asked) -> Any:
    """The raw reward as the only number of an embedding."""
    found = [
        {
            "embedding": [reward],
            "meta_info": {
                "id": asked.id,
                "finish_reason": {"type": "length", "length": 0},
                "prompt_tokens": answer.num_tokens,
                "e2e_latency": answer.queue_s + answer.run_s,
            },
        }
        for answer, reward in zip(asked.answers, asked.rewards, strict=True)
    ]
    return found[0] if body.is_single else found


DIALECTS = [
    Dialect(("/classify",), Classify, questions, reply, frozenset({"text", "input_ids"}), methods=("POST", "PUT"))
]
