"""One foreign row → one of ours, or the reason why it is none: the validator of preferences, ratings and steps.

A row function reads the fields of a foreign row by our names for them; a field that is absent is as good as null.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from rayrm import files
from rayrm.rows import Message, Preference, Rated, RowType, Stepwise

if TYPE_CHECKING:
    from rayrm.sources.preferences import PreferenceSource

REASONS = {
    "missing_field": "a field that it needs is null",
    "bad_role_order": "its turns are not one system turn or none, then user and assistant in turn",
    "not_ending_in_assistant": "the last turn of an answer is not the assistant's",
    "prompt_mismatch": "its conversations have not one and the same prompt",
    "empty_content": "a turn or a step has no text",
    "tool_calls": "a turn calls tools, and a message holds a role and a text only",
    "tools_not_json": "its tools are text, and no JSON list",
    "identical_responses": "chosen and rejected are the same",
    "not_a_number": "text stands where a number belongs",
    "non_finite_margin": "its margin is NaN or infinite",
    "label_not_in_0_to_1": "a label is not from 0 to 1",
    "weight_not_0_or_more": "its weight is not a finite number of at least 0",
    "non_finite_rating": "a rating is infinite",
    "no_rating": "none of its ratings is there",
    "no_label": "none of its steps has a label",
    "unequal_lengths": "it has not as many labels as steps",
    "duplicate_id": "an earlier row has its id and language",
}
"""Why a row may be invalid, and what that means."""

_NEXT_ROLES = {
    "start": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
_SIGNS = {"+": 1.0, "-": 0.0}

Fields = Mapping[str, Any]
Chat = str | Sequence[Mapping[str, Any]] | None
"""A text, or messages that may have more keys than ours."""


class InvalidRow(Exception):
    """A row that cannot be used, for one of REASONS."""

    def __init__(self, reason: str) -> None:
        super().__init__(REASONS[reason])
        self.reason = reason


def require(is_valid: bool, reason: str) -> None:
    """Raise InvalidRow unless `is_valid`."""
    if not is_valid:
        raise InvalidRow(reason)


def preference_row(fields: Fields) -> dict[str, Any]:
    """prompt, chosen, rejected, margin, label and scores, of which NaN is null. Raises InvalidRow."""
    sides = [_messages(fields.get(name), "assistant") for name in ("chosen", "rejected")]
    prompt, (chosen, rejected) = _read_prompt(fields, sides)
    require(chosen != rejected, "identical_responses")
    return {
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "margin": _finite(_number(fields.get("margin"))),
        "chosen_score": _measure(fields.get("chosen_score")),
        "rejected_score": _measure(fields.get("rejected_score")),
        "label": _label(fields.get("label")),
    }


def rated_row(fields: Fields) -> dict[str, Any]:
    """prompt, completion and ratings, of which NaN is null. Raises InvalidRow."""
    prompt, (answer,) = _read_prompt(fields, [_messages(fields.get("completion"), "assistant")])
    ratings = {name: _measure(value) for name, value in (fields.get("ratings") or {}).items()}
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
    prompt, _ = _read_prompt(fields, [[{"role": "assistant", "content": step or ""}] for step in steps])
    require(len(steps) == len(labels), "unequal_lengths")
    found = [_label(_SIGNS.get(label, label) if isinstance(label, str) else label) for label in labels]
    require(any(label is not None for label in found), "no_label")
    return {"prompt": prompt, "steps": steps, "labels": found}


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
}
"""What makes the rows of each type."""


def make_row(fields: Fields, source: PreferenceSource, kind: RowKind) -> dict[str, Any]:
    """A row with all columns of its kind. Raises InvalidRow."""
    row = kind.make(fields)
    if source.margin_from_scores and row["margin"] is None:
        row["margin"] = _score_margin(row)
    own_id, group, lang = fields.get("id"), fields.get("group"), fields.get("lang") or source.lang
    require(bool(lang), "missing_field")
    tools = _tools(fields.get("tools"))
    if own_id in (None, ""):
        row_id = files.digest([tools, *(row[name] for name in kind.content)])
    else:
        row_id = f"{source.name}/{own_id}" if source.name else str(own_id)
    return {
        "id": row_id,
        "group": group_of(row["prompt"]) if group in (None, "") else str(group),
        **row,
        "src_lang": fields.get("src_lang"),
        "tgt_lang": fields.get("tgt_lang"),
        "lang": lang,
        "subset": fields.get("subset") or source.name,
        "weight": _weight(fields.get("weight"), source.weight),
        "tools": tools,
    }


def group_of(prompt: Sequence[Message]) -> str:
    """What rows with the same prompt share, whatever its system turn and the white space around its turns."""
    return files.digest([[turn["role"], turn["content"].strip()] for turn in _without_system(prompt)])


def _read_prompt(fields: Fields, sides: list[list[Message]]) -> tuple[list[Message], list[list[Message]]]:
    prompt, answers = _split_prompt(fields.get("prompt"), sides)
    if (fields.get("system") or "").strip():
        prompt = [{"role": "system", "content": fields["system"]}, *prompt]
    _check_chat(prompt, answers)
    return prompt, answers


def _split_prompt(prompt: Chat, sides: list[list[Message]]) -> tuple[list[Message], list[list[Message]]]:
    """The prompt that `sides` share, and what answers it on each side.

    Sides that begin with a system or user turn are whole conversations, as are all sides without a `prompt`: their
    last turn is the answer, and what stands before it the prompt. A `prompt` beside them must be the same one.
    """
    if prompt is not None and all(side[0]["role"] not in ("system", "user") for side in sides):
        return _messages(prompt, "user"), sides
    shared = sides[0][:-1]
    require(all(side[-1]["role"] == "assistant" for side in sides), "not_ending_in_assistant")
    require(all(side[:-1] == shared for side in sides), "prompt_mismatch")
    require(bool(shared), "missing_field")
    if prompt is not None:
        require(_messages(prompt, "user") in (shared, _without_system(shared)), "prompt_mismatch")
    return shared, [side[-1:] for side in sides]


def _check_chat(prompt: list[Message], answers: list[list[Message]]) -> None:
    """A chat is one system turn or none, then user and assistant in turn, with tool turns behind the assistant's.

    An answer begins and ends with the assistant, and no user speaks in it.
    """
    for answer in answers:
        require(answer[-1]["role"] == "assistant", "not_ending_in_assistant")
        require(all(turn["role"] != "user" for turn in answer), "bad_role_order")
        require(is_in_order([*prompt, *answer]), "bad_role_order")
    require(all(turn["content"].strip() for turns in [prompt, *answers] for turn in turns), "empty_content")


def is_in_order(turns: Sequence[Message]) -> bool:
    """Whether turns are one of the system or none, then user and assistant in turn, with tools behind the assistant."""
    roles = [turn["role"] for turn in turns]
    return all(role in _NEXT_ROLES.get(before, ()) for before, role in zip(["start", *roles], roles, strict=False))


def _messages(value: Chat, role: str) -> list[Message]:
    """Messages with our two keys, or a text as one turn of `role`. Raises InvalidRow where there is nothing."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not value or None in value:
        raise InvalidRow("missing_field")
    require(not any(turn.get("tool_calls") for turn in value), "tool_calls")
    return [{"role": turn["role"] or "", "content": turn["content"] or ""} for turn in value]


def _without_system(prompt: Sequence[Message]) -> Sequence[Message]:
    return prompt[1:] if prompt[0]["role"] == "system" else prompt


def _number(value: Any) -> float | None:
    if value is None or value == "":
        return None
    try:
        return float(value)
    except ValueError as error:
        raise InvalidRow("not_a_number") from error


def _measure(value: Any) -> float | None:
    number = _number(value)
    return None if number is None or math.isnan(number) else number


def _score_margin(row: Mapping[str, Any]) -> float | None:
    """chosen_score − rejected_score, None where one is not there. Raises InvalidRow unless it is finite."""
    chosen, rejected = row["chosen_score"], row["rejected_score"]
    return None if chosen is None or rejected is None else _finite(chosen - rejected)


def _weight(value: Any, factor: float) -> float:
    """The row's own weight, 1 where it has none, times `factor`. Raises InvalidRow unless it is finite and 0 or more."""
    own = _number(value)
    weight = factor if own is None else factor * own
    require(math.isfinite(weight) and weight >= 0, "weight_not_0_or_more")
    return weight


def _tools(value: Any) -> str | None:
    """Tool schemas, a list or its JSON, as JSON; None where there are none. Raises InvalidRow for other text.

    A key that is null in a list is left out: a file gives each of its tools the keys of all the others.
    """
    tools = value
    if isinstance(value, str):
        try:
            tools = json.loads(value or "[]")
        except ValueError as error:
            raise InvalidRow("tools_not_json") from error
        require(tools is None or isinstance(tools, list), "tools_not_json")
    return json.dumps(_without_nulls(tools), ensure_ascii=False) if tools else None


def _finite(margin: float | None) -> float | None:
    require(margin is None or math.isfinite(margin), "non_finite_margin")
    return margin


def _label(value: Any) -> float | None:
    number = _number(value)
    require(number is None or 0 <= number <= 1, "label_not_in_0_to_1")
    return number


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
