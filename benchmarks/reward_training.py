"""Reward-model training: our loop against TRL's RewardTrainer, on the same pairs, weights, batch, threads and dtype.

TRL runs as it comes, in random order, and with its length grouping; both sides train without gradient checkpointing,
with AdamW, on one process. A token counts when it is no padding, on each side of each pair, whether it was computed for
one side or for both. Another part has prompts of 512 tokens and answers of 64, with and without `shared_prefix`.
Every run is a process of its own, so that its peak memory is its own; the first step is left out.

    python benchmarks/reward_training.py [preferences.jsonl] [fp32|bf16] [threads]
"""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rayrm.config import build_config
from rayrm.rows import Message
from rayrm.training.reward_model import RewardModelJob

PREFERENCES = Path(__file__).resolve().parents[2] / "shared" / "data" / "preferences" / "qa_feedback_train.jsonl"
SIZES = {"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1376, "num_layers": 8, "num_heads": 8}
MICRO_BATCH, GLOBAL_BATCH = 8, 64
STEPS = 4
PROMPT_TOKENS, ANSWER_TOKENS = 512, 64
LONG_BATCH = 8
ASKED = {"trl": 1.5, "trl_grouped": 1.1, "long_unshared": 1.6}


def main() -> None:
    """Make the model and the rows, run all sides in turn, print the ratios."""
    if sys.argv[1:2] == ["run"]:
        print(json.dumps(RUNS[sys.argv[2]](*sys.argv[2:])))
        return
    path = sys.argv[1] if len(sys.argv) > 1 else str(PREFERENCES)
    dtype = sys.argv[2] if len(sys.argv) > 2 else "fp32"
    threads = sys.argv[3] if len(sys.argv) > 3 else "2"
    with tempfile.TemporaryDirectory() as folder:
        prepare(path, folder, dtype)
        found = {mode: run(mode, folder, dtype, threads) for mode in RUNS}
    for mode, facts in found.items():
        print(f"{mode:14} {facts['tokens_s']:8,.0f} tokens/s   peak {facts['peak_mib']:6,.0f} MiB   {facts['what']}")
    for ours, baseline in (("ours", "trl"), ("ours", "trl_grouped"), ("long_shared", "long_unshared")):
        speed = found[ours]["tokens_s"] / found[baseline]["tokens_s"]
        memory = found[ours]["peak_mib"] / found[baseline]["peak_mib"]
        print(
            f"{ours} against {baseline}: ratio {speed:.2f} (at least {ASKED[baseline]} is asked), memory {memory:.2f}"
        )


def run(mode: str, folder: str, dtype: str, threads: str) -> dict[str, Any]:
    """What a process of its own measures."""
    environment = os.environ | {"OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, __file__, "run", mode, folder, dtype, threads]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{mode} failed:\n{done.stderr[-3000:]}")
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts


def prepare(path: str, folder: str, dtype: str) -> None:
    """A model of some 30 million parameters with a tokenizer of the pairs' texts, and both sets of rows, rendered."""
    import ray

    from jobs import prepare_preferences
    from rayrm.models.creation import CreationConfig, create_model
    from rayrm.shards import read_table
    from rayrm.training.rendered import render_rows

    prepare_preferences.main([f"output={folder}/rows", f"sources=[{{input: {path}}}]"])
    rows = read_table(f"{folder}/rows").to_pylist()
    texts = [message["content"] for row in rows for name in ("prompt", "chosen", "rejected") for message in row[name]]
    facts = create_model(texts, CreationConfig.model_validate({**SIZES, "max_length": 1024}), f"{folder}/model")
    print(f"{len(rows):,} pairs, a model of {facts['num_parameters']:,} parameters, {dtype}")
    write_long(texts, folder)
    for name in ("rows", "long"):
        job = make_job(folder, name, dtype, shared_prefix=False)
        render_rows(job.input, job.output, job.training)
    ray.shutdown()


def write_long(texts: list[str], folder: str) -> None:
    """Pairs with prompts of 512 tokens and answers of 64, the chat template's own tokens included."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from transformers import AutoTokenizer

    from rayrm.models.rendering import Renderer

    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/model")
    view = Renderer(tokenizer, tokenizer.chat_template)
    ids = [token for text in texts for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    rng = random.Random(0)

    def message(role: str, num_tokens: int) -> list[Message]:
        start = rng.randrange(len(ids) - num_tokens)
        return [{"role": role, "content": str(tokenizer.decode(ids[start : start + num_tokens]))}]

    rows: list[dict[str, Any]] = []
    while len(rows) < LONG_BATCH * STEPS:
        prompt, sides = message("user", PROMPT_TOKENS - 9), [message("assistant", ANSWER_TOKENS - 1) for _ in range(2)]
        lengths = [len(view.pair_ids(prompt, side[0]["content"]).ids) for side in sides]
        if all(abs(num - PROMPT_TOKENS - ANSWER_TOKENS) <= 8 for num in lengths):
            number = str(len(rows))
            row: dict[str, Any] = {
                "id": number,
                "group": number,
                "prompt": prompt,
                "chosen": sides[0],
                "rejected": sides[1],
            }
            rows.append(row | {"lang": "en"})
    Path(folder, "long").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), f"{folder}/long/rows.parquet")


def make_job(folder: str, name: str, dtype: str, shared_prefix: bool) -> RewardModelJob:
    """Our job on one of the sets."""
    size = GLOBAL_BATCH if name == "rows" else LONG_BATCH
    training = {
        "model": f"{folder}/model",
        "lr": 1e-5,
        "warmup_fraction": 0.0,
        "schedule": "constant",
        "max_length": 1024,
        "max_steps": STEPS,
        "global_batch_size": size,
        "micro_batch_size": min(size, MICRO_BATCH),
        "shared_prefix": shared_prefix,
    }
    values = {"input": f"{folder}/{name}", "output": f"{folder}/run-{name}", "training": training, "report_to": "none"}
    parallelism = {"zero_stage": 0, "precision": dtype}
    return build_config(RewardModelJob, values | {"parallelism": parallelism}, "the benchmark")


def run_ours(mode: str, folder: str, dtype: str, threads: str) -> dict[str, Any]:
    """Steps of our loop."""
    import torch.distributed as dist

    from rayrm.training.batches import batch_of_step
    from rayrm.training.launch import prepare_worker
    from rayrm.training.reward_loop import RewardTrainer

    # Only here: with it, TRL would look for other processes.
    os.environ["LOCAL_RANK"] = "0"
    prepare_worker(float(threads), use_gpu=False)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{mode}", rank=0, world_size=1)
    name, is_shared = ("long" if mode.startswith("long") else "rows"), mode in ("ours", "long_shared")
    job = make_job(folder, name, dtype, is_shared)
    trainer = RewardTrainer(job, job.training.micro_batch_size)
    seconds, tokens = 0.0, 0
    for step in range(STEPS):
        batch = batch_of_step(step, len(trainer.rows.train), job.training.global_batch_size, job.training.seed)
        began = time.monotonic()
        trainer.train_step()
        if step:
            seconds += time.monotonic() - began
            tokens += int(trainer.rows.side_lengths[:, [trainer.rows.train[index] for index in batch]].sum())
    return facts_of(tokens / seconds, "shared_prefix" if is_shared else "padded, sorted by length within a step")


def run_trl(mode: str, folder: str, dtype: str, threads: str) -> dict[str, Any]:
    """Steps of TRL's trainer on the same rendered rows."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
    from trl.trainer.reward_config import RewardConfig
    from trl.trainer.reward_trainer import RewardTrainer

    from rayrm.training.rendered import read_rendered

    torch.set_num_threads(int(threads))
    rows, _ = read_rendered(f"{folder}/run-rows", 2)
    columns = {name: [rows.sides[side][row].tolist() for row in rows.train] for side, name in enumerate(SIDES)}
    model = AutoModelForSequenceClassification.from_pretrained(f"{folder}/model", num_labels=1, dtype=torch.float32)
    settings: dict[str, Any] = {
        "output_dir": f"{folder}/{mode}",
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "max_steps": STEPS,
        "per_device_train_batch_size": MICRO_BATCH,
        "gradient_accumulation_steps": GLOBAL_BATCH // MICRO_BATCH,
        "gradient_checkpointing": False,
        "bf16": dtype == "bf16",
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    if mode == "trl_grouped":
        settings |= {"train_sampling_strategy": "group_by_length", "remove_unused_columns": False}
        columns["length"] = [rows.lengths[row] for row in rows.train]
    clock: dict[str, float] = {"tokens": 0}

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                clock["began"] = time.monotonic()
                clock["first"] = clock["tokens"]
            clock["ended"] = time.monotonic()

    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/model")
    trainer = RewardTrainer(
        model,
        RewardConfig(**settings),
        train_dataset=Dataset.from_dict(columns),
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    step = trainer.training_step

    def count(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        clock["tokens"] += int(inputs["attention_mask"].sum())
        return step(model, inputs, *args, **kwargs)

    trainer.training_step = count  # type: ignore[method-assign]
    trainer.train()
    tokens_s = (clock["tokens"] - clock["first"]) / (clock["ended"] - clock["began"])
    return facts_of(tokens_s, "random order" if mode == "trl" else "grouped by length")


def facts_of(tokens_s: float, what: str) -> dict[str, Any]:
    """What a run reports; the peak is that of its own process."""
    return {
        "tokens_s": tokens_s,
        "what": what,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


SIDES = ("chosen_ids", "rejected_ids")
RUNS = {
    "trl": run_trl,
    "trl_grouped": run_trl,
    "ours_padded": run_ours,
    "ours": run_ours,
    "long_unshared": run_ours,
    "long_shared": run_ours,
}
"""What each process runs, by mode."""


if __name__ == "__main__":
    main()
