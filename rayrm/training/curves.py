"""What a training run measured, as JSON lines and as a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from io import BytesIO
from typing import Any

from rayrm import files

METRICS = "metrics.jsonl"
CURVE = "loss.png"
SAMPLES = "samples"
"""Folder of a run with rewards: a file for each step, with all of its samples and what became of them."""


def write_curves(history: Sequence[dict[str, Any]], output: str) -> None:
    """Write `<output>/metrics.jsonl`, a line for each record, and `<output>/loss.png`, see `draw_loss`.

    `history` holds records with `step` and any metrics, as `TrainerState.log_history` does; both files are replaced.
    """
    with files.atomic_file(files.join(output, METRICS)) as handle:
        for record in history:
            handle.write(json.dumps(record).encode() + b"\n")
    picture = draw_loss(history)
    with files.atomic_file(files.join(output, CURVE)) as handle:
        handle.write(picture)


def draw_loss(history: Sequence[dict[str, Any]]) -> bytes:
    """A PNG of training and held-out loss by step, and below it, where there is one, of accuracy, also by language."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = {"loss": {"loss": "training", "eval_loss": "held out"}, "accuracy": {"accuracy": "training"}}
    for name in dict.fromkeys(name for record in history for name in record):
        if name == "eval_accuracy" or (name.startswith("eval_accuracy/") and "/subset/" not in name):
            curves["accuracy"][name] = name.removeprefix("eval_accuracy").removeprefix("/") or "held out"
    curves = {what: names for what, names in curves.items() if any(n in record for record in history for n in names)}
    figure = Figure(figsize=(7, 3.5 * max(1, len(curves))), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (what, names) in zip(
        figure.subplots(max(1, len(curves)), squeeze=False)[:, 0], curves.items(), strict=False
    ):
        for name, label in names.items():
            points = [(record["step"], record[name]) for record in history if name in record]
            if points:
                axes.plot(
                    *zip(*points, strict=True), "o-" if name.startswith("eval_") else "-", label=label, markersize=4
                )
        axes.set(xlabel="step", ylabel=what)
        axes.grid(alpha=0.3)
        axes.legend()
    picture = BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()
