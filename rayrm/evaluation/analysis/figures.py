"""Figures of an analysis: models by language, against English, by what languages share, and by one another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rayrm.evaluation.analysis.agreement import Consistency
from rayrm.evaluation.analysis.bias import SIDES, LengthBias
from rayrm.evaluation.analysis.leaderboard import Standing, group_means, merge_chinese
from rayrm.evaluation.analysis.probability import Probability
from rayrm.evaluation.drawing import INK, add_legend, new_axes, quieten
from rayrm.evaluation.preferences import Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#3d7fe8", "#e08a2c", "#2f9e77", "#d4574b", "#8a63d2", "#b8862b", "#d45b9b", "#5b8c2a", "#4aa3b8", "#8b8f98")
CHOSEN, REJECTED = COLOURS[0], COLOURS[1]
DASHED: Any = (0, (4, 3))
NUM_REWARD_BINS = 30
WIDE = 11.0
"""Inches of a figure that has the page's width."""


def shorten(name: str, num: int = 28) -> str:
    """A model's name in at most `num` characters: without the folders before it, then cut in the middle."""
    name = name if len(name) <= num else name.rstrip("/").rpartition("/")[2]
    half = (num - 1) // 2
    return name if len(name) <= num else f"{name[: num - 1 - half]}…{name[-half:]}"


def draw_heatmap(lines: Sequence[Standing]) -> Figure:
    """Scores of models by language, the average first; both written forms of Chinese are one column."""
    merged = [merge_chinese(line.scores) for line in lines]
    columns = ["Avg", *merged[0]]
    values = np.array(
        [[_number(line.average), *map(_number, own.values())] for line, own in zip(lines, merged, strict=True)]
    )
    figure, axes = new_axes(max(4.0, min(WIDE, 2.6 + 0.42 * len(columns))), 0.8 + 0.32 * len(lines))
    _cells(axes, 100 * values, [shorten(line.model) for line in lines], columns, "{:.1f}")
    axes.axvline(1, color=INK, linewidth=1.2)
    return figure


def draw_matrix(models: Sequence[str], values: Floats) -> Figure:
    """Cohen's κ of every two models; the numbers under the columns are those of the rows."""
    figure, axes = new_axes(3.2 + 0.42 * len(models), 1.0 + 0.34 * len(models))
    numbers = [str(number) for number in range(1, len(models) + 1)]
    names = [f"{shorten(model, 24)}  {number}" for model, number in zip(models, numbers, strict=True)]
    _cells(axes, values, names, numbers, "{:.2f}")
    return figure


def _cells(axes: Axes, values: Floats, rows: Sequence[str], columns: Sequence[str], form: str) -> None:
    from matplotlib import colormaps

    known = values[np.isfinite(values)]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    colours = colormaps["YlGnBu"]
    for row in range(values.shape[0]):
        for column in range(values.shape[1]):
            value = values[row, column]
            if not np.isfinite(value):
                axes.text(column + 0.5, row + 0.5, "–", ha="center", va="center", fontsize=8, color=INK)
                continue
            fill = colours(0.08 + 0.84 * (value - low) / (high - low) if high > low else 0.5)
            axes.fill([column, column + 1, column + 1, column], [row, row, row + 1, row + 1], color=fill, linewidth=0)
            is_dark = 0.299 * fill[0] + 0.587 * fill[1] + 0.114 * fill[2] < 0.55
            colour = "#ffffff" if is_dark else "#14202e"
            axes.text(column + 0.5, row + 0.5, form.format(value), ha="center", va="center", fontsize=8, color=colour)
    axes.set_xlim(0, len(columns))
    axes.set_ylim(len(rows), 0)
    axes.set_xticks(np.arange(len(columns)) + 0.5, columns)
    axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)


def draw_drops(lines: Sequence[Standing]) -> Figure:
    """The average over other languages against the score in English, a numbered dot for each model."""
    shown = [(line, 100 * line.english, 100 * line.average) for line in lines if line.english and line.average]
    figure, axes = new_axes(5.4, 4.2)
    values = [value for _, x, y in shown for value in (x, y)]
    low, high = min(values), max(values)
    margin = max(0.06 * (high - low), 0.5)
    limits = (low - margin, high + margin)
    axes.plot(limits, limits, color=INK, alpha=0.45, linewidth=1, linestyle=DASHED, label="no drop")
    kinds = list(dict.fromkeys(line.model_type for line, _, _ in shown))
    for number, kind in enumerate(kinds):
        xs = [x for line, x, _ in shown if line.model_type == kind]
        ys = [y for line, _, y in shown if line.model_type == kind]
        axes.plot(xs, ys, "o", markersize=6, color=COLOURS[number], label=kind)
    for index, (x, y) in enumerate(_apart([(x, y) for _, x, y in shown], limits)):
        axes.text(x, y, str(index + 1), ha="center", va="center", fontsize=8, color=INK)
    axes.set_xlim(*limits)
    axes.set_ylim(*limits)
    axes.set_xlabel("score in English")
    axes.set_ylabel("average over other languages")
    axes.grid(alpha=0.15, color=INK)
    add_legend(axes)
    return figure


def _apart(points: Sequence[tuple[float, float]], limits: tuple[float, float]) -> list[tuple[float, float]]:
    """A place for each point's label: right above it, or beside it where a label or a dot stands already."""
    step = (limits[1] - limits[0]) * 0.045
    offsets = [(0, 1), (1, 0), (0, -1), (-1, 0), (1, 1), (-1, 1), (1, -1), (-1, -1), (0, 2), (2, 0), (0, -2), (-2, 0)]
    taken = list(points)
    found = []
    for x, y in points:
        places = [(x + step * dx, y + step * dy) for dx, dy in offsets]
        free = [p for p in places if all(np.hypot(p[0] - q[0], p[1] - q[1]) > 0.8 * step for q in taken)]
        found.append(free[0] if free else places[0])
        taken.append(found[-1])
    return found


def draw_groups(lines: Sequence[Standing], groups: Mapping[str, Sequence[str]]) -> Figure:
    """Mean scores by what languages have in common: a bar for the mean over models, a dot for each model."""
    figure, axes = new_axes(5.4, 1.1 + 0.36 * len(groups))
    means = [group_means(line.scores, groups) for line in lines]
    places = np.arange(len(groups))[::-1]
    for place, name in zip(places, groups, strict=True):
        own = [100 * value for found in means if (value := found[name]) is not None]
        if own:
            axes.barh(place, float(np.mean(own)), height=0.62, color=CHOSEN, alpha=0.35)
            axes.plot(own, [place] * len(own), "o", markersize=4.5, color=CHOSEN, alpha=0.85)
    axes.set_yticks(places, [f"{name} ({len(codes)})" for name, codes in groups.items()])
    axes.set_xlim(0, 100)
    axes.set_xlabel("mean score of the languages")
    axes.grid(axis="x", alpha=0.15, color=INK)
    return figure


def draw_kappas(found: Sequence[Consistency]) -> Figure:
    """κ of each model with its own results in English: the mean over languages and the standard deviation."""
    figure, axes = new_axes(5.4, 1.0 + 0.34 * len(found))
    places = np.arange(len(found))[::-1]
    bars: dict[str, Any] = {"error_kw": {"ecolor": INK, "elinewidth": 1.1, "capsize": 3}}
    axes.barh(places, [x.mean for x in found], xerr=[x.deviation for x in found], height=0.6, color=CHOSEN, **bars)
    axes.axvline(0, color=INK, alpha=0.35, linewidth=1)
    axes.set_yticks(places, [shorten(item.model, 24) for item in found])
    axes.set_xlim(min(0.0, *(item.mean - item.deviation for item in found)) - 0.02, 1.05)
    axes.set_xlabel("Cohen's κ with English")
    axes.grid(axis="x", alpha=0.15, color=INK)
    return figure


def draw_lengths(found: Sequence[LengthBias]) -> Figure:
    """Accuracy of each model where the right answer is the longer one, as long, or the shorter one."""
    figure, axes = new_axes(5.4, 1.2 + 0.34 * len(found))
    places = np.arange(len(found))[::-1]
    for side, colour, marker in zip(SIDES, (CHOSEN, COLOURS[-1], REJECTED), "osD", strict=True):
        known = [(item.accuracy[side], place) for item, place in zip(found, places, strict=True)]
        shown = [(value, place) for value, place in known if value is not None]
        if shown:
            label = f"right is {side}" if side != "equal" else "equal"
            axes.plot(*zip(*shown, strict=True), marker, markersize=6, color=colour, label=label)
    for item, place in zip(found, places, strict=True):
        values = [value for value in item.accuracy.values() if value is not None]
        axes.plot([min(values), max(values)], [place, place], color=INK, alpha=0.25, linewidth=1, zorder=0)
    axes.set_yticks(places, [shorten(item.model, 24) for item in found])
    axes.set_ylim(-0.6, len(found) - 0.4)
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel("accuracy")
    axes.grid(axis="x", alpha=0.15, color=INK)
    add_legend(axes)
    return figure


def draw_reliability(found: Sequence[Probability]) -> Figure:
    """Accuracy against confidence σ(|gap|), a line for each model, beside the line on which they are equal."""
    figure, axes = new_axes(5.4, 3.6 + 0.16 * ((len(found) + 2) // 2))
    axes.plot([0.5, 1], [0.5, 1], color=INK, alpha=0.45, linewidth=1, linestyle=DASHED, label="calibrated")
    for index, item in enumerate(found):
        xs, ys = [part.confidence for part in item.bins], [part.accuracy for part in item.bins]
        colour = COLOURS[index % len(COLOURS)]
        marker = "os^Dv"[index % 5]
        axes.plot(xs, ys, f"{marker}-", color=colour, markersize=4.5, linewidth=1.3, label=shorten(item.model, 24))
    axes.set_xlim(0.48, 1.02)
    axes.set_ylim(min(0.45, *(part.accuracy for item in found for part in item.bins)) - 0.03, 1.03)
    axes.set_xlabel("confidence σ(|reward gap|)")
    axes.set_ylabel("accuracy")
    axes.grid(alpha=0.15, color=INK)
    add_legend(axes, ncols=2)
    return figure


def draw_rewards(rewards: Mapping[str, tuple[Floats, Floats]]) -> Figure:
    """Histograms of each model's rewards of right and of wrong answers, 30 bins, each on its own scale."""
    from matplotlib.figure import Figure as Drawing

    num_columns = min(3, len(rewards))
    num_rows = -(-len(rewards) // num_columns)
    figure = Drawing(figsize=(3.6 * num_columns, 0.5 + 2.0 * num_rows), layout="constrained")
    figure.patch.set_alpha(0)
    for index, (model, (right, wrong)) in enumerate(rewards.items()):
        axes = figure.add_subplot(num_rows, num_columns, index + 1)
        quieten(axes)
        edges = np.histogram_bin_edges(np.concatenate([right, wrong]), NUM_REWARD_BINS).tolist()
        axes.hist(right, edges, color=CHOSEN, alpha=0.6)
        axes.hist(wrong, edges, color=REJECTED, alpha=0.6)
        axes.set_title(shorten(model, 30), fontsize=9, color=INK)
        axes.tick_params(labelsize=7.5)
    return figure


def _number(value: float | None) -> float:
    return np.nan if value is None else value
