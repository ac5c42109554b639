"""Losses and gradients of the objectives by hand, what they make of a row, and each of them learning something simple."""

import json
import math
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import test_train_reward_model as base
import torch
from pydantic import TypeAdapter

from rayrm.errors import CheckpointError, ConfigError, SchemaError
from rayrm.models.readouts import Comparison, Encoded, LastToken, Ratings, Steps
from rayrm.models.rewarder import Rendering, load_rewarder
from rayrm.training.objectives import OBJECTIVES, AnyObjective
from rayrm.training.objectives.base import Measured
from rayrm.training.objectives.comparison import PairwiseComparison
from rayrm.training.objectives.pairs import Odin, correlation
from rayrm.training.objectives.ratings import OutcomeReward, Regression
from rayrm.training.objectives.steps import ProcessReward
from rayrm.training.rendered import make_renderer, render_row
from rayrm.training.reward_metrics import measure_ratings, measure_verdicts, rank
from rayrm.training.reward_model import train_reward_model

NAN = math.nan
LN2, LN3, LN4 = math.log(2), math.log(3), math.log(4)
data = base.data
alone = base.alone


def tensor(*values):
    return torch.tensor(values, requires_grad=True)


def test_every_tag_is_that_of_its_objective():
    given = {"regression": {"ratings": ["helpful"]}, "gated": {"objectives": ["helpful"], "ratings": "x"}}
    for tag, kind in OBJECTIVES.items():
        assert type(TypeAdapter(AnyObjective).validate_python({"type": tag, **given.get(tag, {})})) is kind


# Regression.


def regress(outputs, targets, **settings):
    objective = Regression(ratings=tuple("ab"[: outputs.shape[-1]]), **settings)
    return objective.losses(outputs[None, :, None], torch.tensor(targets))


def test_squared_error_of_the_ratings_that_a_row_has_by_hand():
    outputs = tensor([1.0, 5.0], [2.0, -1.0])
    losses = regress(outputs, [[3.0, 4.0], [NAN, 1.0]])
    assert losses.tolist() == [(4 + 1) / 2, 4.0]
    losses.sum().backward()
    assert outputs.grad.tolist() == [[-2.0, 1.0], [0.0, -4.0]]


def test_huber_loss_by_hand():
    outputs = tensor([0.5, 3.0])
    losses = regress(outputs, [[0.0, 0.0]], loss="huber", huber_delta=2.0)
    # 0.5² / 2 within delta; 2 · (3 − 1) beyond it.
    assert losses.tolist() == [(0.125 + 4.0) / 2]
    losses.sum().backward()
    assert outputs.grad.tolist() == [[0.25, 1.0]]


def test_cross_entropy_of_ratings_by_hand():
    outputs = tensor([0.0, LN3], [-200.0, 8.0])
    losses = regress(outputs, [[1.0, 0.25], [1.0, 0.0]], loss="bce")
    # σ(log 3) = 3/4: −¼ log ¾ − ¾ log ¼; a logit of 8 that should be 0 costs 8.
    second = -0.25 * math.log(0.75) + 0.75 * LN4
    assert losses.tolist() == pytest.approx([(LN2 + second) / 2, (200 + 8.000335) / 2], rel=1e-6)
    losses.sum().backward()
    assert outputs.grad[0].tolist() == pytest.approx([-0.25, 0.25])


def test_ratings_are_learned_in_their_own_scale_and_given_back_in_the_rows_scale():
    targets = np.array([[1.0, 10.0], [3.0, NAN], [NAN, 30.0]])
    objective = Regression(ratings=("a", "b"), weights={"b": 2.0})
    readout = objective.readout(targets)
    assert readout.means == (2.0, 20.0) and readout.stds == (1.0, 10.0) and readout.weights == (0.0, 2.0)
    learned = objective.to_units(targets.astype(np.float32), readout)
    np.testing.assert_array_equal(learned, np.float32([[-1, -1], [1, NAN], [NAN, 1]]))
    assert readout.ratings([[0.5, -1.0]]) == {"a": 2.5, "b": 10.0} and readout.reward([[0.5, -1.0]]) == 20.0
    plain = Regression(ratings=("a", "b"), standardize=False).readout(targets)
    assert plain.reward([[1.0, 4.0]]) == 2.5
    logits = Regression(ratings=("a",), loss="bce").readout(targets[:, :1])
    assert logits.reward([[LN3]]) == pytest.approx(0.75)
    assert Regression(ratings=("a",)).readout(np.array([[4.0], [4.0]])).stds == (1.0,)
    with pytest.raises(SchemaError, match="No training row has the rating b; leave it out"):
        Regression(ratings=("a", "b")).readout(targets[:2] * [[1.0, NAN]])


def test_ratings_that_are_not_there_are_named():
    schema = pa.schema({"ratings": pa.struct([("helpful", pa.float64())])})
    with pytest.raises(SchemaError, match=r"Column 'ratings' of 'x' lacks honest; it has helpful."):
        Regression(ratings=("helpful", "honest")).check_schema(schema, "'x'")
    with pytest.raises(SchemaError, match="lacks correct; it has no fields"):
        OutcomeReward().check_schema(pa.schema({"ratings": pa.float64()}), "'x'")
    with pytest.raises(ValueError, match="weights names c"):
        Regression(ratings=("a",), weights={"c": 1.0})
    with pytest.raises(ValueError, match="a rating stands twice"):
        Regression(ratings=("a", "a"))


# Outcome and process rewards.


def test_outcome_loss_by_hand():
    logits = tensor(0.0, LN3, 800.0)
    losses = OutcomeReward().losses(logits[None, :, None, None], torch.tensor([[1.0], [0.5], [0.0]]))
    assert losses.tolist() == pytest.approx([LN2, (math.log(4 / 3) + LN4) / 2, 800.0])
    losses.sum().backward()
    assert logits.grad.tolist() == pytest.approx([-0.5, 0.25, 1.0])


def test_process_loss_is_the_mean_over_the_labelled_steps_by_hand():
    logits = tensor([0.0, LN3, 5.0], [0.0, 9.0, 9.0])
    targets = torch.tensor([[1.0, 0.0, NAN, NAN], [0.0, NAN, NAN, NAN]])
    losses = ProcessReward().losses(logits[None, :, :, None], targets)
    assert losses.tolist() == pytest.approx([(LN2 + LN4) / 2, LN2])
    losses.sum().backward()
    assert logits.grad.flatten().tolist() == pytest.approx([-0.25, 0.375, 0.0, 0.5, 0.0, 0.0])
    hits = ProcessReward().track(logits[None, :, :, None].detach(), targets)["accuracy"]
    assert hits.tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("aggregate", "expected"), [("mean", 5 / 12), ("min", 0.25), ("product", 0.0625), ("last", 0.25)]
)
def test_reward_of_steps_by_hand(aggregate, expected):
    assert Steps(aggregate=aggregate).reward([[0.0], [0.0], [-LN3]]) == pytest.approx(expected)


def test_steps_are_read_at_their_last_token(data):
    renderer = make_renderer(f"{data}/policy", None, 96)
    prompt, steps = base.message("one two", "user"), ["three", "good one", "bad"]
    found = Steps().encode_steps(renderer, prompt, steps)
    tokenizer = renderer.tokenizer
    head = renderer.prompt_text(prompt)
    for position, num in zip(found.reads, (1, 2, 3), strict=True):
        expected = head + "".join(step + "\n\n" for step in steps[:num])
        assert tokenizer.decode(found.ids[: position + 1]) == expected
    assert Steps().encode(renderer, prompt, "three\n\ngood one\n\n\n\nbad") == found
    assert Steps().encode(renderer, prompt, " \n\n").status == "empty"
    short = make_renderer(f"{data}/policy", None, len(found.ids) - 3)
    cut = Steps().encode_steps(short, prompt, steps)
    assert cut.status == "truncated" and cut.ids == found.ids[3:] and cut.reads == [p - 3 for p in found.reads]
    assert Steps().encode_steps(make_renderer(f"{data}/policy", None, 4), prompt, steps) == Encoded(
        [], [], "overlength"
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"labels": [1.0]}, "unequal_lengths"),
        ({"steps": [], "labels": []}, "empty_content"),
        ({"steps": ["one", " "]}, "empty_content"),
        ({"steps": ["one", "two\n\nthree"]}, "separator_in_step"),
        ({"labels": [None, NAN]}, "no_label"),
        ({"labels": [None, 1.5]}, "label_not_in_0_to_1"),
        ({"steps": None}, "missing_field"),
        ({"steps": ["one " * 200, "two"]}, "overlength"),
    ],
)
def test_steps_that_are_no_use_have_a_reason(data, changes, reason):
    training = base.make_job(data, "nowhere", objective={"type": "process"}).training
    renderer = make_renderer(training.model, None, 96)
    row = {"id": "a", "group": "g", "prompt": base.message("one", "user"), "lang": "en"}
    row |= {"steps": ["one", "two"], "labels": [True, None]}
    assert render_row(row, renderer, training)["targets"] == [1.0, pytest.approx(NAN, nan_ok=True)]
    assert render_row(row | changes, renderer, training) == reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"completion": base.message("one", "user")}, "not_ending_in_assistant"),
        ({"completion": base.message(" ")}, "empty_content"),
        ({"ratings": {"correct": None}}, "no_rating"),
        ({"ratings": {"correct": math.inf}}, "no_rating"),
        ({"ratings": {"correct": 2.0}}, "rating_not_in_0_to_1"),
        ({"ratings": None}, "missing_field"),
    ],
)
def test_rated_completions_that_are_no_use_have_a_reason(data, changes, reason):
    training = base.make_job(data, "nowhere", objective={"type": "outcome"}).training
    renderer = make_renderer(training.model, None, 96)
    row = {"id": "a", "group": "g", "prompt": base.message("one", "user"), "lang": "en"}
    row |= {"completion": base.message("two"), "ratings": {"correct": 1}}
    assert render_row(row, renderer, training)["targets"] == [1.0]
    assert render_row(row | changes, renderer, training) == reason


# ODIN.


def test_odin_loss_by_hand():
    quality, by_length = torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, -1.0]])
    lengths = torch.tensor([[4.0, 2.0], [2.0, 0.0]])
    targets = torch.cat([torch.tensor([[0.0, 1.0]] * 2), lengths.T], dim=1)
    found = Odin(length_weight=0.5).losses(torch.stack([quality, by_length], -1)[:, :, None], targets)
    # Quality 1, 2, 3, 0 against length 4, 2, 2, 0: covariances −0.5·2 + 0 + 0 + −1.5·−2 = 2 over √(5 · 8).
    entangled = 2 / math.sqrt(40)
    # Length head 1, 0, 0, −1 against 4, 2, 2, 0: exactly along.
    expected = 0.5 * (entangled + 1 - 1)
    gaps = [2.0 - 3.0, 2.0 - -1.0]
    assert found.tolist() == pytest.approx([math.log1p(math.exp(-gap)) + expected for gap in gaps])
    assert Odin().readout(np.zeros((1, 4))).reward([[1.5, 7.0]]) == 1.5


def test_correlation_and_its_gradient_agree_with_numpy_and_autograd():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(9, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(2))
    assert correlation(x, y).item() == pytest.approx(np.corrcoef(x.detach(), y.detach())[0, 1])
    assert torch.autograd.gradcheck(correlation, (x, y))
    flat = torch.ones(4, requires_grad=True)
    correlation(flat, torch.arange(4.0)).backward()
    assert correlation(flat, torch.arange(4.0)) == 0 and flat.grad.tolist() == [0.0] * 4


def test_odins_gradient_is_that_of_the_whole_batch_whatever_the_micro_batch(data, tmp_path, alone):
    found, losses = [], []
    for size in (2, 14):
        job = base.make_job(
            data, tmp_path / f"run{size}", micro_batch_size=size, max_steps=2, objective={"type": "odin"}
        )
        trainer = base.start(job)
        trainer.train(show_progress=False)
        found.append(base.weights_of(trainer))
        losses.append([record["loss"] for record in trainer.history if "loss" in record])
    base.assert_same_weights(*found, 2e-5)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert found[0]["score.weight"].shape == (2, 64)


def test_odin_takes_length_out_of_quality(data, tmp_path, alone):
    """Chosen sides are longer and begin with another word: two explanations, one of which is to go to its own head."""
    rng = random.Random(0)
    rows = []
    for index in range(160):
        row = base.preference(index, rng)
        texts = [
            f"{word} " + " ".join(["one"] * rng.randint(*span)) for word, span in (("good", (3, 14)), ("bad", (1, 10)))
        ]
        rows.append(row | {"chosen": base.message(texts[0]), "rejected": base.message(texts[1])})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "preferences.parquet")
    correlations = {}
    for tag in ("bradley_terry", "odin"):
        job = base.make_job(
            data, tmp_path / tag, objective={"type": tag}, max_steps=40, global_batch_size=32, micro_batch_size=32
        )
        job = job.model_copy(update={"input": f"{tmp_path}/preferences.parquet"})
        trainer = base.start(job)
        trainer.train(show_progress=False)
        outputs = trainer.collect(trainer.rows.held_out)[:, :, 0, 0].flatten()
        trainer.engine.eval()
        lengths = torch.from_numpy(trainer.rows.side_lengths[:, trainer.rows.held_out]).flatten().float()
        correlations[tag] = correlation(outputs, lengths).item()
        assert trainer.history[-1]["eval_accuracy"] > 0.8
    assert correlations["bradley_terry"] > 0.45 and abs(correlations["odin"]) < 0.3


# Comparison.


def test_comparison_loss_by_hand():
    logs = torch.tensor([[[-1.0, -3.0]], [[-2.0, -0.5]]])[:, :, None].requires_grad_()
    losses = PairwiseComparison().losses(logs, torch.zeros(1, 0))
    assert losses.tolist() == [(1.0 + 0.5) / 2]
    losses.sum().backward()
    assert logs.grad.flatten().tolist() == [-0.5, 0.0, 0.0, -0.5]
    third, half = math.log(3), 0.0
    gap = Comparison().gap([[third, 0.0]], [[half, 0.0]])
    # 3/4 in one order and 1/2 in the other.
    assert gap == pytest.approx(math.log(0.625 / 0.375))
    assert Comparison().gap([[800.0, 0.0]], [[0.0, 800.0]]) == pytest.approx(800.0)
    assert Comparison().gap([[-50.0, 0.0]], [[0.0, -50.0]]) == pytest.approx(-50.0)


def test_a_question_holds_both_completions_in_both_orders(data):
    renderer = make_renderer(f"{data}/policy", None, 900)
    prompt = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        *base.message("Bye", "user"),
    ]
    sides = Comparison().encode_both(renderer, prompt, "good", "bad")
    context = "\n\n<turn> user\n Hi\n<turn> assistant\n Hello\n<turn> user\n Bye\n"
    for side, (first, second) in zip(sides, (("good", "bad"), ("bad", "good")), strict=True):
        text = renderer.tokenizer.decode(side.ids)
        assert f"[CONTEXT] {context} [RESPONSE A] {first} [RESPONSE B] {second} \n" in text
        assert text.endswith("<|im_start|>assistant\n") and side.reads == [len(side.ids) - 1]
    short = make_renderer(f"{data}/policy", None, len(sides[0].ids) - 1)
    assert [side.status for side in Comparison().encode_both(short, prompt, "good", "bad")] == ["overlength"] * 2
    assert Comparison().encode_both(renderer, prompt, "good", " ")[0].status == "empty"


def test_templates_without_a_header_and_words_of_two_tokens_cannot_compare(data, tmp_path):
    from rayrm.training.rendered import check_renderer

    (tmp_path / "bare.jinja").write_text("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
    for template in ("none", f"{tmp_path}/bare.jinja"):
        job = base.make_job(data, "nowhere", objective={"type": "comparison"}, chat_template=template)
        with pytest.raises(ConfigError, match="writes no header for the assistant's answer"):
            check_renderer(job.training)
    job = base.make_job(data, "nowhere", objective={"type": "comparison", "words": ["A", "zzz"]})
    with pytest.raises(CheckpointError, match="needs two words of one token each"):
        check_renderer(job.training)


# Metrics.


def measured(outputs, targets, **given):
    num = len(outputs)
    words = np.array([""] * num)
    outputs, targets = np.array(outputs, float)[None], np.array(targets, float)
    return Measured(outputs, targets, np.ones(num), np.zeros((1, num)), given.get("languages", words), words)


def test_ranks_share_ties():
    assert rank(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1.0, 3.5, 2.0]


def test_metrics_of_ratings_by_hand():
    given = measured([[[1.0, 0.0]], [[2.0, 0.0]], [[4.0, 1.0]]], [[1.0, NAN], [3.0, NAN], [4.0, 3.0]])
    found = measure_ratings(given, ("a", "b"), is_logit=False)
    assert found["eval_mse_a"] == pytest.approx(1 / 3) and found["eval_mse_b"] == 4.0 and found["eval_loss"] == 1.0
    assert found["eval_spearman_a"] == pytest.approx(1.0)
    assert found["eval_pearson_a"] == pytest.approx(np.corrcoef([1, 2, 4], [1, 3, 4])[0, 1])
    assert "eval_pearson_b" not in found


def test_metrics_of_verdicts_by_hand():
    languages = np.array(["de", "de", "fr"])
    given = measured(
        [[[LN3], [0.0]], [[-1.0], [9.0]], [[-LN3], [9.0]]], [[1, 0], [0, NAN], [1, NAN]], languages=languages
    )
    found = measure_verdicts(given)
    assert found["eval_accuracy"] == 0.75 and found["eval_accuracy/de"] == 1.0 and found["eval_accuracy/fr"] == 0.0
    assert found["eval_accuracy_right"] == 0.5 and found["eval_accuracy_wrong"] == 1.0
    # Right: log 3 and −log 3; wrong: 0 and −1. log 3 is above both, −log 3 above none.
    assert found["eval_auc"] == 0.5 and "eval_auc/fr" not in found
    wrong = 1 / (1 + math.exp(1.0))
    assert found["eval_brier"] == pytest.approx((1 / 16 + 1 / 4 + wrong**2 + 9 / 16) / 4)


# Each of them learns something simple, is saved, and is read again as it was.


def rated(index, rng):
    row = base.preference(index, rng)
    is_good = rng.random() < 0.5
    text = ("good " if is_good else "bad ") + " ".join(["one"] * rng.randint(0, 6))
    ratings = {"correct": float(is_good), "helpful": 5.0 * is_good - 1, "long": float(len(text)) if index % 2 else None}
    return {
        **{k: v for k, v in row.items() if k not in ("chosen", "rejected")},
        "completion": base.message(text),
        "ratings": ratings,
    }


def stepwise(index, rng):
    row = base.preference(index, rng)
    labels = [rng.random() < 0.5 for _ in range(rng.randint(1, 4))]
    steps = [("good " if label else "bad ") + rng.choice(["one", "two"]) for label in labels]
    return {
        **{k: v for k, v in row.items() if k not in ("chosen", "rejected")},
        "steps": steps,
        "labels": [float(label) for label in labels],
    }


SETS = {
    "bradley_terry": (base.preference, {}, "eval_accuracy", 0.9),
    "odin": (base.preference, {}, "eval_accuracy", 0.9),
    "regression": (rated, {"ratings": ["helpful", "long"]}, "eval_pearson_helpful", 0.9),
    "outcome": (rated, {}, "eval_accuracy", 0.9),
    "process": (stepwise, {}, "eval_accuracy", 0.9),
    "comparison": (base.preference, {}, "eval_accuracy", 0.9),
}


def test_there_is_a_set_for_every_objective():
    assert {*SETS, "gated"} == OBJECTIVES.keys()


@pytest.fixture
def job(data, tmp_path, request):
    row, settings, _, _ = SETS[request.param]
    rng = random.Random(5)
    pq.write_table(pa.Table.from_pylist([row(index, rng) for index in range(200)]), tmp_path / "rows.parquet")
    training = {"objective": {"type": request.param, **settings}, "max_length": 900, "global_batch_size": 32}
    settings = base.make_job(data, tmp_path / "run", micro_batch_size=16, max_steps=60, lr=2e-3, **training)
    return settings.model_copy(update={"input": f"{tmp_path}/rows.parquet"})


@pytest.mark.parametrize("job", SETS, indirect=True)
def test_every_objective_learns_and_is_read_again_as_it_was(job, alone):
    from rayrm.training.probes import probe_outputs

    objective = job.training.objective
    _, _, metric, least = SETS[objective.type]
    trainer = base.start(job)
    before = trainer.evaluate()
    trainer.train(show_progress=False)
    after = trainer.history[-1]
    assert after[metric] > least and after["eval_loss"] < 0.7 * before["eval_loss"]
    facts = trainer.finish()
    rendering = {"chat_template": None, "max_length": 900, "fingerprint": trainer.renderer.fingerprint()}
    mark = {"rendering": rendering, "readout": trainer.readout.model_dump(), "probe": facts["probe"]}
    found = probe_outputs(f"{job.output}/model", mark, objective, "fp32")
    assert len(found) == 16
    for row, sides in zip(facts["probe"], found, strict=True):
        for expected, side in zip(row["outputs"], sides, strict=True):
            np.testing.assert_allclose(side, expected, atol=1e-5)
    rewarder = load_rewarder(f"{job.output}/model", Rendering(max_length=900), readout=trainer.readout)
    prompt = base.message("one two", "user")
    if objective.type == "comparison":
        gaps = rewarder.compare([(prompt, "good one", "bad one"), (prompt, "bad one", "good one")])
        assert gaps[0][0] > 1 and gaps[0][0] == pytest.approx(-gaps[1][0], abs=1e-4)
        with pytest.raises(CheckpointError, match="gives a single one no reward"):
            rewarder.rewards([(prompt, "good one")])
    else:
        good, bad = rewarder.rewards([(prompt, "good one"), (prompt, "bad one")])
        assert good[1] == bad[1] == "ok" and good[0] > bad[0]
        with pytest.raises(CheckpointError, match="compares none"):
            rewarder.compare([(prompt, "good one", "bad one")])


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("job", ["odin", "regression", "outcome", "process", "comparison"], indirect=True)
def test_every_head_that_two_workers_train_in_parts_is_saved_whole(job, ray_cluster):
    job = job.model_copy(
        update={
            "training": job.training.model_copy(update={"max_steps": 3, "shared_prefix": True}),
            "workers": job.workers.model_copy(update={"num_workers": 2}),
            "parallelism": job.parallelism.model_copy(update={"zero_stage": 3}),
        }
    )
    # The job itself loads the model in a process of its own and compares it with the workers' outputs, to 1e-4.
    done = train_reward_model(job)
    rewarder = load_rewarder(f"{job.output}/model")
    assert rewarder.readout.model_dump(mode="json") == json.loads(json.dumps(done["readout"])) and done["steps"] == 3
    for row in done["probe"]:
        example = job.training.objective.encode(row, rewarder.renderer)
        for expected, side in zip(row["outputs"], rewarder.read(example.sides), strict=True):
            np.testing.assert_allclose(side, expected, atol=1e-4)


# The gate.


def gated_rows(rng, num):
    """Completions rated for politeness and brevity, and pairs where the prompt says which of the two counts."""
    ratings, pairs = [], []
    for index in range(num):
        row = base.preference(index, rng)
        kind = ["one", "two"][index % 2]
        row |= {"prompt": base.message(f"{kind} {kind}", "user"), "group": f"g{index}", "subset": kind}
        plain = {k: v for k, v in row.items() if k not in ("chosen", "rejected")}
        texts = {sign: " ".join([["bad", "good"][sign > 0]] * 2) for sign in (1, -1)}
        sign = rng.choice([1, -1])
        found = {"polite": float(sign), "rude": -float(sign)}
        ratings.append(plain | {"completion": base.message(texts[sign]), "ratings": found})
        chosen = 1 if kind == "one" else -1
        pairs.append(row | {"chosen": base.message(texts[chosen]), "rejected": base.message(texts[-chosen])})
    return ratings, pairs


@pytest.fixture(scope="module")
def gated(data, tmp_path_factory):
    """A job whose right answer needs a gate: no constant weights of the two objectives are right for both prompts."""
    folder = tmp_path_factory.mktemp("gated")
    for name, rows in zip(("ratings", "pairs"), gated_rows(random.Random(0), 240), strict=True):
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    fit = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_steps": 300,
        "batch_size": 128,
        "temperature": 1.0,
        "lr": 1e-2,
    }
    objective = {"type": "gated", "objectives": ["polite", "rude"], "ratings": f"{folder}/ratings.parquet", "fit": fit}
    job = base.make_job(data, folder / "run", objective=objective, micro_batch_size=64, workers=2)
    return job.model_copy(update={"input": f"{folder}/pairs.parquet"})


@pytest.mark.ray
def test_a_gate_weighs_objectives_by_the_prompt_and_is_read_again_as_it_was(gated, ray_cluster):
    from transformers import AutoModelForSequenceClassification

    done = train_reward_model(gated)
    assert (
        done["metrics"]["eval_accuracy"] > 0.95
        and min(done["metrics"][f"eval_accuracy/subset/{k}"] for k in ("one", "two")) > 0.9
    )
    assert done["transform"] == [[1.0, 0.0], [0.0, 1.0]] and done["heads"]["polite"]["mse"] < 0.1
    path = f"{gated.output}/model"
    rewarder = load_rewarder(path)
    prompts = {kind: base.message(f"{kind} {kind}", "user") for kind in ("one", "two")}
    encoded = [rewarder.readout.encode(rewarder.renderer, prompts[kind], "good good") for kind in prompts]
    plain = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    for kind, side, outputs in zip(prompts, encoded, rewarder.read(encoded), strict=True):
        reward, *others = outputs[0]
        scores, weights = others[:2], others[2:]
        assert rewarder.renderer.tokenizer.decode(side.ids[: side.reads[0] + 1]).endswith(f"{kind} {kind}<|im_end|>")
        assert reward == pytest.approx(sum(w * s for w, s in zip(weights, scores, strict=True)), abs=1e-5)
        assert (weights[0] > weights[1]) == (kind == "one")
        with torch.no_grad():
            assert plain(torch.tensor([side.ids])).logits[0].tolist() == pytest.approx(scores, abs=1e-4)
        found = rewarder.rewards([(prompts[kind], "good good")])
        assert found == [(pytest.approx(reward, abs=1e-5), "ok")]
    for row in done["probe"]:
        sides = [
            rewarder.readout.encode(rewarder.renderer, row["prompt"], row[n][0]["content"])
            for n in ("chosen", "rejected")
        ]
        np.testing.assert_allclose(np.ravel(rewarder.read(sides)), np.ravel(row["outputs"]), atol=1e-4)


@pytest.mark.ray
def test_embeddings_that_are_there_are_not_computed_again(gated, ray_cluster, tmp_path, monkeypatch, process_group):
    from rayrm.training import gate_loop

    monkeypatch.setattr(gate_loop, "SHARD_ROWS", 100)
    job = gated.model_copy(update={"output": f"{tmp_path}/run"})
    base.render_here(job)
    with monkeypatch.context() as patch:
        patch.setattr("rayrm.training.rendered.fetch", lambda results, what: list(results))
        patch.setattr(
            "ray.remote", lambda **options: lambda function: type("Task", (), {"remote": staticmethod(function)})
        )
        gate_loop.render_ratings(job)
    trainer = gate_loop.GateTrainer(job, 64)
    computed, embed_rows = [], trainer.embed_rows

    def count(rows, numbers):
        computed.append(numbers)
        if len(computed) == 3:
            raise RuntimeError("killed")
        return embed_rows(rows, numbers)

    monkeypatch.setattr(trainer, "embed_rows", count)
    with pytest.raises(RuntimeError, match="killed"):
        trainer.embed(show_progress=False)
    assert len(list(tmp_path.glob("run/embeddings/*.npy"))) == 2
    trainer.embed(show_progress=False)
    assert computed == [
        range(0, 100),
        range(100, 200),
        range(200, 240),
        range(200, 240),
        *[range(0, 100), range(100, 200), range(200, 240)],
    ]


def test_readouts_read_one_number_as_the_reward():
    assert LastToken().reward([[3.0]]) == 3.0 and LastToken().num_outputs == 1
    two = Ratings(names=("a", "b"), weights=(1.0, -1.0), means=(0.0, 1.0), stds=(1.0, 2.0), is_logit=False)
    assert two.num_outputs == 2 and two.reward([[2.0, 3.0]]) == 2.0 - 7.0
