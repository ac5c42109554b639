"""SVG drawings for a page, in the page's own text colour and font, light or dark."""

from __future__ import annotations

import hashlib
import io
import re
from typing import TYPE_CHECKING, Any

from rayrm import files

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#010203"
"""Stands for the page's text colour until the SVG is written."""
PIXELS_PER_INCH = 98
"""Largest scale at which a page shows a drawing, so that a small one in a wide place has text like the others."""


def new_axes(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty drawing of so many inches, with quiet axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    quieten(axes)
    return figure, axes


def quieten(axes: Axes) -> None:
    """Give axes the page's text colour and two thin lines."""
    axes.patch.set_alpha(0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(INK)
        axes.spines[side].set_alpha(0.35)
    axes.tick_params(colors=INK, labelsize=9, length=3)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(INK)
        label.set_fontsize(9)


def add_legend(axes: Axes, ncols: int = 3) -> None:
    """Name what was drawn, above the axes."""
    options: dict[str, Any] = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": ncols, "frameon": False}
    axes.legend(labelcolor=INK, fontsize=8.5, handletextpad=0.4, columnspacing=1.2, **options)


def save_figure(figure: Figure, stem: str) -> list[str]:
    """Write a drawing as `<stem>.png` and `<stem>.svg`, dark on white, to use outside the page; give their paths."""
    from matplotlib import rc_context

    paths = [f"{stem}.png", f"{stem}.svg"]
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "rayrm"}):
        for path, metadata in zip(paths, ({"Software": None}, {"Date": None, "Creator": None}), strict=True):
            handle = io.BytesIO()
            options: dict[str, Any] = {"dpi": 150, "facecolor": "white", "metadata": metadata}
            figure.savefig(handle, format=path.rpartition(".")[2], **options)
            with files.atomic_file(path) as file:
                file.write(handle.getvalue())
    return paths


def to_svg(figure: Figure) -> str:
    """The figure as an `<svg>` element whose ids do not meet those of other figures on the page."""
    from matplotlib import rc_context

    handle = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "rayrm"}):
        figure.savefig(handle, format="svg", metadata={"Date": None, "Creator": None})
    text = handle.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    for attribute in ("width", "height", "xmlns:xlink", "xmlns"):
        text = re.sub(rf'(<svg[^>]*?) {attribute}="[^"]*"', r"\1", text, count=1)
    width = round(figure.get_figwidth() * PIXELS_PER_INCH)
    text = text.replace("<svg", f'<svg style="max-width: {width}px"', 1)
    text = re.sub(r"font(-family)?: (\d[\d.]*px )?'[^;\"]*", _font, text)
    salt = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
    text = re.sub(r'(id="|url\(#|xlink:href="#)', rf"\g<1>{salt}-", text)
    return text.replace(INK, "currentColor").strip()


def _font(match: re.Match[str]) -> str:
    size = f"font-size: {match[2].strip()}; " if match[2] else ""
    return f"{size}font-family: inherit"
