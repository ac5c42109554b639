"""The learner on samples made by hand: its steps at every ZeRO stage, without a sampler or a scorer."""

import os
import random

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from rayrm.config import build_config
from rayrm.errors import CheckpointError
from rayrm.models.creation import CreationConfig, create_model
from rayrm.training.checkpoints import gather_state
from rayrm.training.launch import Parallelism, deepspeed_config
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


def make(policy, zero_stage=0, micro_batch_size=3, parallelism=None, **training):
    """A learner, and the renderer of its policy."""
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
    return Learner(engine, job.training, micro_batch_size, renderer.tokenizer.pad_token_id), renderer


def make_learner(*args, **values):
    return make(*args, **values)[0]


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


@pytest.mark.parametrize("is_managed", [True, False])
@pytest.mark.parametrize(
    ("zero_stage", "offload"), [(0, False), (1, False), (2, False), (3, False), (1, True), (2, True), (3, True)]
)
def test_small_gradients_of_many_passes_count_beside_a_large_one_in_bf16(
    process_group, zero_stage, offload, is_managed
):
    import deepspeed

    parallelism = Parallelism(zero_stage=zero_stage, offload_optimizer=offload)
    settings = deepspeed_config(parallelism, 1, 65, True, max_grad_norm=1e9)
    settings["managed_gradient_accumulation"] = is_managed
    layer = torch.nn.Linear(4, 1, bias=False, dtype=torch.bfloat16)
    torch.nn.init.zeros_(layer.weight)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    engine, *_ = deepspeed.initialize(model=layer, optimizer=optimizer, config=settings)
    # In bf16 1 + 2⁻⁹ is 1.
    for size in [1.0] + 64 * [2.0**-9]:
        engine.backward(size * engine(torch.ones(1, 4, dtype=torch.bfloat16)).sum(), scale_wrt_gas=False)
        if is_managed:
            engine.step()
    if not is_managed:
        engine.step()
    assert gather_state(layer)["weight"].tolist() == [4 * [-1.125]]


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_a_step_in_bf16_is_near_that_in_fp32(policy, zero_stage):
    values = {"entropy_coefficient": 0.1, "kl": {"coefficient": 0.3}, "num_updates": 1, "num_mini_batches": 1}
    wanted = take_step(make_learner(policy, **values))
    found = take_step(make_learner(policy, zero_stage, parallelism={"precision": "bf16"}, **values))
    assert found == pytest.approx(wanted, rel=0.03, abs=0.01)
    assert abs(wanted["policy_loss"]) + wanted["value_loss"] > 0.1 and wanted["grad_norm"] > 0.1


def moments_of(learner):
    """Adam's moments and steps, by the size of what they are for."""
    states = learner.engine.basic_optimizer.state.values()
    return sorted((len(s["exp_avg"].flatten()), float(s["exp_avg_sq"].sum()), float(s["step"])) for s in states)


@pytest.mark.parametrize(("zero_stage", "precision"), [(0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "bf16"), (3, "fp32")])
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


@pytest.mark.parametrize("zero_stage", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_recomputed_activations_give_the_same_step(policy, zero_stage):
    found = []
    for is_on in (False, True):
        learner = make_learner(policy, zero_stage, parallelism={"gradient_checkpointing": is_on})
        assert learner.network.policy.is_gradient_checkpointing == is_on
        found.append((take_step(learner), weights_of(learner)))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5, abs=1e-7)
    assert_near(found[1][1], found[0][1])


def assert_near(weights, wanted, atol=1e-6):
    assert weights.keys() == wanted.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, wanted[name], atol=atol, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize(
    ("zero_stage", "precision", "lora"),
    [
        (1, "bf16", None),
        (2, "bf16", {"r": 2}),
        (2, "fp32", None),
        pytest.param(1, "fp32", None, marks=pytest.mark.slow),
        pytest.param(3, "fp32", None, marks=pytest.mark.slow),
        pytest.param(3, "fp32", {"r": 2}, marks=pytest.mark.slow),
    ],
)
def test_a_learner_goes_on_from_its_state_as_if_it_had_not_ended(policy, tmp_path, zero_stage, precision, lora):
    """Also behind the last step in which only values were learned."""
    values = {"parallelism": {"precision": precision}, "lora": lora, "value_warmup_steps": 1, "weight_decay": 0.1}
    whole = make_learner(policy, zero_stage, **values)
    for step in range(3):
        whole.set_lr(step, 3)
        record = take_step(whole, step)
        if not step:
            whole.engine.save_checkpoint(str(tmp_path), tag="state")
    resumed = make_learner(policy, zero_stage, **values)
    resumed.engine.load_checkpoint(str(tmp_path), tag="state")
    for step in range(1, 3):
        resumed.set_lr(step, 3)
        again = take_step(resumed, step)
    assert again == pytest.approx(record, rel=1e-5, abs=1e-7)
    assert_near(weights_of(resumed), weights_of(whole))


@pytest.mark.parametrize(
    ("zero_stage", "lora"), [(2, {"r": 2}), (3, {"r": 2}), pytest.param(3, None, marks=pytest.mark.slow)]
)
def test_a_policy_that_was_trained_in_parts_is_read_by_plain_transformers(policy, tmp_path, zero_stage, lora):
    from rayrm.training.ppo.engine import export_learned

    learner, renderer = make(policy, zero_stage, lora=lora, lr=1e-2)
    take_step(learner)
    samples = make_samples()
    logprobs = learner.judge(samples)[0]
    export_learned(learner.network.policy, learner.training, renderer, str(tmp_path))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    start = AutoModelForCausalLM.from_pretrained(policy)
    moved = 0.0
    for sample, found in zip(samples, logprobs, strict=True):
        ids, num = torch.tensor([sample.prompt_ids + sample.ids]), len(sample.ids)
        with torch.no_grad():
            logits = [network(ids).logits[0, -num - 1 : -1] for network in (model, start)]
        wanted, before = (x.log_softmax(-1)[range(num), sample.ids] for x in logits)
        torch.testing.assert_close(found[:num], wanted, atol=1e-5, rtol=0)
        moved = max(moved, float((wanted - before).abs().max()))
    assert moved > 1e-3


def test_updates_end_early_when_the_policy_has_gone_far(policy):
    values = {"num_updates": 3, "num_mini_batches": 1, "lr": 1e-2}
    assert take_step(make_learner(policy, **values))["num_updates"] == 3
    record = take_step(make_learner(policy, max_update_kl=1e-6, **values))
    # The first one sees the policy that drew.
    assert record["num_updates"] == 2 and record["update_kl"] > 1e-6


def step_of_rank(rank, num_ranks, policy, folder):
    """What a process of its own does: a step at some ZeRO stages."""
    os.environ["LOCAL_RANK"] = str(rank)
    store = dist.FileStore(f"{folder}/store", num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
    for zero_stage in (0, 2, 3):
        learner = make_learner(policy, zero_stage)
        found = take_step(learner), weights_of(learner)
        if rank == 0:
            torch.save(found, f"{folder}/{zero_stage}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_take_the_step_of_one(policy, tmp_path):
    learner = make_learner(policy)
    wanted = take_step(learner), weights_of(learner)
    torch.multiprocessing.spawn(step_of_rank, (2, policy, str(tmp_path)), nprocs=2)
    for zero_stage in (0, 2, 3):
        record, weights = torch.load(tmp_path / f"{zero_stage}.pt")
        assert record == pytest.approx(wanted[0], rel=1e-4, abs=1e-5)
        assert_near(weights, wanted[1], atol=2e-5)
