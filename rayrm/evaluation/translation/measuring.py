"""The numbers of a test set: every metric of every policy by language pair, and the differences between policies."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from rayrm.config import Config
from rayrm.evaluation.preferences import BootstrapConfig, Floats
from rayrm.evaluation.translation.bootstrap import Resampler, summarise, summarise_difference
from rayrm.evaluation.translation.comet import CometConfig
from rayrm.evaluation.translation.drift import LanguageGuess, measure_drift
from rayrm.evaluation.translation.metrics import (
    COUNTS,
    SCORES,
    count_mean,
    flatten_text,
    score_mean,
)
from rayrm.evaluation.translation.policies import Answers
from rayrm.scoring.bleurt import BleurtScoring


class MetricsConfig(Config):
    """What is measured."""

    corpus: list[Literal["bleu", "chrf"]] = Field(["bleu", "chrf"])
    """Metrics of sacreBLEU, with its tokenizer for each target language."""
    bleurt: BleurtScoring | None = None
    """The BLEURT checkpoint; null for none."""
    comet: CometConfig | None = None
    """The COMET model; null for none."""

    @model_validator(mode="after")
    def _check_metrics(self) -> MetricsConfig:
        if not self.names:
            raise ValueError("there is nothing to measure; name bleu or chrf in corpus, or set bleurt or comet")
        if len(set(self.corpus)) < len(self.corpus):
            raise ValueError(f"a metric is named twice in corpus: {', '.join(self.corpus)}")
        return self

    @property
    def names(self) -> list[str]:
        """All metrics, in the order of reports."""
        scored = [name for name in ("bleurt", "comet") if getattr(self, name) is not None]
        return [*self.corpus, *scored]


class SetResult(NamedTuple):
    """What was measured on a test set; plain values, as they stand in `run.json`."""

    num_rows: int
    num_groups: int
    pairs: list[tuple[str, str]]
    """Language pairs, English first."""
    signatures: dict[str, str]
    """`bleu/<target language>` and `chrf` to sacreBLEU's signature, which names BLEU's tokenizer."""
    metrics: dict[str, dict[str, Any]]
    """By policy: `bleu` (mean over pairs), `bleu/en-x`, `bleu/en-de`, `bleu_interval/…`, shares and lengths; null where
    there is no number, and for an interval of fewer than `MIN_GROUPS` groups."""
    differences: list[dict[str, Any]]
    """Of every two policies: `policy` minus `baseline`, `bleu/…`, `bleu_interval/…`, `bleu_p_value/…`."""


def measure_set(
    name: str, rows: pa.Table, answers: dict[str, Answers], metrics: Sequence[str], config: BootstrapConfig
) -> SetResult:
    """All metrics of the rows of a set that policies have answered.

    A row that a policy could not answer is an empty text, and an empty text is scored like any other. Only where BLEURT or
    COMET failed is a row in no mean of theirs, and their differences are over rows that both policies have a score for.
    """
    table = rows.select(["source", "reference", "src_lang", "tgt_lang"]).to_pylist()
    pairs = [(row["src_lang"], row["tgt_lang"]) for row in table]
    groups = rows["group"].to_pylist()
    resampler = Resampler(pairs, groups, config, name)
    spoken = [(row["tgt_lang"], row["reference"]) for row in table] + [(r["src_lang"], r["source"]) for r in table]
    guess = LanguageGuess(spoken)
    found: dict[str, dict[str, Any]] = {
        policy: dict(measure_drift(table, own, guess)) for policy, own in answers.items()
    }
    differences: list[dict[str, Any]] = [
        {"policy": policy, "baseline": baseline} for baseline, policy in combinations(answers, 2)
    ]
    signatures: dict[str, str] = {}
    for metric in metrics:
        draws = {}
        for policy, own in answers.items():
            draws[policy], counted = _draw(metric, own, table, resampler)
            signatures |= counted
            is_known = None if metric in SCORES else ~np.isnan(own.scores[metric])
            found[policy] |= summarise(metric, resampler.slice(draws[policy], is_known), config.confidence)
            if is_known is not None:
                found[policy][f"{metric}_unscored"] = int((~is_known).sum())
                found[policy][f"{metric}_faults"] = own.faults[metric]
        for difference in differences:
            one, other = difference["policy"], difference["baseline"]
            if metric in SCORES:
                slices = resampler.slice(draws[one] - draws[other])
            else:
                gaps = answers[one].scores[metric] - answers[other].scores[metric]
                slices = resampler.slice(_draw_mean(gaps, resampler), ~np.isnan(gaps))
                difference[f"{metric}_unscored"] = int(np.isnan(gaps).sum())
            difference |= summarise_difference(metric, slices, config.confidence)
    return SetResult(len(table), resampler.num_groups, resampler.pairs, signatures, found, differences)


def _draw(
    metric: str, answers: Answers, table: Sequence[dict[str, Any]], resampler: Resampler
) -> tuple[Floats, dict[str, str]]:
    """Draws of a metric (draws, pairs), and the signatures with which it was counted."""
    if metric not in SCORES:
        return _draw_mean(answers.scores[metric], resampler), {}
    statistics, signatures = [], {}
    for (_, target), rows in zip(resampler.pairs, resampler.rows, strict=True):
        samples = [[flatten_text(texts[row]) for row in rows] for texts in answers.samples]
        references = [flatten_text(table[row]["reference"]) for row in rows]
        counted = COUNTS[metric](samples, references, target)
        statistics.append(counted.numbers)
        signatures[f"{metric}/{target}" if metric == "bleu" else metric] = counted.signature
    return resampler.draw(statistics, SCORES[metric]), signatures


def _draw_mean(values: Floats, resampler: Resampler) -> Floats:
    return resampler.draw([count_mean(values[rows]) for rows in resampler.rows], score_mean)
