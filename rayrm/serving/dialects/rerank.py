"""The rerank API of Cohere and Jina: the completions of a prompt, best first."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from rayrm.serving.dialects.base import Asked, Dialect, ForeignBody, sigmoid, user_turn
from rayrm.serving.questions import Completions, Question


class Document(BaseModel):
    """A completion."""

    text: str


class Rerank(ForeignBody):
    """A prompt and its completions."""

    query: str
    documents: list[str | Document]
    top_n: int | None = Field(None, ge=0)
    """How many of the best; all of them for 0 or null."""
    return_documents: bool = False

    @property
    def texts(self) -> list[str]:
        """The completions."""
        return [each if isinstance(each, str) else each.text for each in self.documents]


def questions(body: Rerank) -> list[Question]:
    """All completions of the prompt."""
    return [Completions(user_turn(body.query), body.texts)]


def reply(body: Rerank, asked: Asked) -> dict[str, Any]:
    """Best first, each with σ(reward), which lies between 0 and 1 as those clients expect."""
    order = sorted(range(len(asked.rewards)), key=lambda index: -asked.rewards[index])
    results = []
    for index in order[: body.top_n or None]:
        result: dict[str, Any] = {"index": index, "relevance_score": sigmoid(asked.rewards[index])}
        results.append(result | ({"document": {"text": body.texts[index]}} if body.return_documents else {}))
    total = sum(answer.num_tokens for answer in asked.answers)
    usage = {"prompt_tokens": total, "total_tokens": total}
    return {"id": f"rerank-{asked.id}", "model": asked.model, "results": results, "usage": usage}


DIALECTS = [Dialect(("/rerank", "/v1/rerank", "/v2/rerank"), Rerank, questions, reply)]
