"""Preference optimization: rows to ids, one process in this test's own, two of them in Ray Train."""

import json
import math
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from test_policy import SIZES, alone, load, make_job, run, values_of, words_of  # noqa: F401

from jobs.train_policy import main
from rayrm.errors import ConfigError, SchemaError
from rayrm.models.creation import create_model
from rayrm.training.policy import check_policy

NUM_ROWS = 48
PAIRS = {"type": "dpo", "lr": 2e-3, "beta": 0.4}


def answer(text):
    return [{"role": "assistant", "content": text}]


def preference_row(index, rng):
    words = [rng.choice(["eins", "zwei", "drei"]) for _ in range(rng.randint(2, 9))]
    return {
        "id": f"r{index}",
        "group": f"g{index // 2}",
        "prompt": [{"role": "user", "content": " ".join(words)}],
        "chosen": answer(" ".join(reversed(words)) + " gut"),
        "rejected": answer(" ".join(words[1:]) + " schlecht"),
        "margin": rng.random(),
        "lang": "de",
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A tiny model, and pairs whose chosen side ends with another word than the rejected one."""
    folder = tmp_path_factory.mktemp("dpo")
    rng = random.Random(0)
    rows = [preference_row(index, rng) for index in range(NUM_ROWS)]
    create_model([row["chosen"][0]["content"] for row in rows], SIZES, f"{folder}/base")
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    return folder


def records_of(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def log_probabilities(model, ids, mask):
    """log π of each marked token and how many there are, by row, by plain transformers in fp64."""
    attention = (torch.cumsum(mask.flip(1), 1) > 0).flip(1).long()
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=attention).logits.double()
    scores = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return (scores * mask[:, 1:]).sum(1), mask[:, 1:].sum(1)


def changed_copy(data, folder):
    """A policy that is no longer its reference."""
    from transformers import AutoModelForCausalLM

    generator = torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(f"{data}/base", dtype=torch.float64)
    for tensor in model.parameters():
        tensor.data += 0.02 * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
    return model


@pytest.mark.parametrize("precompute", [False, True])
def test_the_loss_of_a_step_is_that_of_the_formula(data, tmp_path, run, monkeypatch, precompute):  # noqa: F811
    """By plain transformers in fp64, with a policy that is not its reference, whatever the micro batch."""
    from transformers import AutoModelForCausalLM

    from rayrm.training import dpo

    policy, reference = changed_copy(data, tmp_path), AutoModelForCausalLM.from_pretrained(f"{data}/base").double()
    steps = []
    compute, load_both = dpo.PairTrainer._compute_loss, dpo.load_policy

    def load_changed(*args):
        model = load_both(*args)
        if len(args) == 4:
            model.load_state_dict(policy.float().state_dict())
            policy.double()
        return model

    def spy(self, model, inputs, return_outputs):
        steps.append({name: x.clone() for name, x in inputs.items()})
        return compute(self, model, inputs, return_outputs)

    monkeypatch.setattr(dpo, "load_policy", load_changed)
    monkeypatch.setattr(dpo.PairTrainer, "_compute_loss", spy)
    settings = {**PAIRS, "max_steps": 1, "micro_batch_size": 2, "sft_weight": 2.0, "precompute_reference": precompute}
    run(make_job(data, tmp_path / "run", **settings))
    assert len(steps) == 4 and ("ref_chosen_logps" in steps[0]) == precompute
    losses, sft_losses, margins = [], [], []
    for inputs in steps:
        ids, mask = inputs["input_ids"], inputs["completion_mask"]
        logps, lengths = log_probabilities(policy, ids, mask)
        ratios = logps - log_probabilities(reference, ids, mask)[0]
        chosen, rejected = ratios.chunk(2)
        margins += (0.4 * (chosen - rejected)).tolist()
        sft_losses += (-logps / lengths).chunk(2)[0].tolist()
    losses = [math.log1p(math.exp(-margin)) for margin in margins]
    record = records_of(tmp_path / "run")[0]
    assert len(losses) == 8 and max(map(abs, margins)) > 0.1
    assert record["sft_loss"] == pytest.approx(sum(sft_losses) / 8, rel=1e-5)
    assert record["loss"] == pytest.approx(sum(losses) / 8 + 2.0 * sum(sft_losses) / 8, rel=1e-5)
    assert record["rewards/margins"] == pytest.approx(sum(margins) / 8, rel=1e-3, abs=1e-5)
    assert record["rewards/accuracies"] == pytest.approx(sum(margin > 0 for margin in margins) / 8)


def test_a_run_leaves_a_model_that_prefers_the_chosen_sides(data, tmp_path, run):  # noqa: F811
    job = make_job(data, tmp_path / "run", **PAIRS, held_out_fraction=0.25, max_steps=8)
    facts = run(job)
    assert facts["objective"] == "dpo" and facts["steps"] == 8
    assert facts["counts"]["trained"] + facts["counts"]["held_out"] == NUM_ROWS
    first, *_ = records = records_of(tmp_path / "run")
    # Before the first step the policy is its reference.
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    evaluated = [record for record in records if "eval_loss" in record]
    assert [record["step"] for record in evaluated] == [4, 8]
    assert facts["eval_rewards/accuracies"] == evaluated[-1]["eval_rewards/accuracies"] > 0.9
    assert facts["eval_rewards/margins"] > 0.5 > facts["eval_loss"]
    model, tokenizer = load(tmp_path / "run")
    assert model.generation_config.eos_token_id == [tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_an_interrupted_run_ends_like_one_that_was_not(data, tmp_path, run):  # noqa: F811
    """Even with another micro batch, and in the second epoch; the reference stays the start model."""
    settings = {**PAIRS, "max_steps": 8, "save_steps": 4, "sft_weight": 1.0}
    run(make_job(data, tmp_path / "whole", **settings))
    facts = run(make_job(data, tmp_path / "resumed", micro_batch_size=2, **settings), tmp_path / "step-4")
    assert facts["steps"] == 8
    (whole, _), (resumed, _) = load(tmp_path / "whole"), load(tmp_path / "resumed")
    for (name, found), expected in zip(resumed.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    shared = [[record["loss"] for record in records_of(tmp_path / name)[:8]] for name in ("whole", "resumed")]
    assert shared[0] == pytest.approx(shared[1], abs=1e-4)


def test_with_lora_the_reference_is_the_model_without_its_updates(data, tmp_path, run, monkeypatch):  # noqa: F811
    from transformers import AutoModelForCausalLM

    from rayrm.training import dpo

    seen = []
    compute = dpo.PairTrainer._compute_loss

    def spy(self, model, inputs, return_outputs):
        loss = compute(self, model, inputs, return_outputs)
        assert self.ref_model is None and list(self.model.peft_config) == ["default"]
        logps, _ = log_probabilities(base, inputs["input_ids"], inputs["completion_mask"])
        with self.model.disable_adapter():
            found = self.compute_ref_log_probs(self.model, inputs)
        seen.append((torch.cat(found).double(), logps))
        return loss

    base = AutoModelForCausalLM.from_pretrained(f"{data}/base").double()
    monkeypatch.setattr(dpo.PairTrainer, "_compute_loss", spy)
    settings = {**PAIRS, "lora": {"r": 4, "alpha": 8, "targets": ["q_proj", "v_proj"]}, "max_steps": 4}
    run(make_job(data, tmp_path / "run", **settings))
    losses = [record["loss"] for record in records_of(tmp_path / "run") if "loss" in record]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and losses[-1] < losses[0] - 0.01
    assert len(seen) == 8
    for found, expected in seen:
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
    start, (model, _) = dict(base.float().named_parameters()), load(tmp_path / "run")
    changed = {name for name, tensor in model.named_parameters() if not torch.equal(tensor, start[name])}
    assert changed == {f"model.layers.{i}.self_attn.{m}_proj.weight" for i in range(2) for m in "qv"}


# Rows.


def test_rows_that_cannot_be_learned_are_counted(data, tmp_path):
    from transformers import AutoTokenizer

    from rayrm.models.rendering import Renderer
    from rayrm.training.dpo import COLUMNS, pair_lengths, read_pairs

    rng = random.Random(1)
    rows = [preference_row(index, rng) for index in range(9)]
    rows[0] |= {"rejected": rows[0]["chosen"]}
    rows[1] |= {"chosen": answer(" ")}
    rows[2] |= {"rejected": answer("eins " * 90)}
    rows[3] |= {"prompt": [{"role": "user", "content": "zwei " * 90}]}
    rows[4] |= {"chosen": [{"role": "user", "content": "nein"}]}
    rows[5] |= {"chosen": None}
    turn = {"role": "user", "content": "und?"}
    rows[6] |= {"chosen": [*answer("a"), turn, *answer("b")], "rejected": [*answer("c"), turn, *answer("d")]}
    rows[7] |= {"prompt": answer("ich zuerst")}
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    tokenizer = AutoTokenizer.from_pretrained(f"{data}/base")
    renderer = Renderer(tokenizer, tokenizer.chat_template, 64)
    train, held_out, counts = read_pairs(f"{tmp_path}/rows.parquet", renderer, 0.0, 0)
    assert held_out is None and train.column_names == list(COLUMNS)
    assert counts == {
        "read": 9,
        "trained": 2,
        "held_out": 0,
        "truncated": 1,
        "dropped": {
            "bad_role_order": 1,
            "different_prompts": 1,
            "empty_content": 1,
            "identical_responses": 1,
            "missing_field": 1,
            "not_ending_in_assistant": 1,
            "overlength": 1,
        },
    }
    # The long prompt lost its beginning for the longer side, and both sides are whole.
    for row, found in zip((rows[3], rows[8]), train, strict=True):
        for side in ("chosen", "rejected"):
            whole = renderer.pair_ids(row["prompt"], row[side][0]["content"])
            assert found[f"{side}_ids"] == whole.ids[whole.num_prompt :]
            assert (whole.ids[: whole.num_prompt])[-len(found["prompt_ids"]) :] == found["prompt_ids"]
    assert pair_lengths(train)[0] == 64
    with pytest.raises(SchemaError, match="holds out no row"):
        read_pairs(f"{tmp_path}/rows.parquet", renderer, 1e-6, 0)


# What is checked first.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "robust"}, "go together"),
        ({"label_smoothing": 0.1}, "go together"),
        ({"precompute_reference": True, "lora": {}}, "with lora there is none"),
        ({"lora": {"dropout": 0.1}}, "dropout is off"),
        ({"packing": True}, "packing"),
        ({"beta": 0.0}, "beta"),
    ],
)
def test_settings_that_do_not_fit_together(data, settings, message):
    with pytest.raises(ConfigError, match=message):
        make_job(data, "nowhere", **{**PAIRS, **settings})


def test_each_training_names_the_rows_that_it_needs(data, tmp_path):
    with pytest.raises(SchemaError, match="no reference in any row.*training.type=dpo"):
        check_policy(make_job(data, "nowhere"))
    rows = [{**preference_row(0, random.Random(0)), "reference": "eins"}]
    prompts = pa.Table.from_pylist(rows).drop_columns(["chosen", "rejected", "margin"])
    pq.write_table(prompts, tmp_path / "rows.parquet")
    words = [f"input={tmp_path}/rows.parquet", f"output={tmp_path}/out", f"training.model={data}/base"]
    with pytest.raises(SchemaError, match="is not a file of Preference rows: it lacks chosen, rejected"):
        main([*words, "training.type=dpo"])
    assert not (tmp_path / "out").exists()


# Ray Train.


@pytest.mark.slow
@pytest.mark.ray
def test_two_workers_under_zero_3_train_like_one(data, tmp_path, run, ray_cluster):  # noqa: F811
    settings = {**PAIRS, "max_steps": 4, "sft_weight": 1.0, "held_out_fraction": 0.25, "precompute_reference": True}
    run(make_job(data, tmp_path / "one", **settings))
    main(words_of(values_of(data, tmp_path / "two", workers=2, zero_stage=3, **settings)))
    mark = json.loads((tmp_path / "two/model/rayrm.json").read_text())
    assert mark["objective"] == "dpo" and mark["eval_rewards/margins"] > 0
    one, two = ([r["loss"] for r in records_of(tmp_path / name) if "loss" in r] for name in ("one", "two"))
    assert two == pytest.approx(one, abs=1e-4)
    evaluated = [records_of(tmp_path / name)[4] for name in ("one", "two")]
    for metric in ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins", "eval_sft_loss"):
        assert evaluated[1][metric] == pytest.approx(evaluated[0][metric], abs=1e-4)
    whole, found = load(tmp_path / "one")[0], load(tmp_path / "two")[0]
    for (name, tensor), expected in zip(found.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(tensor, expected, atol=1e-3, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
