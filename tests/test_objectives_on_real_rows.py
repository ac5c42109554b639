"""Every objective on human preferences: it learns real rows by heart, and goes on where it was interrupted."""

import json
import math
import re
import shutil
import statistics
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import test_train_reward_model as base

from rayrm.models.creation import CreationConfig, create_model
from rayrm.training.objectives import OBJECTIVES
from rayrm.training.reward_model import train_reward_model

REAL = Path(__file__).resolve().parents[2] / "shared/data/preferences/qa_feedback_train.jsonl"
NUM_PAIRS = 12


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A folder with a small model whose tokenizer knows the texts, and the same pairs in the form of each objective."""
    if not REAL.exists():
        pytest.skip(f"the human preferences are not there: {REAL}")
    folder = tmp_path_factory.mktemp("real")
    rows = [json.loads(line) for line in REAL.read_text().splitlines()]
    # One pair a prompt, the shortest, so that no two rows of the set contradict each other.
    pairs = list(
        {row["prompt"]: row for row in sorted(rows, key=lambda row: -len(row["chosen"] + row["rejected"]))}.values()
    )
    pairs = pairs[-NUM_PAIRS:]
    sizes = {"vocab_size": 1024, "hidden_size": 64, "intermediate_size": 128, "num_layers": 2, "num_heads": 4}
    texts = [row[name] for row in pairs for name in ("prompt", "chosen", "rejected")]
    create_model(texts, CreationConfig.model_validate({**sizes, "max_length": 512}), f"{folder}/model")
    sets = {"preferences": [], "rated": [], "stepwise": []}
    for pair in pairs:
        shared = {k: pair[k] for k in ("id", "lang", "subset")} | {
            "group": pair["id"],
            "prompt": base.message(pair["prompt"], "user"),
        }
        sides = {name: base.message(pair[name]) for name in ("chosen", "rejected")}
        sets["preferences"].append(shared | sides)
        right = sentences(pair["chosen"])
        for name, message in sides.items():
            own = shared | {"id": f"{pair['id']}-{name}"}
            facts = {"correct": float(name == "chosen"), "log_words": math.log(len(pair[name].split()))}
            sets["rated"].append(own | {"completion": message, "ratings": facts})
            steps = sentences(pair[name])
            sets["stepwise"].append(own | {"steps": steps, "labels": [float(step in right) for step in steps]})
    for name, found in sets.items():
        pq.write_table(pa.Table.from_pylist(found), folder / f"{name}.parquet")
    return folder


def sentences(text):
    return [part.strip() for part in re.split(r"(?<=[.!?])\s+", text) if part.strip()]


# The fixture of a process group of one.
alone = base.alone

CASES = {
    "bradley_terry": ("preferences", {}),
    "odin": ("preferences", {}),
    "comparison": ("preferences", {}),
    "regression": ("rated", {"ratings": ["correct", "log_words"]}),
    "outcome": ("rated", {}),
    "process": ("stepwise", {}),
}


def test_every_objective_is_here():
    assert {*CASES, "gated"} == OBJECTIVES.keys()


@pytest.mark.parametrize("tag", CASES)
@pytest.mark.usefixtures("alone")
def test_real_rows_are_learned_by_heart_with_an_interruption_or_without(
    real,
    tmp_path,
    monkeypatch,
    tag,
):
    from ray import train

    from rayrm.training.checkpoints import gather_state

    def report(metrics, checkpoint, checkpoint_dir_name):
        shutil.copytree(checkpoint.path, tmp_path / checkpoint_dir_name)

    monkeypatch.setattr(train, "report", report)
    name, settings = CASES[tag]
    training = {"model": f"{real}/model", "objective": {"type": tag, **settings}, "max_length": 512, "max_steps": 100}
    training |= {"global_batch_size": 8, "micro_batch_size": 8, "lr": 2e-3, "held_out_fraction": 0.0}
    job = base.make_job(real, tmp_path / "run", save_steps=90, **training)
    job = job.model_copy(update={"input": f"{real}/{name}.parquet"})
    whole = base.start(job)
    whole.train(show_progress=False)
    losses = [record["loss"] for record in whole.history if "loss" in record]
    assert losses[-1] < 0.25 * losses[0], losses
    resumed = base.start(job)
    resumed.load(str(tmp_path / "step-90"))
    assert resumed.step == 90
    resumed.train(show_progress=False)
    base.assert_same_weights(*(gather_state(trainer.engine.module.network) for trainer in (resumed, whole)), 1e-6)


@pytest.mark.ray
def test_a_gate_is_fitted_to_real_rows(real, tmp_path, ray_cluster):
    fit = {"hidden_size": 16, "num_hidden_layers": 1, "num_steps": 300, "batch_size": 12, "lr": 1e-2}
    objective = {
        "type": "gated",
        "objectives": ["correct", "log_words"],
        "ratings": f"{real}/rated.parquet",
        "fit": fit,
    }
    job = base.make_job(real, tmp_path / "run", model=f"{real}/model", objective=objective, max_length=512)
    done = train_reward_model(job)
    # Less than chance, and half of what a head that always gives the mean would have.
    assert done["metrics"]["loss"] < math.log(2) - 0.05
    words = [row["ratings"]["log_words"] for row in pq.read_table(real / "rated.parquet").to_pylist()]
    assert done["heads"]["log_words"]["mse"] < statistics.pvariance(words) / 2
