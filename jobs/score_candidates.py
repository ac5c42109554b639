"""Score the candidates of every row with one scorer; run it again with another scorer to add its scores."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from pydantic import Field

from rayrm.config import NOT_IDENTITY, parse_args, run_job
from rayrm.rows import Candidates, Scored
from rayrm.runs import RowsJob, transform_rows
from rayrm.scoring import Scoring, check_scoring, score_candidates
from rayrm.scoring.identity import identify, known_scorers


class ScoreCandidates(RowsJob):
    """Candidates (or Scored) rows → Scored rows."""

    scoring: Scoring
    """The scorer: bleurt, reward_model, service, implicit, length, grammar or custom."""
    max_failed_fraction: float = Field(0.1, ge=0, le=1, json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Most scores that may be null; a run with more fails at its end and keeps what it wrote."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the job. `run.json` says of all scorers of the rows what they are."""
    config = parse_args(ScoreCandidates, argv)
    check_scoring(config.input, config.scoring)
    stage = partial(score_candidates, config=config.scoring)
    scorers = {**known_scorers(config.input), config.scoring.name: identify(config.scoring)}
    transform_rows(
        config,
        Candidates,
        Scored,
        stage,
        {config.scoring.name: config.max_failed_fraction},
        summarise=lambda output: {"scorers": scorers},
    )


if __name__ == "__main__":
    run_job(main)
