"""The learner on samples made by hand: its steps at every ZeRO stage, without a sampler or a scorer."""

import random

import pytest
import torch

from rayrm.config import build_config
from rayrm.errors import CheckpointError
from rayrm.models.creation import CreationConfig, create_model
from rayrm.training.ppo.experience import Sample, compute_advantages
from rayrm.training.ppo.settings import RewardedJob

SIZES = CreationConfig(vocab_size=300, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2, max_length=64)


@pytest.fixture(scope="module")
def policy(tmp_path_factory, process_group):
    """A tiny policy."""
    folder = tmp_path_factory.mktemp("policy")
    create_model(["one two three good bad"] * 9, SIZES, str(folder))
    return folder


@pytest.fixture(autouse=True)
def local_rank(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")


def make_learner(policy, zero_stage=0, micro_batch_size=3, parallelism=None, **training):
    from rayrm.training.ppo.engine import make_engine
    from rayrm.training.ppo.learner import Learner

    values = {
        "input": "rows",
        "output": "nowhere",
        "training": {
            "type": "ppo",
            "model": str(policy),
            "max_length": 64,
            "lr": 1e-3,
            "schedule": "constant",
            "warmup_fraction": 0.0,
            "global_batch_size": 4,
            "seed": 1,
            "sampling": {"num_candidates": 2, "max_tokens": 12},
            "scorers": [{"type": "grammar"}],
            "rewarding": {"holistic": {"scorer": "grammar"}},
            **training,
        },
        "parallelism": {"zero_stage": zero_stage, **(parallelism or {})},
    }
    job = build_config(RewardedJob, values, "the test")
    engine, renderer = make_engine(job, None, micro_batch_size)
    return Learner(engine, job.training, micro_batch_size, renderer.tokenizer.pad_token_id)


def make_samples(num_rows=4, rewards=None):
    """Two completions for each prompt, of random tokens and rewards."""
    rng = random.Random(0)
    samples = []
    for index in range(2 * num_rows):
        if index % 2 == 0:
            prompt = [rng.randrange(5, 60) for _ in range(rng.randint(1, 6))]
        ids = [rng.randrange(5, 60) for _ in range(rng.randint(1, 8))]
        reward = rng.uniform(-1, 1) if rewards is None else rewards[index]
        sample = Sample(f"s{index}", index // 2, "de", "", prompt, ids, [0.0] * len(ids), True, "", reward)
        sample.token_rewards = [0.0] * (len(ids) - 1) + [reward]
        samples.append(sample)
    return samples


def take_step(learner, step=0, samples=None, coefficient=0.05):
    experience = learner.prepare(samples or make_samples())
    advantages, returns = compute_advantages(experience, learner.training, coefficient)
    return learner.learn(experience, advantages, returns, step, coefficient)


def weights_of(learner):
    from rayrm.training.ppo.weights import sampler_state

    return sampler_state(learner.network)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_the_norm_of_the_gradient_is_told_before_it_is_clipped(policy, zero_stage):
    values = {"num_updates": 1, "num_mini_batches": 1, "max_grad_norm": 1e-3}
    plain = make_learner(policy, **values)
    found = {}
    plain.engine.optimizer.register_step_pre_hook(
        lambda *_: found.update(norm=torch.cat([p.grad.flatten() for p in plain.network.parameters()]).norm())
    )
    wanted = take_step(plain)["grad_norm"]
    assert found["norm"] == pytest.approx(1e-3, rel=1e-3) and wanted > 0.01
    assert take_step(make_learner(policy, zero_stage, **values))["grad_norm"] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_gradient_that_is_not_finite_ends_the_run_and_spoils_nothing(policy, zero_stage):
    learner = make_learner(policy, zero_stage, kl={"coefficient": 0})
    before = weights_of(learner)
    # Its value is finite; its gradient is that of a root at 0.
    learner.network.value_head.register_forward_hook(lambda module, inputs, values: values + (values * 0).sqrt())
    with pytest.raises(CheckpointError, match="The norm of the gradient is (inf|nan) at step 3; try a lower lr"):
        take_step(learner, step=2)
    for name, tensor in weights_of(learner).items():
        assert torch.equal(tensor, before[name])


def moments_of(learner):
    """Adam's moments and steps, by the size of what they are for."""
    states = learner.engine.basic_optimizer.state.values()
    return sorted((len(s["exp_avg"].flatten()), float(s["exp_avg_sq"].sum()), float(s["step"])) for s in states)


@pytest.mark.parametrize(("zero_stage", "precision"), [(0, "fp32"), (1, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")])
def test_while_values_warm_up_the_policy_stays_as_it_was_to_the_last_bit(policy, zero_stage, precision):
    values = {"value_warmup_steps": 2, "weight_decay": 0.1, "schedule": "linear", "num_updates": 1}
    parallelism = {"precision": precision, "gradient_checkpointing": zero_stage == 3}
    learner = make_learner(policy, zero_stage, parallelism=parallelism, **values)
    before = weights_of(learner)
    rates = []
    for step in range(2):
        rates.append(learner.set_lr(step, 6))
        take_step(learner, step)
    after = weights_of(learner)
    moved = [name for name, tensor in after.items() if not torch.equal(tensor, before[name])]
    assert moved == ["value_head.weight", "value_head.bias"]
    counts = [steps for _, squares, steps in moments_of(learner) if not squares]
    assert not any(counts)
    rates.append(learner.set_lr(2, 6))
    take_step(learner, 2)
    # Twice two parts for the value head, once for the policy.
    assert {steps for _, _, steps in moments_of(learner)} == {6.0, 2.0}
    rates.append(learner.set_lr(3, 6))
    assert rates == pytest.approx([0, 0, 1e-3, 0.75e-3])
    moved = [name for name, tensor in weights_of(learner).items() if not torch.equal(tensor, after[name])]
    assert any(name.startswith("policy.") for name in moved)
