"""What tells two scorers apart: whatever their scores hang on, wherever they run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rayrm import files
from rayrm.composing import Composition
from rayrm.config import identity
from rayrm.errors import ConfigError
from rayrm.runs import input_paths
from rayrm.scoring.service import ServiceScoring, find_revision, recall_served

AGAIN = "score the samples with this scorer and run calibrate_scores again, into another output"


def identify(config: Any) -> dict[str, Any]:
    """Type, settings and fingerprints of models of a scorer, without its name and its place.

    A model of a service is known by its revision, which is the fingerprint that it has in process too. Raises
    ConfigError where there is no model, and what `find_revision` raises.
    """
    if isinstance(config, ServiceScoring):
        model = find_revision(config)
        if recall_served(config).readout == "bleurt":
            return {"type": "bleurt", "inputs": {"model": model}}
        asked = {"prompt": "as_is", "negate": False, "calibration": config.calibration}
        return {"type": "reward_model", **asked, "inputs": {"model": model}}
    inputs = {name: files.fingerprint(path).partition(":")[2] for name, path in input_paths(config).items()}
    return {**{name: value for name, value in identity(config).items() if name != "name"}, "inputs": inputs}


def known_scorers(path: str) -> dict[str, Any]:
    """What the scorers of the rows at `path` are, by their names, as score_candidates has written it beside them.

    Nothing for rows that it has not written.
    """
    found: dict[str, Any] = (files.read_json(files.join(path, files.RUN_MARK)) or {}).get("scorers", {})
    return found


def check_calibrations(composition: Composition, scorers: Sequence[Any]) -> None:
    """Raise ConfigError for a part whose calibration was measured with another scorer than its own of `scorers`.

    What only one of both sides tells is not compared: a service does not say how its model is set up. Raises as
    `identify` too.
    """
    configs = {config.name: config for config in scorers}
    for name, path in _calibrations(composition):
        measured = known_scorers(path).get(name)
        if measured is None:
            raise ConfigError(
                f"'{path}' does not say which scorer its calibration of '{name}' was measured with; {AGAIN}, or set mean "
                "and std in its place."
            )
        _compare(name, path, measured, identify(configs[name]))


def check_calibrations_of_rows(composition: Composition, rows: str) -> None:
    """Raise ConfigError for a part whose calibration was measured with another scorer than the rows at `rows` have.

    What is not said beside the rows or the calibration is not compared.
    """
    scorers = known_scorers(rows)
    for name, path in _calibrations(composition):
        measured = known_scorers(path).get(name)
        if measured is not None and name in scorers:
            _compare(name, path, measured, scorers[name])


def _calibrations(composition: Composition) -> list[tuple[str, str]]:
    return [(part.scorer, part.calibration) for part in composition.parts if part.calibration is not None]


def _compare(name: str, path: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    if differing := _differences(there, here):
        raise ConfigError(
            f"The calibration of '{name}' in '{path}' was measured with another scorer ({'; '.join(differing)}); {AGAIN}."
        )


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Of what both sides tell."""
    both = [("", there, here), ("inputs.", there["inputs"], here["inputs"])]
    return [
        f"{prefix}{key}: {one[key]!r} there, {other[key]!r} here"
        for prefix, one, other in both
        for key in sorted(one.keys() & other.keys() - {"inputs"})
        if one[key] != other[key]
    ]
