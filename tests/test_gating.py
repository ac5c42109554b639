import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rayrm.config import build_config
from rayrm.errors import CheckpointError, ConfigError, SchemaError
from rayrm.models.gating import GATE_FILE, Gate, GatedHead, load_gate, save_gate
from rayrm.training import gating
from rayrm.training import ridge as ridge_module
from rayrm.training.gating import (
    PENALTIES,
    GatePairs,
    Gating,
    find_penalties,
    find_transform,
    fit_gate,
    gate_losses,
    reward_gaps,
    transform_matrix,
)
from rayrm.training.ridge import fit_heads

NAN = float("nan")
SMALL = Gating(hidden_size=48, num_hidden_layers=2, num_steps=200, batch_size=128)


def drawn_gate(widths, temperature=10.0, seed=0, **settings):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Gate(widths, temperature, **settings)


def ridge(x, y, alpha):
    return np.linalg.inv(x.T @ x + alpha * np.eye(x.shape[1])) @ x.T @ y


def drawn_ratings(num_rows=200, hidden=6, noise=0.1, seed=0):
    random = np.random.default_rng(seed)
    x = random.normal(size=(num_rows, hidden))
    y = x @ random.normal(size=(hidden, 3)) + noise * random.normal(size=(num_rows, 3))
    y[: num_rows // 2, 1] = NAN
    y[num_rows // 4 :, 2] = NAN
    return x, y


# Heads


def test_heads_are_the_ridge_of_all_rated_rows(monkeypatch):
    monkeypatch.setattr(ridge_module, "BLOCK_ROWS", 7)
    x, y = drawn_ratings()
    for alpha in (0.5, 300.0):
        heads = fit_heads(x, y, "abc", Gating(alphas=[alpha]), seed=0)
        assert heads.alphas.tolist() == [alpha] * 3
        for column in range(3):
            rated = ~np.isnan(y[:, column])
            np.testing.assert_allclose(heads.weights[column], ridge(x[rated], y[rated, column], alpha), atol=1e-10)


def test_head_of_one_number_by_hand():
    # Σ x·y = 1·2 + 2·5 + 3·4 = 24 and Σ x² + alpha = 14 + 2.
    heads = fit_heads(np.array([[1.0], [2], [3]]), np.array([[2.0], [5], [4]]), ["a"], Gating(alphas=[2.0]), seed=0)
    np.testing.assert_allclose(heads.weights, [[1.5]], rtol=1e-12)


def test_alpha_is_the_one_that_errs_least_on_held_out_rows():
    # Few rows in many dimensions and much noise ask for a strong penalty, many rows without noise for a weak one.
    config = Gating(validation_fraction=0.25)
    random = np.random.default_rng(1)
    x = random.normal(size=(240, 30))
    y = np.full((240, 2), NAN)
    y[:, 0] = x @ random.normal(size=30)
    y[:40, 1] = x[:40] @ random.normal(size=30) * 0.1 + random.normal(size=40)
    heads = fit_heads(x, y, ["clean", "noisy"], config, seed=3)
    assert heads.alphas[0] == 1e-4 and heads.errors[0] < 1e-8
    assert heads.alphas[1] >= 10
    rows = np.random.default_rng(3).permutation(40)
    held_out, fitted = rows[:10], rows[10:]
    errors = [
        np.mean((y[held_out, 1] - x[held_out] @ ridge(x[fitted], y[fitted, 1], alpha)) ** 2) for alpha in config.alphas
    ]
    assert heads.alphas[1] == config.alphas[int(np.argmin(errors))]
    assert heads.errors[1] == pytest.approx(min(errors), rel=1e-9)
    np.testing.assert_allclose(heads.weights[1], ridge(x[:40], y[:40, 1], heads.alphas[1]), atol=1e-10)


def test_memory_mapped_fp32_embeddings_are_summed_in_fp64(tmp_path):
    # In fp32 the square of 10000.5 is rounded, and differences of such squares are lost.
    random = np.random.default_rng(0)
    x = (10_000 + random.normal(size=(300, 4))).astype(np.float32)
    y = x @ np.array([[1.0], [-2], [3], [-1]])
    np.save(tmp_path / "x.npy", x)
    heads = fit_heads(np.load(tmp_path / "x.npy", mmap_mode="r"), y, ["a"], Gating(alphas=[1e-4]), seed=0)
    np.testing.assert_allclose(heads.weights[0], ridge(x.astype(np.float64), y[:, 0], 1e-4), atol=1e-5)
    np.testing.assert_allclose(heads.weights[0], [1, -2, 3, -1], atol=1e-3)


def test_seed_decides_which_rows_are_held_out():
    x, y = drawn_ratings(noise=1.0)
    first, again, other = (fit_heads(x, y, "abc", Gating(alphas=[1.0]), seed).errors for seed in (0, 0, 1))
    assert first.tolist() == again.tolist() != other.tolist()


def test_objective_with_too_few_ratings_is_named():
    x = np.ones((5, 2))
    y = np.array([[1.0, NAN, 1.0]] * 2 + [[1.0, NAN, NAN]] * 3)
    with pytest.raises(SchemaError, match="No row has a rating of 'style'"):
        fit_heads(x, y, ["help", "style", "code"], Gating(), seed=0)
    with pytest.raises(SchemaError, match="'code' is rated in 2 rows, of which validation_fraction 0.2 leaves none"):
        fit_heads(x, y[:, ::2], ["help", "code"], Gating(), seed=0)


def test_row_that_is_not_finite_is_named():
    x, y = drawn_ratings()
    x[60, 2] = NAN
    with pytest.raises(SchemaError, match="row 60 is not finite"):
        fit_heads(x, y, "abc", Gating(), seed=0)
    x[60, 2], y[199, 0] = 0.0, np.inf
    with pytest.raises(SchemaError, match="row 199 is not finite"):
        fit_heads(x, y, "abc", Gating(), seed=0)


# Verbosity


def test_penalties_are_twenty_four_from_0_to_95_hundredths():
    assert len(PENALTIES) == 24 and PENALTIES[0] == 0 and PENALTIES[-1] == 0.95
    assert list(PENALTIES) == sorted(set(PENALTIES))


def test_penalty_is_the_smallest_that_undoes_the_correlation():
    verbosity = np.linspace(-1, 1, 201)
    even = np.cos(np.pi * verbosity)
    scores = np.stack(
        [
            verbosity,
            # What is left of the second at 0.3 does not go along with verbosity, and of the third at 0.35 goes against it.
            0.001 * even + 0.3 * verbosity,
            0.32 * verbosity,
            2 * verbosity,
            -verbosity,
            np.full(201, 4.0),
            even,
        ],
        axis=1,
    )
    assert find_penalties(scores, 0).tolist() == [1, 0.3, 0.35, 1, 0, 0, 0]


def test_correlation_is_spearmans_with_mean_ranks_for_ties():
    # Ranks 1, 2.5, 2.5, 4 and 2, 1, 3, 4: deviations from 2.5 multiply to 0.75 + 0 + 0 + 2.25 = 3, squares sum up to
    # 4.5 and 5, so ρ = 3 / √22.5 = 0.632456 whatever the distances.
    scores = np.array([[-7.0, 3], [0, 2], [0, 50], [900, 51]])
    assert find_penalties(scores, 0, max_correlation=0.6325)[1] == 0
    assert find_penalties(scores, 0, max_correlation=0.6324)[1] == 0.01


def test_verbosity_without_spread_costs_nothing():
    assert find_penalties(np.array([[1.0, 2], [1, 3], [1, 9]]), 0).tolist() == [1, 0]


def test_reference_scores_that_say_nothing_are_refused():
    for scores in (np.empty((0, 2)), np.ones((1, 2)), np.array([[1.0, 2], [NAN, 1]])):
        with pytest.raises(SchemaError, match=f"scores of the {len(scores)} reference rows"):
            find_penalties(scores, 0)


def test_transform_takes_the_penalty_from_each_score_and_verbosity_out():
    transform = transform_matrix(np.array([0.25, 1.0, 0.0]), 1)
    assert transform.tolist() == [[1, 0, 0], [-0.25, 0, 0], [0, 0, 1]]
    assert (np.array([[3.0, 4, 5]]) @ transform).tolist() == [[3 - 0.25 * 4, 0, 5]]


def test_transform_of_a_config():
    verbosity = np.arange(5.0)
    scores = np.stack([0.5 * verbosity, verbosity], axis=1)
    assert find_transform(scores, ["help", "length"], Gating()).tolist() == [[1, 0], [0, 1]]
    assert find_transform(scores, ["help", "length"], Gating(verbosity="length")).tolist() == [[1, 0], [-0.5, 0]]
    with pytest.raises(ConfigError, match="'verbosity' is 'size', and the objectives are help, length"):
        find_transform(scores, ["help", "length"], Gating(verbosity="size"))


# The gate


def test_weights_are_a_softmax_over_objectives_times_the_scale():
    gate = drawn_gate([2, 3], temperature=2.0)
    with torch.no_grad():
        gate.layers[0].weight.copy_(torch.tensor([[2.0, 0], [0, 2], [0, 0]]))
        gate.layers[0].bias.copy_(torch.tensor([0.0, 0, 2]))
        gate.logit_scale.fill_(3.0)
    # Logits 2a, 2b and 2, halved: the first row gives e², 1, e and the second three equal weights.
    found = gate(torch.tensor([[[2.0, 0.0], [1.0, 1.0]]]))
    e = np.e
    expected = 3 * np.array([[[e**2, 1, e], [e, e, e]]]) / np.array([[[e**2 + 1 + e], [3 * e]]])
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-6)


def test_gate_computes_in_fp32_and_drops_only_while_it_trains():
    gate = drawn_gate([4, 16, 16, 3], dropout=0.5).eval()
    prompts = torch.randn((5, 4), generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gate(prompts)
    assert found.dtype == torch.float32
    x = prompts.double()
    for layer in gate.layers[:-1]:
        x = (x @ layer.weight.double().T + layer.bias.double()).relu()
    last = gate.layers[-1]
    expected = ((x @ last.weight.double().T + last.bias.double()) / 10).softmax(-1)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)
    assert torch.equal(gate(prompts), found)
    assert not torch.equal(gate.train()(prompts), gate(prompts))


def test_reward_is_the_weighted_sum_of_adjusted_scores():
    gate = drawn_gate([2, 2])
    with torch.no_grad():
        gate.layers[0].weight.zero_()
        gate.layers[0].bias.copy_(torch.tensor([0.0, 10 * np.log(3)]))
    head = GatedHead(gate, torch.tensor([[1.0, 0], [-0.5, 1]]), ["help", "length"])
    # Weights ¼ and ¾; adjusted scores 8 − 0.5·2 and 2.
    found = head(torch.tensor([[8.0, 2.0]]), torch.zeros((1, 2)))
    assert found.rewards.tolist() == pytest.approx([7 / 4 + 2 * 3 / 4])
    assert found.scores.tolist() == [[8.0, 2.0]]
    assert found.weights[0].tolist() == pytest.approx([0.25, 0.75])


def test_loss_and_its_gradient_by_hand():
    gate = drawn_gate([3, 2])
    with torch.no_grad():
        gate.layers[0].weight.zero_()
        gate.layers[0].bias.zero_()
    gaps = reward_gaps(gate, np.ones((4, 3)), np.array([[1.0, -1.0]] * 4))
    loss = gate_losses(gaps).mean()
    loss.backward()
    # Even weights make the gap 0 and the loss log 2. A logit moves its weight by ½·½/10, the other's by the opposite,
    # and so the gap by 2·½·½/10 = 0.05; the loss falls by half of that.
    assert gaps.tolist() == [0, 0, 0, 0]
    assert loss.item() == pytest.approx(np.log(2))
    assert gate.layers[0].bias.grad.tolist() == pytest.approx([-0.025, 0.025])
    assert gate.layers[0].weight.grad.flatten().tolist() == pytest.approx([-0.025] * 3 + [0.025] * 3)
    assert gate.logit_scale.grad.item() == 0
    assert gate_losses(torch.tensor([-1e4, 1e4])).tolist() == [1e4, 0.0]


def two_kinds(num_pairs=1200, hidden=8, seed=0):
    """Pairs in which the sign of the prompt's first number says which of two objectives is right; the other is wrong."""
    random = np.random.default_rng(seed)
    prompts = random.normal(size=(num_pairs, hidden)).astype(np.float32)
    prompts[:, 0] += np.where(random.random(num_pairs) < 0.5, 2, -2)
    right = (prompts[:, 0] < 0).astype(int)
    differences = np.empty((num_pairs, 2))
    differences[np.arange(num_pairs), right] = random.uniform(1, 2, num_pairs)
    differences[np.arange(num_pairs), 1 - right] = -random.uniform(1, 2, num_pairs)
    rejected = random.normal(size=(num_pairs, 2))
    is_held_out = np.arange(num_pairs) % 4 == 0
    return GatePairs(prompts, rejected + differences, rejected, is_held_out, np.ones(num_pairs, np.float32))


def test_pairs_without_weight_teach_a_gate_nothing():
    pairs = two_kinds(400)._replace(is_held_out=np.zeros(400, bool))
    turned = pairs._replace(chosen=pairs.rejected, rejected=pairs.chosen, weights=np.zeros(400, np.float32))
    seen, unseen = (pairs._replace(is_held_out=np.full(400, is_out)) for is_out in (False, True))
    every = [np.concatenate(parts) for parts in zip(seen, turned, unseen, strict=True)]
    assert fit_gate(GatePairs(*every), np.eye(2), SMALL, seed=0).history[-1]["eval_accuracy"] > 0.9


def test_gate_learns_what_no_constant_mixture_can():
    pairs = two_kinds()
    told = []
    fitted = fit_gate(pairs, np.eye(2), SMALL, seed=0, progress=told.append)
    held_out = (pairs.chosen - pairs.rejected)[pairs.is_held_out]
    mixtures = [(held_out @ [share, 1 - share] > 0).mean() for share in np.linspace(0, 1, 101)]
    assert max(mixtures) < 0.6
    assert fitted.history == told and [record["step"] for record in told] == [100, 200]
    assert told[-1]["eval_accuracy"] > 0.95
    assert told[-1]["loss"] < told[0]["loss"] < np.log(2)
    gaps = reward_gaps(fitted.gate, pairs.prompts[pairs.is_held_out], held_out)
    assert (gaps > 0).float().mean().item() == pytest.approx(told[-1]["eval_accuracy"])
    weights = fitted.gate(torch.from_numpy(pairs.prompts))
    assert not fitted.gate.training
    assert (weights[:, 0] > weights[:, 1]).numpy()[np.abs(pairs.prompts[:, 0]) > 1].tolist() == (
        pairs.prompts[np.abs(pairs.prompts[:, 0]) > 1, 0] > 0
    ).tolist()


def test_transform_acts_in_training_and_evaluation():
    # The chosen side is the longer one and nothing else is known; without its length, all gaps are 0.
    pairs = two_kinds(num_pairs=80)
    length = np.linspace(1, 2, 80)
    pairs = pairs._replace(chosen=pairs.rejected + np.stack([0.5 * length, length], axis=1))
    config = SMALL.model_copy(update={"num_steps": 3})
    plain = fit_gate(pairs, np.eye(2), config, seed=0).history[-1]
    adjusted = fit_gate(pairs, transform_matrix(np.array([0.5, 1.0]), 1), config, seed=0).history[-1]
    assert plain["eval_accuracy"] == 1 and plain["loss"] < 0.6
    assert adjusted["loss"] == pytest.approx(np.log(2), abs=1e-6) and adjusted["eval_accuracy"] < 0.6


def test_seed_decides_the_gate_and_nothing_else_does():
    pairs = two_kinds(num_pairs=100)
    config = SMALL.model_copy(update={"num_steps": 5, "batch_size": 32})
    gates = []
    for outside, seed in ((0, 0), (1, 0), (1, 1)):
        torch.manual_seed(outside)
        before = torch.random.get_rng_state()
        gates.append(fit_gate(pairs, np.eye(2), config, seed).gate.state_dict())
        assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(gates[0][name], gates[1][name]) for name in gates[0])
    assert not torch.equal(gates[0]["layers.0.weight"], gates[2]["layers.0.weight"])


def test_rate_falls_along_a_cosine_without_warmup():
    pairs = two_kinds(num_pairs=40)
    pairs = pairs._replace(chosen=pairs.rejected + [1.0, -1.0])
    start = drawn_gate([8, 2], seed=5).layers[0].bias
    # AdamW moves a parameter by the rate while its gradient stays the same: 1 and ½ of lr.
    for num_steps, rates in ((1, 1.0), (2, 1.5)):
        config = Gating(num_hidden_layers=0, lr=0.01, num_steps=num_steps)
        moved = fit_gate(pairs, np.eye(2), config, seed=5).gate.layers[0].bias - start
        assert moved.tolist() == pytest.approx([0.01 * rates, -0.01 * rates], rel=1e-3)


def test_record_is_the_mean_since_the_last_and_does_not_disturb(monkeypatch):
    pairs = two_kinds(num_pairs=60)
    config = SMALL.model_copy(update={"num_steps": 5, "dropout": 0.5})
    losses = {}
    for every in (1, 2):
        monkeypatch.setattr(gating, "RECORD_STEPS", every)
        losses[every] = [record["loss"] for record in fit_gate(pairs, np.eye(2), config, seed=0).history]
    first, second, third, fourth, fifth = losses[1]
    assert losses[2] == pytest.approx([(first + second) / 2, (third + fourth) / 2, fifth])


def test_batches_go_through_all_rows_before_one_comes_again():
    rows = np.arange(100, 110)
    found = np.concatenate(list(gating._batches(rows, Gating(batch_size=4, num_steps=5), seed=0)))
    assert sorted(found[:10]) == sorted(found[10:]) == rows.tolist()
    assert [len(batch) for batch in gating._batches(rows, Gating(batch_size=64, num_steps=2), seed=0)] == [10, 10]


def test_held_out_pairs_are_not_learned_from():
    pairs = two_kinds(num_pairs=100)
    config = SMALL.model_copy(update={"num_steps": 5})
    chosen = pairs.chosen.copy()
    chosen[pairs.is_held_out] += 100
    first, second = (fit_gate(pairs._replace(chosen=c), np.eye(2), config, seed=0) for c in (pairs.chosen, chosen))
    assert first.history[0]["loss"] == second.history[0]["loss"]
    assert first.history[0]["eval_accuracy"] < second.history[0]["eval_accuracy"] == 1


def test_gate_without_pairs_or_with_numbers_that_are_not_finite_is_refused():
    pairs = two_kinds(num_pairs=20)
    with pytest.raises(SchemaError, match="All 20 pairs are held out"):
        fit_gate(pairs._replace(is_held_out=np.ones(20, bool)), np.eye(2), SMALL, seed=0)
    none = fit_gate(
        pairs._replace(is_held_out=np.zeros(20, bool)), np.eye(2), SMALL.model_copy(update={"num_steps": 1}), seed=0
    )
    assert set(none.history[0]) == {"step", "loss"}
    pairs.prompts[1] = NAN
    with pytest.raises(CheckpointError, match="loss is nan at step 100"):
        fit_gate(pairs, np.eye(2), SMALL, seed=0)


def test_config_refuses_what_cannot_be():
    assert len(Gating().alphas) == 9 and Gating().alphas[0] == 1e-4 and Gating().alphas[-1] == 1e4
    for wrong in ({"alphas": []}, {"alphas": [0]}, {"validation_fraction": 0}, {"dropout": 1}, {"temperature": 0}):
        with pytest.raises(ConfigError, match=f"'{next(iter(wrong))}"):
            build_config(Gating, wrong, "the test")


# Saving


@pytest.fixture
def head():
    gate = drawn_gate([6, 5, 4, 3], temperature=7.0, dropout=0.3)
    with torch.no_grad():
        gate.logit_scale.fill_(1.7)
    transform = torch.from_numpy(transform_matrix(np.array([0.3, 1.0, 0.05]), 1))
    return GatedHead(gate, transform, ["help", "length", "Güte"]).eval()


def test_saved_gate_gives_the_same_rewards(head, tmp_path):
    save_gate(tmp_path, head)
    loaded = load_gate(str(tmp_path))
    generator = torch.Generator().manual_seed(0)
    scores, prompts = torch.randn((2, 9, 3), generator=generator), torch.randn((2, 9, 6), generator=generator)
    with torch.inference_mode():
        expected, found = head(scores, prompts), loaded(scores, prompts)
    assert found.rewards.shape == (2, 9) and found.rewards.std() > 0.1
    torch.testing.assert_close(found.rewards, expected.rewards, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.weights, expected.weights, atol=1e-6, rtol=0)
    assert loaded.objectives == ("help", "length", "Güte") and not loaded.training
    assert sorted(load_file(tmp_path / GATE_FILE)) == [
        "gating.layers.0.bias",
        "gating.layers.0.weight",
        "gating.layers.1.bias",
        "gating.layers.1.weight",
        "gating.layers.2.bias",
        "gating.layers.2.weight",
        "gating.logit_scale",
        "reward_transform_matrix",
    ]


def test_gate_lies_where_loaders_of_the_model_do_not_look(head, tmp_path):
    save_gate(tmp_path, head)
    assert list(tmp_path.glob("*.safetensors")) == []


def armorm_tensors(num_layers=4, objectives=19, hidden=32, width=12):
    widths = [hidden, *[width] * (num_layers - 1), objectives]
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "model.layers.0.mlp.up_proj.weight": torch.ones((2, 2)),
        "regression_layer.weight": torch.randn((objectives, hidden), generator=generator),
        "gating.logit_scale": torch.tensor([2.0]),
        "reward_transform_matrix": torch.eye(objectives),
    }
    for index in range(num_layers):
        shape = (widths[index + 1], widths[index])
        tensors[f"gating.layers.{index}.weight"] = torch.randn(shape, generator=generator)
        tensors[f"gating.layers.{index}.bias"] = torch.randn(shape[:1], generator=generator)
    return {name: tensor.bfloat16() for name, tensor in tensors.items()}


@pytest.mark.parametrize("num_layers", [1, 2, 4, 12])
def test_tensors_of_an_armorm_checkpoint_make_a_gate(num_layers):
    tensors = armorm_tensors(num_layers)
    names = [str(index) for index in range(19)]
    head = GatedHead.from_tensors(tensors, names)
    hidden = torch.randn((7, 32), generator=torch.Generator().manual_seed(1)).bfloat16()
    scores = hidden.float() @ tensors["regression_layer.weight"].float().T
    x = hidden.float()
    for index in range(num_layers):
        x = x @ tensors[f"gating.layers.{index}.weight"].float().T + tensors[f"gating.layers.{index}.bias"].float()
        x = x.relu() if index < num_layers - 1 else x
    expected = (2 * (x / 10).softmax(-1) * scores).sum(-1)
    found = head(scores, hidden)
    assert found.rewards.dtype == torch.float32
    torch.testing.assert_close(found.rewards, expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(Gate.from_tensors(tensors, 10.0)(hidden), found.weights)


def test_tensors_that_make_no_gate_are_named():
    names = [str(index) for index in range(19)]

    def refused(match, objectives=names, **changes):
        tensors = {**armorm_tensors(), **{name.replace("__", "."): value for name, value in changes.items()}}
        tensors = {name: value for name, value in tensors.items() if value is not None}
        with pytest.raises(CheckpointError, match=match):
            GatedHead.from_tensors(tensors, objectives, where="'there'")

    refused("'there' lacks 'gating.layers.1.weight'", gating__layers__1__weight=None)
    refused("'there' lacks 'gating.layers.2.bias'", gating__layers__2__bias=None)
    refused("'there' lacks 'gating.logit_scale'", gating__logit_scale=None)
    refused("'there' lacks 'reward_transform_matrix'", reward_transform_matrix=None)
    refused(
        r"'gating.layers.1.weight' of 'there' has the shape \(12, 5\), .* \(12, 12\)",
        gating__layers__1__weight=torch.ones((12, 5)),
    )
    refused(r"'gating.layers.0.weight' .* \(12,\); a layer's", gating__layers__0__weight=torch.ones(12))
    refused(r"'reward_transform_matrix' .* \(3, 3\), .* \(19, 19\)", reward_transform_matrix=torch.eye(3))
    refused("'gating.layers.3.bias' of 'there' is not finite", gating__layers__3__bias=torch.full((19,), NAN))
    refused("weighs 19 objectives, and 2 have names", objectives=["a", "b"])
    with pytest.raises(CheckpointError, match=r"lacks 'gating.layers.0.weight'"):
        Gate.from_tensors({})


def test_gate_file_that_is_missing_cut_short_or_without_facts_is_refused(head, tmp_path):
    with pytest.raises(CheckpointError, match="has no gate, for there is no 'gate/gate.safetensors'"):
        load_gate(tmp_path)
    save_gate(tmp_path, head)
    path = tmp_path / GATE_FILE
    whole = path.read_bytes()
    for length in (len(whole) - 5, 100, 0):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="cannot be read, perhaps it is cut short"):
            load_gate(tmp_path)
    path.write_bytes(whole)
    tensors = load_file(path)
    for facts in ({"format": "pt"}, {"temperature": "10.0"}, {"temperature": "hot", "objectives": json.dumps(["a"])}):
        save_file(tensors, path, facts)
        with pytest.raises(CheckpointError, match="does not say its temperature and objectives"):
            load_gate(tmp_path)
