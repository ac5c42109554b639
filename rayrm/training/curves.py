"""What a training run measured, as JSON lines and as a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from io import BytesIO
from typing import Any

from rayrm import files

METRICS = "metrics.jsonl"
CURVE = "loss.png"


def write_curves(history: Sequence[dict[str, Any]], output: str) -> None:
    """Write `<output>/metrics.jsonl`, a line for each record, and `<output>/loss.png` with `loss` and `eval_loss`.

    `history` holds records with `step` and any metrics, as `TrainerState.log_history` does; both files are replaced.
    """
    with files.atomic_file(files.join(output, METRICS)) as handle:
        for record in history:
            handle.write(json.dumps(record).encode() + b"\n")
    picture = draw_loss(history)
    with files.atomic_file(files.join(output, CURVE)) as handle:
        handle.write(picture)


def draw_loss(history: Sequence[dict[str, Any]]) -> bytes:
    """A PNG of training and held-out loss by step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "held out", "o-")):
        points = [(record["step"], record[key]) for record in history if key in record]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    picture = BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()
