"""The page and the terminal tables of a translation evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rayrm.evaluation.preferences import BootstrapConfig
from rayrm.evaluation.report import Block, Figure, Figures, Report, Section, Table, Text, Tile, Tone
from rayrm.evaluation.translation.bootstrap import MIN_GROUPS, direction_of
from rayrm.evaluation.translation.drift import SHARES
from rayrm.evaluation.translation.figures import draw_differences, draw_matrix
from rayrm.evaluation.translation.matrices import make_matrix
from rayrm.evaluation.translation.measuring import SetResult

TITLES = {"bleu": "BLEU", "chrf": "chrF", "bleurt": "BLEURT", "comet": "COMET"}
SLICES = {"": "all", "en-x": "en → x", "x-en": "x → en", "x-x": "x → x"}
FORMS = {"bleu": "{:.2f}", "chrf": "{:.2f}", "bleurt": "{:.4f}", "comet": "{:.4f}"}
CELLS = {"bleu": "{:.1f}", "chrf": "{:.1f}", "bleurt": "{:.3f}", "comet": "{:.3f}"}
NONE = "–"
MAX_PAIRS = 100
"""Language pairs that a figure of differences shows by themselves."""


def build_report(
    results: dict[str, SetResult], metrics: Sequence[str], facts: dict[str, str], config: BootstrapConfig
) -> Report:
    """The page: means first, then by set differences, matrices, and what went wrong with the texts."""
    policies = list(next(iter(results.values())).metrics)
    rows = " and ".join(f"{result.num_rows:,} rows of {name}" for name, result in results.items())
    lead = f"{', '.join(policies)} on {rows}, in {_count_pairs(results)} language pairs."
    sections = [section for name, result in results.items() for section in _sections(name, result, metrics, config)]
    return Report("Translation", lead, _tiles(results, metrics), facts, sections)


def means_table(result: SetResult, metrics: Sequence[str], config: BootstrapConfig) -> Table:
    """The means of every policy over all pairs and by direction, with their intervals."""
    rows = [
        [policy, title, *(_with_interval(found, metric, suffix) for metric in metrics)]
        for policy, found in result.metrics.items()
        for suffix, title in _slices(result)
    ]
    caption = (
        f"Unweighted means over language pairs; {config.confidence:.0%} intervals of {config.num_resamples:,} resamples "
        f"of whole groups, – where a language pair has fewer than {MIN_GROUPS}."
    )
    return Table(["policy", "direction", *(TITLES[metric] for metric in metrics)], rows, caption, num_labels=2)


def differences_table(result: SetResult, metrics: Sequence[str], config: BootstrapConfig) -> Table:
    """Every two policies: differences of the means, with intervals and p-values, of the same resamples for both."""
    rows = [
        [
            f"{found['policy']} − {found['baseline']}",
            title,
            *(_with_interval(found, metric, suffix, sign="+") for metric in metrics),
        ]
        for found in result.differences
        for suffix, title in _slices(result)
    ]
    caption = (
        f"Paired bootstrap: {config.confidence:.0%} intervals of the difference on the same resamples, and two-sided "
        "p-values, which are not corrected for several comparisons."
    )
    return Table(["difference", "direction", *(TITLES[metric] for metric in metrics)], rows, caption, num_labels=2)


def drift_table(result: SetResult) -> Table:
    """What went wrong with the texts of each policy."""
    numbers = ("length_ratio", "distinct_1", "distinct_2", "reference_distinct_2")
    rows = [
        [policy, *(_tell(found[name], "{:.1%}") for name in SHARES), *(_tell(found[n], "{:.3f}") for n in numbers)]
        for policy, found in result.metrics.items()
    ]
    caption = (
        "Shares of all texts. A dropped row had no answer, such as one too long for the model, and counts as empty; what is "
        "empty is scored by every metric. "
        "Wrong language: a text that looks more like another language of the set, by three characters at a time, learned "
        "from the set's own texts. Length is in characters by those of the references. Distinct: different tokens, and "
        "pairs of tokens, by all of them."
    )
    header = [name.replace("_", " ") for name in (*SHARES, *numbers)]
    return Table(["policy", *header], rows, caption)


def _sections(name: str, result: SetResult, metrics: Sequence[str], config: BootstrapConfig) -> list[Section]:
    blocks: list[Block] = [means_table(result, metrics, config)]
    if result.differences:
        blocks += [differences_table(result, metrics, config), *_draw_differences(result, metrics)]
    blocks += _draw_matrices(result, metrics)
    if unscored := tell_unscored(result, metrics):
        blocks.append(Text(unscored))
    drift: list[Block] = [drift_table(result), _drift_by_pair(result)]
    counting = [Section(f"{name}: how it was counted", [_signatures(result)])] if result.signatures else []
    return [Section(name, blocks), Section(f"{name}: what the texts are like", drift), *counting]


def _draw_differences(result: SetResult, metrics: Sequence[str]) -> list[Block]:
    """The figures of every two policies, a row of them each."""
    titles = dict(_slices(result))
    if len(result.pairs) <= MAX_PAIRS:
        titles |= {name: name for name in map("-".join, result.pairs)}
    return [
        Figures(
            [
                Figure(
                    draw_differences(found, metric, titles),
                    f"{TITLES[metric]}: {found['policy']} − {found['baseline']}",
                    "Blue where the whole interval is above zero, red where it is below, grey elsewhere.",
                )
                for metric in metrics
            ]
        )
        for found in result.differences
    ]


def _draw_matrices(result: SetResult, metrics: Sequence[str]) -> list[Block]:
    """The matrices of every metric, a row of them each, on one scale."""
    blocks: list[Block] = []
    for metric in metrics:
        matrices = {policy: make_matrix(found, metric, result.pairs) for policy, found in result.metrics.items()}
        values = np.concatenate([matrix.values.ravel() for matrix in matrices.values()])
        known = values[np.isfinite(values)]
        bounds = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
        caption = "From the languages on the left into those above; one scale for all policies."
        blocks.append(
            Figures(
                [
                    Figure(draw_matrix(matrix, bounds, CELLS[metric]), f"{TITLES[metric]}: {policy}", caption)
                    for policy, matrix in matrices.items()
                ]
            )
        )
    return blocks


def _drift_by_pair(result: SetResult) -> Table:
    shares = [name for name in SHARES if name != "dropped"]
    rows = [
        [policy, pair, f"{found[f'num_rows/{pair}']:,}"]
        + [_tell(found[f"{name}/{pair}"], "{:.1%}") for name in shares]
        + [_tell(found[f"length_ratio/{pair}"], "{:.3f}"), _tell(found[f"distinct_2/{pair}"], "{:.3f}")]
        for pair in map("-".join, result.pairs)
        for policy, found in result.metrics.items()
    ]
    header = ["policy", "pair", "rows", *(name.replace("_", " ") for name in shares), "length ratio", "distinct 2"]
    return Table(header, rows, num_labels=2)


def _signatures(result: SetResult) -> Table:
    rows = [[name, signature] for name, signature in sorted(result.signatures.items())]
    caption = "sacreBLEU's signatures; BLEU has a tokenizer for each target language, named by tok."
    return Table(["metric", "signature"], rows, caption, num_labels=2)


def _tiles(results: dict[str, SetResult], metrics: Sequence[str]) -> list[Tile]:
    """Each policy's mean of the first metric, toned by its difference from the first policy."""
    name, result = next(iter(results.items()))
    metric = metrics[0]
    against_first = {
        found["policy"]: found for found in result.differences if found["baseline"] == next(iter(result.metrics))
    }
    tiles = []
    for policy, found in result.metrics.items():
        tone: Tone = "plain"
        interval = against_first.get(policy, {}).get(f"{metric}_interval")
        if interval:
            tone = "good" if interval[0] > 0 else "bad" if interval[1] < 0 else "plain"
        value, note = _tell(found[metric], FORMS[metric]), _tell_interval(found, metric, "", FORMS[metric])
        tiles.append(Tile(f"{TITLES[metric]} of {policy}", value, f"{note} on {name}".removeprefix(f"{NONE} "), tone))
    return tiles


def tell_unscored(result: SetResult, metrics: Sequence[str]) -> str:
    """The rows that a scorer failed on, and those that are therefore in no difference."""
    told = []
    for metric in metrics:
        for policy, found in result.metrics.items():
            if num := found.get(f"{metric}_unscored"):
                words = ", ".join(f"{count:,} {word}" for word, count in found[f"{metric}_faults"].items())
                told.append(f"{num:,} rows of {policy} have no {TITLES[metric]} ({words})")
        for found in result.differences:
            if num := found.get(f"{metric}_unscored"):
                pair = f"{found['policy']} − {found['baseline']}"
                told.append(f"{num:,} rows are left out of both sides of {pair} in {TITLES[metric]}")
    return f"{'; '.join(told)}." if told else ""


def _slices(result: SetResult) -> list[tuple[str, str]]:
    """Suffix and title of the means that the set has; one alone where they are all the same."""
    directions = {direction_of(pair) for pair in result.pairs}
    there = [(name, title) for name, title in SLICES.items() if name in directions]
    return [("", SLICES[""]), *(there if len(there) > 1 else [])]


def _with_interval(found: dict[str, Any], metric: str, suffix: str, sign: str = "") -> str:
    form = FORMS[metric].replace("{:", "{:" + sign)
    end = f"/{suffix}" if suffix else ""
    if found[f"{metric}{end}"] is None:
        return NONE
    told = f"{_tell(found[f'{metric}{end}'], form)} {_tell_interval(found, metric, end, form)}"
    p_value = found.get(f"{metric}_p_value{end}")
    return told if p_value is None else f"{told} p={p_value:.3f}"


def _tell_interval(found: dict[str, Any], metric: str, end: str, form: str) -> str:
    interval = found[f"{metric}_interval{end}"]
    return NONE if interval is None else f"[{form.format(interval[0])}, {form.format(interval[1])}]"


def _tell(value: float | None, form: str) -> str:
    return NONE if value is None else form.format(value)


def _count_pairs(results: dict[str, SetResult]) -> int:
    return len({pair for result in results.values() for pair in result.pairs})
