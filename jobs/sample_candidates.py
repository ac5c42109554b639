"""Sample candidates for every prompt from a policy."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pyarrow.compute as pc

from rayrm import cluster
from rayrm.config import parse_args, run_job
from rayrm.rows import Candidates, Prompt
from rayrm.runs import RowsJob, transform_rows
from rayrm.sampling import SamplingConfig, check_sampling, sample_candidates
from rayrm.shards import iter_tables


class SampleCandidates(RowsJob):
    """Prompt rows → Candidates rows."""

    sampling: SamplingConfig
    """The policy, and how its answers are drawn."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the job; `run.json` also counts the candidates and those that were cut."""
    config = parse_args(SampleCandidates, argv)
    check_sampling(config.sampling)
    workers = config.sampling.workers
    cluster.require(workers.num_workers, workers.num_cpus, workers.num_gpus, "Sampling")
    transform_rows(config, Prompt, Candidates, partial(sample_candidates, config=config.sampling), summarise=count)


def count(output: str) -> dict[str, Any]:
    """`num_candidates`, and `num_unfinished` of them: cut at `max_tokens` or at the model's limit."""
    counts = {"num_candidates": 0, "num_unfinished": 0}
    for rows in iter_tables(output, ["candidates", "num_unfinished"]):
        counts["num_candidates"] += pc.sum(pc.list_value_length(rows["candidates"])).as_py() or 0
        counts["num_unfinished"] += pc.sum(rows["num_unfinished"]).as_py() or 0
    return counts


if __name__ == "__main__":
    run_job(main)
