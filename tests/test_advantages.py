"""Advantages, losses and divergences, by hand and against plain loops."""

import math

import pytest
import torch
from pydantic import TypeAdapter

from rayrm.training.ppo.advantages import estimate_gae, group_relative, leave_one_out, whiten
from rayrm.training.ppo.experience import Experience, Sample, compute_advantages, equal_rewards_fraction
from rayrm.training.ppo.kl import KLConfig
from rayrm.training.ppo.losses import (
    clipped_policy_loss,
    clipped_value_loss,
    estimate_kl,
    token_weights,
)
from rayrm.training.ppo.settings import RewardedTraining

MASK = torch.tensor([[1.0, 1, 1], [1, 1, 0]])


def test_gae_by_hand_for_completions_of_unequal_length():
    rewards = torch.tensor([[0.0, 0, 1], [0, 2, 0]])
    values = torch.tensor([[0.5, 0.25, 0.5], [1, 0.5, 9]])
    advantages, returns = estimate_gae(rewards, values, MASK, gamma=1.0, lam=0.5)
    # Row 0: deltas −0.25, 0.25, 0.5; row 1: deltas −0.5, 1.5, and the 9 behind its end counts nowhere.
    assert advantages.tolist() == [[-0.25 + 0.5 * 0.5, 0.25 + 0.5 * 0.5, 0.5], [-0.5 + 0.5 * 1.5, 1.5, 0.0]]
    assert returns.tolist() == [[0.5, 0.75, 1.0], [1.25, 2.0, 0.0]]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (0.99, 0.0), (1.0, 1.0)])
def test_gae_equals_the_sum_of_its_definition(gamma, lam):
    generator = torch.Generator().manual_seed(3)
    rewards, values = (torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    lengths = [7, 1, 3, 6, 2]
    mask = torch.tensor([[float(token < length) for token in range(7)] for length in lengths]).double()
    advantages, returns = estimate_gae(rewards, values, mask, gamma, lam)
    for row, length in enumerate(lengths):
        after = [*values[row, 1:length].tolist(), 0.0]
        deltas = [float(rewards[row, t] + gamma * after[t] - values[row, t]) for t in range(length)]
        wanted = [sum((gamma * lam) ** (u - t) * deltas[u] for u in range(t, length)) for t in range(length)]
        assert advantages[row, :length].tolist() == pytest.approx(wanted, abs=1e-12)
        assert returns[row, :length].tolist() == pytest.approx(
            [a + float(v) for a, v in zip(wanted, values[row], strict=False)], abs=1e-12
        )
        assert not advantages[row, length:].any() and not returns[row, length:].any()


def test_with_lambda_1_the_return_of_a_token_is_the_reward_from_it_on():
    rewards = torch.tensor([[0.0, 0, 3], [0, 2, 0]])
    _, returns = estimate_gae(rewards, torch.rand(2, 3), MASK, gamma=1.0, lam=1.0)
    assert returns.tolist() == [pytest.approx([3, 3, 3]), pytest.approx([2, 2, 0])]


def test_whitened_values_have_mean_0_and_variance_1_over_the_mask_alone():
    values = torch.tensor([[1.0, 2, 3], [4, 5, 1000]])
    found = whiten(values, MASK)
    assert found[1, 2] == 0
    kept = found[MASK.bool()]
    assert kept.mean() == pytest.approx(0, abs=1e-6)
    assert kept.var() == pytest.approx(1, rel=1e-6)
    # Mean 3 and unbiased variance 2.5.
    assert found[0].tolist() == pytest.approx([-2 / math.sqrt(2.5), -1 / math.sqrt(2.5), 0], rel=1e-6)
    assert whiten(torch.tensor([[7.0]]), torch.ones(1, 1)).tolist() == [[0.0]]


def test_a_sample_is_compared_with_the_others_of_its_prompt():
    rewards, groups = torch.tensor([1.0, 2, 6, 5, 5]), [8, 8, 8, 3, 3]
    assert leave_one_out(rewards, groups).tolist() == [1 - 4, 2 - 3.5, 6 - 1.5, 0, 0]
    std = math.sqrt(7)
    assert group_relative(rewards, groups).tolist() == pytest.approx(
        [-2 / (std + 1e-4), -1 / (std + 1e-4), 3 / (std + 1e-4), 0, 0]
    )
    assert group_relative(rewards, groups, scale=False).tolist() == [-2, -1, 3, 0, 0]


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_without_a_critic_divergence_in_the_reward_is_compared_too(kind):
    """Totals of 1 − 0.5 · 2 = 0, 2 and −1 for the first prompt, 3 and 3 + 0.5 · 1 for the second."""
    rewards = torch.tensor([[0.0, 1], [0, 2], [-1, 0], [3, 0], [3, 0]])
    mask = torch.tensor([[1.0, 1], [1, 1], [1, 0], [1, 1], [1, 0]])
    old = torch.tensor([[-1.0, -1], [-3, -1], [-2, 9], [-1, -2], [-3, 9]])
    ref = torch.tensor([[-2.0, -2], [-2, -2], [-2, 0], [-2, -1], [-2, 0]])
    samples = [Sample(str(n), row, "de", "", [1], [2], [0.0], True, "") for n, row in enumerate([7, 7, 7, 4, 4])]
    zeros = torch.zeros(5, 2)
    experience = Experience(samples, mask, rewards, old, ref, zeros, zeros)
    values = {
        "type": kind,
        "model": "m",
        "scorers": [{"type": "grammar"}],
        "kl": {"estimator": "k1", "part_of": "reward"},
    }
    values |= {"sampling": {"num_candidates": 3}, "rewarding": {"holistic": {"scorer": "grammar"}}}
    training = TypeAdapter(RewardedTraining).validate_python(values)
    advantages, returns = compute_advantages(experience, training, 0.5)
    std = {"rloo": [1.0, 1.0], "grpo": [math.sqrt(7 / 3), math.sqrt(0.125)]}[kind]
    wanted = {"rloo": [-0.5, 2.5, -2, -0.5, 0.5], "grpo": [-1 / 3, 5 / 3, -4 / 3, -0.25, 0.25]}[kind]
    spread = [std[0]] * 3 + [std[1]] * 2
    for row, (value, divisor) in enumerate(zip(wanted, spread, strict=True)):
        assert advantages[row].tolist() == pytest.approx((value / divisor * mask[row]).tolist(), rel=1e-3)
    assert returns is None


def test_prompts_whose_completions_all_earn_the_same_are_counted():
    rewards = {8: [1.0, 2.0, 1.0], 3: [0.5, 0.5], 4: [0.0, 0.0], 5: [0.1, 0.2]}
    samples = [
        Sample(f"{row}/{n}", row, "de", "", [1], [2], [0.0], True, "", reward)
        for row, found in rewards.items()
        for n, reward in enumerate(found)
    ]
    assert equal_rewards_fraction(samples) == 0.5


def test_the_policy_loss_is_clipped_where_it_would_go_on_growing_better():
    old = torch.zeros(4)
    logprobs = torch.tensor([1.5, 1.5, 0.5, 0.5]).log()
    loss, clipped = clipped_policy_loss(logprobs, old, torch.tensor([1.0, -1, 1, -1]), 0.2)
    assert loss.tolist() == pytest.approx([-1.2, 1.5, -0.5, 0.8])
    assert clipped.tolist() == [1, 0, 0, 1]


def test_a_clipped_token_bears_no_gradient():
    logprobs = torch.tensor([1.5, 0.5, 1.1]).log().requires_grad_()
    loss, _ = clipped_policy_loss(logprobs, torch.zeros(3), torch.tensor([2.0, -2, 2]), 0.2)
    loss.sum().backward()
    assert logprobs.grad.tolist() == pytest.approx([0, 0, -2 * 1.1])


def test_the_value_loss_is_the_worse_of_the_free_and_the_clipped_one():
    values = torch.tensor([1.0, 0.1, -1.0])
    loss, clipped = clipped_value_loss(values, torch.zeros(3), torch.tensor([1.0, 1.0, 1.0]), 0.2)
    # Value 1 is clipped to 0.2: (0.2 − 1)²; 0.1 is free; −1 is clipped to −0.2, and the free error is the larger one.
    assert loss.tolist() == pytest.approx([0.5 * 0.64, 0.5 * 0.81, 0.5 * 4])
    assert clipped.tolist() == [1, 0, 0]


def test_estimators_of_divergence_by_hand():
    logprobs, ref = torch.tensor([0.0, -1.0]), torch.tensor([-1.0, 0.0])
    assert estimate_kl(logprobs, ref, "k1").tolist() == [1, -1]
    assert estimate_kl(logprobs, ref, "k2").tolist() == [0.5, 0.5]
    assert estimate_kl(logprobs, ref, "k3").tolist() == pytest.approx([math.exp(-1), math.e - 2])
    assert estimate_kl(logprobs, ref, "abs").tolist() == [1, 1]


def test_a_ratio_beyond_all_bounds_stays_finite():
    logprobs, old = torch.tensor([-1.0, -500.0]).requires_grad_(), torch.tensor([-500.0, -1.0])
    loss, _ = clipped_policy_loss(logprobs, old, torch.tensor([-1.0, -1.0]), 0.2)
    assert loss.tolist() == pytest.approx([math.exp(20), 0.8])
    assert estimate_kl(logprobs, old, "k3").tolist() == pytest.approx([19, math.exp(20) - 21])
    (loss.sum() + estimate_kl(logprobs, old, "k3").sum()).backward()
    assert logprobs.grad.isfinite().all()


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_estimators_are_right_on_average(estimator):
    generator = torch.Generator().manual_seed(0)
    policy, ref = (torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(0) for _ in range(2))
    exact = (policy.exp() * (policy - ref)).sum()
    assert (policy.exp() * estimate_kl(policy, ref, estimator)).sum() == pytest.approx(float(exact))


def test_the_coefficient_follows_the_target_within_bounds():
    kl = KLConfig(coefficient=0.2, target=6, horizon=10000)
    assert kl.adapt(0.2, 6.0, 512) == 0.2
    assert kl.adapt(0.2, 6.6, 512) == pytest.approx(0.2 * math.exp(0.1 * 512 / 10000))
    assert kl.adapt(0.2, 60.0, 512) == pytest.approx(0.2 * math.exp(0.2 * 512 / 10000))
    assert kl.adapt(0.2, 0.0, 512) == pytest.approx(0.2 * math.exp(-0.2 * 512 / 10000))
    # More samples a step than the horizon has.
    assert 0 < KLConfig(coefficient=0.2, target=6, horizon=50).adapt(0.2, 0.0, 512) < 0.2
    assert KLConfig(coefficient=0.2).adapt(0.2, 60.0, 512) == 0.2


def test_tokens_count_as_the_reduction_says():
    assert token_weights(MASK, "token_mean").tolist() == [[pytest.approx(0.2)] * 3, [pytest.approx(0.2)] * 2 + [0]]
    assert token_weights(MASK, "sequence_mean").tolist() == [[pytest.approx(1 / 6)] * 3, [0.25, 0.25, 0]]
    assert token_weights(MASK, "sequence_sum").tolist() == [[0.5] * 3, [0.5, 0.5, 0]]
