"""One foreign row → one of ours, by the type of row that is wanted.

A row function reads the fields of a foreign row by our names for them; a field that is absent is as good as null.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from rayrm import files
from rayrm.languages import short_code
from rayrm.rows import Candidates, Message, Preference, Rated, RowType, Stepwise
from rayrm.sources.validation import (
    Fields,
    InvalidRow,
    finite,
    group_of,
    read_label,
    read_measure,
    read_messages,
    read_number,
    read_prompt,
    read_tools,
    require,
)

if TYPE_CHECKING:
    from rayrm.sources.preferences import PreferenceSource

_SIGNS = {"+": 1.0, "-": 0.0}
_NO_SOURCE = dict.fromkeys(("source", "reference", "anchor"))


def preference_row(fields: Fields) -> dict[str, Any]:
    """prompt, chosen, rejected, margin, label and scores, of which NaN is null. Raises InvalidRow."""
    sides = [read_messages(fields.get(name), "assistant") for name in ("chosen", "rejected")]
    prompt, (chosen, rejected) = read_prompt(fields, sides)
    require(chosen != rejected, "identical_responses")
    return {
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "margin": finite(read_number(fields.get("margin"))),
        "chosen_score": read_measure(fields.get("chosen_score")),
        "rejected_score": read_measure(fields.get("rejected_score")),
        "label": read_label(fields.get("label")),
    }


def rated_row(fields: Fields) -> dict[str, Any]:
    """prompt, completion and ratings, of which NaN is null. Raises InvalidRow."""
    prompt, (answer,) = read_prompt(fields, [read_messages(fields.get("completion"), "assistant")])
    ratings = {name: read_measure(value) for name, value in (fields.get("ratings") or {}).items()}
    known = [value for value in ratings.values() if value is not None]
    require(bool(known), "no_rating")
    require(all(map(math.isfinite, known)), "non_finite_rating")
    return {"prompt": prompt, "completion": answer, "ratings": ratings}


def stepwise_row(fields: Fields) -> dict[str, Any]:
    """prompt, steps and a label, 0 to 1 or null, for each of them; `+` is 1 and `-` is 0. Raises InvalidRow."""
    steps, labels = fields.get("steps"), fields.get("labels")
    if steps is None or labels is None:
        raise InvalidRow("missing_field")
    require(bool(steps), "empty_content")
    prompt, _ = read_prompt(fields, [[{"role": "assistant", "content": step or ""}] for step in steps])
    require(len(steps) == len(labels), "unequal_lengths")
    found = [read_label(_SIGNS.get(label, label) if isinstance(label, str) else label) for label in labels]
    require(any(label is not None for label in found), "no_label")
    return {"prompt": prompt, "steps": steps, "labels": found}


def best_of_row(fields: Fields) -> dict[str, Any]:
    """prompt, candidates (the right ones first) and num_correct. Raises InvalidRow."""
    correct, incorrect = (list(fields.get(name) or []) for name in ("correct", "incorrect"))
    require(bool(correct) and bool(incorrect), "no_answers")
    sides = [[Message(role="assistant", content=text or "")] for text in (*correct, *incorrect)]
    prompt, answers = read_prompt(fields, sides)
    return {
        "prompt": prompt,
        "candidates": [answer[0]["content"] for answer in answers],
        "num_correct": len(correct),
        **_NO_SOURCE,
    }


def conversation_row(fields: Fields) -> dict[str, Any]:
    """prompt and candidates: the last turn of a conversation alone. Raises InvalidRow."""
    prompt, (answer,) = read_prompt(fields, [read_messages(fields.get("completion"), "assistant")])
    return {"prompt": [*prompt, *answer[:-1]], "candidates": [answer[-1]["content"]], "num_correct": 1, **_NO_SOURCE}


class RowKind(NamedTuple):
    """How rows of one type are made."""

    row_type: RowType
    make: Callable[[Fields], dict[str, Any]]
    content: tuple[str, ...]
    """Columns that tell rows without ids apart."""
    fields: tuple[str, ...]
    """Fields that it reads beside COMMON."""
    needs: tuple[str, ...]
    """Fields without which there is no row."""
    numbers: tuple[str, ...] = ("weight",)
    """Columns of numbers that are written beside those of the type."""

    @property
    def columns(self) -> dict[str, pa.DataType | None]:
        """All columns that are written, with None for `ratings`, whose type hangs on the sources."""
        return {**self.row_type.columns, **dict.fromkeys(self.numbers, pa.float64()), "tools": pa.string()}


COMMON = ("id", "group", "prompt", "system", "tools", "weight", "lang", "src_lang", "tgt_lang", "subset")
"""Fields of rows of every type."""
ROW_KINDS = {
    "preference": RowKind(
        Preference,
        preference_row,
        content=("prompt", "chosen", "rejected"),
        fields=("chosen", "rejected", "margin", "label", "chosen_score", "rejected_score"),
        needs=("chosen", "rejected"),
        numbers=("weight", "label", "chosen_score", "rejected_score"),
    ),
    "rated": RowKind(
        Rated,
        rated_row,
        content=("prompt", "completion", "ratings"),
        fields=("completion", "messages", "ratings"),
        needs=("completion", "ratings"),
    ),
    "stepwise": RowKind(
        Stepwise,
        stepwise_row,
        content=("prompt", "steps", "labels"),
        fields=("steps", "labels"),
        needs=("prompt", "steps", "labels"),
    ),
    "best_of": RowKind(
        Candidates,
        best_of_row,
        content=("prompt", "candidates"),
        fields=("correct", "incorrect"),
        needs=("prompt", "correct", "incorrect"),
        numbers=("weight", "num_correct"),
    ),
    "conversation": RowKind(
        Candidates,
        conversation_row,
        content=("prompt", "candidates"),
        fields=("completion", "messages"),
        needs=("completion",),
        numbers=("weight", "num_correct"),
    ),
}
"""What makes the rows of each type."""


def make_row(fields: Fields, source: PreferenceSource, kind: RowKind) -> dict[str, Any]:
    """A row with all columns of its kind. Raises InvalidRow."""
    row = kind.make(fields)
    if source.margin_from_scores and row["margin"] is None:
        row["margin"] = _score_margin(row)
    own_id, group, lang = fields.get("id"), fields.get("group"), fields.get("lang") or source.lang or ""
    require(bool(lang), "missing_field")
    tools = read_tools(fields.get("tools"))
    subset = fields.get("subset") or source.name
    if own_id in (None, ""):
        row_id = files.digest([tools, *(row[name] for name in kind.content)])
    else:
        within = subset if source.ids_within_subset else source.name
        row_id = f"{within}/{own_id}" if within else str(own_id)
    return {
        "id": row_id,
        "group": group_of(row["prompt"]) if group in (None, "") else str(group),
        **row,
        "src_lang": fields.get("src_lang"),
        "tgt_lang": fields.get("tgt_lang"),
        "lang": short_code(lang),
        "subset": subset,
        "weight": _weight(fields.get("weight"), source.weight),
        "tools": tools,
    }


def _score_margin(row: Mapping[str, Any]) -> float | None:
    """chosen_score − rejected_score, None where one is not there. Raises InvalidRow unless it is finite."""
    chosen, rejected = row["chosen_score"], row["rejected_score"]
    return None if chosen is None or rejected is None else finite(chosen - rejected)


def _weight(value: Any, factor: float) -> float:
    """The row's own weight, 1 where it has none, times `factor`. Raises InvalidRow unless it is finite and 0 or more."""
    own = read_number(value)
    weight = factor if own is None else factor * own
    require(math.isfinite(weight) and weight >= 0, "weight_not_0_or_more")
    return weight
