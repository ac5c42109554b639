"""Training whose worker, driver or node is killed ends as if nothing had happened."""

import json
from pathlib import Path

import pytest
import test_policy
import test_train_reward_model
import torch
from safetensors.torch import load_file
from test_kills import descendants, kill_group, run_job, run_on_two_nodes, start_job, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]
rows = test_policy.data
pairs = test_train_reward_model.data
NUM_STEPS = 60
JOBS = ["train_policy", "train_reward_model"]


@pytest.fixture(scope="module")
def folders(rows, pairs):
    """What each job reads: its rows and the model to start from."""
    return {
        "train_policy": [f"input={rows}/rows.parquet", f"training.model={rows}/base"],
        "train_reward_model": [f"input={pairs}/preferences.parquet", f"training.model={pairs}/policy"],
    }


@pytest.fixture(scope="module")
def undisturbed(folders, tmp_path_factory):
    """The runs that nobody disturbs."""
    output = tmp_path_factory.mktemp("undisturbed")
    for job in JOBS:
        run_job(job, words(job, folders, output / job))
    return output


def words(job, folders, output):
    """How a job is called; states are frequent enough to be killed between two."""
    return [
        *folders[job],
        f"output={output}",
        "training.type=sft" if job == "train_policy" else "training.objective.type=bradley_terry",
        "training.max_length=96",
        "training.lr=1e-3",
        # The reward model's batches need not divide evenly among workers and micro batches.
        f"training.global_batch_size={12 if job == 'train_policy' else 14}",
        "training.micro_batch_size=3",
        f"training.max_steps={NUM_STEPS}",
        "training.held_out_fraction=0.2",
        "workers.num_workers=2",
        "parallelism.zero_stage=2",
        "save_steps=8",
        # A record of TRL's covers the steps since the last one or since a resume, so both must fall together.
        "log_steps=8",
    ]


def assert_equal_runs(output, expected):
    weights = [load_file(path / "model" / "model.safetensors") for path in (output, expected)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], atol=1e-6, rtol=0)
    marks = [json.loads((path / "model" / "rayrm.json").read_text()) for path in (output, expected)]
    assert marks[0]["steps"] == marks[1]["steps"] == NUM_STEPS
    histories = [[json.loads(line) for line in (path / "metrics.jsonl").open()] for path in (output, expected)]
    for found, wanted in zip(*histories, strict=True):
        assert found["step"] == wanted["step"]
        assert found.get("loss", 0) == pytest.approx(wanted.get("loss", 0), abs=1e-6)


def states(output):
    return list(Path(output).glob("state/step-*"))


@pytest.mark.parametrize("job", JOBS)
def test_training_goes_on_after_a_worker_was_killed(job, folders, undisturbed, tmp_path):
    process = start_job(job, words(job, folders, tmp_path))
    wait_for(lambda: len(states(tmp_path)) >= 2, process)
    victims = descendants(process, "RayTrainWorker")
    assert len(victims) == 2, "two training workers run below the job"
    victims[0].kill()
    assert not (tmp_path / "model").exists()
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert_equal_runs(tmp_path, undisturbed / job)


@pytest.mark.parametrize("job", JOBS)
def test_training_goes_on_after_its_driver_was_killed(job, folders, undisturbed, tmp_path):
    process = start_job(job, words(job, folders, tmp_path))
    wait_for(lambda: len(states(tmp_path)) >= 2, process)
    kill_group(process)
    assert not (tmp_path / "model").exists()
    assert "resuming" in run_job(job, words(job, folders, tmp_path))
    assert_equal_runs(tmp_path, undisturbed / job)


def test_training_goes_on_after_a_node_was_killed(folders, undisturbed, tmp_path):
    job = "train_reward_model"
    run_on_two_nodes(f"{tmp_path}/state/step-*", 2, job, words(job, folders, tmp_path))
    assert_equal_runs(tmp_path, undisturbed / job)
