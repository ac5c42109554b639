"""Metrics of held-out rows against numbers by hand, and the best evaluation's weights as they were."""

import math

import numpy as np
import pytest
import test_train_reward_model as base
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from rayrm.models.creation import create_model
from rayrm.training.best import find_best, keep_best, read_merit, read_weights
from rayrm.training.checkpoints import export_model, gather_state
from rayrm.training.objectives.base import Measured
from rayrm.training.objectives.comparison import PairwiseComparison
from rayrm.training.objectives.pairs import BradleyTerry
from rayrm.training.objectives.ratings import OutcomeReward, Regression
from rayrm.training.objectives.steps import ProcessReward
from rayrm.training.rendered import make_renderer

NAN = math.nan
EMBEDDING, UNEMBEDDING = "model.embed_tokens.weight", "lm_head.weight"
data = base.data
alone = base.alone


def measure(objective, outputs, targets, languages, subsets=None, lengths=None):
    """Metrics of rows with `outputs` [sides, rows, reads, outputs]."""
    num = len(languages)
    words = np.array(subsets or [""] * num)
    lengths = np.zeros((objective.num_sides, num), int) if lengths is None else np.array(lengths)
    outputs, targets = np.array(outputs, float), np.array(targets, float)
    return objective.measure(Measured(outputs, targets, np.ones(num), lengths, np.array(languages), words))


def measure_gaps(gaps, lengths, languages=None, subsets=None):
    """Metrics of pairs whose rejected side has a reward of 0, with the tokens of both sides."""
    outputs = np.stack([np.array(gaps, float), np.zeros(len(gaps))])[:, :, None, None]
    return measure(BradleyTerry(), outputs, [[0, 1]] * len(gaps), languages or [""] * len(gaps), subsets, lengths)


# Pairs.


def test_ties_are_counted_in_all_pairs_and_in_each_slice():
    languages, subsets = ["de", "de", "fr", "fr", "fr"], ["", "chat", "chat", "", ""]
    found = measure_gaps([1.0, 0.0, 0.0, -2.0, 3.0], [[1] * 5] * 2, languages, subsets)
    assert found["eval_ties"] == 2 and found["eval_ties/de"] == found["eval_ties/fr"] == 1
    assert found["eval_ties/subset/chat"] == 2
    assert found["eval_accuracy"] == 0.4 and found["eval_accuracy_half_ties"] == 0.6
    assert measure_gaps([1.0], [[1], [1]])["eval_ties"] == 0


def test_fewer_ties_are_better():
    assert read_merit({"eval_ties": 3.0, "eval_accuracy": 0.5}, "ties") == -3.0
    assert read_merit({"eval_ties": 3.0, "eval_accuracy": 0.5}, "accuracy") == 0.5


def test_length_correlations_by_hand():
    # Extra lengths 2, 1, 2 and −7.
    found = measure_gaps([10.0, 1.0, 100.0, -5.0], [[5, 3, 9, 1], [3, 2, 7, 8]])
    # Ranks 3, 2, 4, 1 and 3.5, 2, 3.5, 1: a covariance of 4.5, and squares of 5 and 4.5.
    assert found["eval_length_correlation_spearman"] == pytest.approx(4.5 / math.sqrt(5 * 4.5))
    # Less their means of 26.5 and −0.5.
    gaps, extra = (-16.5, -25.5, 73.5, -31.5), (2.5, 1.5, 2.5, -6.5)
    products = sum(g * e for g, e in zip(gaps, extra, strict=True))
    scale = math.sqrt(sum(g * g for g in gaps) * sum(e * e for e in extra))
    assert found["eval_length_correlation"] == pytest.approx(products / scale)
    assert found["eval_accuracy_chosen_longer"] == 1.0 and found["eval_accuracy_chosen_shorter"] == 0.0


def test_one_far_gap_bends_the_correlation_of_values_and_not_that_of_ranks():
    found = measure_gaps([1.0, 2.0, 1000.0], [[2, 3, 4], [1, 1, 1]], ["de", "de", "de"])
    assert found["eval_length_correlation_spearman"] == pytest.approx(1.0)
    assert found["eval_length_correlation_spearman/de"] == pytest.approx(1.0)
    assert found["eval_length_correlation"] == pytest.approx(math.sqrt(0.75), abs=1e-3)


@pytest.mark.parametrize(
    ("gaps", "lengths"),
    [
        ([0.1, 0.1, 0.1], [[1, 2, 3], [0, 0, 0]]),
        ([1.0, 2.0, 3.0], [[2, 3, 4], [1, 2, 3]]),
        ([1.0], [[2], [1]]),
    ],
)
@pytest.mark.filterwarnings("error")
def test_what_has_no_spread_has_no_length_correlation(gaps, lengths):
    found = measure_gaps(gaps, lengths)
    assert found["eval_accuracy"] == 1.0 and not [name for name in found if "correlation" in name]


@pytest.mark.filterwarnings("error")
def test_equal_outputs_correlate_with_no_rating():
    found = measure(Regression(ratings=("a",)), [[[[0.1]]] * 3], [[1.0], [2.0], [3.0]], ["de", "de", "fr"])
    assert found["eval_mse_a"] == pytest.approx((0.9**2 + 1.9**2 + 2.9**2) / 3)
    assert not [name for name in found if name.startswith(("eval_pearson", "eval_spearman"))]


# Comparison.


def test_metrics_of_a_comparison_by_hand():
    # p(A) in both orders; the chosen side is A in the first and B in the second one, so it has 0.7, 0.5, 0.2 and 0.9.
    shares = np.array([[0.8, 0.5, 0.3, 0.95], [0.4, 0.5, 0.9, 0.15]])
    outputs = np.log(np.stack([shares, 1 - shares], -1))[:, :, None]
    tokens = [[5, 2], [3, 3], [2, 6], [4, 9]]
    # The question is as long in both orders, which says nothing of the completions.
    found = measure(PairwiseComparison(), outputs, tokens, ["de", "fr", "fr", "de"], lengths=[[9] * 4, [9] * 4])
    assert found["eval_accuracy"] == 0.5 and found["eval_ties"] == 1 and found["eval_accuracy_half_ties"] == 0.625
    assert found["eval_accuracy/de"] == 1.0 and found["eval_accuracy_worst_language"] == 0.0
    assert found["eval_margin"] == pytest.approx((math.log(7 / 3) - math.log(4) + math.log(9)) / 4)
    # The first is the only one whose chosen side is longer; of the last two, one is right.
    assert found["eval_accuracy_chosen_longer"] == 1.0 and found["eval_accuracy_chosen_shorter"] == 0.5
    # Ranks 3, 2, 1, 4 of the gaps and 4, 3, 2, 1 of 3, 0, −4 and −5: 1 − 6 · (1 + 1 + 1 + 9) / (4 · 15).
    assert found["eval_length_correlation_spearman"] == pytest.approx(-0.2)
    assert found["eval_first_share"] == pytest.approx(shares.mean()) and found["eval_words_mass"] == pytest.approx(1.0)


def test_a_comparison_knows_the_extra_length_that_bradley_terry_knows(data):
    renderer = make_renderer(f"{data}/policy", None, 900)
    row = {
        "prompt": base.message("one two", "user"),
        "chosen": base.message("good one two three"),
        "rejected": base.message("bad"),
    }
    found, pair = PairwiseComparison().encode(row, renderer), BradleyTerry().encode(row, renderer)
    chosen, rejected = (len(renderer.tokenizer.tokenize(row[name][0]["content"])) for name in ("chosen", "rejected"))
    assert found.targets == [chosen, rejected] and chosen > rejected > 0
    assert chosen - rejected == len(pair.sides[0].ids) - len(pair.sides[1].ids)
    assert len(found.sides[0].ids) == len(found.sides[1].ids)


# Right and wrong.


def test_the_worst_language_of_outcomes_is_the_least_accurate_one():
    outputs = [[[[2.0]], [[-1.0]], [[3.0]], [[1.0]]]]
    languages = ["de", "de", "fr", "fr"]
    found = measure(OutcomeReward(), outputs, [[1], [0], [1], [0]], languages, ["", "", "", "hard"])
    assert found["eval_accuracy"] == 0.75 and found["eval_accuracy/fr"] == 0.5
    # A subset is no language.
    assert found["eval_accuracy/subset/hard"] == 0.0 and found["eval_accuracy_worst_language"] == 0.5
    assert "eval_accuracy_worst_language" not in measure(OutcomeReward(), outputs, [[1], [0], [1], [0]], [""] * 4)


def test_the_worst_language_of_steps_counts_the_labelled_ones():
    outputs = [[[[2.0], [-1.0]], [[3.0], [5.0]], [[-4.0], [1.0]]]]
    found = measure(ProcessReward(), outputs, [[1, 0], [0, NAN], [0, 1]], ["de", "fr", "fr"])
    assert found["eval_accuracy"] == 0.8 and found["eval_accuracy/de"] == 1.0
    assert found["eval_accuracy_worst_language"] == found["eval_accuracy/fr"] == pytest.approx(2 / 3)


# The best evaluation.


def test_tied_weights_of_the_best_are_kept_once_and_come_back_under_both_names(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=40, num_key_value_heads=2, tie_word_embeddings=True, **sizes))
    state = gather_state(model)
    keep_best(str(tmp_path), {"step": 3, "merit": 0.5}, state)
    best = find_best(str(tmp_path))
    assert best["step"] == 3 and best["merit"] == 0.5
    assert len({EMBEDDING, UNEMBEDDING} & load_file(tmp_path / "best/step-3/weights.safetensors").keys()) == 1
    found = read_weights(best["folder"])
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)
    assert found[EMBEDDING] is found[UNEMBEDDING]
    export_model(str(tmp_path), lambda folder: model.save_pretrained(folder, state_dict=found), AutoModelForCausalLM)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in state.items())


def test_equal_weights_that_are_not_tied_stay_apart(tmp_path):
    state = {"first": torch.ones(2, 3), "second": torch.ones(2, 3), "turned": torch.arange(6.0).reshape(2, 3).T}
    keep_best(str(tmp_path), {"step": 1, "merit": 0.0}, state)
    found = read_weights(f"{tmp_path}/best/step-1")
    assert all(torch.equal(found[name], state[name]) for name in state) and found.keys() == state.keys()
    assert found["first"] is not found["second"]


def test_the_best_comparison_on_tied_embeddings_is_the_final_model(tmp_path, data, alone, monkeypatch):
    sizes = base.SIZES.model_copy(update={"tie_embeddings": True, "max_length": 512})
    create_model(["one two three good bad"] * 9, sizes, f"{tmp_path}/policy")
    training = {"model": f"{tmp_path}/policy", "objective": {"type": "comparison"}, "max_length": 300}
    job = base.make_job(data, tmp_path / "run", **training, max_steps=2, eval_steps=1, best_by="accuracy")
    trainer = base.start(job)
    evaluate, seen, merits = trainer.evaluate, {}, iter([0.75, 0.25])

    def evaluate_as_told():
        seen[trainer.step] = base.weights_of(trainer)
        return evaluate() | {"eval_accuracy": next(merits)}

    monkeypatch.setattr(trainer, "evaluate", evaluate_as_told)
    trainer.train(show_progress=False)
    facts = trainer.finish()
    assert facts["best_step"] == 1 and {"eval_accuracy_chosen_longer", "eval_ties"} <= facts["metrics"].keys()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model").state_dict()
    assert saved.keys() - seen[1].keys() == {UNEMBEDDING} and torch.equal(saved[UNEMBEDDING], saved[EMBEDDING])
    assert all(torch.equal(saved[name], tensor) for name, tensor in seen[1].items())
    assert not torch.equal(saved[EMBEDDING], seen[2][EMBEDDING])
