"""A PPO step: drawing by vLLM against transformers.generate, overlap, and who waits for whom.

One run, one model, the same prompts and batch throughout. transformers.generate has a KV cache, takes the whole batch at
once and stops when every row has ended. Whole steps are real ones: samplers and a reward model in Ray actors, a DeepSpeed
learner in this process; the first step and the last one of each way are left out.
Usage: `python benchmarks/ppo.py [num_prompts=…] [num_steps=…] …`
"""

from __future__ import annotations

import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from pydantic import Field

from rayrm import cluster
from rayrm.config import Config, build_config, parse_args, run_job
from rayrm.models.creation import CreationConfig, create_model
from rayrm.models.loading import load_padding_tokenizer
from rayrm.models.reward_model import NewHead, load_reward_model
from rayrm.models.vllm import DecodingConfig, Drawn, Engine, EngineConfig
from rayrm.prompts import direct_prompt
from rayrm.training.launch import prepare_worker
from rayrm.training.ppo import loop
from rayrm.training.ppo.rollouts import RolloutConfig, RolloutPool
from rayrm.training.ppo.settings import RewardedJob

TEXT = "a red house stands near the old river where two small dogs run across wet grass while children play"
WORDS = TEXT.split()
SIZES = CreationConfig(
    vocab_size=4096, hidden_size=256, intermediate_size=688, num_layers=4, num_heads=4, max_length=256
)


class PPOBenchmark(Config):
    """What is drawn and learned."""

    num_prompts: int = Field(64, ge=1)
    """Prompts of a step."""
    num_candidates: int = Field(4, ge=1)
    """Completions of each prompt."""
    max_tokens: int = Field(48, ge=1)
    """Tokens at which a completion is cut; most end before."""
    num_steps: int = Field(6, ge=3)
    """Steps of each way."""
    repeats: int = Field(3, ge=1)
    """Draws of either sampler."""


class GenerateEngine:
    """transformers.generate, with the methods of a sampler."""

    def __init__(self, model: str) -> None:
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(2)
        self.model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.pad_id = load_padding_tokenizer(model).pad_token_id
        ends = self.model.generation_config.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [ends])

    @torch.inference_mode()
    def draw(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], config: DecodingConfig) -> list[list[Drawn]]:
        """All completions of all prompts in one call, without log-probabilities by a pass of their own."""
        width = max(map(len, prompts))
        ids = torch.tensor([[self.pad_id] * (width - len(p)) + list(p) for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        torch.manual_seed(seeds[0])
        found = self.model.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=config.temperature,
            num_return_sequences=config.num_candidates,
            max_new_tokens=config.max_tokens,
            pad_token_id=self.pad_id,
            return_dict_in_generate=True,
            output_logits=True,
        )
        logprobs = torch.stack([step.float().log_softmax(-1) for step in found.logits], 1)
        tokens = found.sequences[:, width:]
        chosen = logprobs.gather(-1, tokens[..., None])[..., 0]
        drawn = [self._drawn(row.tolist(), own.tolist()) for row, own in zip(tokens, chosen, strict=True)]
        num = config.num_candidates
        return [drawn[start : start + num] for start in range(0, len(drawn), num)]

    def _drawn(self, ids: list[int], logprobs: list[float]) -> Drawn:
        end = next((place + 1 for place, token in enumerate(ids) if token in self.ends), None)
        return Drawn(ids[:end], logprobs[:end], end is not None)

    def load_weights(self, state: dict[str, Any]) -> None:
        """Take new weights."""
        self.model.load_state_dict({name: torch.as_tensor(np.array(x)) for name, x in state.items()}, strict=False)


class GenerateActor:
    """As RolloutActor, with transformers.generate."""

    def __init__(self, model: str, config: RolloutConfig) -> None:
        self.engine = GenerateEngine(model)

    def draw(
        self, requests: list[Any], decoding: DecodingConfig, version: int, state: dict[str, Any] | None
    ) -> tuple[int, list[list[Drawn]]]:
        """As RolloutActor.draw."""
        from rayrm.training.ppo.rollouts import _unpack

        if state is not None:
            self.engine.load_weights({name: _unpack(*packed) for name, packed in state.items()})
        return version, self.engine.draw([r.prompt_ids for r in requests], [r.seed for r in requests], decoding)


class GeneratePool(RolloutPool):
    """As RolloutPool, with transformers.generate."""

    def _start(self) -> None:
        import ray

        actor = ray.remote(num_cpus=2)(GenerateActor).remote(self.model, self.config)
        self._actors[actor] = 0
        self._starting[actor.__ray_ready__.remote()] = actor


def main() -> None:
    """Print the times of all ways, their ratios, and the share of a step that each role waits."""
    config = parse_args(PPOBenchmark)
    cluster.connect(8)
    prepare_worker(2, use_gpu=False)
    os.environ["LOCAL_RANK"] = "0"
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        make_policy(f"{folder}/policy")
        make_reward_model(f"{folder}/policy", f"{folder}/reward_model")
        make_rows(config.num_prompts * (config.num_steps + 1), f"{folder}/rows.parquet")
        compare_samplers(config, f"{folder}/policy")
        steps = {
            "vLLM": run_steps(config, folder, RolloutPool),
            "transformers.generate": run_steps(config, folder, GeneratePool),
            "vLLM, overlapped": run_steps(config, folder, RolloutPool, overlap=True),
            "vLLM, shared_prefix": run_steps(config, folder, RolloutPool, shared_prefix=True),
            "vLLM, overlapped, shared_prefix": run_steps(config, folder, RolloutPool, overlap=True, shared_prefix=True),
        }
        ours = statistics.median(record["step_s"] for record in steps["vLLM"])
        for name, records in steps.items():
            print(describe(name, records, ours, config.num_prompts * config.num_candidates))
        dist.destroy_process_group()


def compare_samplers(config: PPOBenchmark, model: str) -> None:
    """Draw the same prompts by both, in turns, and print their times and tokens."""
    tokenizer = load_padding_tokenizer(model)
    texts = make_texts(config.num_prompts)
    prompts = [tokenizer(direct_prompt(text, "en", "de"))["input_ids"] for text in texts]
    decoding = DecodingConfig(num_candidates=config.num_candidates, max_tokens=config.max_tokens)
    engines: dict[str, Any] = {
        "vLLM": Engine(model, EngineConfig(kv_cache_gib=0.5), 2, with_logprobs=True),
        "transformers.generate": GenerateEngine(model),
    }
    times: dict[str, list[float]] = {name: [] for name in engines}
    tokens = dict.fromkeys(engines, 0)
    for repeat in range(config.repeats + 1):
        for name, engine in engines.items():
            seeds = [repeat * 10**6 + number for number in range(len(prompts))]
            began = time.perf_counter()
            drawn = engine.draw(prompts, seeds, decoding)
            if repeat:
                times[name].append(time.perf_counter() - began)
                tokens[name] += sum(len(each.ids) for own in drawn for each in own)
    rates = {name: tokens[name] / sum(times[name]) for name in engines}
    for name, rate in rates.items():
        each = statistics.median(times[name])
        print(f"drawing {len(prompts)} × {config.num_candidates} by {name}: {each:.2f} s, {rate:,.0f} tokens/s")
    print(
        f"drawing: {rates['vLLM'] / rates['transformers.generate']:.2f}× the tokens a second of transformers.generate"
    )


def run_steps(config: PPOBenchmark, folder: str, pool: Callable[..., Any], **training: Any) -> list[dict[str, float]]:
    """The records of real steps: all but the first, where actors start, and the last, beside which nothing is drawn."""
    vars(loop)["RolloutPool"] = pool
    with tempfile.TemporaryDirectory() as output:
        values = {
            "input": f"{folder}/rows.parquet",
            "output": output,
            "training": {
                "type": "ppo",
                "model": f"{folder}/policy",
                "max_length": 256,
                "lr": 1e-5,
                "global_batch_size": config.num_prompts,
                "micro_batch_size": 64,
                "max_steps": config.num_steps,
                "sampling": {"num_candidates": config.num_candidates, "max_tokens": config.max_tokens},
                "rollouts": {"settings": {"kv_cache_gib": 0.5}, "workers": {"num_cpus": 2}},
                "scorers": [
                    {"type": "reward_model", "model": f"{folder}/reward_model", "max_length": 256}
                    | {"chat_template": "none", "workers": {"num_cpus": 2}}
                ],
                "rewarding": {"holistic": {"scorer": "reward_model"}},
                "max_drift": 1.0,
                **training,
            },
            "parallelism": {"zero_stage": 0},
            "log_steps": 1,
            "report_to": "none",
        }
        job = build_config(RewardedJob, values, "the benchmark")
        trainer = loop.RewardedTrainer(job, None, job.training.micro_batch_size)
        # States are Ray Train's, outside of which this process is.
        vars(trainer)["save"] = lambda: None
        try:
            trainer.train(show_progress=False)
        finally:
            trainer.close()
        return trainer.history[1:-1]


def describe(name: str, records: list[dict[str, float]], ours: float, num_drawn: int) -> str:
    """One line: a step's time against that of vLLM, its parts, and what share of it each role waits."""

    def median(key: str) -> float:
        return statistics.median(record[key] for record in records)

    step = median("step_s")
    parts = ", ".join(
        f"{part} {median(f'seconds/{part}'):.2f}" for part in ("draw", "score", "prepare", "learn", "push")
    )
    samples = num_drawn / step
    tokens = samples * median("completion_length")
    idle = {"sampler": 1 - median("seconds/draw") / step, "scorer": 1 - median("seconds/scorers") / step}
    waits = f"learner waits {median('seconds/wait') / step:.0%}, " + ", ".join(
        f"{role} {share:.0%}" for role, share in idle.items()
    )
    return (
        f"step by {name}: {step:.2f} s ({step / ours:.2f}× that of vLLM; {parts}); {waits}; {samples:.1f} samples/s, "
        f"{tokens:,.0f} tokens/s"
    )


def make_texts(num: int) -> list[str]:
    """`num` texts of 8 to 40 words, always the same."""
    chance = random.Random(0)
    return [" ".join(chance.choices(WORDS, k=chance.randint(8, 40))) for _ in range(num)]


def make_policy(path: str) -> None:
    """A model that answers with 4 to 30 words and ends; what they say is of no matter here."""
    from transformers import AutoModelForCausalLM

    create_model([direct_prompt(text, "en", "de") for text in make_texts(500)], SIZES, path)
    tokenizer = load_padding_tokenizer(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    chance = random.Random(0)
    for text in make_texts(60 * 16)[::16]:
        answers = [" ".join(chance.choices(WORDS, k=chance.randint(4, 30))) for _ in range(16)]
        prompt = tokenizer(direct_prompt(text, "en", "de"))["input_ids"]
        rows = [[*prompt, *tokenizer(f" {answer}")["input_ids"], tokenizer.eos_token_id] for answer in answers]
        width = max(map(len, rows))
        ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
        labels = torch.tensor([[-100] * len(prompt) + r[len(prompt) :] + [-100] * (width - len(r)) for r in rows])
        model(ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def make_reward_model(policy: str, path: str) -> None:
    """A reward model of the policy's size with a random head."""
    network = load_reward_model(policy, new_head=NewHead(0)).network
    tokenizer = load_padding_tokenizer(policy)
    network.config.pad_token_id = tokenizer.pad_token_id
    network.save_pretrained(path)
    tokenizer.save_pretrained(path)


def make_rows(num: int, path: str) -> None:
    """Prompt rows."""
    rows = [
        {
            "id": str(number),
            "group": str(number),
            "prompt": [{"role": "user", "content": direct_prompt(text, "en", "de")}],
            "source": text,
            "reference": None,
            "anchor": None,
            "src_lang": "en",
            "tgt_lang": "de",
            "lang": "de",
            "subset": None,
        }
        for number, text in enumerate(make_texts(num))
    ]
    pq.write_table(pa.Table.from_pylist(rows), Path(path))


if __name__ == "__main__":
    run_job(main)
