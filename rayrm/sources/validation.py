"""What the fields of a foreign row must hold, and why a row may be none of ours."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rayrm import files
from rayrm.rows import Message

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
    "no_answers": "it has no right answer, or no wrong one",
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


def group_of(prompt: Sequence[Message]) -> str:
    """What rows with the same prompt share, whatever its system turn and the white space around its turns."""
    return files.digest([[turn["role"], turn["content"].strip()] for turn in _without_system(prompt)])


def read_prompt(fields: Fields, sides: list[list[Message]]) -> tuple[list[Message], list[list[Message]]]:
    """The prompt that all `sides` answer, its system turn included, and what answers it on each. Raises InvalidRow."""
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
        return read_messages(prompt, "user"), sides
    shared = sides[0][:-1]
    require(all(side[-1]["role"] == "assistant" for side in sides), "not_ending_in_assistant")
    require(all(side[:-1] == shared for side in sides), "prompt_mismatch")
    require(bool(shared), "missing_field")
    if prompt is not None:
        require(read_messages(prompt, "user") in (shared, _without_system(shared)), "prompt_mismatch")
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


def read_messages(value: Chat, role: str) -> list[Message]:
    """Messages with our two keys, or a text as one turn of `role`. Raises InvalidRow where there is nothing."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not value or None in value:
        raise InvalidRow("missing_field")
    require(not any(turn.get("tool_calls") for turn in value), "tool_calls")
    return [{"role": turn["role"] or "", "content": turn["content"] or ""} for turn in value]


def _without_system(prompt: Sequence[Message]) -> Sequence[Message]:
    return prompt[1:] if prompt[0]["role"] == "system" else prompt


def read_number(value: Any) -> float | None:
    """A number, also one that is spelled; None where there is none. Raises InvalidRow for other text."""
    if value is None or value == "":
        return None
    try:
        return float(value)
    except ValueError as error:
        raise InvalidRow("not_a_number") from error


def read_measure(value: Any) -> float | None:
    """`read_number`, and None for NaN."""
    number = read_number(value)
    return None if number is None or math.isnan(number) else number


def read_tools(value: Any) -> str | None:
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


def finite(margin: float | None) -> float | None:
    """The margin itself. Raises InvalidRow unless it is finite or None."""
    require(margin is None or math.isfinite(margin), "non_finite_margin")
    return margin


def read_label(value: Any) -> float | None:
    """A number from 0 to 1, or None. Raises InvalidRow."""
    number = read_number(value)
    require(number is None or 0 <= number <= 1, "label_not_in_0_to_1")
    return number


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
