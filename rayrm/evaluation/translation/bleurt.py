"""BLEURT over translations, the empty ones too: left out, they would flatter the policy that is silent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rayrm import cluster
from rayrm.scoring import ScoreStage
from rayrm.scoring.base import Outcome
from rayrm.scoring.bleurt import BleurtScorer, BleurtScoring

if TYPE_CHECKING:
    from ray.data import Dataset


def score_translations(candidates: Dataset, config: BleurtScoring) -> Dataset:
    """As `score_candidates`, with a score for every text. Raises ResourceError when the cluster cannot hold the actors."""
    workers = config.workers
    cluster.require(workers.num_workers, workers.num_cpus, workers.num_gpus, f"Scorer '{config.name}'")
    return candidates.map_batches(
        TranslationStage, fn_constructor_args=(config,), batch_format="pyarrow", batch_size=None, **workers.pool()
    )


class TranslationScorer(BleurtScorer):
    """A loaded BLEURT model for which a text of nothing is a text."""

    def score(self, rows: list[dict[str, Any]]) -> list[list[Outcome]]:
        """As `BleurtScorer.score`, but what is `empty` there has the model's score of the reference and no text."""
        found = super().score(rows)
        references = [row["reference"] for row, own in zip(rows, found, strict=True) if (None, "empty") in own]
        silent = self._score_pairs([(reference, "") for reference in dict.fromkeys(references)])
        return [
            [silent[row["reference"], ""] if outcome == (None, "empty") else outcome for outcome in own]
            for row, own in zip(rows, found, strict=True)
        ]


class TranslationStage(ScoreStage):
    """The scorer of one actor, applied to tables of whole shards."""

    def __init__(self, config: BleurtScoring) -> None:
        self.name = config.name
        self.scorer = TranslationScorer(config)
