"""What stands in the folder of a policy training with rewards, finished or not."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from rayrm import files
from rayrm.errors import EvaluationError
from rayrm.evaluation.preferences import Floats
from rayrm.runs import STARTED
from rayrm.training.curves import METRICS, SAMPLES

END_FRACTION = 0.1
"""Share of a run's records whose mean stands for its start, and for its end."""


class Series(NamedTuple):
    """A metric by step."""

    steps: Floats
    values: Floats

    @property
    def start(self) -> float | None:
        """Mean of the first tenth of the values, of one at least; None without values."""
        return self._mean(slice(None, self._num))

    @property
    def end(self) -> float | None:
        """Mean of the last tenth of the values, of one at least; None without values."""
        return self._mean(slice(-self._num, None))

    @property
    def mean(self) -> float | None:
        """Mean of all values; None without any."""
        return self._mean(slice(None))

    @property
    def last(self) -> float | None:
        """The last value; None without any."""
        return self._mean(slice(-1, None))

    @property
    def _num(self) -> int:
        return max(1, int(END_FRACTION * len(self.values)))

    def _mean(self, which: slice) -> float | None:
        return float(self.values[which].mean()) if len(self.values) else None


@dataclass(frozen=True)
class PolicyRun:
    """A run as its folder tells of it."""

    config: dict[str, Any]
    """The resolved config without paths, as `started.json` has it; empty where that is not there."""
    inputs: dict[str, str]
    """Fingerprints of what the run reads, by the field that names it."""
    records: list[dict[str, Any]]
    """Metrics of steps."""
    evaluations: list[dict[str, Any]]
    """Metrics of the held-out rows, their names without `eval_`."""
    samples: list[dict[str, Any]]
    """All samples of one step."""
    samples_step: int
    """The last step whose samples are there; 0 for none."""
    is_saved: bool
    """Whether the trained model is there."""

    @property
    def training(self) -> dict[str, Any]:
        """What was set of the training."""
        found: dict[str, Any] = self.config.get("training", {})
        return found

    @property
    def num_steps(self) -> int:
        """Steps that were recorded."""
        return int(max(record["step"] for record in [*self.records, *self.evaluations]))

    @property
    def filters(self) -> list[str]:
        """The settings of sampling that the learner does not model, as they read in a config."""
        sampling = self.training.get("sampling", {})
        off = {"top_k": None, "top_p": 1.0, "min_tokens": 0}
        return [f"{name}={sampling[name]}" for name, none in off.items() if sampling.get(name, none) != none]

    def series(self, name: str) -> Series:
        """A metric of steps; records without it, or where it is no finite number, are left out."""
        return _series(self.records, name)

    def held_out(self, name: str) -> Series:
        """A metric of the held-out rows, likewise."""
        return _series(self.evaluations, name)

    def shares(self, name: str) -> Series:
        """A share by its reason, which a step without any of it does not name."""
        there = [{name: 0.0, **record} for record in self.records if "left_out_fraction" in record]
        return _series(there, name)

    def names(self, prefix: str) -> list[str]:
        """What stands behind `prefix` in the names of metrics of steps and of held-out rows, sorted."""
        names = {name for record in [*self.records, *self.evaluations] for name in record if name.startswith(prefix)}
        return sorted(name.removeprefix(prefix) for name in names)

    @property
    def languages(self) -> list[str]:
        """The languages that have rewards."""
        return [name for name in self.names("reward/") if not name.startswith("length/")]


def read_run(output: str) -> PolicyRun:
    """What the folder of a run holds. Raises EvaluationError where no step and no held-out row has been measured."""
    started = files.read_json(files.join(output, STARTED)) or {}
    path = files.join(output, METRICS)
    found = _read_lines(path) if files.exists(path) else []
    if not found:
        raise EvaluationError(f"'{path}' has no records; a page can be written when the run's first step is recorded.")
    is_evaluation = [any(name.startswith("eval_") for name in record) for record in found]
    step, samples = _read_samples(files.join(output, SAMPLES))
    return PolicyRun(
        config=started.get("config", {}),
        inputs=started.get("inputs", {}),
        records=[record for record, is_out in zip(found, is_evaluation, strict=True) if not is_out],
        evaluations=[
            {name.removeprefix("eval_"): value for name, value in record.items()}
            for record, is_out in zip(found, is_evaluation, strict=True)
            if is_out
        ],
        samples=samples,
        samples_step=step,
        is_saved=files.exists(files.join(output, "model", files.CHECKPOINT_MARK)),
    )


def main_reward(run: PolicyRun) -> tuple[str, float | None, float | None]:
    """Where the reward was measured, and what it was at the start and at the end: held out if it was twice."""
    held_out = run.held_out("reward")
    if len(held_out.values) > 1:
        return "held-out", float(held_out.values[0]), held_out.last
    series = run.series("reward")
    return "training", series.start, series.end


def _series(records: Sequence[dict[str, Any]], name: str) -> Series:
    there = [(record["step"], record[name]) for record in records if record.get(name) is not None]
    points = np.array(there, dtype=float).reshape(-1, 2)
    points = points[np.isfinite(points[:, 1])]
    return Series(points[:, 0], points[:, 1])


def _read_samples(folder: str) -> tuple[int, list[dict[str, Any]]]:
    fs, inner = files.filesystem(folder)
    names = fs.ls(inner, detail=False) if fs.isdir(inner) else []
    steps = {int(match[1]): name for name in names if (match := re.search(r"/step-(\d+)\.jsonl$", name))}
    if not steps:
        return 0, []
    last = max(steps)
    return last, _read_lines(files.join(folder, steps[last].rpartition("/")[2]))


def _read_lines(path: str) -> list[dict[str, Any]]:
    fs, inner = files.filesystem(path)
    with fs.open(inner, "rb") as handle:
        return [json.loads(line) for line in handle if line.strip()]
