import os

import pytest

from rayrm.errors import ConfigError
from rayrm.training.tracking import TRACKERS, check_tracker, set_places

SETTINGS = {"lr": 0.1, "objective": {"type": "bradley_terry"}}
PLACES = ("WANDB_DIR", "WANDB_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_ALLOW_FILE_STORE", "MLFLOW_EXPERIMENT_NAME")


@pytest.fixture(autouse=True)
def no_places(monkeypatch):
    """An environment that says nothing about trackers, and is put back."""
    for name in PLACES:
        monkeypatch.setenv(name, "undone when the test ends")
        monkeypatch.delenv(name)


def test_tensorboard_holds_each_step_once_after_a_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = TRACKERS["tensorboard"](str(tmp_path), SETTINGS, 0)
    for step in (1, 2, 3):
        tracker.log({"loss": step / 10, "eval_accuracy/en-de": 0.5}, step)
    tracker.close()
    tracker = TRACKERS["tensorboard"](str(tmp_path), SETTINGS, 2)
    for step in (3, 4):
        tracker.log({"loss": step / 100}, step)
    tracker.close()
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    assert [(event.step, pytest.approx(event.value)) for event in events.Scalars("loss")] == [
        (1, 0.1),
        (2, 0.2),
        (3, 0.03),
        (4, 0.04),
    ]
    assert [event.step for event in events.Scalars("eval_accuracy/en-de")] == [1, 2]


def test_mlflow_gets_metrics_and_settings(tmp_path):
    mlflow = pytest.importorskip("mlflow")
    tracker = TRACKERS["mlflow"](str(tmp_path), SETTINGS, 0)
    tracker.log({"loss": 0.5, "eval_accuracy/en-de": 0.75}, 2)
    run = tracker.run.info.run_id
    tracker.close()
    found = mlflow.get_run(run).data
    assert found.metrics == {"loss": 0.5, "eval_accuracy/en-de": 0.75}
    assert found.params["lr"] == "0.1"
    assert list((tmp_path / "logs" / "mlruns").glob(f"*/{run}"))
    resumed = TRACKERS["mlflow"](str(tmp_path), SETTINGS, 2)
    resumed.close()
    assert resumed.run.info.run_id != run
    assert mlflow.get_run(resumed.run.info.run_id).data.params["lr"] == "0.1"


def test_wandb_gets_a_run_that_a_resume_continues(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    ids = []
    for first_step in (0, 2):
        tracker = TRACKERS["wandb"](str(tmp_path), SETTINGS, first_step)
        tracker.log({"loss": 0.5}, first_step + 1)
        assert tracker.run.config["lr"] == 0.1
        ids.append(tracker.run.id)
        tracker.close()
    assert ids[0] == ids[1]
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_none_sends_nothing(tmp_path):
    tracker = TRACKERS["none"](str(tmp_path), SETTINGS, 0)
    tracker.log({"loss": 0.5}, 1)
    tracker.close()
    assert list(tmp_path.iterdir()) == []


def test_the_environment_says_where_trackers_write(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker")
    set_places("/logs")
    assert [os.environ[name] for name in PLACES] == ["/logs", "rayrm", "http://tracker", "true", "rayrm"]


def test_a_tracker_that_is_not_installed_is_told(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"report_to=wandb needs .* pip install 'rayrm\[tracking\]'"):
        check_tracker("wandb")
    check_tracker("tensorboard")
    check_tracker("none")
