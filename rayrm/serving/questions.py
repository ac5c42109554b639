"""What the gateway asks a model, and what the model answers: plain values that travel between processes."""

from __future__ import annotations

from typing import NamedTuple

from rayrm.rows import Message

RETRYABLE = ("overloaded", "timeout")
"""Statuses with which asking again may help."""


class Completions(NamedTuple):
    """Completions of one prompt, to be rendered with the model's template."""

    prompt: list[Message]
    completions: list[str]
    lang: str | None = None
    """Language whose calibration is wanted, `de` or `en-de`; null for that of all languages."""
    tools: str | None = None
    """Tool schemas, a JSON list, for the template to show."""

    @property
    def num_items(self) -> int:
        """Answers to it."""
        return len(self.completions)


class Text(NamedTuple):
    """A conversation that is already rendered; it gets a BOS if it lacks the one its model has."""

    text: str

    @property
    def num_items(self) -> int:
        """Answers to it."""
        return 1


class Ids(NamedTuple):
    """A conversation that is already tokenized, and is read as it is."""

    ids: list[int]

    @property
    def num_items(self) -> int:
        """Answers to it."""
        return 1


class Reference(NamedTuple):
    """Candidates to be compared with a reference."""

    reference: str
    candidates: list[str]
    lang: str | None = None
    """Language of them; counted in the metrics."""

    @property
    def num_items(self) -> int:
        """Answers to it."""
        return len(self.candidates)


Question = Completions | Text | Ids | Reference


class Answer(NamedTuple):
    """What a model made of one completion or conversation."""

    reward: float | None
    """The raw reward; null when it is not there."""
    status: str
    """`ok` or `truncated` with a reward; `overlength`, `empty`, `error`, `nan`, `timeout` or `overloaded` without."""
    detail: str | None = None
    """Why there is none."""
    calibrated: float | None = None
    """Standard deviations from the mean reward; null for a model that is not calibrated."""
    outputs: list[list[float]] | None = None
    """What the network gave at each token that is read, [reads][outputs]."""
    ratings: dict[str, float] | None = None
    """The reward's parts by name, for models of several objectives."""
    num_tokens: int = 0
    """Tokens of the whole conversation."""
    queue_s: float = 0.0
    """Seconds in the queue."""
    run_s: float = 0.0
    """Seconds of the batch's forward pass."""
    batch_tokens: int = 0
    """Tokens of that batch, padding left out."""
    padded_tokens: int = 0
    """Tokens of that batch, padding included."""
    retry_after_s: float = 0.0
    """Seconds after which asking again may help, where it was refused."""
    revision: str | None = None
    """What stands for the weights of the model that answered; null where none did."""


class Verdict(NamedTuple):
    """Which of two completions is better."""

    log_odds: float | None
    """log p(first) − log p(second); above 0 the first is better. Null when it is not there."""
    status: str
    """As that of an answer."""
    detail: str | None = None
    """Why there is none."""
    rewards: tuple[float, float] | None = None
    """The raw rewards of both; null for a model that compares them without rewarding either."""
    num_tokens: int = 0
    """Tokens of all conversations that were read for it."""
    retry_after_s: float = 0.0
    """Seconds after which asking again may help, where it was refused."""
    revision: str | None = None
    """As that of an answer."""
