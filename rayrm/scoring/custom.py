"""Score with a class of one's own, from any package that is installed.

A package names its class in its `pyproject.toml`:

    [project.entry-points."rayrm.scorers"]
    brevity = "my_package.scorers:BrevityScorer"

and a config takes it by that name:

    type: custom
    scorer: brevity
    options: {longest: 80}

The class is called with the whole `CustomScoring`, in each actor, and has one method:

    class BrevityScorer:
        needs = ()  # columns without which no row can be scored; may be left out

        def __init__(self, config):
            self.longest = config.options["longest"]

        def score(self, rows):
            return [[(float(self.longest - len(text)), "ok") for text in row["candidates"]] for row in rows]

A class that also tells where in a text its score comes from has `spans(rows)` beside, which gives for each candidate
the parts that it marks, as `SpanScorer.spans` says:

        def spans(self, rows):
            return [[[(self.longest, len(text), -1.0)] if len(text) > self.longest else [] for text in row["candidates"]]
                    for row in rows]

A class with `compares = True` has `compare(pairs)` in its place, which gives each of two rows with one candidate the
log of its chance to be the better one, as `PreferenceScorer.compare` says. `model_type` may say what reports call it.
The package must be installed wherever actors run, for a Ray cluster by its image or its `runtime_env`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import metadata
from typing import Any, ClassVar, Literal

from pydantic import Field

from rayrm.config import NOT_IDENTITY, Config, Workers
from rayrm.errors import ConfigError, SchemaError
from rayrm.scoring.base import CUSTOM, Outcome, Span
from rayrm.shards import read_schemas

GROUP = "rayrm.scorers"
"""The group of entry points that name classes of scorers."""


class CustomScoring(Config):
    """Scores by a class that another package has, found by an entry point of the group `rayrm.scorers`."""

    type: Literal["custom"] = "custom"
    name: str = Field("custom", min_length=1)
    """Field of `scores` and `status` that holds the result."""
    scorer: str
    """Name of the entry point."""
    options: dict[str, Any] = Field({})
    """What the class is told beside; it decides what comes out."""
    workers: Workers = Field(default_factory=Workers, json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Actors that score."""


class CustomClass:
    """The class of an entry point, checked."""

    def __init__(self, name: str) -> None:
        """Raises ConfigError when no package has the entry point, or its class does not load or cannot score."""
        found = {entry.name: entry for entry in metadata.entry_points(group=GROUP)}
        if name not in found:
            known = ", ".join(sorted(found)) or "none"
            raise ConfigError(
                f"scorer is '{name}', and the installed packages have no such entry point of the group '{GROUP}' (they "
                f"have {known}); install the package that has it."
            )
        where = f"The scorer '{name}' ({found[name].value})"
        try:
            self.make: Any = found[name].load()
        except Exception as error:
            raise ConfigError(f"{where} does not load: {error!r}.") from error
        self.compares = bool(getattr(self.make, "compares", False))
        self.needs: tuple[str, ...] = tuple(getattr(self.make, "needs", ()))
        self.model_type = str(getattr(self.make, "model_type", CUSTOM))
        method = "compare" if self.compares else "score"
        if not callable(self.make) or not callable(getattr(self.make, method, None)):
            argument = "pairs" if self.compares else "rows"
            raise ConfigError(
                f"{where} is no class with a method {method}({argument}), which a scorer with compares={self.compares} "
                "has."
            )


def check_custom(config: CustomScoring, paths: Sequence[str] = ()) -> None:
    """Find out, before any actor starts, whether there is such a class, and at `paths` the columns that it needs.

    Raises ConfigError and SchemaError.
    """
    needs = CustomClass(config.scorer).needs
    for path in paths:
        for name, schema in read_schemas(path):
            if missing := [column for column in needs if column not in schema.names]:
                raise SchemaError(
                    f"'{name}' has no column {', '.join(missing)}, which the scorer '{config.scorer}' needs."
                )


class CustomScorer:
    """A scorer of another package. Raises ConfigError as `CustomClass` does."""

    model_type: ClassVar[str] = CUSTOM
    """That of the class stands in `CustomClass.model_type`."""

    def __init__(self, config: CustomScoring) -> None:
        found = CustomClass(config.scorer)
        self.name = config.scorer
        self.compares = found.compares
        self.needs = found.needs
        self.inner: Any = found.make(config)

    def score(self, rows: list[dict[str, Any]]) -> list[list[Outcome]]:
        """What the class gives. Raises ConfigError unless there is an outcome for each candidate of each row."""
        found: list[list[Outcome]] = self.inner.score(rows)
        wanted = [len(row["candidates"] or []) for row in rows]
        if [len(outcomes) for outcomes in found] != wanted:
            raise ConfigError(
                f"The scorer '{self.name}' gave {[len(outcomes) for outcomes in found]} scores for rows with {wanted} "
                "candidates; let score(rows) give a list for each row, with (score or None, status) for each candidate."
            )
        return found

    def spans(self, rows: list[dict[str, Any]]) -> list[list[list[Span] | None]]:
        """What the class gives.

        Raises ConfigError when it marks none, and unless there is a list or null for each candidate of each row, with
        finite scores of parts that lie within their candidate.
        """
        if not callable(getattr(self.inner, "spans", None)):
            raise ConfigError(f"The scorer '{self.name}' has no method spans(rows), and marks no parts of texts.")
        told = self.inner.spans(rows)
        wanted = [len(row["candidates"] or []) for row in rows]
        if [len(parts) for parts in told] != wanted:
            raise ConfigError(
                f"The scorer '{self.name}' gave spans of {[len(parts) for parts in told]} texts for rows with {wanted} "
                "candidates; let spans(rows) give a list for each row, with a list of spans or None for each candidate."
            )
        return [
            [
                None if parts is None else [self._check(Span(*part), text or "") for part in parts]
                for parts, text in zip(each, row["candidates"] or [], strict=True)
            ]
            for each, row in zip(told, rows, strict=True)
        ]

    def _check(self, span: Span, text: str) -> Span:
        if not (0 <= span.start <= span.end <= len(text) and math.isfinite(span.score)):
            raise ConfigError(
                f"The scorer '{self.name}' marks {span} in a text of {len(text)} characters; let start and end lie "
                "within it, and give a finite score."
            )
        return span

    def compare(self, pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> list[tuple[Outcome, Outcome]]:
        """What the class gives. Raises ConfigError unless there is one for each pair."""
        found: list[tuple[Outcome, Outcome]] = self.inner.compare(pairs)
        if len(found) != len(pairs):
            raise ConfigError(f"The scorer '{self.name}' gave {len(found)} comparisons for {len(pairs)} pairs.")
        return found
