"""Pairs from a million Scored rows: the `build_preferences` job against a plain row loop over a table in memory.

Both read the same parquet file and write their pairs as parquet; Ray's start is left out. The loop does what the
published recipe's script does: `iterrows` over a data frame, two passes over the candidates, a frame of pairs. The
job also runs on a quarter of the rows: its peak memory must not grow with their number.

    python benchmarks/pairing.py [num_rows]
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from rayrm.rows import MESSAGES, NUMBERS, TEXTS
from rayrm.shards import read_table

NUM_CANDIDATES = 4
MIN_MARGIN, MIN_CHOSEN, LOW, HIGH = 20.0, 70.0, 20.0, 95.0


def main() -> None:
    """Make the rows, run both, print the ratio and the memory."""
    num_rows = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=1 << 30)
    folder = Path(tempfile.mkdtemp(prefix="rayrm_pairing_"))
    try:
        write_scored(folder / "whole.parquet", num_rows)
        write_scored(folder / "quarter.parquet", num_rows // 4)
        # The first Dataset of a process starts workers and imports; that is left out.
        write_scored(folder / "small.parquet", 20_000)
        run_job(folder, "small")
        _, quarter_memory = measure(lambda: run_job(folder, "quarter"))
        job_s, memory = measure(lambda: run_job(folder, "whole"))
    finally:
        ray.shutdown()
    loop_s, loop_memory = measure(lambda: run_loop(folder / "whole.parquet", folder / "loop.parquet"))
    job = read_table(str(folder / "whole")).num_rows
    loop = pq.read_metadata(folder / "loop.parquet").num_rows
    shutil.rmtree(folder)
    print(f"job:  {num_rows / job_s:10,.0f} rows/s  ({job_s:.1f} s, {job:,} pairs)")
    print(f"loop: {num_rows / loop_s:10,.0f} rows/s  ({loop_s:.1f} s, {loop:,} pairs)")
    print(f"ratio {loop_s / job_s:.2f} (at least 1 is asked)")
    print(f"peak memory of the job, all its processes: {quarter_memory:,.0f} MiB for {num_rows // 4:,} rows,")
    print(f"{memory:,.0f} MiB for {num_rows:,} rows (growth {memory / quarter_memory:.2f}x)")
    print(f"peak memory of the loop: {loop_memory:,.0f} MiB")


def write_scored(path: Path, num_rows: int, chunk: int = 50_000) -> None:
    """Scored rows with four candidates each, in row groups."""
    rng = np.random.default_rng(0)
    struct = pa.struct([("bleurt", NUMBERS)])
    status = pa.struct([("bleurt", TEXTS)])
    writer = None
    for start in range(0, num_rows, chunk):
        ids = range(start, min(start + chunk, num_rows))
        scores = rng.uniform(0.1, 1.0, (len(ids), NUM_CANDIDATES)).tolist()
        table = pa.table(
            {
                "id": [f"row-{i}" for i in ids],
                "group": [f"group-{i}" for i in ids],
                "prompt": pa.array([[{"role": "user", "content": PROMPT.format(i)}] for i in ids], MESSAGES),
                "source": [SENTENCE.format(i, "source") for i in ids],
                "reference": [SENTENCE.format(i, "reference") for i in ids],
                "src_lang": ["en"] * len(ids),
                "tgt_lang": [("de", "ru", "fr")[i % 3] for i in ids],
                "lang": [("de", "ru", "fr")[i % 3] for i in ids],
                "candidates": [[SENTENCE.format(i, k) for k in range(NUM_CANDIDATES)] for i in ids],
                "scores": pa.array([{"bleurt": row} for row in scores], struct),
                "status": pa.array([{"bleurt": ["ok"] * NUM_CANDIDATES}] * len(ids), status),
            }
        )
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()


SENTENCE = "Sentence {} about two men who repair a roof in the sun, as text {}."
PROMPT = "Translate the following text from English into German:\nEnglish: " + SENTENCE.format("{}", 0) + "\nGerman:"


def run_job(folder: Path, name: str) -> None:
    """`build_preferences` at the recipe's settings."""
    from jobs import build_preferences

    build_preferences.main(
        [
            f"input={folder / name}.parquet",
            f"output={folder / name}",
            "rewarding.scale=100",
            f"pairing.min_margin={MIN_MARGIN}",
            f"pairing.min_chosen_reward={MIN_CHOSEN}",
            f"pairing.valid_score_range=[{LOW},{HIGH}]",
        ]
    )


def run_loop(source: Path, output: Path) -> None:
    """The same pairs by a loop over the rows of a data frame."""
    frame = pd.read_parquet(source)
    pairs = []
    for _, row in frame.iterrows():
        scored = [(t, s * 100) for t, s in zip(row["candidates"], row["scores"]["bleurt"], strict=True)]
        scored = [pair for pair in scored if LOW <= pair[1] <= HIGH]
        if len(scored) < 2:
            continue
        loser = min(scored, key=lambda pair: pair[1])
        winner = max(scored, key=lambda pair: pair[1])
        if winner[1] < MIN_CHOSEN or winner[1] - loser[1] < MIN_MARGIN:
            continue
        kept = {name: row[name] for name in ("id", "group", "source", "reference", "src_lang", "tgt_lang", "lang")}
        pairs.append({**kept, "chosen": winner[0], "rejected": loser[0], "margin": winner[1] - loser[1]})
    pd.DataFrame(pairs).to_parquet(output)


def measure(work: Callable[[], None]) -> tuple[float, float]:
    """Seconds that `work` took, and the peak memory in MiB of this process and all below it while it ran."""
    peak, done = 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.5):
            peak = max(peak, memory_of_tree())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    return seconds, max(peak, memory_of_tree())


def memory_of_tree() -> float:
    """Proportional set size of this process and its descendants in MiB: shared pages count once."""
    import psutil

    me = psutil.Process(os.getpid())
    total = 0
    for process in [me, *me.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue
    return total / (1 << 20)


if __name__ == "__main__":
    main()
