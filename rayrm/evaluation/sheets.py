"""CSV files that people open in a spreadsheet."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

from rayrm import files
from rayrm.errors import SchemaError

Sheet = tuple[list[str], list[list[Any]]]
"""A header, and rows under it; a null is an empty cell."""


def write_sheet(path: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV file, atomically; it begins with a mark by which spreadsheets know UTF-8."""
    handle = io.StringIO()
    writer = csv.writer(handle, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    with files.atomic_file(path) as file:
        file.write(handle.getvalue().encode("utf-8-sig"))


def read_sheet(path: str) -> list[dict[str, str]]:
    """The rows of a CSV file, as a spreadsheet saves it: parted by commas, semicolons or tabs; without empty rows.

    Raises SchemaError for a file that is not UTF-8, or has rows that are longer than its header.
    """
    fs, inner = files.filesystem(path)
    with fs.open(inner, "rb") as file:
        data = file.read()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SchemaError(f"'{path}' is not UTF-8; save it as CSV in UTF-8.") from error
    head = text.partition("\n")[0]
    delimiter = max(",;\t", key=head.count)
    rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, restval=""))
    broken = [number for number, row in enumerate(rows, 2) if None in row]
    if broken:
        raise SchemaError(f"Row {broken[0]} of '{path}' has more cells than the header has columns.")
    return [row for row in rows if any(row.values())]
