"""A report as one HTML page that holds all it shows: text, numbers, tables, figures, examples."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from importlib import resources
from typing import Literal

from rayrm import files

Tone = Literal["plain", "good", "bad"]


@dataclass(frozen=True)
class Tile:
    """One number that a reader wants first."""

    label: str
    value: str
    note: str = ""
    """What stands below the number, such as its interval."""
    tone: Tone = "plain"


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    kind: str = field(default="text", init=False)


@dataclass(frozen=True)
class Table:
    """Rows of cells under a header; all columns but the first `num_labels` are numbers and stand on the right."""

    header: list[str]
    rows: list[list[str]]
    caption: str = ""
    num_labels: int = 1
    kind: str = field(default="table", init=False)


@dataclass(frozen=True)
class Figure:
    """A drawing as SVG text, with a sentence on how to read it."""

    svg: str
    title: str
    caption: str = ""
    kind: str = field(default="figure", init=False)


@dataclass(frozen=True)
class Figures:
    """Drawings beside one another where the window is wide enough."""

    figures: list[Figure]
    kind: str = field(default="figures", init=False)


@dataclass(frozen=True)
class Card:
    """An example: a heading and labelled texts in any script, each with a tone and a remark."""

    title: str
    texts: list[tuple[str, str, Tone, str]]
    """Label, text, tone, remark."""


@dataclass(frozen=True)
class Cards:
    """Examples under a heading."""

    title: str
    cards: list[Card]
    kind: str = field(default="cards", init=False)


Block = Text | Table | Figure | Figures | Cards


@dataclass(frozen=True)
class Section:
    """A heading with what stands below it."""

    title: str
    blocks: list[Block]


@dataclass(frozen=True)
class Report:
    """A page: what was measured, the numbers first, then sections."""

    title: str
    lead: str
    tiles: list[Tile]
    facts: dict[str, str]
    """Name to value: the model, the inputs, the versions."""
    sections: list[Section]


def render(report: Report) -> str:
    """The page as HTML without scripts and without a link to anything outside itself; all text is escaped."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = (resources.files("rayrm.evaluation") / "report.html.jinja").read_text(encoding="utf-8")
    values = {part.name: getattr(report, part.name) for part in dataclasses.fields(report)}
    return environment.from_string(source).render(values)


def write_report(path: str, report: Report) -> None:
    """Write the page to `path`, atomically."""
    with files.atomic_file(path) as handle:
        handle.write(render(report).encode())


def format_table(table: Table) -> str:
    """The table as plain text, for a terminal."""
    rows = [table.header, *table.rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(table.header))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if index < table.num_labels else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([lines[0], "-" * len(max(lines, key=len)), *lines[1:]])
