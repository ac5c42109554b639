"""Figures of preference metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from rayrm.evaluation.drawing import INK, add_legend, new_axes, to_svg
from rayrm.evaluation.preferences import Floats, Pairs, Slice

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MODEL, BASELINE, MISS = "#3d7fe8", "#e08a2c", "#d4574b"
Z95 = 1.959964


class Binned(NamedTuple):
    """The accuracy of the rows of one bin."""

    low: float
    """Smallest value in the bin."""
    high: float
    """Largest value in the bin."""
    mean: float
    """Mean of what was binned."""
    accuracy: float
    num_rows: int


def bins(values: Floats, credits: Floats, num_bins: int) -> list[Binned]:
    """Accuracy in at most `num_bins` bins of about equally many rows; equal values stay in one bin."""
    # A value's place among the sorted ones, the first of equal values, decides its bin.
    codes = np.searchsorted(np.sort(values), values) * num_bins // max(1, len(values))
    found = []
    for code in np.unique(codes):
        inside = codes == code
        found.append(
            Binned(
                float(values[inside].min()),
                float(values[inside].max()),
                float(values[inside].mean()),
                float(credits[inside].mean()),
                int(inside.sum()),
            )
        )
    return found


def calibration(gaps: Floats, num_bins: int = 10) -> list[Binned]:
    """How often the side that the model prefers is the chosen one, by σ(|gap|), what Bradley-Terry takes it for.

    A tie is σ = 0.5 and counts half. Fewer bins when there are fewer than 20 rows for each.
    """
    return bins(1 / (1 + np.exp(-np.abs(gaps))), (np.sign(gaps) + 1) / 2, max(1, min(num_bins, len(gaps) // 20)))


def by_length(pairs: Pairs, num_bins: int = 4) -> dict[str, list[Binned]]:
    """Accuracy by how many characters longer or shorter the chosen completion is; equal lengths have a bin."""
    hits = (pairs.gaps > 0).astype(float)
    sides = {"shorter": pairs.extra_length < 0, "equal": pairs.extra_length == 0, "longer": pairs.extra_length > 0}
    return {name: bins(np.abs(pairs.extra_length[rows]), hits[rows], num_bins) for name, rows in sides.items()}


def wilson(accuracy: float, num_rows: int) -> tuple[float, float]:
    """The 95 % interval of a share of `num_rows` rows (Wilson 1927)."""
    shrink = 1 + Z95**2 / num_rows
    middle = (accuracy + Z95**2 / (2 * num_rows)) / shrink
    half = Z95 * np.sqrt(accuracy * (1 - accuracy) / num_rows + Z95**2 / (4 * num_rows**2)) / shrink
    return float(middle - half), float(middle + half)


def draw_slices(slices: Sequence[Slice]) -> str:
    """Accuracy with its interval and the length-only baseline, a line for each slice."""
    figure, axes = new_axes(5.4, 1.1 + 0.34 * len(slices))
    places = np.arange(len(slices))[::-1]
    value = np.array([part.metrics["accuracy"] for part in slices])
    bounds = np.array([part.metrics["accuracy_interval"] for part in slices])
    baseline = [part.metrics["length_only_accuracy"] for part in slices]
    error = np.abs(bounds.T - value)
    axes.axvline(0.5, color=INK, alpha=0.45, linewidth=1, linestyle=(0, (4, 3)))
    axes.plot(baseline, places, "D", markersize=5.5, markerfacecolor="none", color=BASELINE, label="length only")
    axes.errorbar(value, places, xerr=error, fmt="o", color=MODEL, markersize=6, capsize=3, label="reward model")
    axes.set_yticks(places, [part.name or "all" for part in slices])
    axes.set_ylim(-0.6, len(slices) - 0.4)
    lowest = min(0.45, *bounds[:, 0], *baseline)
    axes.set_xlim(max(0.0, lowest - 0.05), 1.02)
    axes.set_xlabel("accuracy")
    axes.grid(axis="x", alpha=0.15, color=INK)
    add_legend(axes)
    return to_svg(figure)


def draw_gaps(gaps: Floats) -> str:
    """Histogram of the reward gaps, misses in another colour."""
    figure, axes = new_axes(5.4, 3.3)
    low, high = np.quantile(gaps, [0.005, 0.995])
    reach = max(abs(low), abs(high), 1e-6)
    edges = np.linspace(-reach, reach, 2 * int(np.clip(len(gaps) // 25, 6, 25)) + 1).tolist()
    inside = np.clip(gaps, -reach, reach)
    above = gaps > 0
    labels = [f"not above ({np.mean(~above):.1%})", f"chosen above ({np.mean(above):.1%})"]
    axes.hist([inside[~above], inside[above]], edges, stacked=True, color=[MISS, MODEL], label=labels)
    axes.axvline(float(gaps.mean()), color=INK, linewidth=1, linestyle=(0, (4, 3)), label=f"mean {gaps.mean():.2f}")
    axes.set_xlabel("reward of chosen − reward of rejected")
    axes.set_ylabel("rows")
    add_legend(axes)
    return to_svg(figure)


def draw_calibration(gaps: Floats) -> str:
    """Accuracy against the confidence σ(|gap|), beside the line on which they are equal."""
    figure, axes = new_axes(5.4, 3.3)
    points = calibration(gaps)
    axes.plot([0.5, 1], [0.5, 1], color=INK, alpha=0.45, linewidth=1, linestyle=(0, (4, 3)), label="calibrated")
    _line(axes, [p.mean for p in points], points, MODEL, "reward model")
    axes.set_xlim(0.48, 1.02)
    axes.set_ylim(min(0.45, *(wilson(p.accuracy, p.num_rows)[0] for p in points)) - 0.03, 1.03)
    axes.set_xlabel("confidence σ(|reward gap|)")
    axes.set_ylabel("accuracy")
    axes.grid(alpha=0.15, color=INK)
    add_legend(axes)
    return to_svg(figure)


def draw_by_length(pairs: Pairs) -> str:
    """Accuracy by the length difference, the chosen side being shorter on the left and longer on the right."""
    figure, axes = new_axes(5.4, 3.3)
    sides = by_length(pairs)
    colours = {"shorter": BASELINE, "equal": INK, "longer": MODEL}
    labels: list[str] = []
    for name, found in sides.items():
        ordered = found[::-1] if name == "shorter" else found
        places = [float(len(labels) + i) for i in range(len(ordered))]
        sign = {"shorter": "−", "equal": "", "longer": "+"}[name]
        labels += [f"{sign}{b.low:.0f}" if b.low == b.high else f"{sign}{b.low:.0f}–{b.high:.0f}" for b in ordered]
        _line(axes, places, ordered, colours[name], f"chosen {name}" if name != "equal" else "equal length")
    axes.axhline(0.5, color=INK, alpha=0.45, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_xticks(range(len(labels)), labels, fontsize=7.5)
    axes.set_xlim(-0.5, len(labels) - 0.5)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("characters of chosen − characters of rejected")
    axes.set_ylabel("accuracy")
    axes.grid(axis="y", alpha=0.15, color=INK)
    add_legend(axes)
    return to_svg(figure)


def _line(axes: Axes, places: Sequence[float], points: Sequence[Binned], colour: str, label: str) -> None:
    if not points:
        return
    values = np.array([p.accuracy for p in points])
    error = np.abs(np.array([wilson(p.accuracy, p.num_rows) for p in points]).T - values)
    axes.errorbar(
        places, values, yerr=error, fmt="o-", color=colour, markersize=5, capsize=3, linewidth=1.4, label=label
    )
