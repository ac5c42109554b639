"""What starting Ray Train gets over, and what it does not."""

import contextlib
from types import SimpleNamespace

import pytest

from rayrm import cluster, files
from rayrm.errors import CheckpointError
from rayrm.training import launch
from rayrm.training.launch import TrainingWorkers


@pytest.fixture
def start(monkeypatch, tmp_path):
    """Starts training that fails with the given errors, one an attempt; gives what it returned and those left over."""

    def started(*failures, max_failures=2):
        left = list(failures)

        def fit():
            if left:
                raise left.pop(0)
            return SimpleNamespace(return_value={"steps": 3})

        monkeypatch.setattr(cluster, "require", lambda *_: None)
        monkeypatch.setattr(launch, "_trainer", lambda *_: SimpleNamespace(fit=fit))
        workers = TrainingWorkers(max_failures=max_failures)
        return launch.launch(lambda config: {}, {}, str(tmp_path), workers, "The test"), left

    return started


def test_a_node_that_goes_while_workers_are_placed_is_no_end(start):
    from ray.train import ControllerError, WorkerGroupError

    gone = ControllerError(RuntimeError("the node has died"))
    assert start(gone, gone) == ({"steps": 3}, [])
    with pytest.raises(CheckpointError, match="the node has died"):
        start(gone, gone, gone)
    # Ray Train has started these workers again already, as often as it may.
    with pytest.raises(CheckpointError, match="ValueError: of the loop"):
        start(WorkerGroupError("failed", {0: ValueError("of the loop")}))


def test_what_another_attempt_cannot_mend_ends_training_also_behind_a_halved_micro_batch(monkeypatch, tmp_path):
    from ray.train import TrainingFailedError

    attempts = []

    def loop(_):
        files.write_json(f"{tmp_path}/{launch.MICRO_BATCH}", {"micro_batch_size": 1})
        raise CheckpointError("Memory runs out with a micro batch of one row.")

    def trainer(told, *_):
        def fit():
            attempts.append(1)
            with contextlib.suppress(CheckpointError):
                told({})
            raise TrainingFailedError

        return SimpleNamespace(fit=fit)

    monkeypatch.setattr(cluster, "require", lambda *_: None)
    monkeypatch.setattr(launch, "_trainer", trainer)
    with pytest.raises(CheckpointError):
        launch.launch(loop, {}, str(tmp_path), TrainingWorkers(), "The test")
    assert len(attempts) == 1
