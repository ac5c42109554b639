"""Supervised fine-tuning: rows to ids, one process in this test's own, two of them in Ray Train."""

import json
import os
import random
import shutil
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoTokenizer

from jobs.train_policy import main
from rayrm.config import build_config
from rayrm.errors import CheckpointError, ConfigError, SchemaError
from rayrm.models.creation import CreationConfig, create_model
from rayrm.models.rendering import Renderer
from rayrm.training.launch import Parallelism
from rayrm.training.order import LengthGrouped
from rayrm.training.policy import LOOPS, PolicyJob, check_policy
from rayrm.training.policy import train_policy as train_with_ray
from rayrm.training.policy_model import end_ids

SIZES = CreationConfig(vocab_size=320, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=2, max_length=128)
NUM_ROWS = 50
ROOT = Path(__file__).resolve().parents[1]


def prompt_row(index, rng):
    words = [rng.choice(["eins", "zwei", "drei"]) for _ in range(rng.randint(1, 9))]
    return {
        "id": f"r{index}",
        "group": f"g{index // 2}",
        "prompt": [{"role": "user", "content": " ".join(words)}],
        "source": " ".join(words),
        "reference": " ".join(reversed(words)),
        "lang": "de",
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A tiny model, and rows whose reference is the prompt backwards."""
    folder = tmp_path_factory.mktemp("policy")
    rng = random.Random(0)
    rows = [prompt_row(index, rng) for index in range(NUM_ROWS)]
    create_model([row["source"] for row in rows], SIZES, f"{folder}/base")
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    return folder


def values_of(data, output, workers=1, zero_stage=0, save_steps=100, **training):
    return {
        "input": f"{data}/rows.parquet",
        "output": str(output),
        "training": {
            "model": f"{data}/base",
            "max_length": 96,
            "lr": 1e-2,
            "global_batch_size": 8,
            "micro_batch_size": 4,
            "max_steps": 6,
            "eval_steps": 4,
            "seed": 1,
            **training,
        },
        "workers": {"num_workers": workers},
        "parallelism": {"zero_stage": zero_stage},
        "save_steps": save_steps,
        "log_steps": 1,
        "report_to": "none",
    }


def make_job(*args, **kwargs):
    return build_config(PolicyJob, values_of(*args, **kwargs), "the test")


def load(output):
    from transformers import AutoModelForCausalLM

    folder = Path(output) / "model"
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model, AutoTokenizer.from_pretrained(folder)


# Training, in this process.


@pytest.fixture
def alone(process_group):
    """The environment that Ray Train gives the only worker of a run; what a run adds to it is gone afterwards."""
    given = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    with mock.patch.dict(os.environ, {**given, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}):
        yield


class State:
    """What `ray.train.get_checkpoint` gives."""

    def __init__(self, path):
        self.path = str(path)

    @contextmanager
    def as_directory(self):
        yield self.path


@pytest.fixture
def run(alone, tmp_path, monkeypatch):
    """`run(job, state)` is the loop of one worker; the states that it reports are in `tmp_path`."""
    from accelerate.state import AcceleratorState
    from ray import train

    def report(metrics, checkpoint, checkpoint_dir_name):
        shutil.copytree(checkpoint.path, tmp_path / checkpoint_dir_name, dirs_exist_ok=True)

    def run(job, state=None):
        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.setattr(train, "report", report)
        monkeypatch.setattr(train, "get_checkpoint", lambda: state and State(state))
        return LOOPS[job.training.type]({"job": job, "template": check_policy(job), "show_progress": False})

    return run


def test_a_run_leaves_a_model_curves_and_facts(data, tmp_path, run):
    job = make_job(data, tmp_path / "run", held_out_fraction=0.2, micro_batch_size=2)
    facts = run(job)
    assert facts["steps"] == 6 and facts["objective"] == "sft" and facts["micro_batch_size"] == 2
    counts = facts["counts"]
    assert counts["trained"] + counts["held_out"] == NUM_ROWS and 0 < counts["held_out"] < 20
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == 6 and losses[-1] < losses[0] - 0.5
    evaluated = {record["step"]: record["eval_loss"] for record in records if "eval_loss" in record}
    assert list(evaluated) == [4, 6] and facts["eval_loss"] == evaluated[6] < losses[0] - 0.5
    assert facts["loss"] == losses[-1]
    assert (tmp_path / "run/loss.png").read_bytes().startswith(b"\x89PNG")
    model, tokenizer = load(tmp_path / "run")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert model.generation_config.eos_token_id == [end] and model.config.use_cache
    assert "<|im_start|>" in tokenizer.chat_template
    assert not list((tmp_path / "run").glob(".model-*"))


def test_loss_is_the_mean_over_the_tokens_of_references(data, tmp_path, run, monkeypatch):
    """The first record is the loss of plain transformers on the same rows, whatever the micro batch."""
    from transformers import AutoModelForCausalLM

    from rayrm.training import sft

    steps = []
    compute = sft.PolicyTrainer.compute_loss

    def spy(self, model, inputs, *args, **kwargs):
        steps.append({name: x.clone() for name, x in inputs.items()})
        return compute(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(sft.PolicyTrainer, "compute_loss", spy)
    run(make_job(data, tmp_path / "run", max_steps=1, micro_batch_size=2))
    assert len(steps) == 4
    model = AutoModelForCausalLM.from_pretrained(f"{data}/base")
    total = count = 0
    for inputs in steps:
        num = (inputs["labels"][:, 1:] != -100).sum()
        total, count = total + model(**inputs).loss * num, count + num
    record = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    assert record["loss"] == pytest.approx(float(total / count), rel=1e-5)


def test_packed_rows_do_not_see_each_other(data, tmp_path, run, monkeypatch):
    """The loss of rows that lie end to end is the loss of each of them alone."""
    from transformers import AutoModelForCausalLM

    from rayrm.training import sft

    batches = []
    compute = sft.PolicyTrainer.compute_loss

    def spy(self, model, inputs, *args, **kwargs):
        batch = {name: inputs[name][0].clone() for name in ("input_ids", "labels", "position_ids")}
        batches.append((batch, loss := compute(self, model, inputs)))
        return loss

    monkeypatch.setattr(sft.PolicyTrainer, "compute_loss", spy)
    settings = {"max_steps": 1, "global_batch_size": 2, "micro_batch_size": 2}
    run(make_job(data, tmp_path / "packed", packing=True, **settings))
    model = AutoModelForCausalLM.from_pretrained(f"{data}/base")
    ((batch, found),) = batches
    starts = [*(batch["position_ids"] == 0).nonzero().flatten().tolist(), len(batch["input_ids"])]
    assert len(starts) > 4
    total = count = 0
    for first, last in pairwise(starts):
        ids, labels = (batch[name][None, first:last] for name in ("input_ids", "labels"))
        num = (labels[:, 1:] != -100).sum()
        total, count = total + model(input_ids=ids, labels=labels).loss * num, count + num
    assert float(found.detach()) == pytest.approx(float((total / count).detach()), rel=1e-4)


def test_an_interrupted_run_ends_like_one_that_was_not(data, tmp_path, run):
    """Even with another micro batch, and in the second epoch."""
    settings = {"max_steps": 9, "save_steps": 3}
    run(make_job(data, tmp_path / "whole", **settings))
    shutil.rmtree(tmp_path / "step-9")
    facts = run(make_job(data, tmp_path / "resumed", micro_batch_size=2, **settings), tmp_path / "step-3")
    assert facts["steps"] == 9
    (whole, _), (resumed, _) = load(tmp_path / "whole"), load(tmp_path / "resumed")
    for (name, found), expected in zip(resumed.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    steps = [json.loads(line)["step"] for line in (tmp_path / "resumed/metrics.jsonl").read_text().splitlines()]
    assert steps[:9] == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    # A run that died behind its last step trains no more.
    again = run(make_job(data, tmp_path / "again", **settings), tmp_path / "step-9")
    assert again["steps"] == 9
    assert torch.equal(load(tmp_path / "again")[0].lm_head.weight, resumed.lm_head.weight)


def test_updates_are_merged_and_new_tokens_have_embeddings(data, tmp_path, run):
    from transformers import AutoModelForCausalLM

    lora = {"lora": {"r": 4, "alpha": 8, "targets": ["q_proj", "v_proj"]}}
    run(make_job(data, tmp_path / "plain", **lora))
    run(make_job(data, tmp_path / "grown", added_special_tokens=["<|im_end|>", "<|new|>"], **lora))
    base = dict(AutoModelForCausalLM.from_pretrained(f"{data}/base").named_parameters())
    model, _ = load(tmp_path / "plain")
    changed = {name for name, tensor in model.named_parameters() if not torch.equal(tensor, base[name])}
    assert changed == {f"model.layers.{i}.self_attn.{m}_proj.weight" for i in range(2) for m in "qv"}
    model, tokenizer = load(tmp_path / "grown")
    rows = len(base["model.embed_tokens.weight"])
    assert tokenizer.convert_tokens_to_ids("<|new|>") == rows and len(model.get_input_embeddings().weight) == rows + 1
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert not torch.equal(model.lm_head.weight[:rows], base["model.embed_tokens.weight"])


def test_a_template_of_ones_own_is_saved(data, tmp_path, run):
    turn = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}</s>{% endfor %}"
    template = turn + "{% if add_generation_prompt %}[assistant] {% endif %}"
    (tmp_path / "own.jinja").write_text(template)
    facts = run(make_job(data, tmp_path / "run", chat_template=str(tmp_path / "own.jinja"), max_steps=1))
    model, tokenizer = load(tmp_path / "run")
    assert tokenizer.chat_template == template
    names = tokenizer.convert_ids_to_tokens(model.generation_config.eos_token_id)
    assert names == ["</s>", "<|im_end|>"] and facts["counts"]["trained"] == NUM_ROWS


@pytest.mark.parametrize(
    ("behind", "names"),
    [
        ("<|im_end|>\n", ["<|im_end|>"]),
        # The next turn's BOS, as in Llama 2, and a token behind the turn's own, as in Phi 3.
        (" </s><s>", ["</s>", "<|im_end|>"]),
        ("</s>\n<|im_end|>", ["</s>", "<|im_end|>"]),
        ("\n### ", ["<|im_end|>"]),
        (None, ["<|im_end|>"]),
    ],
)
def test_generation_ends_with_the_turn(data, behind, names):
    tokenizer = AutoTokenizer.from_pretrained(f"{data}/base")
    tokenizer.bos_token = "<s>"
    turn = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}" + f"{behind}" + "{% endfor %}"
    renderer = Renderer(tokenizer, None if behind is None else turn)
    assert tokenizer.convert_ids_to_tokens(end_ids(renderer)) == names


def test_rows_that_cannot_be_learned_are_counted(data, tmp_path):
    from rayrm.training.examples import read_examples

    rng = random.Random(1)
    rows = [prompt_row(index, rng) for index in range(4)]
    rows[0] |= {"reference": None}
    rows[1] |= {"reference": "eins " * 90}
    rows[2] |= {"prompt": [{"role": "user", "content": "zwei " * 90}]}
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    tokenizer = AutoTokenizer.from_pretrained(f"{data}/base")
    renderer = Renderer(tokenizer, tokenizer.chat_template, 64)
    train, held_out, counts = read_examples(f"{tmp_path}/rows.parquet", renderer, 0.0, 0)
    assert held_out is None
    assert counts == {
        "read": 4,
        "trained": 2,
        "held_out": 0,
        "truncated": 1,
        "dropped": {"no_reference": 1, "overlength": 1},
    }
    assert len(train[0]["input_ids"]) == 64
    rendered = renderer.pair_ids(rows[3]["prompt"], rows[3]["reference"])
    assert list(train[1]["input_ids"]) == rendered.ids
    with pytest.raises(SchemaError, match="holds out no row"):
        read_examples(f"{tmp_path}/rows.parquet", renderer, 1e-6, 0)
    assert list(train[1]["labels"]) == [-100] * rendered.num_prompt + rendered.ids[rendered.num_prompt :]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zero_stage": 2, "offload_parameters": True}, "needs zero_stage 3, not 2"),
        ({"zero_stage": 0, "offload_optimizer": True}, "needs zero_stage 1 or more"),
    ],
)
def test_only_what_is_partitioned_is_offloaded(settings, message):
    with pytest.raises(ConfigError, match=message):
        build_config(Parallelism, settings, "the test")


# The order of rows.


def test_every_epoch_takes_every_row_once_and_rows_of_like_length_together():
    lengths = [3, 90, 4, 91, 5, 92, 6, 93, 50]
    order = LengthGrouped(lengths, 4, seed=3)
    first = list(order)
    assert list(order) == first
    order.set_epoch(1)
    assert list(order) != first
    for rows in (first, list(order)):
        assert sorted(rows) == list(range(9)) and len(rows) == len(order)
        for batch in (rows[:4], rows[4:8]):
            near = sorted(lengths[row] for row in batch)
            # Short rows with short ones, long with long: only the row of 50 may stand in either.
            assert near[-1] - near[0] <= 47


# What is checked first.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"global_batch_size": 9}, "no multiple"),
        ({"load_in_8bit": True}, "set lora too"),
        ({"load_in_8bit": True, "lora": {}}, "needs GPUs"),
        ({"type": "magic"}, "type"),
    ],
)
def test_settings_that_do_not_fit_together(data, settings, message):
    with pytest.raises(ConfigError, match=message):
        make_job(data, "nowhere", **settings)


def test_missing_things_are_told_before_anything_starts(data, tmp_path):
    shutil.copytree(data / "base", tmp_path / "mute")
    (tmp_path / "mute/chat_template.jinja").unlink()
    assert AutoTokenizer.from_pretrained(tmp_path / "mute").chat_template is None
    with pytest.raises(CheckpointError, match="no chat template"):
        check_policy(make_job(data, "nowhere", model=f"{tmp_path}/mute"))
    with pytest.raises(CheckpointError, match="no model"):
        check_policy(make_job(data, "nowhere", model=f"{tmp_path}/absent"))
    rows = pq.read_table(data / "rows.parquet").drop_columns("reference")
    pq.write_table(rows, tmp_path / "rows.parquet")
    words = [f"input={tmp_path}/rows.parquet", f"output={tmp_path}/out", f"training.model={data}/base"]
    with pytest.raises(SchemaError, match="no reference in any row"):
        main(words)
    with pytest.raises(ConfigError, match="holds out 0 of the 25 groups"):
        main([f"input={data}/rows.parquet", *words[1:], "training.held_out_fraction=1e-6"])
    assert not (tmp_path / "out").exists()
    assert check_policy(make_job(data, "nowhere", model=f"{tmp_path}/mute", chat_template="none")) is None


# Ray Train.


def words_of(values, prefix=""):
    words = []
    for name, value in values.items():
        words += words_of(value, f"{prefix}{name}.") if isinstance(value, dict) else [f"{prefix}{name}={value}"]
    return words


@pytest.mark.slow
@pytest.mark.ray
def test_two_workers_under_zero_3(data, tmp_path, ray_cluster):
    words = words_of(values_of(data, tmp_path / "run", workers=2, zero_stage=3, max_steps=4, held_out_fraction=0.2))
    main([*words, "report_to=tensorboard"])
    mark = json.loads((tmp_path / "run/model/rayrm.json").read_text())
    assert mark["steps"] == 4 and mark["objective"] == "sft" and mark["rendering"]["pooling"] == "last_attended"
    model, _ = load(tmp_path / "run")
    assert all(tensor.numel() and torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert losses[3] < losses[0]
    shards = sorted(path.name for path in (tmp_path / "run/state/step-4/global_step4").iterdir())
    assert len([name for name in shards if "optim_states" in name]) == 2
    assert list((tmp_path / "run/logs").glob("events*"))
    before = os.stat(tmp_path / "run/model/model.safetensors").st_mtime_ns
    main(words)
    assert os.stat(tmp_path / "run/model/model.safetensors").st_mtime_ns == before


def exhausted_loop(config):
    """The loop of a machine with memory for two rows, which dies at the third step with more."""
    from rayrm.training import sft

    step = sft.PolicyTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step >= 3 and self.args.per_device_train_batch_size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return step(self, *args, **kwargs)

    sft.PolicyTrainer.training_step = training_step
    return sft.train_loop(config)


@pytest.mark.slow
@pytest.mark.ray
def test_the_micro_batch_is_halved_when_memory_runs_out(data, tmp_path, ray_cluster, monkeypatch):
    from rayrm.training import policy

    monkeypatch.setitem(policy.LOOPS, "sft", exhausted_loop)
    job = make_job(data, tmp_path / "run", save_steps=2)
    job = job.model_copy(update={"workers": job.workers.model_copy(update={"max_failures": 0})})
    facts = train_with_ray(job, check_policy(job))
    assert facts["micro_batch_size"] == 2 and facts["steps"] == 6
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 3, 4, 5, 6]
