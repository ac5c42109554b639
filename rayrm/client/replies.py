"""What a reply of the service must be: a finite number or a null with its reason for each item that was asked about."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rayrm.errors import ServiceError

SCORED = ("ok", "truncated")
"""Statuses of what has a reward."""
SHOWN = 60
"""Most characters of a reply that an error repeats."""


class Reply(BaseModel):
    """Of all: what is not known here may be there too."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="ignore")


class Told(Reply):
    """A number or why there is none."""

    status: str
    detail: str | None

    def number(self) -> float | None:
        """The number itself."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if (self.number() is not None) != (self.status in SCORED):
            raise ValueError(f"the status is '{self.status}', and the number {self.number()}")
        return self


class Rewarded(Told):
    """A reward."""

    reward: float | None
    num_tokens: int
    calibrated: float | None = None
    ratings: dict[str, float] | None = None

    def number(self) -> float | None:
        """The reward."""
        return self.reward


class Likened(Told):
    """A score against a reference."""

    score: float | None
    num_tokens: int

    def number(self) -> float | None:
        """The score."""
        return self.score


class Compared(Told):
    """A comparison."""

    better: Literal["first", "second", "tie"] | None
    probability: Annotated[float, Field(ge=0, le=1)] | None

    def number(self) -> float | None:
        """The probability."""
        return self.probability


class Answered(Reply):
    """Of all routes that ask a model."""

    model: str
    revision: str | None = None


class RewardedItem(Reply):
    """All completions of a query."""

    completions: list[Rewarded]


class RewardsReply(Answered):
    """Of /v1/rewards."""

    items: list[RewardedItem]


class PairsReply(Answered):
    """Of /v1/rewards/pairs."""

    pairs: list[Compared]


class BleurtReply(Answered):
    """Of /v1/bleurt."""

    items: list[list[Likened]]


class Calibrated(Reply):
    """What a calibration is told to be."""

    languages: dict[str, Any]


class Model(Reply):
    """A model that the service tells of."""

    id: str
    aliases: list[str] = []
    revision: str | None = None
    readout: str | None = None
    calibration: Calibrated | None = None


class ModelsReply(Reply):
    """Of /v1/models."""

    data: list[Model]


ReplyT = TypeVar("ReplyT", bound=Reply)


def read_reply(kind: type[ReplyT], found: Any, where: str) -> ReplyT:
    """A reply as what it must be; `where` names address and path. Raises ServiceError."""
    try:
        return kind.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "it"
        shown = "" if first["type"] in ("missing", "value_error") else f", not {shorten(repr(first['input']))}"
        raise no_reply(where, f"{place}: {first['msg']}{shown}") from None


def no_reply(where: str, what: str) -> ServiceError:
    """The error of a reply that is none; `what` says why."""
    return ServiceError(
        f"{where} was answered with what is no reply of a rayrm service ({what}); see what runs there, and whether "
        "something stands before it that answers in its place."
    )


def shorten(text: str, longest: int = SHOWN) -> str:
    """The beginning of a text, on one line."""
    text = " ".join(text.split())
    return text if len(text) <= longest else f"{text[:longest]}…"
