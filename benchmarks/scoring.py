"""Preferences rewarded by our evaluation job's stage on Ray, against RewardBench's loop: same model, texts and threads.

The loop takes pairs in file order, 8 a batch, padded to the longest, all chosen sides and then all rejected ones, by
plain transformers in fp32. The pairs are of mixed length, as RewardBench's are: sides of one to eight human-rated answers
joined, and captions with those of other pictures. The model has random weights and about 3.5 million parameters. Each
side is run in a process of its own and loads the model; ours is told with and without the start of Ray, and starts its
actors in both.

    python benchmarks/scoring.py [folder with preferences/ and parallel/]
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

NUM_PAIRS = 2000
BATCH = 8
SIZES = {"vocab_size": 4096, "hidden_size": 192, "intermediate_size": 512, "num_layers": 6, "num_heads": 6}
MAX_LENGTH = 1024
MAX_CHARACTERS = 2500
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def main() -> None:
    """Make the model and the pairs, run both sides, print the ratios."""
    data = Path(sys.argv[1]) if len(sys.argv) > 1 else DATA
    with tempfile.TemporaryDirectory() as folder:
        prepare(data, folder)
        theirs = run("loop", folder)
        ours = run("job", folder)
        rewards = {name: json.loads(Path(folder, f"{name}.json").read_text()) for name in ("loop", "job")}
    print(
        f"{NUM_PAIRS:,} pairs, {theirs['num_parameters'] / 1e6:.1f}M parameters, tokens {theirs['lengths']}, 2 threads"
    )
    print(f"  the loop {theirs['seconds']:.1f} s, {theirs['padding']:.0%} of its tokens are padding")
    print(f"  the job  {ours['seconds']:.1f} s, and {ours['start_s']:.1f} s for Ray to start")
    print(f"  ratio {theirs['seconds'] / ours['seconds']:.2f} without Ray's start (at least 1.8 is asked)")
    print(f"  ratio {theirs['seconds'] / (ours['seconds'] + ours['start_s']):.2f} with it (at least 1.3 is asked)")
    difference = max(
        abs(a - b) for x, y in zip(rewards["loop"], rewards["job"], strict=True) for a, b in zip(x, y, strict=True)
    )
    print(f"  largest difference of a reward {difference:.1e} (at most 5e-04 is asked)")


def run(side: str, folder: str) -> dict[str, Any]:
    """Run one side in a process of its own; what it found."""
    command = [sys.executable, __file__, f"--{side}", folder]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def prepare(data: Path, folder: str) -> None:
    """A reward model in `<folder>/model`, and pairs of both kinds, mixed, in `<folder>/pairs.jsonl`."""
    import pyarrow.parquet as pq
    import torch

    from rayrm.models.creation import CreationConfig, create_model
    from rayrm.models.loading import load_padding_tokenizer
    from rayrm.models.reward_model import NewHead, load_reward_model

    answers = read_lines(data / "preferences" / "qa_feedback_train.jsonl")
    captions = pq.read_table(data / "parallel" / "test.parquet").to_pylist()
    draw = random.Random(0)
    pairs = []
    for start in range(NUM_PAIRS // 2):
        sides = {
            side: " ".join(row[side] for row in answers[start : start + draw.randint(1, 8)])[:MAX_CHARACTERS]
            for side in ("chosen", "rejected")
        }
        pairs.append({"prompt": answers[start]["prompt"], **sides})
    for row in captions[: NUM_PAIRS - len(pairs)]:
        other = draw.choice(captions)["trg_text"] + "."
        pairs.append({"prompt": row["src_text"], "chosen": row["trg_text"], "rejected": other})
    draw.shuffle(pairs)
    rows = [{**pair, "id": str(number), "lang": "en"} for number, pair in enumerate(pairs)]
    Path(folder, "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = CreationConfig.model_validate({**SIZES, "max_length": MAX_LENGTH})
    create_model([text for row in rows for text in (row["prompt"], row["chosen"])], settings, f"{folder}/policy")
    torch.manual_seed(0)
    tokenizer = load_padding_tokenizer(f"{folder}/policy")
    network = load_reward_model(f"{folder}/policy", new_head=NewHead(0)).network
    network.score.weight.data *= 40
    network.config.pad_token_id = tokenizer.pad_token_id
    network.save_pretrained(f"{folder}/model")
    tokenizer.save_pretrained(f"{folder}/model")


def read_lines(path: Path) -> list[Any]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run_loop(folder: str) -> dict[str, Any]:
    """RewardBench's loop."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.set_num_threads(2)
    rows = read_lines(Path(folder, "pairs.jsonl"))
    start = time.perf_counter()
    tokenizer: Any = AutoTokenizer.from_pretrained(f"{folder}/model")
    tokenizer.padding_side = "left"
    model: Any = AutoModelForSequenceClassification.from_pretrained(f"{folder}/model", dtype=torch.float32).eval()
    rewards: list[list[float]] = []
    lengths: list[int] = []
    padded = 0
    for first in range(0, len(rows), BATCH):
        batch = rows[first : first + BATCH]
        sides = []
        for side in ("chosen", "rejected"):
            texts = [render(tokenizer, row["prompt"], row[side]) for row in batch]
            inputs = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
            lengths += inputs["attention_mask"].sum(1).tolist()
            padded += inputs["attention_mask"].numel()
            with torch.no_grad():
                sides.append(model(**inputs).logits.flatten().tolist())
        rewards += [list(pair) for pair in zip(*sides, strict=True)]
    seconds = time.perf_counter() - start
    Path(folder, "loop.json").write_text(json.dumps(rewards))
    lengths.sort()
    return {
        "seconds": seconds,
        "padding": 1 - sum(lengths) / padded,
        "lengths": f"{lengths[len(lengths) // 20]} to {lengths[-len(lengths) // 20]} (5th and 95th of 100)",
        "num_parameters": sum(each.numel() for each in model.parameters()),
    }


def render(tokenizer: Any, prompt: str, answer: str) -> str:
    """The conversation as the template writes it, without white space behind its end token."""
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False)).rstrip()


def run_job(folder: str) -> dict[str, Any]:
    """The stage of the evaluation job, on two actors."""
    import ray

    from rayrm import cluster
    from rayrm.config import Workers
    from rayrm.evaluation.preferences import RewardedPreference
    from rayrm.evaluation.rewarding import RewardingJob, reward_preferences
    from rayrm.evaluation.sets import EvaluationSet, PreparedSets, prepare_sets
    from rayrm.rows import Preference
    from rayrm.runs import transform_rows
    from rayrm.scoring.reward_model import RewardModelScoring
    from rayrm.shards import read_table

    start = time.perf_counter()
    ray.init(address="local", num_cpus=2, log_to_driver=False)
    cluster.connect()
    start_s = time.perf_counter() - start
    start = time.perf_counter()
    sets = [EvaluationSet(input=f"{folder}/pairs.jsonl")]
    (prepared,) = prepare_sets(PreparedSets(sets=sets, output=f"{folder}/sets", shard_rows=250))
    model = RewardModelScoring(model=f"{folder}/model", dtype="float32", workers=Workers(num_workers=2, num_cpus=1))
    job = RewardingJob(input=prepared.path, output=f"{folder}/rows", shard_rows=250, reward_model=model)
    transform_rows(job, Preference, RewardedPreference, partial(reward_preferences, config=job))
    seconds = time.perf_counter() - start
    ray.shutdown()
    rows = {row["id"]: row for row in read_table(f"{folder}/rows").to_pylist()}
    ordered = [[rows[str(i)][f"{side}_reward"] for side in ("chosen", "rejected")] for i in range(len(rows))]
    Path(folder, "job.json").write_text(json.dumps(ordered))
    return {"seconds": seconds, "start_s": start_s}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--loop"]:
        print(json.dumps(run_loop(sys.argv[2])))
    elif sys.argv[1:2] == ["--job"]:
        print(json.dumps(run_job(sys.argv[2])))
    else:
        main()
