"""The page and the table of a reward model's agreement with preferences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from rayrm.evaluation import figures
from rayrm.evaluation.preferences import BootstrapConfig, Pairs, Slice, measure, read_pairs
from rayrm.evaluation.report import Card, Cards, Figure, Figures, Report, Section, Table, Text, Tile, Tone

MAX_EXAMPLE_CHARS = 600


class RewardedSet(NamedTuple):
    """RewardedPreference rows with what was measured on them."""

    name: str
    rows: pa.Table
    pairs: Pairs
    slices: list[Slice]

    @property
    def overall(self) -> dict[str, Any]:
        """The metrics of all rows."""
        return self.slices[0].metrics


def measure_set(name: str, rows: pa.Table, config: BootstrapConfig) -> RewardedSet:
    """Measure RewardedPreference rows. Raises EvaluationError when none of them is scored."""
    pairs = read_pairs(rows)
    return RewardedSet(name, rows, pairs, measure(pairs, config, f"'{name}'"))


def summary_table(slices: Sequence[Slice], confidence: float) -> Table:
    """A row for all, for each language pair and for each subset; intervals hold `confidence` of the resamples."""
    interval = f"{confidence:.0%} interval"
    header = ["slice", "rows", "accuracy", interval, "length only", "gain", interval, "ties", "mean gap", "unscored"]
    return Table(header, [_summary_row(part) for part in slices])


def _summary_row(part: Slice) -> list[str]:
    m = part.metrics
    name = {"all": "all", "language": part.name, "subset": f"subset {part.name}"}[part.kind]
    if not m["num_rows"]:
        return [name, "0", *["–"] * 7, f"{m['num_unscored']:,}"]
    return [
        name,
        f"{m['num_rows']:,}",
        f"{m['accuracy']:.1%}",
        _percent_interval(m["accuracy_interval"]),
        f"{m['length_only_accuracy']:.1%} ({m['length_only']})",
        f"{100 * m['accuracy_gain']:+.1f}",
        _point_interval(m["accuracy_gain_interval"]),
        f"{m['num_ties']:,}",
        f"{m['mean_margin']:.3f}",
        f"{m['num_unscored']:,}",
    ]


def _percent_interval(bounds: Sequence[float]) -> str:
    return f"{100 * bounds[0]:.1f} – {bounds[1]:.1%}"


def _point_interval(bounds: Sequence[float]) -> str:
    return f"{100 * bounds[0]:+.1f} – {100 * bounds[1]:+.1f}"


def build_report(
    sets: Sequence[RewardedSet],
    lead: str,
    facts: dict[str, str],
    bootstrap: BootstrapConfig,
    num_examples: int,
    overview: Sequence[Section] = (),
) -> Report:
    """The page: `overview`, the first set with figures and examples, then each further set with its table and figures."""
    sections, tiles = list(overview), []
    for main in sets[:1]:
        sections += [_numbers(main, bootstrap, "Accuracy"), Section("Figures", [_figures(main)])]
        tiles += _tiles(main)
        if num_examples:
            sections.append(Section("Examples", _examples(main, num_examples)))
    for other in sets[1:]:
        sections.append(_numbers(other, bootstrap, other.name, [_figures(other)]))
        tiles.append(_accuracy_tile(other, other.name))
    return Report("Reward model evaluation", lead, tiles, facts, sections)


def _tiles(main: RewardedSet) -> list[Tile]:
    m = main.overall
    low, high = m["accuracy_gain_interval"]
    tone: Tone = "good" if low > 0 else "bad" if high < 0 else "plain"
    return [
        _accuracy_tile(main, "Accuracy"),
        Tile(
            "Gain over length only", f"{100 * m['accuracy_gain']:+.1f}", f"points, {_point_interval((low, high))}", tone
        ),
        Tile("Rows", f"{m['num_rows']:,}", f"{m['num_groups']:,} groups, {m['num_unscored']:,} unscored"),
        Tile("Mean reward gap", f"{m['mean_margin']:.2f}", f"{m['num_ties']:,} ties"),
    ]


def _accuracy_tile(rewarded: RewardedSet, label: str) -> Tile:
    low, high = rewarded.overall["accuracy_interval"]
    tone: Tone = "good" if low > 0.5 else "bad" if high < 0.5 else "plain"
    return Tile(label, f"{rewarded.overall['accuracy']:.1%}", _percent_interval((low, high)), tone)


def _numbers(rewarded: RewardedSet, config: BootstrapConfig, title: str, blocks: Sequence[Figures] = ()) -> Section:
    about = (
        "Accuracy is the share of rows whose chosen completion has the higher reward; a tie is a miss. Length only is "
        "a judge that always prefers the longer completion, or always the shorter one, whichever is right more often "
        "on the very rows of its line; equal lengths give it half a point. Gain is accuracy minus length only, in "
        f"percentage points. Intervals come from {config.num_resamples:,} resamples of whole groups of rows."
    )
    return Section(title, [Text(about), summary_table(rewarded.slices, config.confidence), *blocks])


def _figures(rewarded: RewardedSet) -> Figures:
    scored = rewarded.pairs.select(np.isfinite(rewarded.pairs.gaps))
    shown = [part for part in rewarded.slices if part.kind != "subset" and part.metrics["num_rows"]]
    return Figures(
        [
            Figure(
                figures.draw_slices(shown),
                "Accuracy by language pair",
                "The bar is the bootstrap interval; the dashed line is chance.",
            ),
            Figure(
                figures.draw_gaps(scored.gaps),
                "Reward gaps",
                "Gaps beyond the middle 99% of rows are counted in the outermost bars.",
            ),
            Figure(
                figures.draw_calibration(scored.gaps),
                "Calibration",
                "Rows are binned by σ of the gap's size, the chance that Bradley-Terry gives the preferred side; "
                "above the dashed line the model is right more often than it claims. Bars are 95% Wilson intervals.",
            ),
            Figure(
                figures.draw_by_length(scored),
                "Accuracy by length difference",
                "Apart for rows whose chosen side is shorter and longer: a model that follows length is high on one "
                "side and low on the other. Bars are 95% Wilson intervals.",
            ),
        ]
    )


def _examples(rewarded: RewardedSet, num: int) -> list[Cards | Text | Table | Figure | Figures]:
    gaps = rewarded.pairs.gaps
    order = [int(i) for i in np.argsort(gaps, kind="stable") if np.isfinite(gaps[i])]
    misses = [i for i in order if gaps[i] <= 0][:num]
    hits = [i for i in reversed(order) if gaps[i] > 0][:num]
    found = {"Worst misses": misses, "Most confident hits": hits}
    return [Cards(title, [_card(rewarded, index) for index in rows]) for title, rows in found.items() if rows]


def _card(rewarded: RewardedSet, index: int) -> Card:
    row = rewarded.rows.slice(index, 1).to_pylist()[0]
    title = f"{rewarded.pairs.languages[index]} · {row['id']} · gap {rewarded.pairs.gaps[index]:+.3f}"
    return Card(
        title,
        [
            ("prompt", _words(row["prompt"]), "plain", ""),
            ("chosen", _words(row["chosen"]), "good", f"{row['chosen_reward']:.3f}"),
            ("rejected", _words(row["rejected"]), "bad", f"{row['rejected_reward']:.3f}"),
        ],
    )


def _words(messages: Sequence[dict[str, str]]) -> str:
    text = "\n".join(message["content"] for message in messages)
    return text if len(text) <= MAX_EXAMPLE_CHARS else text[: MAX_EXAMPLE_CHARS - 1] + "…"
