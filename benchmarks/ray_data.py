"""A stage through Ray Data against the same work in one process: BLEURT scores for whole shards, read and committed.

Both sides have the same model, shards and threads: one actor with all of them, or this process. The process does one
half of the shards before Ray and the other half after it, so that a machine that slows down hurts both. Start-up is
left out: Ray's clock starts when the actor gets its first shard, and stops when the run is complete.

    python benchmarks/ray_data.py [seconds] [threads]
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from jobs.score_candidates import ScoreCandidates
from rayrm.config import Workers
from rayrm.models.bleurt import new_bleurt, save_bleurt
from rayrm.rows import Candidates, Scored
from rayrm.runs import commit_shard, shard_path, transform_rows
from rayrm.scoring import ScoreStage
from rayrm.scoring.bleurt import BleurtScoring
from rayrm.shards import Shard, list_shards, read_shard
from rayrm.sources.grammar import GrammarConfig, write_sentences
from rayrm.training.bleurt_loop import train_vocabulary

SIZES = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
SHARD_ROWS = 512
NUM_CANDIDATES = 4
ALLOWED = 1.10


class TimedStage(ScoreStage):
    """Notes when its first shard came."""

    def __init__(self, config: BleurtScoring, note: str) -> None:
        super().__init__(config)
        self.note = Path(note)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Score a table."""
        if not self.note.exists():
            self.note.write_text(str(time.time()))
        return super().__call__(table)


def main() -> None:
    """Find out how many shards take the time, score them both ways, print the ratio."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 150.0
    threads = int(sys.argv[2]) if len(sys.argv) > 2 else 2
    texts = sorted(set(write_sentences(GrammarConfig(num_sentences=3000))["trg_text"].to_pylist()))
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = train_vocabulary(texts, 4000)
        torch.manual_seed(0)
        save_bleurt(new_bleurt(vocab_size=len(vocabulary), **SIZES), vocabulary, f"{folder}/model")
        workers = Workers(num_workers=1, num_cpus=threads)
        scoring = BleurtScoring(model=f"{folder}/model", workers=workers)
        stage = ScoreStage(scoring)
        write_rows(texts, 4, Path(folder, "small.parquet"))
        small = list_shards(f"{folder}/small.parquet", SHARD_ROWS)
        in_process(stage, small[:1], f"{folder}/warm")
        num_shards = max(4, round(seconds * 3 / in_process(stage, small[1:], f"{folder}/trial")))
        write_rows(texts, num_shards, Path(folder, "rows.parquet"))
        shards = list_shards(f"{folder}/rows.parquet", SHARD_ROWS)
        half = len(shards) // 2
        print(f"{len(shards)} shards of {SHARD_ROWS} rows × {NUM_CANDIDATES} candidates, {threads} threads")
        first_s = in_process(stage, shards[:half], f"{folder}/one")
        ray_s = through_ray(scoring, folder)
        second_s = in_process(stage, shards[half:], f"{folder}/two")
    process_s = first_s + second_s
    print(f"one process: {process_s:6.1f} s  ({first_s:.1f} s before Ray, {second_s:.1f} s after it)")
    print(f"Ray Data:    {ray_s:6.1f} s")
    print(f"ratio {ray_s / process_s:.3f} (at most {ALLOWED:.2f} is asked)")


def write_rows(texts: list[str], num_shards: int, path: Path) -> None:
    """Candidates rows; a candidate is its reference in another order of words."""
    rng = random.Random(0)
    writer = None
    for number in range(num_shards):
        rows = [make_row(f"{number}-{i}", rng.choice(texts), rng) for i in range(SHARD_ROWS)]
        table = Candidates.conform(pa.Table.from_pylist(rows))
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()


def make_row(name: str, reference: str, rng: random.Random) -> dict[str, Any]:
    """One Candidates row."""
    words = reference.split()
    candidates = [" ".join(rng.sample(words, len(words))) for _ in range(NUM_CANDIDATES)]
    prompt = [{"role": "user", "content": f"Translate: {name}"}]
    return {
        "id": name,
        "group": name,
        "prompt": prompt,
        "lang": "de",
        "reference": f"{reference} {name}",
        "candidates": candidates,
    }


def in_process(stage: ScoreStage, shards: list[Shard], output: str) -> float:
    """Seconds for reading, scoring and committing shards in this process."""
    start = time.perf_counter()
    for index, shard in enumerate(shards):
        table = stage(Candidates.conform(read_shard(shard)))
        commit_shard(shard_path(output, index, len(shards)), table, Scored)
    return time.perf_counter() - start


def through_ray(scoring: BleurtScoring, folder: str) -> float:
    """Seconds from the actor's first shard to the end of the run."""
    import ray

    # One CPU more than the actor holds, for the tasks that read.
    ray.init(address="local", num_cpus=int(scoring.workers.num_cpus) + 1, include_dashboard=False, log_to_driver=False)
    config = ScoreCandidates(
        input=f"{folder}/rows.parquet", output=f"{folder}/ray", shard_rows=SHARD_ROWS, scoring=scoring
    )
    note = f"{folder}/first_shard"

    def stage(dataset: Any) -> Any:
        return dataset.map_batches(
            TimedStage,
            fn_constructor_args=(scoring, note),
            batch_format="pyarrow",
            batch_size=None,
            **scoring.workers.pool(),
        )

    transform_rows(config, Candidates, Scored, stage)
    elapsed = time.time() - float(Path(note).read_text())
    ray.shutdown()
    return elapsed


if __name__ == "__main__":
    main()
