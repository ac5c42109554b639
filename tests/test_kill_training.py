"""A reward model's training whose worker or driver is killed ends as if nothing had happened."""

import json
from pathlib import Path

import pytest
import test_train_reward_model as small
import torch
from safetensors.torch import load_file
from test_kills import descendants, kill_group, run_job, start_job, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]
NUM_STEPS = 60
data = small.data


def words(data, output):
    return [
        f"input={data}/preferences.parquet",
        f"output={output}",
        f"training.model={data}/policy",
        "training.max_length=96",
        "training.lr=1e-3",
        "training.global_batch_size=14",
        "training.micro_batch_size=3",
        f"training.max_steps={NUM_STEPS}",
        "training.held_out_fraction=0.2",
        "workers.num_workers=2",
        "parallelism.zero_stage=2",
        "save_steps=8",
    ]


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed")
    run_job("train_reward_model", words(data, output))
    return output


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
    return {path.parent.name for path in Path(output).glob("state/step-*/progress.json")}


def test_training_goes_on_after_a_worker_was_killed(data, undisturbed, tmp_path):
    process = start_job("train_reward_model", words(data, tmp_path))
    wait_for(lambda: len(states(tmp_path)) >= 2, process)
    victims = descendants(process, "RayTrainWorker")
    assert len(victims) == 2, "two training workers run below the job"
    victims[0].kill()
    assert not (tmp_path / "model").exists()
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert_equal_runs(tmp_path, undisturbed)


def test_training_goes_on_after_its_driver_was_killed(data, undisturbed, tmp_path):
    process = start_job("train_reward_model", words(data, tmp_path))
    wait_for(lambda: len(states(tmp_path)) >= 2, process)
    kill_group(process)
    assert not (tmp_path / "model").exists()
    assert "resuming" in run_job("train_reward_model", words(data, tmp_path))
    assert_equal_runs(tmp_path, undisturbed)
