"""What the service is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

Prompt = str | Sequence[dict[str, str]]
"""A text, taken for one user turn, or messages with `role` and `content`."""


class Query(NamedTuple):
    """A prompt and its completions."""

    prompt: Prompt
    completions: Sequence[str]
    lang: str | None = None
    """Language of the completions, `de`, or languages of a translation, `en-de`."""
    tools: Sequence[dict[str, Any]] | None = None
    """Tool schemas for the chat template to show."""


class Reward(NamedTuple):
    """A completion's reward, or why it has none."""

    reward: float | None
    status: str
    """`ok` or `truncated` with a reward; `overlength`, `empty`, `error`, `nan`, `timeout`, `overloaded` without."""
    detail: str | None
    num_tokens: int
    calibrated: float | None = None
    """Standard deviations from the mean reward, for a model that is calibrated."""
    ratings: dict[str, float] | None = None
    """The reward's parts by name, for a model of several objectives."""


class Pair(NamedTuple):
    """Two completions of one prompt."""

    prompt: Prompt
    first: str
    second: str


class Comparison(NamedTuple):
    """Which of two completions is better."""

    better: str | None
    """`first`, `second`, `tie`, or null."""
    probability: float | None
    """That the first is the better one."""
    status: str
    """As that of a reward."""
    detail: str | None


class Reference(NamedTuple):
    """A text, and candidates to be compared with it."""

    reference: str
    candidates: Sequence[str]
    lang: str | None = None
    """Language of all of them."""
