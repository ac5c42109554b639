import json
import math
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from rayrm import files
from rayrm.config import build_config
from rayrm.counts import describe_counts
from rayrm.errors import CheckpointError, ConfigError, OutputExistsError, SchemaError
from rayrm.models.creation import CreationConfig, create_model
from rayrm.training.batches import batch_of_step, micro_batches, steps_per_epoch
from rayrm.training.launch import fetch
from rayrm.training.objectives.pairs import BradleyTerry
from rayrm.training.optimization import Optimization
from rayrm.training.rendered import check_renderer, make_renderer, render_row, render_rows
from rayrm.training.reward_metrics import MeasuredPairs, expected_calibration_error, measure_pairs
from rayrm.training.reward_model import RewardModelJob, train_reward_model

SIZES = CreationConfig(vocab_size=320, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=2, max_length=128)
NUM_ROWS = 60


def message(text, role="assistant"):
    return [{"role": role, "content": text}]


def preference(index, rng):
    question = " ".join(rng.choice(["one", "two", "three"]) for _ in range(rng.randint(1, 9)))
    sides = [word + " " + question[: rng.randint(1, 20)] for word in ("good", "bad")]
    return {
        "id": f"r{index}",
        "group": f"g{index // 2}",
        "prompt": message(question, "user"),
        "chosen": message(sides[0]),
        "rejected": message(sides[1]),
        "margin": 0.5,
        "src_lang": "en",
        "tgt_lang": ["de", "fr"][index % 2],
        "lang": ["de", "fr"][index % 2],
        "subset": None,
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A tiny policy, and pairs whose chosen side is the one that begins with another word."""
    folder = tmp_path_factory.mktemp("rewards")
    create_model(["one two three good bad"] * 9, SIZES, f"{folder}/policy")
    rng = random.Random(0)
    rows = [preference(index, rng) for index in range(NUM_ROWS)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "preferences.parquet")
    return folder


def make_job(data, output, workers=1, zero_stage=0, save_steps=100, **training):
    values = {
        "input": f"{data}/preferences.parquet",
        "output": str(output),
        "training": {
            "model": f"{data}/policy",
            "max_length": 96,
            "lr": 1e-3,
            "global_batch_size": 14,
            "micro_batch_size": 3,
            "held_out_fraction": 0.2,
            "max_steps": 8,
            "eval_steps": 4,
            "seed": 1,
            **training,
        },
        "workers": {"num_workers": workers},
        "parallelism": {"zero_stage": zero_stage},
        "save_steps": save_steps,
        "log_steps": 2,
        "report_to": "none",
    }
    return build_config(RewardModelJob, values, "the test")


# The order of rows, the learning rate, the loss.


def test_every_epoch_takes_every_row_once_in_an_order_of_its_own():
    assert steps_per_epoch(10, 4) == 3
    epochs = [[batch_of_step(3 * epoch + k, 10, 4, seed=7) for k in range(3)] for epoch in range(2)]
    for batches in epochs:
        assert [len(batch) for batch in batches] == [4, 4, 2]
        assert sorted(row for batch in batches for row in batch) == list(range(10))
    assert epochs[0] != epochs[1]
    assert batch_of_step(4, 10, 4, seed=7) == epochs[1][1] and batch_of_step(4, 10, 4, seed=8) != epochs[1][1]


def test_workers_make_the_same_number_of_passes_over_rows_of_like_length():
    lengths = [5, 9, 1, 7, 3, 8, 2]
    shares = [list(micro_batches(range(7), lengths, 2, rank, 3)) for rank in range(3)]
    assert shares == [[[1, 0], [2]], [[5, 4], []], [[3, 6], []]]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.25, 0.5, 0.75, 1, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7]),
        ("cosine", [0.25, 0.5, 0.75] + [0.5 * (1 + math.cos(math.pi * k / 7)) for k in range(7)]),
    ],
)
def test_learning_rate_warms_up_and_follows_its_schedule(schedule, expected):
    rates = Optimization(lr=2.0, warmup_fraction=0.3, schedule=schedule)
    assert [rates.rate_at(step, 10) / 2 for step in range(10)] == pytest.approx(expected)


def test_matrices_decay_and_norms_and_biases_do_not():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    model[0].weight.requires_grad_(True)
    groups = Optimization(weight_decay=0.1).optimizer(model).param_groups
    assert [[p.shape for p in group["params"]] for group in groups] == [[(2, 3)], [(2,), (2,), (2,)]]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]


def losses(objective, chosen, rejected, **given):
    num = len(chosen)
    targets = torch.tensor([given.get("margin", [0.0] * num), given.get("label", [1.0] * num)]).T
    return objective.losses(torch.stack([chosen, rejected])[:, :, None, None], targets)


def test_bradley_terry_loss_by_hand():
    chosen, rejected = torch.tensor([1.0, 0.0, -200.0]), torch.tensor([1.0, math.log(3), 200.0])
    plain = losses(BradleyTerry(), chosen, rejected)
    assert plain.tolist() == pytest.approx([math.log(2), math.log(4), 400.0])
    with_margin = losses(BradleyTerry(), chosen, rejected, margin=[0.0, -math.log(3), 0.0])
    assert with_margin.tolist() == pytest.approx([math.log(2), math.log(2), 400.0])
    # σ(−log 3) = 1/4: a label of 0.2 costs 0.2 log 4 + 0.8 log 4/3, and smoothing by 0.1 makes 0.26 of it.
    label = [0.2, 0.2, 0.0]
    soft = losses(BradleyTerry(), chosen, rejected, label=label)
    assert soft.tolist() == pytest.approx([math.log(2), 0.2 * math.log(4) + 0.8 * math.log(4 / 3), 0.0])
    smooth = losses(BradleyTerry(label_smoothing=0.1), chosen, rejected, label=label)[1]
    assert smooth.item() == pytest.approx(0.26 * math.log(4) + 0.74 * math.log(4 / 3))
    centred = losses(BradleyTerry(centering=0.5), chosen, rejected)
    assert centred.tolist() == pytest.approx([math.log(2) + 2, math.log(4) + 0.5 * math.log(3) ** 2, 400.0])


def test_gradient_of_the_bradley_terry_loss_by_hand():
    chosen, rejected = torch.tensor([0.5], requires_grad=True), torch.tensor([-0.25], requires_grad=True)
    objective = BradleyTerry(label_smoothing=0.1, centering=0.25)
    losses(objective, chosen, rejected, margin=[0.25], label=[0.75]).sum().backward()
    # d/dgap = σ(gap) − p with gap = 0.5 and p = 0.8 · 0.75 + 0.1; d/dr of the centring is 2 · 0.25 · (0.5 − 0.25).
    slope = 1 / (1 + math.exp(-0.5)) - 0.7
    assert chosen.grad.item() == pytest.approx(slope + 0.125, abs=1e-6)
    assert rejected.grad.item() == pytest.approx(-slope + 0.125, abs=1e-6)


def measured():
    rewards = np.array([[2.0, 1.0, 0.0, 3.0], [1.0, 1.0, 2.0, 0.0]])
    languages, subsets = np.array(["en-de", "en-de", "en-fr", "en-fr"]), np.array(["", "chat", "", "chat"])
    return MeasuredPairs(rewards, np.array([1.0, 2.0, 3.0, 4.0]), np.array([3, 0, 1, -2]), languages, subsets)


def test_metrics_by_hand():
    found = measure_pairs(measured())
    assert found["eval_accuracy"] == 0.5 and found["eval_accuracy_half_ties"] == 0.625
    assert found["eval_margin"] == 0.5 and found["eval_loss"] == 2.5
    assert found["eval_chosen_reward"] == 1.5 and found["eval_rejected_reward"] == 1.0
    assert found["eval_chosen_reward_std"] == pytest.approx(math.sqrt(1.25))
    sigmoid = [1 / (1 + math.exp(-gap)) for gap in (1.0, 0.0, -2.0, 3.0)]
    assert found["eval_brier"] == pytest.approx(sum((1 - p) ** 2 for p in sigmoid) / 4)
    # Each of the four has a bin of its own: σ(1) = 0.73 hits, σ(0) hits half, σ(2) = 0.88 misses, σ(3) = 0.95 hits.
    assert found["eval_ece"] == pytest.approx((1 - sigmoid[0] + 0 + 1 - sigmoid[2] + 1 - sigmoid[3]) / 4)
    assert found["eval_length_correlation"] == pytest.approx(np.corrcoef([1, 0, -2, 3], [3, 0, 1, -2])[0, 1])
    assert found["eval_accuracy_chosen_longer"] == 0.5 and found["eval_accuracy_chosen_shorter"] == 1.0


def test_metrics_have_slices_and_leave_out_what_is_not_defined():
    found = measure_pairs(measured())
    assert found["eval_accuracy/en-de"] == 0.5 and found["eval_margin/en-fr"] == 0.5
    assert found["eval_accuracy/subset/chat"] == 0.5 and found["eval_loss/subset/chat"] == 3.0
    assert "eval_accuracy_chosen_shorter/en-de" not in found and "eval_accuracy/subset/" not in found
    equal = measure_pairs(measured().select(np.array([False, True, False, False])))
    assert "eval_length_correlation" not in equal and all(math.isfinite(value) for value in equal.values())


def test_pairs_of_one_bin_make_one_calibration_error():
    gaps = np.array([0.1, 0.1, 0.1, -0.1])
    assert expected_calibration_error(gaps) == pytest.approx(0.75 - 1 / (1 + math.exp(-0.1)))


# Rows → ids.


def render(data, row, **training):
    settings = make_job(data, "nowhere", **training).training
    renderer = make_renderer(settings.model, settings.chat_template, settings.max_length)
    return render_row(row, renderer, settings)


def test_rendered_sides_share_the_prompt(data):
    row = preference(0, random.Random(0))
    found = render(data, row)
    assert not found["is_truncated"] and render(data, row | {"weight": 0.5})["weight"] == 0.5
    assert render(data, row | {"weight": None})["weight"] == 1.0
    assert (
        render(data, row | {"weight": 0.5}, objective={"type": "bradley_terry", "use_weight": False})["weight"] == 1.0
    )
    renderer = make_renderer(f"{data}/policy", None, 96)
    assert found["language"] == "en-de" and [found["weight"], *found["targets"]] == [1.0, 0.0, 1.0]
    assert found["sides"][0] == renderer.pair_ids(row["prompt"], row["chosen"][0]["content"]).ids
    turns = [{"role": "user", "content": "more"}, {"role": "assistant", "content": "good"}]
    assert found["reads"] == [[len(ids) - 1] for ids in found["sides"]]
    found = render(data, row | {"chosen": [*row["chosen"], *turns], "src_lang": None})
    assert found["sides"][0] == renderer.pair_ids([*row["prompt"], *row["chosen"], turns[0]], "good").ids
    assert found["language"] == "de"


@pytest.mark.parametrize(
    ("changes", "training", "reason"),
    [
        ({"chosen": None}, {}, "missing_field"),
        ({"group": None}, {}, "missing_field"),
        ({"chosen": []}, {}, "not_ending_in_assistant"),
        ({"rejected": message("hm", "user")}, {}, "not_ending_in_assistant"),
        ({"rejected": message(" ")}, {}, "empty_content"),
        ({"rejected": message("same"), "chosen": message("same")}, {}, "identical_responses"),
        ({"margin": None}, {"objective": {"type": "bradley_terry", "use_margin": True}}, "non_finite_margin"),
        ({"margin": math.inf}, {"objective": {"type": "bradley_terry", "use_margin": True}}, "non_finite_margin"),
        ({"label": 1.1}, {"objective": {"type": "bradley_terry", "use_label": True}}, "label_not_in_0_to_1"),
        ({"weight": -1.0}, {"objective": {"type": "bradley_terry", "use_weight": True}}, "weight_not_0_or_more"),
        ({"weight": "heavy"}, {"objective": {"type": "bradley_terry", "use_weight": True}}, "weight_not_0_or_more"),
        ({"chosen": message("good " * 120)}, {}, "overlength"),
        ({"chosen": message("good " * 120)}, {"on_overlength": "truncate_prompt_left"}, "overlength"),
        ({"prompt": message("one " * 120, "user")}, {}, "overlength"),
        ({"prompt": message("one")}, {}, "bad_role_order"),
        ({"prompt": [*message("one", "user"), *message("two", "user")]}, {}, "bad_role_order"),
        ({"prompt": message(None, "user")}, {}, "empty_content"),
        ({"tools": "{"}, {}, "tools_not_json"),
    ],
)
def test_pairs_that_are_no_use_have_a_reason(data, changes, training, reason):
    assert render(data, preference(0, random.Random(0)) | changes, **training) == reason


def test_rows_that_the_template_refuses_are_dropped_and_stray_headers_are_found(data, tmp_path):
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    (tmp_path / "strict.jinja").write_text(refusing + (data / "policy/chat_template.jinja").read_text())
    row = preference(0, random.Random(0))
    settings = {"chat_template": f"{tmp_path}/strict.jinja"}
    assert render(data, row, **settings)["weight"] == 1.0
    system = {"role": "system", "content": "be kind"}
    assert render(data, row | {"prompt": [system, *row["prompt"]]}, **settings) == "not_rendered"
    turn = "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
    (tmp_path / "early.jinja").write_text(turn + "<|im_start|>assistant ")
    with pytest.raises(ConfigError, match="such as the header of another answer"):
        check_renderer(make_job(data, "nowhere", chat_template=f"{tmp_path}/early.jinja").training)


def test_long_prompts_are_cut_when_asked_to(data):
    row = preference(0, random.Random(0)) | {"prompt": message("one " * 120, "user")}
    found = render(data, row, on_overlength="truncate_prompt_left")
    assert [len(ids) for ids in found["sides"]] == [96, 96] and found["is_truncated"]


# Training, in this process.


@pytest.fixture(scope="module")
def alone(process_group):
    """The environment that Ray Train gives the only worker of a run."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("LOCAL_RANK", "0")
        yield


def render_here(job):
    """What `render_rows` does with its tasks run in this process."""
    import ray

    from rayrm import cluster

    class Task:
        def __init__(self, function):
            self.remote = function

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "connect", lambda: None)
        patch.setattr(ray, "remote", lambda **options: Task)
        patch.setattr("rayrm.training.rendered.fetch", lambda results, what: list(results))
        return render_rows(job.input, job.output, job.training)


def start(job):
    """A trainer of this process with its rows rendered."""
    from rayrm.training.reward_loop import RewardTrainer

    assert not render_here(job)["counts"]["dropped"]
    return RewardTrainer(job, job.training.micro_batch_size)


def weights_of(trainer):
    return {name: p.detach().clone() for name, p in trainer.engine.module.network.named_parameters()}


def assert_same_weights(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_gradient_of_a_step_is_that_of_plain_torch(data, tmp_path, alone, monkeypatch):
    """Uneven micro batches add up to the gradient of the mean loss over the whole batch."""
    job = make_job(data, tmp_path / "run", warmup_fraction=0.0, held_out_fraction=0.0)
    trainer = start(job)
    from rayrm.models.reward_model import NewHead, load_reward_model

    model = load_reward_model(job.training.model, new_head=NewHead(job.training.seed))
    assert_same_weights(weights_of(trainer), dict(model.network.named_parameters()), 0.0)
    rows = batch_of_step(0, NUM_ROWS, 14, job.training.seed)
    losses = []
    for row in rows:
        ids = [torch.from_numpy(side[row]).long()[None] for side in trainer.rows.sides]
        rewards = [model(side, torch.tensor([side.shape[1] - 1]))[0][:, 0] for side in ids]
        losses.append(-torch.log(torch.sigmoid(rewards[0] - rewards[1])))
    torch.cat(losses).mean().backward()
    found = {}
    network = trainer.engine.module.network
    monkeypatch.setattr(
        trainer.engine, "step", lambda: found.update((name, p.grad.clone()) for name, p in network.named_parameters())
    )
    trainer.train_step()
    expected = {name: parameter.grad for name, parameter in model.network.named_parameters()}
    assert len(rows) == 14 and expected["score.weight"].norm() > 0.1
    assert_same_weights(found, expected, 2e-6)
    assert trainer.sums["loss"] == pytest.approx(sum(loss.item() for loss in losses), rel=1e-4)
    assert trainer.sums["rows"] == 14


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_an_interrupted_run_ends_like_one_that_was_not(data, tmp_path, alone, monkeypatch, zero_stage):
    import shutil

    from ray import train

    from rayrm.training.checkpoints import gather_state

    def report(metrics, checkpoint, checkpoint_dir_name):
        shutil.copytree(checkpoint.path, tmp_path / checkpoint_dir_name)

    monkeypatch.setattr(train, "report", report)
    job = make_job(data, tmp_path / "run", zero_stage=zero_stage, save_steps=3)
    whole = start(job)
    whole.train(show_progress=False)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-3", "step-6"]
    resumed = start(job)
    resumed.load(str(tmp_path / "step-3"))
    shutil.rmtree(tmp_path / "step-6")
    assert resumed.step == 3
    resumed.train(show_progress=False)
    states = [gather_state(trainer.engine.module.network) for trainer in (resumed, whole)]
    assert_same_weights(*states, 1e-7)
    assert states[0]["score.weight"].shape == (1, 64)
    timeless = [[{k: v for k, v in r.items() if k != "step_s"} for r in t.history] for t in (resumed, whole)]
    assert [[r["step"] for r in history] for history in timeless] == [[2, 4, 4, 6, 8, 8]] * 2
    for found, expected in zip(*timeless, strict=True):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_a_simple_preference_is_learned_and_evaluated_exactly(data, tmp_path, alone):
    trainer = start(make_job(data, tmp_path / "run", max_steps=12))
    before = trainer.evaluate()
    trainer.train(show_progress=False)
    after = trainer.history[-1]
    num = {
        name: [trainer.rows.languages[row] for row in trainer.rows.held_out].count(name) for name in ("en-de", "en-fr")
    }
    assert sum(num.values()) == len(trainer.rows.held_out) > 4
    assert after["eval_accuracy"] == 1.0 and after["eval_loss"] < 0.5 * before["eval_loss"]
    share = sum(before[f"eval_accuracy/{name}"] * num[name] for name in num) / sum(num.values())
    assert before["eval_accuracy"] == pytest.approx(share)


def test_no_operator_is_compiled_that_a_killed_worker_could_leave_locked(data, tmp_path, alone):
    from deepspeed.comm.torch import build_shm_op

    start(make_job(data, tmp_path / "run"))
    assert build_shm_op() is None


def test_micro_batches_do_not_change_the_result(data, tmp_path, alone):
    found = []
    for size in (1, 14):
        trainer = start(make_job(data, tmp_path / f"run{size}", micro_batch_size=size, max_steps=2))
        trainer.train(show_progress=False)
        found.append(weights_of(trainer))
    assert_same_weights(*found, 2e-5)


def test_low_rank_updates_are_merged_and_the_head_is_trained(data, tmp_path, alone):
    from rayrm.models.reward_model import NewHead, load_reward_model
    from rayrm.models.rewarder import Rendering, load_rewarder

    trainer = start(make_job(data, tmp_path / "run", lora={"r": 4, "alpha": 8, "dropout": 0.1}, max_steps=3))
    trainer.train(show_progress=False)
    probe = trainer.finish()["probe"]
    base = load_reward_model(f"{data}/policy", new_head=NewHead(1)).network.state_dict()
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert saved.keys() == base.keys()
    changed = {name for name, tensor in saved.items() if not torch.equal(tensor, base[name])}
    assert "score.weight" in changed and "model.layers.0.self_attn.q_proj.weight" in changed
    assert "model.embed_tokens.weight" not in changed and "model.norm.weight" not in changed
    rewarder = load_rewarder(str(tmp_path / "run" / "model"), Rendering(max_length=96))
    pairs = [(probe[0]["prompt"], probe[0][name][0]["content"]) for name in ("chosen", "rejected")]
    expected = np.ravel(probe[0]["outputs"])
    assert [reward for reward, _ in rewarder.rewards(pairs)] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("zero_stage", "checkpointing", "lora"), [(0, False, None), (3, True, None), (2, False, {"r": 4, "alpha": 8})]
)
def test_shared_prefixes_change_neither_losses_nor_weights(data, tmp_path, alone, zero_stage, checkpointing, lora):
    from rayrm.training.checkpoints import gather_state

    found = []
    for is_shared in (False, True):
        job = make_job(data, tmp_path / f"{is_shared}", zero_stage=zero_stage, shared_prefix=is_shared, lora=lora)
        parallelism = job.parallelism.model_copy(update={"gradient_checkpointing": checkpointing})
        trainer = start(job.model_copy(update={"parallelism": parallelism}))
        trainer.train(show_progress=False)
        records = [{k: v for k, v in r.items() if k != "step_s"} for r in trainer.history]
        found.append((records, gather_state(trainer.engine.module.network)))
    for plain, shared in zip(found[0][0], found[1][0], strict=True):
        # Ranks, unlike rewards, jump.
        smooth = [name for name in plain if "spearman" not in name]
        assert shared.keys() == plain.keys()
        assert [shared[n] for n in smooth] == pytest.approx([plain[n] for n in smooth], rel=2e-4, abs=2e-5)
    assert_same_weights(found[1][1], found[0][1], 1e-4)


def adapter_rewards(data, output, trainer, probe):
    """Rewards of a probe row by peft's adapter on the plain base model."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    plain = AutoModelForSequenceClassification.from_pretrained(f"{data}/policy", num_labels=1, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(plain, f"{output}/adapter").eval()
    sides = [
        trainer.renderer.pair_ids(probe["prompt"], probe[name][0]["content"]).ids for name in ("chosen", "rejected")
    ]
    with torch.no_grad():
        return [adapted(input_ids=torch.tensor([ids])).logits.item() for ids in sides]


def test_the_adapter_alone_has_the_updates_and_the_head(data, tmp_path, alone):
    trainer = start(make_job(data, tmp_path / "run", lora={"r": 4, "alpha": 8}, max_steps=3))
    trainer.train(show_progress=False)
    probe = trainer.finish()["probe"][0]
    expected = np.ravel(probe["outputs"])
    assert adapter_rewards(data, tmp_path / "run", trainer, probe) == pytest.approx(expected, abs=1e-5)


def test_a_4_bit_model_is_saved_with_what_its_bits_stand_for(data, tmp_path, alone):
    from rayrm.models.rewarder import Rendering, load_rewarder

    job = make_job(data, tmp_path / "run", lora={"r": 4, "alpha": 8}, load_in_4bit=True, max_steps=4)
    trainer = start(job)
    frozen = trainer.engine.module.network.model.layers[0].self_attn.q_proj.base_layer
    assert type(frozen).__name__ == "Linear4bit"
    trainer.train(show_progress=False)
    probe = trainer.finish()["probe"]
    rewarder = load_rewarder(f"{tmp_path}/run/model", Rendering(max_length=96))
    for row in probe:
        pairs = [(row["prompt"], row[name][0]["content"]) for name in ("chosen", "rejected")]
        assert [reward for reward, _ in rewarder.rewards(pairs)] == pytest.approx(np.ravel(row["outputs"]), abs=1e-4)
    saved, base = load_file(tmp_path / "run/model/model.safetensors"), load_file(data / "policy/model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert saved[name].dtype == torch.float32 and 0 < (saved[name] - base[name]).abs().mean() < 0.1
    assert "quantization_config" not in json.loads((tmp_path / "run/model/config.json").read_text())
    for changes, parallel, message in (({}, 3, "zero_stage to 2"), ({"lora": None}, 2, "set lora too")):
        with pytest.raises(ConfigError, match=message):
            make_job(data, tmp_path, zero_stage=parallel, **{"lora": {"r": 4}, "load_in_4bit": True, **changes})


def test_tools_of_a_row_are_shown_by_the_template(data, tmp_path):
    template = (
        "{% if tools %}tools: {{ tools | tojson }}\n{% endif %}" + (data / "policy/chat_template.jinja").read_text()
    )
    (tmp_path / "tools.jinja").write_text(template)
    row = preference(0, random.Random(0)) | {"tools": '[{"name": "search"}]'}
    found = render(data, row, chat_template=f"{tmp_path}/tools.jinja")
    renderer = make_renderer(f"{data}/policy", f"{tmp_path}/tools.jinja", 96)
    assert renderer.tokenizer.decode(found["sides"][0]).startswith('tools: [{"name": "search"}]')
    assert "tools" not in renderer.tokenizer.decode(render(data, row | {"tools": None})["sides"][0])
    with pytest.raises(ConfigError, match="'none' has no place for them"):
        render(data, row, chat_template="none")


def test_the_best_evaluation_gives_the_final_model(data, tmp_path, alone, monkeypatch):
    from rayrm.models.rewarder import Rendering, load_rewarder
    from rayrm.training.best import find_best

    merits = iter([0.5, 0.75, 0.75, 0.25])
    job = make_job(data, tmp_path / "run", eval_steps=2, best_by="accuracy_worst_language")
    trainer = start(job)
    evaluate, seen = trainer.evaluate, {}

    def evaluate_as_told():
        seen[trainer.step] = weights_of(trainer)
        return evaluate() | {"eval_accuracy_worst_language": next(merits)}

    monkeypatch.setattr(trainer, "evaluate", evaluate_as_told)
    trainer.train(show_progress=False)
    facts = trainer.finish()
    assert facts["steps"] == 8 and facts["best_step"] == 4
    assert facts["metrics"]["eval_accuracy_worst_language"] == 0.75
    assert_same_weights(load_file(tmp_path / "run/model/model.safetensors"), seen[4], 0.0)
    assert [path.name for path in (tmp_path / "run/best").iterdir()] == ["step-4"]
    assert start(job).best["step"] == find_best(job.output)["step"] == 4
    rewarder = load_rewarder(f"{tmp_path}/run/model", Rendering(max_length=96))
    row = facts["probe"][0]
    pairs = [(row["prompt"], row[name][0]["content"]) for name in ("chosen", "rejected")]
    assert [reward for reward, _ in rewarder.rewards(pairs)] == pytest.approx(np.ravel(row["outputs"]), abs=1e-5)


def test_a_best_that_nothing_measures_is_named(data, tmp_path, alone):
    from rayrm.training.best import read_merit

    assert read_merit({"eval_loss": 2.0, "eval_accuracy": 0.5}, "loss") == -2.0
    with pytest.raises(ConfigError, match="best_by is 'acuracy', which is no metric .* there are accuracy, loss"):
        read_merit({"eval_loss": 2.0, "eval_accuracy": 0.5}, "acuracy")
    with pytest.raises(ConfigError, match="nothing is held out"):
        make_job(data, tmp_path, held_out_fraction=0.0, best_by="accuracy")


# The whole job, on Ray.


@pytest.mark.ray
def test_two_workers_with_zero_3_end_like_one_and_are_verified(data, tmp_path, ray_cluster, alone):
    from rayrm.models.rewarder import load_rewarder

    trainer = start(make_job(data, tmp_path / "alone"))
    trainer.train(show_progress=False)
    job = make_job(data, tmp_path / "two", workers=2, zero_stage=3, save_steps=3)
    done = train_reward_model(job)
    saved = load_file(tmp_path / "two" / "model" / "model.safetensors")
    # Adam divides by the size of a gradient, so where that is rounding error a weight may go either way.
    for name, expected in weights_of(trainer).items():
        difference = (saved[name] - expected).abs()
        assert difference.max() < 2e-3 and difference.mean() < 1e-5, name
    assert done["steps"] == 8 and done["objective"] == BradleyTerry().model_dump()
    assert done["counts"]["read"] == NUM_ROWS == done["counts"]["train"] + done["counts"]["held_out"]
    assert done["metrics"]["eval_accuracy"] == pytest.approx(trainer.history[-1]["eval_accuracy"])
    assert done["metrics"]["eval_loss"] == pytest.approx(trainer.history[-1]["eval_loss"], abs=1e-4)
    rewarder = load_rewarder(str(tmp_path / "two" / "model"))
    assert rewarder.renderer.max_length == 96
    for row in done["probe"]:
        assert row["is_held_out"]
        pairs = [(row["prompt"], row[name][0]["content"]) for name in ("chosen", "rejected")]
        assert [reward for reward, _ in rewarder.rewards(pairs)] == pytest.approx(np.ravel(row["outputs"]), abs=1e-4)
    lines = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 4, 6, 8, 8]
    for found, expected in zip(lines, trainer.history, strict=True):
        assert found.get("loss", 0) == pytest.approx(expected.get("loss", 0), abs=1e-4)
    assert (tmp_path / "two" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (tmp_path / "two" / "state").glob("step-*")) == ["step-3", "step-6"]
    card = (tmp_path / "two/model/README.md").read_text()
    assert "objective `bradley_terry`" in card and f"| accuracy | {done['metrics']['eval_accuracy']:.4g} |" in card
    assert str(tmp_path) not in card
    assert train_reward_model(job) == done
    with pytest.raises(OutputExistsError, match="training.lr"):
        train_reward_model(make_job(data, tmp_path / "two", workers=2, zero_stage=3, lr=1e-4))


@pytest.mark.ray
@pytest.mark.vllm
def test_plain_transformers_and_vllm_give_the_rewards_of_training(data, tmp_path, ray_cluster):
    job = make_job(data, tmp_path / "run", workers=2, zero_stage=3, max_steps=3)
    done = train_reward_model(job)
    assert describe_counts(done["counts"] | {"truncated": 2}) == "60 rows read, 60 written, 2 of them truncated"
    renderer = make_renderer(job.training.model, None, 96)
    rows = [
        renderer.pair_ids(row["prompt"], row[name][0]["content"]).ids
        for row in done["probe"]
        for name in ("chosen", "rejected")
    ]
    expected = [reward for row in done["probe"] for reward in np.ravel(row["outputs"]).tolist()]
    assert np.std(expected) > 1e-2
    (tmp_path / "given.json").write_text(json.dumps({"model": f"{tmp_path}/run/model", "rows": rows}))
    for reader in ("transformers", "vllm"):
        words = [sys.executable, f"{Path(__file__).parent}/outside_readers.py", reader, f"{tmp_path}/given.json"]
        read = subprocess.run(words, capture_output=True, text=True, timeout=300)
        assert read.returncode == 0, read.stderr[-3000:]
        found = [logits[0] for logits in json.loads(read.stdout.splitlines()[-1])]
        np.testing.assert_allclose(found, expected, atol=1e-4, err_msg=reader)


def test_a_disk_that_is_full_leaves_no_half_of_a_model(data, tmp_path, alone):
    import resource
    import signal

    trainer = start(make_job(data, tmp_path / "run", max_steps=1))
    trainer.train(show_progress=False)
    before = {path.name for path in (tmp_path / "run").iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
        with pytest.raises(Exception, match="File too large|large"):
            trainer.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert {path.name for path in (tmp_path / "run").iterdir()} == before
    trainer.finish()
    assert (tmp_path / "run/model/model.safetensors").stat().st_size > 60_000


def test_settings_that_no_run_can_follow_are_found_before_it_starts(data, tmp_path, ray_cluster):
    for changes, message in (
        ({"router_loss": 0.1}, "is no mixture of experts"),
        ({"best_by": "acuracy"}, "best_by is 'acuracy', which is no metric"),
        ({"max_length": 29, "min_kept_fraction": 0.9}, "min_kept_fraction asks for 0.9"),
    ):
        with pytest.raises((ConfigError, SchemaError), match=message):
            train_reward_model(make_job(data, tmp_path / "run", **changes))
        assert not [path for path in (tmp_path / "run").glob("*") if path.name != "micro_batch.json"]


def test_templates_that_cannot_be_scored_claim_no_output(data, tmp_path):
    shutil.copytree(data / "policy", tmp_path / "mute")
    (tmp_path / "mute/chat_template.jinja").unlink()
    (tmp_path / "broken.jinja").write_text("{{ raise_exception('no such roles') }}")
    (tmp_path / "changing.jinja").write_text("{{ messages | length }}")
    for changes, error, message in (
        ({"model": f"{tmp_path}/mute"}, CheckpointError, "has no chat template"),
        ({"chat_template": f"{tmp_path}/broken.jinja"}, CheckpointError, "no such roles; set chat_template"),
        ({"chat_template": f"{tmp_path}/changing.jinja"}, ConfigError, "cannot be scored"),
    ):
        with pytest.raises(error, match=message):
            train_reward_model(make_job(data, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_errors_of_tasks_come_without_their_traceback(monkeypatch):
    import ray
    from ray.exceptions import RayTaskError

    def get(references):
        raise RayTaskError("render_shard", "Traceback", references[0]).as_instanceof_cause()

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "wait", lambda references: (references[:1], references[1:]))
    with pytest.raises(SchemaError) as found:
        fetch([SchemaError("no rows")], "testing")
    assert type(found.value) is SchemaError and str(found.value) == "no rows"
    with pytest.raises(RayTaskError):
        fetch([ValueError("a fault")], "testing")


@pytest.mark.ray
def test_faults_of_the_input_are_found_before_workers_start(data, tmp_path, ray_cluster):
    def run(name, rows=None, **training):
        path = tmp_path / f"{name}.parquet"
        pq.write_table(pq.read_table(data / "preferences.parquet") if rows is None else rows, path)
        job = make_job(data, tmp_path / name, **training).model_copy(update={"input": str(path)})
        return train_reward_model(job)

    with pytest.raises(SchemaError, match="lacks chosen"):
        run("columns", pa.table({"id": ["a"], "group": ["a"], "prompt": [[]], "rejected": [[]], "lang": ["de"]}))
    with pytest.raises(SchemaError, match="holds no rows"):
        run("empty", pq.read_table(data / "preferences.parquet").slice(0, 0))
    with pytest.raises(CheckpointError, match="no model"):
        run("model", model=f"{data}/nowhere")
    with pytest.raises(ConfigError, match="chat_template 'no' is no .jinja file"):
        run("template", chat_template="no")
    with pytest.raises(SchemaError, match=rf"{NUM_ROWS} of {NUM_ROWS} rows .* are longer than 8 tokens"):
        run("long", max_length=8, on_overlength="error")
    with pytest.raises(SchemaError, match=rf"None of the {NUM_ROWS} rows .* \({NUM_ROWS} overlength\)"):
        run("all", max_length=8)
    with pytest.raises(ConfigError, match="holds out none of the groups"):
        run("split", held_out_fraction=1e-6)
    assert not list(tmp_path.glob("*/started.json"))


@pytest.mark.ray
def test_a_saved_model_that_gives_other_rewards_is_refused(data, tmp_path, ray_cluster, alone):
    from rayrm.training.launch import TrainingWorkers
    from rayrm.training.probes import check_saved

    job = make_job(data, tmp_path / "run", max_steps=1)
    trainer = start(job)
    facts = trainer.finish()
    rendering = {"chat_template": None, "max_length": 96, "fingerprint": trainer.renderer.fingerprint()}
    mark = {"rendering": rendering, "readout": {"type": "last_token"}, "probe": facts["probe"]}
    given = (job.training.objective, "fp32", TrainingWorkers())
    check_saved(f"{tmp_path}/run/model", mark, *given)
    mark["probe"][0]["outputs"][1][0][0] += 0.01
    with pytest.raises(CheckpointError, match="before it was saved; it is not marked complete"):
        check_saved(f"{tmp_path}/run/model", mark, *given)


def exhausted_loop(given):
    """The loop of a machine with memory for one pair, which dies at the third step with more."""
    from rayrm.training import reward_loop

    step = reward_loop.RewardTrainer.train_step

    def train_step(self):
        if self.step >= 2 and self.micro_batch_size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        step(self)

    reward_loop.RewardTrainer.train_step = train_step
    return reward_loop.train_loop(given)


@pytest.mark.ray
def test_the_micro_batch_is_halved_when_memory_runs_out(data, tmp_path, ray_cluster, monkeypatch):
    from rayrm.training import reward_loop

    monkeypatch.setattr(reward_loop, "train_loop", exhausted_loop)
    job = make_job(data, tmp_path / "run", save_steps=2, max_steps=4)
    # What a driver that was killed left behind.
    files.write_json(str(tmp_path / "run/fault.json"), {"type": "CheckpointError", "message": "Of another time."})
    job = job.model_copy(update={"workers": job.workers.model_copy(update={"max_failures": 0})})
    done = train_reward_model(job)
    assert done["micro_batch_size"] == 1 and done["steps"] == 4
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "loss" in record] == [2, 4]
