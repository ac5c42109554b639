"""What our own HTTP API takes and gives, as OpenAPI tells it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from rayrm.rows import Message
from rayrm.serving.questions import Answer, Verdict

PROMPT = "Which city is the capital of France?"


class Body(BaseModel):
    """Of all requests of ours: keys that nobody knows are refused, so that a misspelled one is found."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class Turn(Body):
    """A message of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str


Prompt = Annotated[str | list[Turn], Field(description="A text, taken for one user turn, or messages.")]


class RewardItem(Body):
    """A prompt and its completions."""

    prompt: Prompt
    completions: list[str]
    """Texts of the assistant."""
    lang: str | None = Field(None, max_length=35)
    """Language of the completions, `de`, or languages of a translation, `en-de`; counted in the metrics, and used for
    calibrated rewards."""
    tools: list[dict[str, Any]] | None = None
    """Tool schemas for the chat template to show."""


class Asking(Body):
    """What every request may say."""

    model: str | None = None
    """A name or an alias of /v1/models; null for the first one."""
    deadline_s: float | None = Field(None, gt=0)
    """Seconds after which the answer is of no use; the server's own deadline is the longest."""


class RewardsBody(Asking):
    """Items to be rewarded."""

    items: list[RewardItem]
    outputs: list[Literal["raw", "calibrated", "ratings", "tokens"]] = []
    """What to tell beside the reward: the network's raw outputs, standard deviations from the mean reward, the parts of
    the reward by name, and the token ids that were read."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"items": [{"prompt": PROMPT, "completions": ["Paris.", "Rome."]}]}]}
    )


class Rewarded(BaseModel):
    """A completion's reward, or why it has none."""

    reward: float | None
    status: str
    """ok, truncated, overlength, empty, error, nan, timeout or overloaded."""
    detail: str | None
    num_tokens: int
    raw: list[list[float]] | None = None
    calibrated: float | None = None
    ratings: dict[str, float] | None = None
    tokens: list[int] | None = None


class RewardedItem(BaseModel):
    """All completions of an item, in their order."""

    lang: str | None
    completions: list[Rewarded]


class Usage(BaseModel):
    """Tokens of all that was read."""

    prompt_tokens: int
    total_tokens: int


class RewardsReply(BaseModel):
    """The items in their order."""

    id: str
    model: str
    revision: str | None
    """What stands for the weights of the model that gave all of it; null where no model was there in time."""
    items: list[RewardedItem]
    usage: Usage


class PairItem(Body):
    """Two completions of one prompt."""

    prompt: Prompt
    first: str
    second: str


class PairsBody(Asking):
    """Pairs to be compared."""

    pairs: list[PairItem]

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"pairs": [{"prompt": PROMPT, "first": "Paris.", "second": "Rome."}]}]}
    )


class ComparedPair(BaseModel):
    """Which of the two is better."""

    better: Literal["first", "second", "tie"] | None
    probability: float | None
    """That the first is the better one."""
    rewards: list[float] | None
    """Of both, by a model that rewards single completions."""
    status: str
    detail: str | None
    num_tokens: int


class PairsReply(BaseModel):
    """The pairs in their order."""

    id: str
    model: str
    revision: str | None
    """As that of /v1/rewards."""
    pairs: list[ComparedPair]
    usage: Usage


class BestOfNBody(Asking):
    """A prompt whose best completions are wanted."""

    prompt: Prompt
    completions: list[str]
    n: int = Field(1, ge=1)
    """How many of the best."""
    lang: str | None = Field(None, max_length=35)
    """As that of /v1/rewards."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"prompt": PROMPT, "completions": ["Paris.", "Rome.", "I do not know."]}]}
    )


class Ranked(BaseModel):
    """A completion among the best."""

    index: int
    completion: str
    reward: float


class Unranked(BaseModel):
    """A completion without a reward."""

    index: int
    status: str
    detail: str | None


class BestOfNReply(BaseModel):
    """The best, best first; of equal rewards the one that came first."""

    id: str
    model: str
    revision: str | None
    """As that of /v1/rewards."""
    best: list[Ranked]
    unscored: list[Unranked]
    usage: Usage


class ReferenceItem(Body):
    """Candidates and the reference that they are compared with."""

    reference: str
    candidates: list[str]
    lang: str | None = Field(None, max_length=35)
    """Language of both; counted in the metrics."""


class BleurtBody(Asking):
    """Items to be scored; null for `model` is the first BLEURT model."""

    items: list[ReferenceItem]

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"items": [{"reference": "The cat sat.", "candidates": ["A cat sat."]}]}]}
    )


class Scored(BaseModel):
    """A candidate's score, or why it has none."""

    score: float | None
    status: str
    """ok, truncated, empty, error (no reference), nan, timeout or overloaded."""
    detail: str | None
    num_tokens: int


class BleurtReply(BaseModel):
    """For each item, the scores of its candidates."""

    id: str
    model: str
    revision: str | None
    """As that of /v1/rewards."""
    items: list[list[Scored]]
    usage: Usage


def turns(prompt: str | Sequence[Turn]) -> list[Message]:
    """A prompt as messages."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return [{"role": turn.role, "content": turn.content} for turn in prompt]


def usage(answers: Sequence[Answer | Verdict]) -> Usage:
    """Tokens of all answers."""
    total = sum(answer.num_tokens for answer in answers)
    return Usage(prompt_tokens=total, total_tokens=total)
