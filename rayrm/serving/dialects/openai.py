"""OpenAI's `/v1/embeddings`, as verl asks SGLang for rewards: the last number of the embedding is the reward."""

from __future__ import annotations

import base64
import struct
from typing import Any, Literal

from rayrm.serving.dialects.base import Asked, Dialect, ForeignBody, Inputs, as_questions
from rayrm.serving.questions import Question


class Embeddings(ForeignBody):
    """Rendered texts or token ids."""

    input: Inputs
    encoding_format: Literal["float", "base64"] = "float"


def questions(body: Embeddings) -> list[Question]:
    """What is to be read is rendered already."""
    return as_questions(body.input)


def reply(body: Embeddings, asked: Asked) -> dict[str, Any]:
    """The raw reward as the only number of each embedding."""
    data = [
        {"object": "embedding", "embedding": _encoded(reward, body.encoding_format), "index": index}
        for index, reward in enumerate(asked.rewards)
    ]
    total = sum(answer.num_tokens for answer in asked.answers)
    usage = {"prompt_tokens": total, "total_tokens": total}
    return {"object": "list", "data": data, "model": asked.model, "usage": usage}


def _encoded(reward: float, encoding_format: str) -> Any:
    return [reward] if encoding_format == "float" else base64.b64encode(struct.pack("<f", reward)).decode()


DIALECTS = [Dialect(("/v1/embeddings",), Embeddings, questions, reply)]
