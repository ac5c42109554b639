"""Probe rows: a few rows with what the model gave them, which tell whether a model is still the one it was."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rayrm.errors import CheckpointError
from rayrm.models.readouts import Encoded, parse_readout
from rayrm.models.rewarder import Outputs, Rendering, check_rendering, load_rewarder
from rayrm.training.launch import TrainingWorkers, fetch

if TYPE_CHECKING:
    from rayrm.models.rendering import Renderer
    from rayrm.training.objectives.base import Objective

TOLERANCES = {"fp32": 1e-4, "bf16": 5e-2}
"""Most that an output may move, as a share of its size or of 1, when the saved model is loaded again."""


def encode_probe(row: dict[str, Any], objective: Objective, renderer: Renderer) -> list[Encoded]:
    """The sides of a probe row."""
    example = objective.encode(row, renderer.with_tools(row.get("tools")))
    if isinstance(example, str):
        raise CheckpointError(f"Probe row '{row['id']}' cannot be read ({example}); remove the output and start again.")
    return example.sides


def check_saved(
    path: str, mark: dict[str, Any], objective: Objective, precision: str, workers: TrainingWorkers
) -> None:
    """Load the model at `path` in a process of its own and compare what it gives to the `probe` rows of its mark.

    Raises CheckpointError when it does not load, renders in another way, or gives other numbers.
    """
    import ray

    task = ray.remote(num_cpus=workers.num_cpus, num_gpus=workers.num_gpus, max_retries=2)(probe_outputs)
    (outputs,) = fetch([task.remote(path, mark, objective, precision)], "checking")
    for row, sides in zip(mark["probe"], outputs, strict=True):
        expected = [np.ravel(side) for side in row["outputs"]]
        for wanted, found in zip(expected, [np.ravel(side) for side in sides], strict=True):
            allowed = TOLERANCES[precision] * np.maximum(1.0, np.abs(wanted))
            if found.shape != wanted.shape or not (np.abs(wanted - found) <= allowed).all():
                raise CheckpointError(
                    f"The model saved at '{path}' gives row '{row['id']}' {found.tolist()}, and gave it "
                    f"{wanted.tolist()} before it was saved; it is not marked complete."
                )


def probe_outputs(path: str, mark: dict[str, Any], objective: Objective, precision: str) -> list[list[Outputs | None]]:
    """What the model as it lies at `path` gives to each side of each probe row, read as `mark` says.

    Raises CheckpointError when it does not load or renders in another way.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    rendering = mark["rendering"]
    rewarder = load_rewarder(
        path,
        Rendering(rendering["chat_template"], rendering["max_length"]),
        dtype=dtype,
        readout=parse_readout(mark["readout"]),
    )
    check_rendering(path, rendering["fingerprint"], rewarder.renderer.fingerprint())
    return [rewarder.read(encode_probe(row, objective, rewarder.renderer)) for row in mark["probe"]]
