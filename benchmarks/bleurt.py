"""BLEURT scores: our scorer against bleurt-pytorch's own model, on the same pairs, threads and weights, in fp32.

Two baselines, both in file order with 100 pairs a batch: every pair padded to 512 tokens, as the published recipe
feeds BLEURT, and padded to the longest of its 100. The model has random weights; candidates are spoilt references,
four a row. Loading is left out, tokenisation is not. The padded baseline is slow, so it gets whole batches from
evenly spaced places of the file, and our scorer is timed on exactly those pairs too.

    python benchmarks/bleurt.py [parallel file] [threads]
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from rayrm.config import Workers
from rayrm.models.bleurt import bleurt_classes, new_bleurt, save_bleurt
from rayrm.scoring.bleurt import BleurtScorer, BleurtScoring
from rayrm.shards import read_table
from rayrm.sources.grammar import GrammarConfig, write_sentences
from rayrm.training.bleurt_loop import train_vocabulary
from rayrm.training.corruption import Reference, Spoiler

PARALLEL = Path(__file__).resolve().parents[2] / "shared" / "data" / "parallel" / "test.parquet"
SIZES = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
NUM_CANDIDATES = 4
BATCH = 100
FULL_LENGTH = 512
NUM_BATCHES = {FULL_LENGTH: 4, None: 40}
"""Batches that each baseline gets: padded to 512, and to its longest pair."""
ROUNDS = 3

Row = dict[str, Any]


def main() -> None:
    """Make the model and the pairs, run all sides in turn, print the ratios."""
    rows = make_rows(sys.argv[1] if len(sys.argv) > 1 else None)
    threads = int(sys.argv[2]) if len(sys.argv) > 2 else 2
    with tempfile.TemporaryDirectory() as folder:
        texts = [row["reference"] for row in rows]
        vocabulary = train_vocabulary(texts, 8000)
        torch.manual_seed(0)
        save_bleurt(new_bleurt(vocab_size=len(vocabulary), initializer_range=0.06, **SIZES), vocabulary, folder)
        scorer = BleurtScorer(BleurtScoring(model=folder, workers=Workers(num_cpus=threads)))
        baseline = load_baseline(folder)
    print(f"{len(rows):,} rows × {NUM_CANDIDATES} candidates, {torch.get_num_threads()} threads, {SIZES}")
    for length, required in ((FULL_LENGTH, 20.0), (None, 1.4)):
        sample = spread(rows, NUM_BATCHES[length])
        compare(scorer, baseline, sample, length, required)


def make_rows(path: str | None) -> list[Row]:
    """Rows with a reference and candidates, in file order."""
    if path is not None or PARALLEL.exists():
        table = read_table(path or str(PARALLEL)).to_pylist()
    else:
        table = write_sentences(GrammarConfig()).to_pylist()
    references = [Reference(str(i), str(i), row["trg_lang"], row["trg_text"]) for i, row in enumerate(table)]
    spoiler = Spoiler(references, seed=0)
    return [
        {
            "reference": reference.text,
            "candidates": [spoiler.spoil(reference, k).candidate for k in range(NUM_CANDIDATES)],
        }
        for reference in references
    ]


def spread(rows: Sequence[Row], num_batches: int) -> list[Row]:
    """Runs of rows that make up whole batches, evenly spaced over the file."""
    length = BATCH // NUM_CANDIDATES
    starts = range(0, len(rows) - length + 1, max(length, len(rows) // num_batches))
    return [row for start in list(starts)[:num_batches] for row in rows[start : start + length]]


def load_baseline(folder: str) -> Callable[[Sequence[Row], int | None], list[float]]:
    """bleurt-pytorch's eager model, called as its README calls it."""
    _, model_class, tokenizer_class = bleurt_classes()
    model, tokenizer = model_class.from_pretrained(folder).eval(), tokenizer_class.from_pretrained(folder)
    # Two buffers that transformers 5 leaves without values.
    model.bleurt.embeddings.position_ids = torch.arange(FULL_LENGTH).expand((1, -1))
    model.bleurt.embeddings.token_type_ids = torch.zeros((1, FULL_LENGTH), dtype=torch.long)

    @torch.no_grad()
    def score(rows: Sequence[Row], length: int | None) -> list[float]:
        pairs = [(row["reference"], text) for row in rows for text in row["candidates"]]
        padding = {"padding": "max_length" if length else "longest", "truncation": True, "max_length": FULL_LENGTH}
        scores: list[float] = []
        for start in range(0, len(pairs), BATCH):
            references, candidates = zip(*pairs[start : start + BATCH], strict=True)
            inputs = tokenizer(list(references), list(candidates), return_tensors="pt", **padding)
            scores += model(**inputs).logits.flatten().tolist()
        return scores

    return score


def compare(
    scorer: BleurtScorer,
    baseline: Callable[[Sequence[Row], int | None], list[float]],
    rows: list[Row],
    length: int | None,
    required: float,
) -> None:
    """Run both sides in turn, keep the best time of each, and print the ratio and the largest difference."""
    ours_s, theirs_s = [], []
    for _ in range(ROUNDS):
        seconds, outcomes = timed(lambda: scorer.score(rows))
        ours_s.append(seconds)
        seconds, theirs = timed(lambda: baseline(rows, length))
        theirs_s.append(seconds)
    ours = [score for row in outcomes for score, _ in row]
    difference = max(abs(first - second) for first, second in zip(ours, theirs, strict=True))
    unique = len({(row["reference"], text) for row in rows for text in row["candidates"]})
    name = f"padded to {length}" if length else f"padded to the longest of {BATCH}"
    print(f"{name}, {len(ours):,} pairs ({unique:,} different):")
    print(f"  baseline {len(ours) / min(theirs_s):9,.0f} pairs/s   ours {len(ours) / min(ours_s):9,.0f} pairs/s")
    print(f"  ratio {min(theirs_s) / min(ours_s):.1f} (at least {required:g} is asked)")
    print(f"  largest difference of a score {difference:.1e} (at most 1e-05 is asked)")


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Wall-clock seconds of a call, and what it returns."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


if __name__ == "__main__":
    main()
