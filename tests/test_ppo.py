"""Policy training with rewards on one worker, with a real learner and sampler in this process."""

import json
import random
import shutil
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    T5Config,
    T5ForConditionalGeneration,
)

from rayrm.config import build_config
from rayrm.errors import CheckpointError, ConfigError, RayRMError, SchemaError, ServiceError
from rayrm.models.creation import CreationConfig, create_model
from rayrm.models.folders import load_tokenizer
from rayrm.models.rendering import Renderer
from rayrm.models.vllm import Drawn, EngineConfig
from rayrm.scoring.grammar import GrammarScorer
from rayrm.training.launch import Parallelism
from rayrm.training.ppo.collecting import Faults
from rayrm.training.ppo.experience import Sample, compute_advantages
from rayrm.training.ppo.loop import STEP_PARTS
from rayrm.training.ppo.metrics import distinct_n, merge_records, words_of
from rayrm.training.ppo.network import HEAD_GRADIENT
from rayrm.training.ppo.scorers import check_revision
from rayrm.training.ppo.settings import RewardedJob

SIZES = CreationConfig(vocab_size=300, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2, max_length=64)
NUM_ROWS = 24
NARROW = {"rollouts": {"engine": "transformers", "settings": {"max_model_len": 20}}}
"""A sampler that holds less than the policy."""
TEMPLATE = "{% for m in messages %}{{ m['content'] }}|{% endfor %}"


def teach(path):
    """Some steps on random answers, so that completions are words and end."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rng = random.Random(1)
    words = ["one", "two", "three", "good", "bad"]
    for _ in range(60):
        texts = [[" ".join(rng.choices(words, k=rng.randint(1, 4))) for _ in range(2)] for _ in range(16)]
        rows = [
            [*tokenizer(f"{a}|")["input_ids"], *tokenizer(b)["input_ids"], tokenizer.eos_token_id] for a, b in texts
        ]
        width = max(map(len, rows))
        ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
        labels = torch.tensor([row + [-100] * (width - len(row)) for row in rows])
        model(ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A tiny policy that answers with a few of five words, and prompts whose right answers are two of them."""
    folder = tmp_path_factory.mktemp("ppo")
    create_model(["one two three good bad"] * 9, SIZES, f"{folder}/policy")
    teach(f"{folder}/policy")
    rng = random.Random(0)
    rows = []
    for index in range(NUM_ROWS):
        text = " ".join(rng.choice(["one", "two", "three"]) for _ in range(rng.randint(1, 6)))
        lang = ["de", "fr"][index % 2]
        rows.append(
            {
                "id": f"r{index}",
                "group": f"g{index // 2}",
                "prompt": [{"role": "user", "content": text}],
                "source": text,
                "reference": "good one",
                "anchor": None,
                "src_lang": "en",
                "tgt_lang": lang,
                "lang": lang,
                "subset": None,
            }
        )
    pq.write_table(pa.Table.from_pylist(rows), folder / "prompts.parquet")
    return folder


def make_job(data, output, zero_stage=0, save_steps=100, log_steps=1, **training):
    values = {
        "input": f"{data}/prompts.parquet",
        "output": str(output),
        "training": {
            "type": "ppo",
            "model": f"{data}/policy",
            "max_length": 64,
            "lr": 1e-3,
            "schedule": "constant",
            "warmup_fraction": 0.0,
            "global_batch_size": 4,
            "micro_batch_size": 3,
            "max_steps": 4,
            "seed": 1,
            "sampling": {"num_candidates": 2, "max_tokens": 12},
            "rollouts": {"engine": "transformers"},
            "scorers": [{"type": "grammar"}],
            "rewarding": {"holistic": {"scorer": "grammar", "weight": 0.1}},
            **training,
        },
        "parallelism": {"zero_stage": zero_stage},
        "save_steps": save_steps,
        "log_steps": log_steps,
        "report_to": "none",
    }
    return build_config(RewardedJob, values, "the test")


class Rollouts:
    """A real sampler, in this process."""

    def __init__(self, model, config, decoding, max_model_len, ends):
        from rayrm.models.generating import TransformersEngine

        self.engine = TransformersEngine(model, EngineConfig())
        self.engine.ends = sorted({*self.engine.ends, *ends})
        self.decoding = decoding

    def push(self, state, version):
        self.engine.load_weights({name: tensor.clone() for name, tensor in state.items()})
        self.version = version

    def draw(self, requests):
        prompts, seeds = [r.prompt_ids for r in requests], [r.seed for r in requests]
        yield requests, self.engine.draw(prompts, seeds, self.decoding), self.version

    def close(self):
        pass


class Scorers:
    """The scorer, in this process; `lost` says which texts it has no score for."""

    lost = staticmethod(lambda text: False)

    def __init__(self, scorers, max_failures):
        self.scorer = GrammarScorer(scorers[0])

    def pin(self, known):
        return known

    def submit(self, name, unit, rows):
        outcomes = self.scorer.score(rows) if unit != "spans" else self.scorer.spans(rows)
        return [
            [
                (None, "overloaded") if self.lost(text) else outcome
                for text, outcome in zip(row["candidates"], o, strict=True)
            ]
            for row, o in zip(rows, outcomes, strict=True)
        ]

    def result(self, ticket):
        return ticket

    def take_busy(self):
        return 0.0

    def close(self):
        pass


@pytest.fixture
def alone(process_group, monkeypatch, tmp_path):
    """Sampler and scorer in this process, and states in a folder of the test."""
    from ray import train

    from rayrm.training.ppo import loop

    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(loop, "RolloutPool", Rollouts)
    monkeypatch.setattr(loop, "ScorerPool", Scorers)

    def report(metrics, checkpoint, checkpoint_dir_name):
        shutil.rmtree(tmp_path / checkpoint_dir_name, ignore_errors=True)
        shutil.copytree(checkpoint.path, tmp_path / checkpoint_dir_name)

    monkeypatch.setattr(train, "report", report)


def start(job):
    from rayrm.training.ppo.loop import RewardedTrainer

    return RewardedTrainer(job, TEMPLATE, job.training.micro_batch_size)


def finish(trainer):
    trainer.train(show_progress=False)
    return {name: p.detach().clone() for name, p in trainer.learner.network.named_parameters()}


def samples_of(folder):
    found = {}
    for path in sorted((folder / "samples").glob("*.jsonl")):
        found[path.stem] = [json.loads(line) for line in path.read_text().splitlines()]
    return found


TIMES = ("seconds/", "step_s")
"""What differs between runs that are the same."""


def without_times(history):
    return [{name: value for name, value in record.items() if not name.startswith(TIMES)} for record in history]


def plain_loss(values, chosen, entropy, given, training):
    """The loss of a completion's tokens by the formulas of the settings' docs, in fp64."""
    ratio = (chosen - given["old"]).exp()
    clip, advantages = training.clip_range, given["advantages"]
    loss = torch.maximum(-ratio * advantages, -ratio.clamp(1 - clip, 1 + clip) * advantages) - 0.3 * entropy
    if training.kl.part_of == "loss":
        d = chosen - given["ref"]
        loss = loss + 0.2 * ratio.detach() * (d**2 / 2 if training.kl.estimator == "k2" else (-d).exp() - 1 + d)
    errors = (values - given["returns"]) ** 2
    if training.value_clip_range is not None:
        near = given["values"] + (values - given["values"]).clamp(-training.value_clip_range, training.value_clip_range)
        errors = torch.maximum(errors, (near - given["returns"]) ** 2)
    return loss + 0.1 * errors / 2


@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize(
    ("reduction", "kl", "value_clip_range"),
    [
        ("token_mean", {}, None),
        ("sequence_mean", {"part_of": "loss", "estimator": "k3"}, 0.1),
        ("sequence_sum", {"part_of": "loss", "estimator": "k2"}, None),
    ],
)
def test_the_gradient_of_an_update_is_that_of_plain_torch(
    data, tmp_path, alone, monkeypatch, reduction, kl, value_clip_range, on_policy
):
    """Uneven passes add up to the gradient of one loss over all tokens: policy, value, entropy and divergence."""
    values = {"reduction": reduction, "kl": {"coefficient": 0.2, **kl}, "value_clip_range": value_clip_range}
    job = make_job(data, tmp_path / "run", num_updates=1, num_mini_batches=1, entropy_coefficient=0.3, **values)
    trainer = start(job)
    trainer.push()
    trainer.receive(trainer.begin(0))
    experience = trainer.experience
    assert len(set(experience.lengths)) > 1 and len(experience.lengths) == 8
    if not on_policy:
        # As of other weights; far enough for the clips to act on some tokens.
        noise = torch.Generator().manual_seed(0)
        for name, size in (("old", 0.3), ("ref", 0.5), ("values", 0.3)):
            tensor = getattr(experience, name)
            tensor += size * torch.randn(tensor.shape, generator=noise) * experience.mask
    advantages, returns = compute_advantages(experience, job.training, 0.2)
    found = {}
    monkeypatch.setattr(trainer.learner.engine, "get_global_grad_norm", lambda: 0.0)
    monkeypatch.setattr(
        trainer.learner.engine,
        "step",
        lambda: found.update((n, p.grad.clone()) for n, p in trainer.learner.network.named_parameters()),
    )
    told = trainer.learner.learn(experience, advantages, returns, 0, 0.2)
    assert (told["clip_fraction"] > 0.1) == (not on_policy)
    assert (told["value_clip_fraction"] > 0.1) == (not on_policy and value_clip_range is not None)

    model = AutoModelForCausalLM.from_pretrained(f"{data}/policy", dtype=torch.float64)
    head = torch.nn.Linear(32, 1, dtype=torch.float64)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    total, num = 0.0, sum(experience.lengths)
    for row, sample in enumerate(experience.samples):
        out = model(torch.tensor([sample.prompt_ids + sample.ids]), output_hidden_states=True)
        first, length = len(sample.prompt_ids) - 1, len(sample.ids)
        logprobs = out.logits[0, first:-1].log_softmax(-1)
        chosen = logprobs[range(length), sample.ids]
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        assert not on_policy or experience.old[row, :length].tolist() == pytest.approx(chosen.tolist(), abs=1e-5)
        given = {name: getattr(experience, name)[row, :length].double() for name in ("old", "ref", "values")}
        given |= {"advantages": advantages[row, :length].double(), "returns": returns[row, :length].double()}
        loss = plain_loss(head(out.hidden_states[-1][0, first:-1])[:, 0], chosen, entropy, given, job.training)
        total = (
            total
            + {
                "token_mean": loss.sum() / num,
                "sequence_mean": loss.mean() / 8,
                "sequence_sum": loss.sum() / 8,
            }[reduction]
        )
    total.backward()
    wanted = {f"policy.{name}": p.grad for name, p in model.named_parameters()}
    for name, parameter in head.named_parameters():
        wanted[f"value_head.{name}"] = parameter.grad
        found[f"value_head.{name}"] /= HEAD_GRADIENT
    assert found.keys() == wanted.keys()
    assert found["value_head.weight"].norm() > 1e-3
    for name, gradient in found.items():
        torch.testing.assert_close(gradient.double(), wanted[name], atol=5e-6, rtol=1e-4, msg=lambda m, n=name: n + m)


def test_no_completion_loses_its_reward_whatever_its_length(data, tmp_path, alone):
    trainer = start(make_job(data, tmp_path / "run"))
    trainer.push()
    trainer.receive(trainer.begin(0))
    experience = trainer.experience
    assert max(experience.lengths) > min(experience.lengths)
    for row, sample in enumerate(experience.samples):
        assert sample.reward == pytest.approx(
            0.1 * GrammarScorer(None).score([{"reference": "good one", "candidates": [sample.text.strip()]}])[0][0][0]
        )
        assert float((experience.rewards * experience.mask)[row].sum()) == pytest.approx(sample.reward, rel=1e-6)
        assert float(experience.rewards[row, len(sample.ids) - 1]) == pytest.approx(sample.reward, rel=1e-6)


@pytest.mark.parametrize("overlap", [False, True])
def test_an_interrupted_run_ends_like_one_that_was_not(data, tmp_path, alone, overlap):
    job = make_job(
        data, tmp_path / "run", save_steps=2, max_steps=5, overlap=overlap, kl={"target": 2.0, "horizon": 20}
    )
    whole = start(job)
    weights = finish(whole)
    samples = samples_of(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    resumed = start(job)
    resumed.load(str(tmp_path / "step-2"))
    assert len(resumed.collector.faults.last) == (3 if overlap else 2) * 8
    again = finish(resumed)
    assert [r["step"] for r in resumed.history] == [1, 2, 3, 4, 5]
    assert samples_of(tmp_path / "run") == {name: rows for name, rows in samples.items() if name > "step-000002"}
    for name, tensor in again.items():
        torch.testing.assert_close(tensor, weights[name], atol=1e-6, rtol=0)
    for found, wanted in zip(without_times(resumed.history), without_times(whole.history), strict=True):
        assert found == pytest.approx(wanted, rel=1e-3, abs=1e-5)
    ids = [sample["id"] for rows in samples.values() for sample in rows]
    assert len(ids) == len(set(ids)) == 5 * 8


def test_with_overlap_the_ratio_is_taken_against_the_weights_that_drew(data, tmp_path, alone):
    """Each step's samples but the first come from the weights of one update before; the sampler knows which."""
    trainer = start(make_job(data, tmp_path / "run", overlap=True, max_steps=4, num_updates=1, num_mini_batches=1))
    finish(trainer)
    drift = [record["drift/max"] for record in trainer.history]
    assert max(drift) < 1e-4
    moved = [record["update_kl"] for record in trainer.history]
    assert moved[0] < 1e-9 and min(moved[1:]) > 1e-7
    plain = start(make_job(data, tmp_path / "plain", max_steps=2, num_updates=1, num_mini_batches=1))
    finish(plain)
    assert max(record["update_kl"] for record in plain.history) < 1e-9


@pytest.mark.parametrize(("zero_stage", "lora"), [(1, None), (2, {"r": 4}), (3, None), (3, {"r": 4})])
def test_every_way_to_share_the_work_takes_the_same_steps(data, tmp_path, alone, zero_stage, lora):
    values = {"max_steps": 3, "overlap": True, "lora": lora, "kl": {"coefficient": 0.3}}
    wanted = start(make_job(data, tmp_path / "one", **values))
    finish(wanted)
    found = start(make_job(data, tmp_path / "two", zero_stage=zero_stage, micro_batch_size=2, **{**values}))
    finish(found)
    for one, other in zip(without_times(found.history), without_times(wanted.history), strict=True):
        assert one == pytest.approx(other, rel=2e-3, abs=1e-4)
    assert found.history[0]["kl"] == pytest.approx(0, abs=1e-6) and abs(found.history[-1]["kl"]) > 1e-4


def test_a_prompt_that_is_computed_once_for_its_completions_takes_the_same_steps(data, tmp_path, alone):
    values = {"max_steps": 3, "num_mini_batches": 1, "kl": {"coefficient": 0.3}, "entropy_coefficient": 0.1}
    histories = []
    for name, shared in (("apart", False), ("shared", True)):
        trainer = start(make_job(data, tmp_path / name, shared_prefix=shared, micro_batch_size=4, **values))
        finish(trainer)
        histories.append(without_times(trainer.history))
    for one, other in zip(*histories, strict=True):
        assert one == pytest.approx(other, rel=2e-3, abs=1e-4)


def test_the_parts_of_a_step_hold_whole_prompts_however_little_fits_into_memory(data, tmp_path, alone):
    histories = []
    for size in (8, 3):
        job = make_job(
            data,
            tmp_path / str(size),
            max_steps=2,
            shared_prefix=True,
            sampling={"num_candidates": 4, "max_tokens": 12},
            micro_batch_size=size,
        )
        trainer = start(job)
        finish(trainer)
        histories.append(without_times(trainer.history))
    samples = [SimpleNamespace(row=n // 4) for n in range(16)]
    for part in trainer.learner._parts(samples, 0):
        assert sorted(part) == [4 * row + n for row in sorted({n // 4 for n in part}) for n in range(4)]
    for one, other in zip(*histories, strict=True):
        assert one == pytest.approx(other, rel=2e-3, abs=1e-4)


def test_while_values_warm_up_the_policy_stays_as_it_was(data, tmp_path, alone):
    trainer = start(make_job(data, tmp_path / "run", max_steps=3, value_warmup_steps=2, lr=1e-2))
    finish(trainer)
    moved = [record["kl"] for record in trainer.history]
    assert moved[:2] == pytest.approx([0, 0], abs=1e-6) and trainer.history[2]["update_kl"] > 1e-6
    assert trainer.history[1]["update_kl"] < 1e-9 and trainer.history[1]["explained_variance"] != 0


def test_a_warm_up_that_never_ends_is_refused(data, tmp_path, alone):
    with pytest.raises(ConfigError, match="value_warmup_steps 3 leaves none of the 3 steps to the policy"):
        start(make_job(data, tmp_path / "run", max_steps=3, value_warmup_steps=3))


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_the_value_head_has_a_rate_of_its_own_also_after_a_resume(data, tmp_path, alone, zero_stage):
    def rates(trainer):
        engine = trainer.learner.engine
        return sorted({group["lr"] for group in engine.optimizer.param_groups})

    values = {"max_steps": 3, "schedule": "linear", "value_lr": 0.05}
    job = make_job(data, tmp_path / "run", zero_stage=zero_stage, save_steps=2, **values)
    finish(start(job))
    resumed = start(job)
    resumed.load(str(tmp_path / "step-2"))
    finish(resumed)
    assert 0 < resumed.history[-1]["lr"] < 1e-3
    assert rates(resumed) == [pytest.approx(resumed.history[-1]["lr"]), 0.05]


@pytest.mark.parametrize("kind", ["ppo", "rloo", "grpo"])
def test_every_kind_learns_to_earn_more(data, tmp_path, alone, kind):
    """Fewer errors means shorter completions here, which a random policy finds soon."""
    job = make_job(
        data,
        tmp_path / kind,
        type=kind,
        max_steps=20,
        lr=3e-3,
        global_batch_size=8,
        sampling={"num_candidates": 4, "max_tokens": 12},
        kl={"coefficient": 0.0},
        micro_batch_size=32,
    )
    trainer = start(job)
    finish(trainer)
    rewards = [record["reward"] for record in trainer.history]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:3]) / 3 + 0.1
    assert ("value_loss" in trainer.history[0]) == (kind == "ppo")
    assert ("equal_rewards_fraction" in trainer.history[0]) == (kind != "ppo")


def create_t5(data, path):
    tokenizer = AutoTokenizer.from_pretrained(f"{data}/policy")
    torch.manual_seed(0)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "decoder_start_token_id": 0}
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "vocab_size": len(tokenizer)}
    T5ForConditionalGeneration(T5Config(**sizes, **ends, dropout_rate=0.3)).save_pretrained(path)
    tokenizer.save_pretrained(path)


def test_an_encoder_reads_prompts_as_long_as_max_length(data, tmp_path):
    """A decoder-only policy has its completion in the same tokens."""
    from rayrm.training.ppo.engine import read_prompts

    create_t5(data, tmp_path / "t5")
    tokenizer = AutoTokenizer.from_pretrained(f"{data}/policy")
    rows = pq.read_table(data / "prompts.parquet").to_pylist()
    for num, row in enumerate(rows):
        row["prompt"] = [{"role": "user", "content": " ".join(["one"] * (num + 1))}]
    (tmp_path / "in").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in" / "prompts.parquet")
    lengths = [len(tokenizer(row["prompt"][0]["content"] + "|")["input_ids"]) for row in rows]
    renderer = Renderer(tokenizer, "{{ messages[0]['content'] }}|")
    for model, room in ((tmp_path / "t5", 24), (data / "policy", 12)):
        job = make_job(tmp_path / "in", tmp_path / "run", model=str(model), max_length=24)
        fitting = sum(length <= room for length in lengths)
        assert 0 < fitting < NUM_ROWS
        assert read_prompts(job, renderer)[2]["dropped"] == {"overlength": NUM_ROWS - fitting}


def test_completions_end_at_the_token_that_ends_a_turn_of_the_template_too(data, tmp_path, alone):
    """The files of a base model name its EOS alone."""
    from rayrm.training.ppo.loop import RewardedTrainer

    tokenizer = AutoTokenizer.from_pretrained(f"{data}/policy")
    trainer = RewardedTrainer(make_job(data, tmp_path / "run", max_steps=1), TEMPLATE.replace("|", "</s>"), 3)
    finish(trainer)
    trainer.finish()
    ends = {tokenizer.convert_tokens_to_ids("</s>"), tokenizer.eos_token_id}
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert len(ends) == 2 and set(trainer.rollouts.engine.ends) == set(saved.generation_config.eos_token_id) == ends


def test_an_encoder_decoder_learns_from_the_policy_that_it_samples(data, tmp_path, alone):
    """Dropout, which its checkpoint has, would make other probabilities of the same completion."""
    create_t5(data, tmp_path / "t5")
    job = make_job(data, tmp_path / "run", model=f"{tmp_path}/t5", max_steps=2, num_updates=1, num_mini_batches=1)
    trainer = start(job)
    finish(trainer)
    assert max(record["drift/max"] for record in trainer.history) < 1e-4
    assert max(record["update_kl"] for record in trainer.history) < 1e-9
    assert trainer.history[1]["kl"] != 0
    trainer.finish()
    saved = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run" / "model")
    assert saved.config.dropout_rate == 0.3
    for name, tensor in saved.state_dict().items():
        torch.testing.assert_close(tensor, trainer.learner.network.policy.state_dict()[name])


def test_records_cover_all_steps_since_the_last_one():
    steps = [
        {"reward": 1.0, "drift/max": 3.0, "lr": 0.1, "left_out/empty": 0.5},
        {"reward": 3.0, "drift/max": 1.0, "lr": 0.2},
    ]
    assert merge_records(steps) == {"reward": 2.0, "drift/max": 3.0, "lr": 0.2, "left_out/empty": 0.25}


def test_without_a_reference_no_divergence_is_told(data, tmp_path, alone):
    trainer = start(make_job(data, tmp_path / "run", max_steps=1, kl={"coefficient": 0}))
    finish(trainer)
    assert "kl" not in trainer.history[0] and "entropy" in trainer.history[0]


def test_grpo_keeps_its_divergence_in_the_loss_whatever_it_costs(data, tmp_path):
    kl = make_job(data, tmp_path, type="grpo", kl={"coefficient": 0.3}).training.kl
    assert (kl.coefficient, kl.estimator, kl.part_of) == (0.3, "k3", "loss")


def test_a_service_of_another_revision_is_refused():
    check_revision("http", "b", None)
    check_revision("http", "a", "a")
    with pytest.raises(ServiceError, match="runs revision b of its model, and this run began with a; rewards of two"):
        check_revision("http", "b", "a")


def test_a_sample_without_a_score_is_left_out_and_counted(data, tmp_path, alone, monkeypatch):
    whole = start(make_job(data, tmp_path / "whole", max_steps=1))
    finish(whole)
    texts = sorted({sample["text"].strip() for sample in samples_of(tmp_path / "whole")["step-000001"]})
    monkeypatch.setattr(Scorers, "lost", staticmethod(lambda text: text == texts[0]))
    trainer = start(make_job(data, tmp_path / "run", max_steps=1))
    finish(trainer)
    record = trainer.history[0]
    rows = samples_of(tmp_path / "run")["step-000001"]
    lost = [row for row in rows if row["fault"] == "unscored/grammar/overloaded"]
    assert lost and all(row["reward"] is None for row in lost)
    assert record["left_out/unscored/grammar/overloaded"] == record["unscored_fraction"] == len(lost) / 8
    assert record["num_samples"] == 8 - len(lost)


def test_a_run_ends_when_too_many_have_no_score(data, tmp_path, alone, monkeypatch):
    monkeypatch.setattr(Scorers, "lost", staticmethod(lambda text: True))
    trainer = start(make_job(data, tmp_path / "run", max_steps=1))
    with pytest.raises(RayRMError, match=r"8 of the last 8 completions have no reward \(grammar/overloaded\)"):
        finish(trainer)
    assert trainer.step == 0 and not (tmp_path / "run" / "samples").exists()


def test_a_step_without_a_score_is_skipped_and_counted(data, tmp_path, alone, monkeypatch):
    """One bad step among good ones changes no weight; what the controller and the samples say goes on."""
    job = make_job(data, tmp_path / "run", max_steps=3, max_unscored_fraction=0.6)
    trainer = start(job)
    learn, weights = trainer.learn, []

    def watched():
        record = learn()
        weights.append(torch.cat([p.detach().flatten().clone() for p in trainer.learner.network.parameters()]))
        monkeypatch.setattr(Scorers, "lost", staticmethod(lambda text: trainer.step == 1))
        return record

    monkeypatch.setattr(trainer, "learn", watched)
    finish(trainer)
    assert [record["skipped"] for record in trainer.history] == [0, 1, 0]
    assert torch.equal(weights[1], weights[0]) and not torch.equal(weights[2], weights[1])
    bad = trainer.history[1]
    assert bad["num_samples"] == 0 and bad["left_out/unscored/grammar/overloaded"] > 0 and "loss" not in bad
    assert len(samples_of(tmp_path / "run")) == 3


def test_too_little_to_learn_from_is_judged_over_more_than_a_small_step():
    def samples(*faults):
        return [Sample(str(n), n, "de", "", [1], [2], [0.0], True, "x", fault=f) for n, f in enumerate(faults)]

    faults = Faults(0.5, num=4)
    faults.take(samples(None, None, None, None))
    faults.take(samples(*["unscored/bleurt/nan"] * 4))
    with pytest.raises(
        RayRMError, match="5 of the last 9 completions have no reward \\(bleurt/nan\\), more than max_unsc"
    ):
        faults.take(samples("unscored/bleurt/nan"))
    # A lost step of any size is no end where the one before it was not.
    lost = Faults(1.0, num=2 * 100)
    lost.take(samples(*[None] * 100))
    lost.take(samples(*["too_short"] * 100))
    with pytest.raises(RayRMError, match="All of the last 200 completions were left out"):
        lost.take(samples(*["too_short"] * 100))
    rules = Faults(1.0, num=4)
    rules.take(samples(None))
    for _ in range(15):
        rules.take(samples(*["too_short"] * 4))
    with pytest.raises(RayRMError, match="All of the last 64 completions were left out \\(too_short, unfinished\\)"):
        rules.take(samples(*["unfinished"] * 4))


def test_a_run_that_died_behind_its_last_step_only_saves_the_model(data, tmp_path, alone, monkeypatch):
    job = make_job(data, tmp_path / "run", max_steps=2)
    weights = finish(start(job))
    resumed = start(job)
    resumed.load(str(tmp_path / "step-2"))
    monkeypatch.setattr(Rollouts, "draw", None)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in finish(resumed).items())
    assert resumed.finish()["steps"] == 2 and resumed.history[-1]["step"] == 2


def test_the_times_of_a_step_are_its_own_and_the_first_one_tells_none(data, tmp_path, alone):
    trainer = start(make_job(data, tmp_path / "run", max_steps=3, overlap=True))
    finish(trainer)
    assert not [name for name in trainer.history[0] if name.startswith(("seconds/", "step_s"))]
    for record in trainer.history[1:]:
        assert record["step_s"] == pytest.approx(sum(record[f"seconds/{part}"] for part in STEP_PARTS))
        assert record["seconds/draw"] > 0 and record["seconds/learn"] > 0


@pytest.mark.parametrize(
    ("sampler", "parallelism", "limit"),
    [
        ({}, {}, 0.001),
        ({"dtype": "bfloat16"}, {}, 0.05),
        ({"dtype": "float32"}, {"precision": "bf16"}, 0.05),
    ],
)
def test_more_drift_is_let_pass_where_numbers_are_short(data, tmp_path, sampler, parallelism, limit):
    job = make_job(data, tmp_path, rollouts={"engine": "transformers", "settings": sampler})
    assert job.model_copy(update={"parallelism": Parallelism(**parallelism)}).max_drift == limit
    assert make_job(data, tmp_path, max_drift=0.3).max_drift == 0.3


def test_words_are_told_apart_where_nothing_stands_between_them():
    assert words_of("I saw 日本語 twice") == ["I", "saw", "日", "本", "語", "twice"]
    assert distinct_n(["ไก่ไก่"], 1) == 0.5


def test_a_sampler_that_is_not_the_policy_ends_the_run(data, tmp_path, alone, monkeypatch):
    trainer = start(make_job(data, tmp_path / "run"))
    monkeypatch.setattr(trainer.rollouts, "push", lambda state, version: setattr(trainer.rollouts, "version", version))
    with pytest.raises(CheckpointError, match="At step 2 sampler and learner differ by .* nats a token"):
        finish(trainer)


def test_filters_that_the_policy_does_not_learn_with_are_named(data, tmp_path, alone):
    trainer = start(make_job(data, tmp_path / "run", sampling={"num_candidates": 2, "max_tokens": 12, "top_k": 5}))
    with pytest.raises(CheckpointError, match="sampling has top_k=5 on, which the policy does not learn with"):
        finish(trainer)


def test_rules_of_length_drop_or_penalise(data, tmp_path, alone):
    rules = {"min_length": 6, "too_short": {"then": "penalise", "reward": -7.0}, "unfinished": {"then": "drop"}}
    trainer = start(make_job(data, tmp_path / "run", max_steps=3, **rules))
    finish(trainer)
    rows = [row for rows in samples_of(tmp_path / "run").values() for row in rows]
    cut = [row for row in rows if not row["is_finished"]]
    assert cut and all(row["fault"] == "unfinished" and row["reward"] is None for row in cut)
    short = [row for row in rows if row["is_finished"] and row["num_tokens"] - 1 < 6]
    assert short and all(row["reward"] == -7 and row["parts"] == {"too_short": -7} for row in short)


def test_white_space_is_too_short(data, tmp_path, alone):
    trainer = start(make_job(data, tmp_path / "run", too_short={"then": "penalise", "reward": -5.0}))
    (end,) = [trainer.renderer.tokenizer.eos_token_id]
    (blank,) = trainer.renderer.tokenizer.encode(" ", add_special_tokens=False)
    sample = trainer.collector._sample("r0/de/0", 0, 0, trainer.rows[0], Drawn([blank, end], [-1.0, -1.0], True))
    assert sample.text and not sample.text.strip() and (sample.reward, sample.token_rewards) == (-5.0, [0.0, -5.0])


def test_completions_without_others_are_evaluated_and_not_learned_from(data, tmp_path, alone, monkeypatch):
    trainer = start(make_job(data, tmp_path / "run", type="rloo"))
    trainer.push()
    rows = list(enumerate(trainer.rows[:4]))
    texts = [sample.text.strip() for sample in trainer.collector.collect(rows, "0").samples]
    monkeypatch.setattr(Scorers, "lost", staticmethod(lambda text: text == texts[0]))
    lost = {"unscored/grammar/overloaded"}
    assert {sample.fault for sample in trainer.collector.collect(rows, "0").samples} - {None} == lost
    assert {sample.fault for sample in trainer.collector.collect_step(rows, "0").samples} - {None} == lost | {"alone"}


def test_what_a_scorer_did_not_read_is_counted(data, tmp_path, alone, monkeypatch):
    submit = Scorers.submit

    def cut(self, name, unit, rows):
        found = submit(self, name, unit, rows)
        return [[(score, "truncated") for score, _ in row] if n == 0 else row for n, row in enumerate(found)]

    monkeypatch.setattr(Scorers, "submit", cut)
    trainer = start(make_job(data, tmp_path / "run", max_steps=1))
    finish(trainer)
    (record,) = trainer.history
    assert record["truncated/grammar"] == 2 / 8 and record["num_samples"] == 8


def test_scorers_see_the_columns_that_they_need(data, tmp_path, monkeypatch):
    from rayrm.training.ppo import engine

    monkeypatch.setattr(engine, "CustomClass", lambda scorer: SimpleNamespace(needs=("topic",)))
    table = [{**row, "topic": "rivers", "more": 1} for row in pq.read_table(data / "prompts.parquet").to_pylist()]
    (tmp_path / "in").mkdir()
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "in" / "prompts.parquet")
    scorers = {"scorers": [{"type": "custom", "name": "grammar", "scorer": "own"}]}
    job = make_job(tmp_path / "in", tmp_path / "run", model=f"{data}/policy", **scorers)
    rows, _, _ = engine.read_prompts(job, Renderer(load_tokenizer(f"{data}/policy"), TEMPLATE))
    assert rows[0].values["topic"] == "rivers" and rows[0].values["reference"] and "more" not in rows[0].values


def test_prompts_that_cannot_be_answered_are_dropped_and_counted(data, tmp_path, alone):
    from rayrm.training.ppo.engine import encode_prompt

    table = pq.read_table(data / "prompts.parquet").to_pylist()
    table[0]["prompt"] = [{"role": "user", "content": " "}]
    table[1]["prompt"] = [{"role": "user", "content": "one two three " * 30}]
    table = [{**row, "tools": None} for row in table]
    bad = [{**table[2], "id": f"bad{num}"} for num in range(8)]
    bad[0]["group"] = bad[1]["prompt"] = None
    bad[2]["prompt"] = [{"role": "user", "content": None}]
    bad[3]["tools"] = "no JSON"
    bad[4]["prompt"] = []
    bad[5]["prompt"] = [None]
    bad[6]["prompt"] = [{"role": None, "content": "one"}]
    bad[7]["tools"] = '["none"]'
    (tmp_path / "in").mkdir()
    pq.write_table(pa.Table.from_pylist([*table, *bad]), tmp_path / "in" / "prompts.parquet")
    job = make_job(tmp_path / "in", tmp_path / "run", model=f"{data}/policy")
    trainer = start(job)
    dropped = {"empty_prompt": 2, "overlength": 1, "missing_field": 5, "tools_not_json": 2}
    assert trainer.counts["dropped"] == dropped
    picky = Renderer(load_tokenizer(f"{data}/policy"), "{{ raise_exception('No system turns.') }}")
    assert encode_prompt(table[2], picky, is_encoder=False) == "not_rendered"
    assert len(trainer.rows) == NUM_ROWS - 2
    narrow = start(make_job(tmp_path / "in", tmp_path / "run", model=f"{data}/policy", **NARROW))
    longest = max(len(row.prompt_ids) for row in trainer.rows)
    assert longest + 12 > 20 >= max(len(row.prompt_ids) for row in narrow.rows) + 12
    pq.write_table(pa.Table.from_pylist(table[:2]), tmp_path / "in" / "prompts.parquet")
    with pytest.raises(SchemaError, match="no prompt to train with; dropped were {'empty_prompt': 1, 'overlength': 1}"):
        start(job)
    pq.write_table(pa.Table.from_pylist([*table[2:], table[2]]), tmp_path / "in" / "prompts.parquet")
    with pytest.raises(SchemaError, match="two rows with the id 'r2' and the language 'de'"):
        start(job)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"type": "rloo", "sampling": {"num_candidates": 1, "max_tokens": 12}}, "compared with others of its prompt"),
        ({"sampling": {"temperature": 0, "num_candidates": 1, "max_tokens": 12}}, "equal completions teach nothing"),
        ({"lora": {"dropout": 0.1}}, "lora.dropout"),
        ({"rewarding": {"holistic": {"scorer": "other"}}}, "grammar are no part of rewarding"),
        ({"too_short": {"then": "penalise"}}, "reward belongs to then=penalise"),
        ({"kl": {"part_of": "loss"}}, "the gradient of k1 in the loss is 0"),
        ({"kl": {"coefficient": 0, "target": 3}}, "cannot seek a target"),
        ({"kl": {"horizon": 10000}}, "a horizon of 10000 does nothing without a target"),
        ({"num_mini_batches": 9}, "num_mini_batches 9 is more than the 8 parts"),
        ({"num_mini_batches": 5, "shared_prefix": True}, "num_mini_batches 5 is more than the 4 parts"),
        (
            {"scorers": [{"type": "grammar", "workers": {"num_workers": 1, "max_workers": 2}}]},
            "max_workers is set for grammar, and scorers have a fixed number",
        ),
        ({"max_length": 12}, "leaves no room for a prompt within max_length 12"),
    ],
)
def test_settings_that_cannot_work_are_refused(data, tmp_path, values, message):
    with pytest.raises(ConfigError, match=message):
        make_job(data, tmp_path, **values)


def exhausted_loop(given):
    """The loop of a machine with memory for two completions, which dies in the third step with more."""
    from rayrm.training.ppo import learner, loop

    update = learner.Learner._update

    def fails(self, experience, rows, targets, step, coefficient):
        if step >= 2 and self.micro_batch_size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return update(self, experience, rows, targets, step, coefficient)

    learner.Learner._update = fails
    return loop.train_loop(given)


@pytest.mark.slow
@pytest.mark.ray
def test_the_micro_batch_is_halved_when_memory_runs_out(data, tmp_path, ray_cluster, monkeypatch):
    from rayrm.training import policy

    job = make_job(data, tmp_path / "run", save_steps=1, overlap=True, micro_batch_size=5)
    job = job.model_copy(update={"workers": job.workers.model_copy(update={"num_cpus": 0.5, "max_failures": 0})})
    monkeypatch.setitem(policy.LOOPS, "ppo", exhausted_loop)
    facts = policy.train_policy(job, TEMPLATE)
    assert (facts["micro_batch_size"], facts["steps"]) == (2, 4)
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    ids = [sample["id"] for rows in samples_of(tmp_path / "run").values() for sample in rows]
    assert len(ids) == len(set(ids)) == 4 * 8
