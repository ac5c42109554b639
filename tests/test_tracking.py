import pytest

from rayrm.training.tracking import TRACKERS

SETTINGS = {"lr": 0.1, "objective": {"type": "bradley_terry"}}


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


def test_mlflow_gets_metrics_and_settings(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_ALLOW_FILE_STORE"):
        monkeypatch.setenv(name, "undone when the test ends")
        monkeypatch.delenv(name)
    tracker = TRACKERS["mlflow"](str(tmp_path), SETTINGS, 0)
    tracker.log({"loss": 0.5, "eval_accuracy/en-de": 0.75}, 2)
    run = tracker.run.info.run_id
    tracker.close()
    found = mlflow.get_run(run).data
    assert found.metrics == {"loss": 0.5, "eval_accuracy/en-de": 0.75}
    assert found.params["lr"] == "0.1"
    assert list((tmp_path / "logs" / "mlruns").glob(f"*/{run}"))


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
