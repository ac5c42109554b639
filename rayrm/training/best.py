"""The best evaluation of a run so far: what was trained until then, kept beside the run's states."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rayrm import files
from rayrm.errors import ConfigError
from rayrm.training.checkpoints import publish

BEST = "best"
WEIGHTS = "weights.safetensors"
MARK = "best.json"
LOWER_IS_BETTER = ("loss", "brier", "ece", "mse_", "ties")
"""How the names of metrics begin that are to be low."""


def find_best(output: str) -> dict[str, Any] | None:
    """Step, value, probe rows and `folder` of the best evaluation that was kept below `output`, if any was."""
    fs, inner = files.filesystem(files.join(output, BEST))
    folders = sorted(fs.ls(inner, detail=False)) if fs.isdir(inner) else []
    marks = []
    for folder in folders:
        path = files.join(output, BEST, Path(folder).name)
        if mark := files.read_json(files.join(path, MARK)):
            marks.append({**mark, "folder": path})
    return max(marks, key=lambda mark: mark["merit"], default=None)


def read_merit(metrics: dict[str, float], best_by: str) -> float:
    """How good an evaluation is: the metric, or its negative where less is better.

    Raises ConfigError, naming what there is, when the evaluation has no such metric.
    """
    found = metrics.get(f"eval_{best_by}")
    if found is None:
        known = ", ".join(sorted(name.removeprefix("eval_") for name in metrics))
        raise ConfigError(f"best_by is '{best_by}', which is no metric of the held-out rows; there are {known}.")
    return -found if best_by.startswith(LOWER_IS_BETTER) else found


def keep_best(output: str, mark: dict[str, Any], weights: dict[str, Any]) -> None:
    """Keep `weights`, tensors by name, with the facts of their evaluation, and then remove what was best before.

    A tensor that has several names is kept once, and the mark's `tied` says which name stands for which.
    """
    from safetensors.torch import save_file

    folder = files.join(output, BEST, f"step-{mark['step']}")
    first = {id(tensor): name for name, tensor in reversed(weights.items())}
    tied = {name: first[id(tensor)] for name, tensor in weights.items() if first[id(tensor)] != name}
    with TemporaryDirectory() as temporary:
        local = Path(temporary) / "best"
        local.mkdir()
        kept = {name: tensor.contiguous() for name, tensor in weights.items() if name not in tied}
        save_file(kept, local / WEIGHTS)
        publish(local, folder)
    files.write_json(files.join(folder, MARK), {**mark, "tied": tied})
    fs, inner = files.filesystem(files.join(output, BEST))
    for other in fs.ls(inner, detail=False):
        if Path(other).name != Path(folder).name:
            fs.rm(other, recursive=True)


def read_weights(folder: str) -> dict[str, Any]:
    """The tensors that `keep_best` kept, a shared one under each of its names."""
    from safetensors.torch import load

    fs, inner = files.filesystem(files.join(folder, WEIGHTS))
    with fs.open(inner, "rb") as handle:
        weights = dict(load(handle.read()))
    tied = (files.read_json(files.join(folder, MARK)) or {}).get("tied", {})
    return weights | {name: weights[first] for name, first in tied.items()}
