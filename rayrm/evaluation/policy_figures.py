"""Figures of a policy training with rewards: metrics by step, stacked shares, and changes by language."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from rayrm.evaluation.analysis.figures import COLOURS, DASHED
from rayrm.evaluation.drawing import INK, add_legend, new_axes, to_svg
from rayrm.evaluation.policy_run import Series
from rayrm.evaluation.preferences import Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_POINTS = 200
"""Most points of a line; of a longer run they are means."""
MAX_BARS = 60
"""Likewise most bars."""
SMOOTHED = 30
"""Points from which on a noisy line has its running mean drawn over it."""
MAX_PLAIN_LABELS = 4
"""Names that stand above axes in one line."""


class Line(NamedTuple):
    """A metric to be drawn."""

    label: str
    series: Series
    is_marked: bool = False
    """Whether each of its values is a measurement of its own, drawn as a dot on a full line."""


def thin(series: Series, num_points: int = MAX_POINTS) -> Series:
    """The same with at most `num_points` points, means of neighbours of about equal number."""
    if len(series.values) <= num_points:
        return series
    steps, values = (
        np.array([part.mean() for part in np.array_split(column, num_points)])
        for column in (series.steps, series.values)
    )
    return Series(steps, values)


def running_mean(values: Floats, width: int) -> Floats:
    """Means over `width` neighbours (an odd number), over fewer at both ends."""
    kernel = np.ones(width)
    return np.convolve(values, kernel, mode="same") / np.convolve(np.ones(len(values)), kernel, mode="same")


def draw_lines(
    lines: Sequence[Line],
    ylabel: str,
    limits: Mapping[str, float] | None = None,
    log: bool = False,
    top: float | None = None,
) -> str:
    """Metrics by step, with `limits` as dashed lines; on a log axis what is not above 0 is left out.

    With `top`, the axis reaches from 0 to it.
    """
    figure, axes = new_axes(5.4, 3.1)
    for line, colour in zip(lines, _colours(len(lines)), strict=True):
        steps, values = thin(line.series)
        if log:
            steps, values = steps[values > 0], values[values > 0]
        if line.is_marked or len(values) < 2:
            axes.plot(steps, values, "o-", color=colour, markersize=5, linewidth=1.4, label=line.label)
        elif len(values) < SMOOTHED or log:
            axes.plot(steps, values, color=colour, linewidth=1.4, label=line.label)
        else:
            axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
            width = 2 * (len(values) // 20) + 1
            axes.plot(steps, running_mean(values, width), color=colour, linewidth=1.6, label=line.label)
    for label, value in (limits or {}).items():
        axes.axhline(value, color=INK, alpha=0.6, linewidth=1, linestyle=DASHED, label=label)
    if log:
        axes.set_yscale("log")
    if top is not None:
        axes.set_ylim(0, top)
    _finish(axes, ylabel, len(lines) + len(limits or {}))
    return to_svg(figure)


def draw_stack(parts: Mapping[str, Series], ylabel: str, top: float | None = None, behind: Line | None = None) -> str:
    """Parts of a whole by step, one upon the other; all have the same steps. `behind` is drawn as a dashed line."""
    figure, axes = new_axes(5.4, 3.1)
    thinned = [thin(series, MAX_BARS) for series in parts.values()]
    steps = thinned[0].steps
    width = float(np.median(np.diff(steps))) if len(steps) > 1 else 1.0
    bottom = np.zeros(len(steps))
    for label, part, colour in zip(parts, thinned, _colours(len(parts)), strict=True):
        axes.bar(steps, part.values, 0.92 * width, bottom, color=colour, label=label, alpha=0.85)
        bottom = bottom + part.values
    if behind is not None:
        axes.plot(*thin(behind.series), color=INK, linewidth=1.2, linestyle=DASHED, label=behind.label)
    axes.set_xlim(steps[0] - max(width, 2 / len(steps)), steps[-1] + max(width, 2 / len(steps)))
    axes.set_ylim(0, top)
    axes.set_axisbelow(True)
    _finish(axes, ylabel, len(parts) + (behind is not None))
    return to_svg(figure)


def draw_changes(names: Sequence[str], start: Floats, end: Floats, labels: tuple[str, str]) -> str:
    """A hollow dot at the start and a full one at the end for each name, joined; `labels` say when they are."""
    figure, axes = new_axes(5.4, 1.1 + 0.27 * len(names))
    places = np.arange(len(names))
    for place, low, high in zip(places, start, end, strict=True):
        axes.plot([low, high], [place, place], color=COLOURS[0], alpha=0.4, linewidth=2)
    axes.plot(start, places, "o", markersize=5.5, markerfacecolor="none", color=COLOURS[1], label=labels[0])
    axes.plot(end, places, "o", markersize=6, color=COLOURS[0], label=labels[1])
    axes.set_yticks(places, list(names))
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel("reward")
    axes.grid(axis="x", alpha=0.15, color=INK)
    add_legend(axes)
    return to_svg(figure)


def _finish(axes: Axes, ylabel: str, num_labels: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    axes.set_xlabel("step")
    axes.set_ylabel(ylabel)
    axes.grid(axis="y", alpha=0.15, color=INK)
    if num_labels > 1:
        add_legend(axes, num_labels if num_labels <= MAX_PLAIN_LABELS else 3)


def _colours(num: int) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(num)]
