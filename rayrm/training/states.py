"""States to resume from: reported while training, found again after a worker, a node or the driver died."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from rayrm.errors import CheckpointError
from rayrm.training.curves import write_curves

WORLD = "world.json"
"""File of a state that says how many workers wrote it."""


class ReportStates(TrainerCallback):
    """Hand each state that a transformers Trainer saves to Ray Train, as `<output>/state/step-N`.

    Every rank reports the files that it wrote itself. Rank 0 also brings `metrics.jsonl` and `loss.png` up to date.
    """

    def __init__(self, output: str, num_workers: int) -> None:
        self.output = output
        self.num_workers = num_workers

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report `checkpoint-N` of this process, and remove it."""
        from ray import train

        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero:
            (folder / WORLD).write_text(json.dumps({"num_workers": self.num_workers}))
            write_curves(state.log_history, self.output)
        checkpoint = train.Checkpoint.from_directory(folder)
        train.report({"steps": state.global_step}, checkpoint, checkpoint_dir_name=f"step-{state.global_step}")
        shutil.rmtree(folder)


@contextmanager
def last_state(num_workers: int) -> Iterator[str | None]:
    """A local folder with the state that was reported last; None at the beginning.

    Raises CheckpointError when another number of workers wrote it, since DeepSpeed's parts then do not fit.
    """
    from ray import train

    checkpoint = train.get_checkpoint()
    if checkpoint is None:
        yield None
        return
    with checkpoint.as_directory() as folder:
        found = json.loads((Path(folder) / WORLD).read_text())["num_workers"]
        if found != num_workers:
            raise CheckpointError(
                f"The state in '{checkpoint.path}' is of {found} workers, and this run has {num_workers}; "
                f"resume with workers.num_workers={found}, or start in another output."
            )
        yield str(folder)
