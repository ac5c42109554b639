"""Metrics of a training run, sent to TensorBoard, Weights & Biases or MLflow as they come."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol

from rayrm import files
from rayrm.errors import ConfigError

ReportTo = Literal["tensorboard", "wandb", "mlflow", "none"]
PROJECT = "rayrm"
LOGS = "logs"


class Tracker(Protocol):
    """Where the metrics of one run go."""

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Send the metrics of one step."""

    def close(self) -> None:
        """Send what is left."""


def check_tracker(report_to: ReportTo) -> None:
    """Raise ConfigError when the package that `report_to` needs is not installed here."""
    if report_to in ("wandb", "mlflow"):
        found = importlib.util.find_spec(report_to)
        # A folder of that name in the working directory is found too, and comes from no file.
        if found is None or found.origin is None:
            raise ConfigError(
                f"report_to={report_to} needs the package {report_to}, which is not installed; "
                "pip install 'rayrm[tracking]', or set report_to to tensorboard or none."
            )


def set_places(logs: str) -> None:
    """Have Weights & Biases and MLflow keep their files in the folder `logs`, unless the environment says otherwise."""
    os.environ.setdefault("WANDB_DIR", logs)
    os.environ.setdefault("WANDB_PROJECT", PROJECT)
    # Files need no database driver; MLflow wants to be told that they are meant.
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"file:{logs}/mlruns")
    os.environ.setdefault("MLFLOW_EXPERIMENT_NAME", PROJECT)


def _local_logs(output: str) -> str:
    """A folder on this machine: below `output`, or for a URL a temporary one, since these trackers write only there."""
    folder = Path(tempfile.mkdtemp(prefix="rayrm-") if "://" in output else output) / LOGS
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder)


class TensorBoardTracker:
    """Event files in `<output>/logs`; what an interrupted run wrote behind `first_step` is hidden."""

    def __init__(self, output: str, settings: dict[str, Any], first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(files.join(output, LOGS), purge_step=first_step and first_step + 1)
        if not first_step:
            self.writer.add_text("config", "\n".join(f"    {name}: {value}" for name, value in settings.items()))

    def log(self, metrics: dict[str, float], step: int) -> None:
        """One scalar for each metric."""
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self.writer.close()


class WandbTracker:
    """A run of the project `rayrm`, which a resumed run continues.

    Credentials and mode, and another project or folder, come from the environment.
    """

    def __init__(self, output: str, settings: dict[str, Any], first_step: int) -> None:
        import wandb

        set_places(_local_logs(output))
        self.run = wandb.init(name=output, id=files.digest([output, settings]), resume="allow", config=settings)

    def log(self, metrics: dict[str, float], step: int) -> None:
        """One record for the step."""
        self.run.log(metrics, step=step)

    def close(self) -> None:
        """Finish the run."""
        self.run.finish()


class MlflowTracker:
    """A run of the experiment `rayrm`, in `<output>/logs` unless the environment names a server.

    A resumed run opens another one of the same name, whose steps begin where it resumed.
    """

    def __init__(self, output: str, settings: dict[str, Any], first_step: int) -> None:
        import mlflow

        set_places(_local_logs(output))
        mlflow.set_experiment(os.environ["MLFLOW_EXPERIMENT_NAME"])
        self.run = mlflow.start_run(run_name=output)
        mlflow.log_params(settings)

    def log(self, metrics: dict[str, float], step: int) -> None:
        """One metric record each."""
        import mlflow

        mlflow.log_metrics(metrics, step=step, run_id=self.run.info.run_id)

    def close(self) -> None:
        """End the run."""
        import mlflow

        mlflow.end_run()


class NoTracker:
    """Metrics go nowhere but into the run's own files."""

    def __init__(self, output: str, settings: dict[str, Any], first_step: int) -> None: ...

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


TRACKERS: dict[str, Callable[[str, dict[str, Any], int], Tracker]] = {
    "tensorboard": TensorBoardTracker,
    "wandb": WandbTracker,
    "mlflow": MlflowTracker,
    "none": NoTracker,
}
"""Tag to `tracker(output, settings, first_step)`, for a run that goes on behind `first_step`; 0 is its beginning."""
