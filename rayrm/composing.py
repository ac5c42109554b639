"""Compose the scores of a text into its reward, each part of it at its place in the text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, Self

from pydantic import Field, model_validator

from rayrm import files
from rayrm.config import Config
from rayrm.errors import ConfigError
from rayrm.placing import Point
from rayrm.runs import INPUT
from rayrm.sentences import split_sentences

Shaping = Literal["none", "sigmoid", "centred_sigmoid"]
UnitKind = Literal["text", "sentences", "spans"]
Key = tuple[str, UnitKind]
"""What is asked for: the name of a scorer, and of what it scores."""


class Part(Config):
    """One scorer's part in the reward: weight · shaping((score − mean) / std)."""

    scorer: str = Field(min_length=1)
    """Name of the scorer."""
    weight: float = 1.0
    """Factor of the shaped score; below 0 where a high score is bad."""
    mean: float = 0.0
    """Score that is taken for 0."""
    std: float = Field(1.0, gt=0)
    """Difference of scores that is taken for 1."""
    calibration: str | None = Field(None, json_schema_extra=INPUT)  # type: ignore[arg-type]
    """Output folder of calibrate_scores, whose mean and std of this scorer stand in the place of the two above."""
    shaping: Shaping = "none"
    """sigmoid: σ(x), between 0 and 1, so that every unit adds something and a long text of bad ones beats a short good
    one; centred_sigmoid: σ(x) − 0.5, between −0.5 and 0.5 and 0 at the mean."""
    unit: UnitKind = "text"
    """What has a score: the text; each of its sentences, at whose end the reward stands; each span that the scorer
    marks, likewise, where a text without marks has 0."""
    aggregate: Literal["sum", "mean"] = "sum"
    """Of the contributions of several units; with mean, a long text earns no more than a short one."""

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.calibration is not None and (self.mean, self.std) != (0.0, 1.0):
            raise ValueError(f"mean and std of '{self.scorer}' are set beside calibration, which holds both")
        if self.calibration is not None and self.unit != "text":
            raise ValueError(f"a calibration holds no scores of {self.unit}; set mean and std of '{self.scorer}'")
        if self.unit == "spans" and (self.shaping == "sigmoid" or self.aggregate == "mean"):
            raise ValueError(
                f"with shaping sigmoid or aggregate mean a text without a span of '{self.scorer}' is worth as much as one "
                "with bad ones, or less; take centred_sigmoid or none, and the sum"
            )
        if self.aggregate == "mean" and self.unit == "text":
            raise ValueError(f"aggregate of '{self.scorer}' is 'mean', and a text is one unit; leave it out")
        return self

    @property
    def key(self) -> Key:
        """What is asked for."""
        return self.scorer, self.unit

    @property
    def name(self) -> str:
        """What stands for it in logs: `grammar` of the whole text, else `grammar.spans`."""
        return self.scorer if self.unit == "text" else f"{self.scorer}.{self.unit}"

    @property
    def has_unit(self) -> bool:
        """Whether its mean and standard deviation were said, in numbers or by a calibration."""
        return self.calibration is not None or {"mean", "std"} <= self.model_fields_set

    def normalise(self, score: float) -> float:
        """The score in standard deviations from the mean."""
        return (score - self.mean) / self.std

    def value(self, score: float) -> float:
        """What one unit contributes, before it is divided by their number."""
        return self.weight * shape(self.normalise(score), self.shaping)


class Composition(Config):
    """How scores make one reward (arXiv 2403.06754): h is the contribution of `holistic`, a the sum of the aspects'.

    hierarchical lets the aspects in only where the holistic score, normalised and not shaped, is at least `threshold`.
    """

    type: Literal["holistic_only", "aspect_only", "weighted_sum", "hierarchical"] = "holistic_only"
    """The reward: h; a; a + h; h below the threshold and else a + h."""
    holistic: Part | None = None
    """What judges the text as a whole; its reward stands on the last token."""
    aspects: list[Part] = Field([])
    """What judges a side of it."""
    threshold: float | None = None
    """With hierarchical, the holistic score from which on aspects count, in standard deviations from the mean, which
    `holistic` must say, by its calibration or by mean and std."""

    @model_validator(mode="after")
    def _fits_type(self) -> Self:
        wanted = {
            "holistic": self.type != "aspect_only",
            "aspects": self.type != "holistic_only",
            "threshold": self.type == "hierarchical",
        }
        given = {
            "holistic": self.holistic is not None,
            "aspects": bool(self.aspects),
            "threshold": self.threshold is not None,
        }
        if lacking := [name for name in wanted if wanted[name] and not given[name]]:
            raise ValueError(f"type {self.type} needs {' and '.join(lacking)}")
        if unused := [name for name in wanted if given[name] and not wanted[name]]:
            raise ValueError(f"type {self.type} does not use {' and '.join(unused)}; leave it out, or set another type")
        if self.holistic is not None and self.holistic.unit != "text":
            raise ValueError(f"the unit of holistic is '{self.holistic.unit}', and it judges the whole text")
        # A gate may be all that the holistic score is for.
        if idle := [
            p.name for p in self.parts if p.weight == 0 and (p is not self.holistic or not wanted["threshold"])
        ]:
            raise ValueError(f"the weight of {', '.join(idle)} is 0, and it would be computed for nothing; remove it")
        if wanted["threshold"] and self.holistic is not None and not self.holistic.has_unit:
            raise ValueError(
                "the threshold is in standard deviations, and holistic has none; set its calibration, or both mean and std "
                "(0 and 1 for a score that is normalised already)"
            )
        names = [part.name for part in self.parts]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{', '.join(twice)} is in more than one part")
        return self

    @property
    def parts(self) -> list[Part]:
        """All parts, the holistic one first."""
        return [*([] if self.holistic is None else [self.holistic]), *self.aspects]


class Unit(NamedTuple):
    """A piece of a text and its score."""

    start: int
    end: int
    """Characters of the text."""
    score: float | None
    status: str = "ok"
    """Why there is no score, where there is none."""


class Composed(NamedTuple):
    """The reward of a text."""

    points: list[Point]
    """Its parts, each at its place."""
    total: float
    """Their sum."""
    parts: dict[str, float | None]
    """What each part contributes, by its name. That of an aspect behind a closed gate is told and not counted, and null
    where it has no score."""
    is_open: bool | None
    """Whether the aspects count; null where there is no gate."""


class Unscored(NamedTuple):
    """Why a text has no reward."""

    part: str
    """The first part without a score, by its name."""
    status: str


def compose(text: str, found: Mapping[Key, Sequence[Unit] | None], composition: Composition) -> Composed | Unscored:
    """The reward of a text, or the first score that it lacks.

    `found` holds for each part of `composition` its units: one for the text, those of `asked_units`, or the spans that
    were marked, none of them for a contribution of 0. Null stands for units that nobody could find. A score that is not
    finite is `nan`. An aspect that has no score does no harm behind a closed gate. Raises ValueError for a composition
    whose constants `with_constants` has not read.
    """
    points: dict[str, list[Point] | Unscored] = {p.name: _contribute(text, found[p.key], p) for p in composition.parts}
    counted = composition.parts
    is_open = None
    if composition.type == "hierarchical":
        assert composition.holistic is not None and composition.threshold is not None
        whole = points[composition.holistic.name]
        if isinstance(whole, Unscored):
            return whole
        (score,) = (unit.score for unit in found[composition.holistic.key] or ())
        assert score is not None
        is_open = not composition.holistic.normalise(score) < composition.threshold
        counted = composition.parts if is_open else [composition.holistic]
    placed: list[Point] = []
    for part in counted:
        own = points[part.name]
        if isinstance(own, Unscored):
            return own
        placed += own
    parts = {name: None if isinstance(own, Unscored) else _sum(own) for name, own in points.items()}
    return Composed(placed, _sum(placed), parts, is_open)


def _contribute(text: str, units: Sequence[Unit] | None, part: Part) -> list[Point] | Unscored:
    if part.calibration is not None:
        raise ValueError(f"The constants of '{part.name}' stand in '{part.calibration}'; read them by with_constants.")
    if units is None:
        return Unscored(part.name, "error")
    if not units and part.unit != "spans":
        return Unscored(part.name, "empty")
    share = len(units) if part.aggregate == "mean" else 1
    points = []
    for unit in units:
        if unit.score is None:
            return Unscored(part.name, unit.status)
        if not math.isfinite(unit.score):
            return Unscored(part.name, "nan")
        points.append(Point(len(text) if part.unit == "text" else unit.end, part.value(unit.score) / share))
    return points


def _sum(points: Sequence[Point]) -> float:
    return math.fsum(point.value for point in points)


def shape(value: float, shaping: Shaping) -> float:
    """x, σ(x) or σ(x) − 0.5; without overflow."""
    if shaping == "none":
        return value
    return math.tanh(value / 2) / 2 + (0.5 if shaping == "sigmoid" else 0.0)


def asked_units(text: str, unit: Literal["text", "sentences"]) -> list[tuple[int, int]]:
    """Start and end in `text` of what a scorer is to score; sentences cover it whole. An empty text has none."""
    if unit == "sentences":
        return split_sentences(text)
    return [(0, len(text))] if text else []


class Constants(NamedTuple):
    """Zero and size of a scorer's unit."""

    mean: float
    std: float


def read_constants(path: str, scorer: str) -> Constants:
    """What calibrate_scores found for a scorer, at its output folder `path`.

    Raises ConfigError when there is no such work, it knows no such scorer, or its numbers are none.
    """
    mark = files.join(path, files.RUN_MARK)
    known = (files.read_json(mark) or {}).get("scores")
    if not isinstance(known, dict):
        raise ConfigError(f"'{mark}' holds no calibration of scores; run calibrate_scores with output={path} first.")
    if scorer not in known:
        raise ConfigError(f"'{mark}' has no calibration of '{scorer}', and has {', '.join(known)}.")
    try:
        mean, std = float(known[scorer]["mean"]), float(known[scorer]["std"])
        is_good = math.isfinite(mean) and math.isfinite(std) and std > 0
    except (TypeError, KeyError, ValueError):
        is_good = False
    if not is_good:
        raise ConfigError(
            f"'{mark}' has no mean and no std above 0 of '{scorer}' but {known[scorer]}; run calibrate_scores again."
        )
    return Constants(mean, std)


def with_constants(composition: Composition) -> Composition:
    """The composition with numbers in the place of its calibrations; on the driver, once.

    Raises ConfigError as `read_constants`.
    """
    holistic = composition.holistic and _with_constants(composition.holistic)
    aspects = [_with_constants(part) for part in composition.aspects]
    return composition.model_copy(update={"holistic": holistic, "aspects": aspects})


def _with_constants(part: Part) -> Part:
    if part.calibration is None:
        return part
    constants = read_constants(part.calibration, part.scorer)
    return part.model_copy(update={**constants._asdict(), "calibration": None})
