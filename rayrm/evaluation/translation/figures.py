"""Figures of translation metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rayrm.evaluation.drawing import INK, new_axes, to_svg
from rayrm.evaluation.figures import MISS, MODEL
from rayrm.evaluation.translation.matrices import Matrix

GREY = "#8a94a3"


def draw_matrix(matrix: Matrix, bounds: tuple[float, float], form: str) -> str:
    """A matrix as coloured cells with numbers; `bounds` are the values of the lightest and the darkest cell."""
    from matplotlib import colormaps

    rows, columns = matrix.values.shape
    figure, axes = new_axes(1.0 + 0.62 * columns, 0.5 + 0.4 * rows)
    colours = colormaps["YlGnBu"]
    low, high = bounds
    for row, column in np.argwhere(np.isfinite(matrix.values)).tolist():
        value = float(matrix.values[row, column])
        fill = colours(0.08 + 0.84 * (value - low) / (high - low) if high > low else 0.5)
        axes.fill([column, column + 1, column + 1, column], [row, row, row + 1, row + 1], color=fill, linewidth=0)
        is_dark = 0.299 * fill[0] + 0.587 * fill[1] + 0.114 * fill[2] < 0.55
        colour = "#ffffff" if is_dark else "#14202e"
        axes.text(column + 0.5, row + 0.5, form.format(value), ha="center", va="center", fontsize=8.5, color=colour)
    axes.set_xlim(0, columns)
    axes.set_ylim(rows, 0)
    axes.set_xticks(np.arange(columns) + 0.5, matrix.targets)
    axes.set_yticks(np.arange(rows) + 0.5, matrix.sources)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    return to_svg(figure)


def draw_differences(found: dict[str, Any], metric: str, titles: Mapping[str, str]) -> str:
    """A difference with its interval for each slice, by its title: blue above zero, red below, grey across or without."""
    figure, axes = new_axes(5.4, 0.9 + 0.27 * len(titles))
    axes.axvline(0, color=INK, alpha=0.45, linewidth=1, linestyle=(0, (4, 3)))
    for place, name in enumerate(titles):
        suffix = f"/{name}" if name else ""
        value, interval = found[f"{metric}{suffix}"], found[f"{metric}_interval{suffix}"]
        if value is None:
            continue
        low, high = interval or (0.0, 0.0)
        colour = MODEL if low > 0 else MISS if high < 0 else GREY
        # A value may lie outside of its interval, where resamples are few.
        error = None if interval is None else [[max(value - low, 0.0)], [max(high - value, 0.0)]]
        axes.errorbar([value], [place], xerr=error, fmt="o", color=colour, markersize=5, capsize=3)
    axes.set_yticks(range(len(titles)), list(titles.values()))
    axes.set_ylim(len(titles) - 0.4, -0.6)
    axes.set_xlabel("difference")
    axes.grid(axis="x", alpha=0.15, color=INK)
    return to_svg(figure)
