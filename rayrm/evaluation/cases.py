"""Rows → cases: answers to a prompt, the right ones first, that a judge is asked about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from rayrm.errors import ConfigError
from rayrm.evaluation.benchmarks import TIES
from rayrm.evaluation.sets import Prepared
from rayrm.languages import language_name
from rayrm.rows import Message
from rayrm.scoring.judge import LETTERS, Kind
from rayrm.shards import iter_tables

Status = Literal["ok", "parse_error", "timeout", "overloaded", "error", "empty"]


class Case(NamedTuple):
    """Answers to a prompt, the right ones first."""

    set: str
    id: str
    group: str
    lang: str
    subset: str | None
    num_correct: int
    prompt: Sequence[Message]
    answers: Sequence[str]
    languages: tuple[str | None, str | None]
    """English names of the languages of prompt and answers, for the judge to be told; null to say nothing."""
    fault: tuple[Status, str] | None
    """Status and reason of a case that no judge is asked about."""

    @property
    def has_a_best(self) -> bool:
        """Whether one answer is to be named; where several are right, and in RewardBench 2's Ties, all are rated."""
        return self.num_correct == 1 and self.subset != TIES

    @property
    def is_pair(self) -> bool:
        """Whether there is one right and one wrong answer."""
        return len(self.answers) == 2 and self.num_correct == 1


def read_cases(prepared: Sequence[Prepared], kind: Kind, tell_languages: bool) -> list[Case]:
    """The cases of all rows.

    Raises ConfigError for rows that a judge of the kind is not asked about: one answer alone, or several for a judge of
    pairs.
    """
    cases: list[Case] = []
    for part in prepared:
        if part.rows == "conversation" or (part.rows == "best_of" and kind == "pairwise"):
            raise ConfigError(
                f"judging.kind is '{kind}', and the sets hold {part.rows} rows; pairwise judges take pairs, four_way and "
                "rating also right and wrong answers."
            )
        for table in iter_tables(part.path):
            cases += [_case(row, tell_languages) for row in table.to_pylist()]
    return cases


def _case(row: Mapping[str, Any], tell_languages: bool) -> Case:
    is_pair = "chosen" in row
    answers = (
        [_text(row[side]) for side in ("chosen", "rejected")] if is_pair else [text or "" for text in row["candidates"]]
    )
    num_correct = 1 if is_pair else int(row["num_correct"])
    languages: tuple[str | None, str | None] = (None, None)
    if tell_languages:
        # A row that was translated is in its new language as a whole.
        is_translated = row.get("translated_from") is not None
        codes = [None if is_translated else row[name] for name in ("src_lang", "tgt_lang")]
        languages = (language_name(codes[0] or row["lang"]), language_name(codes[1] or row["lang"]))
    about = (row["set"], row["id"], row["group"], row["lang"], row["subset"], num_correct)
    case = Case(*about, row["prompt"], answers, languages, None)
    return case._replace(fault=_fault(case))


def _text(messages: Sequence[Message]) -> str:
    """A side as one text; one that goes on over several turns names who speaks."""
    if len(messages) == 1:
        return messages[0]["content"] or ""
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def _fault(case: Case) -> tuple[Status, str] | None:
    right, wrong = case.answers[: case.num_correct], case.answers[case.num_correct :]
    if case.num_correct < 1 or not wrong:
        num = len(case.answers)
        return "error", f"{case.num_correct} of {num} answers are right, and there must be right and wrong ones"
    if not all(answer.strip() for answer in case.answers):
        return "empty", "an answer has no text"
    if set(right) & set(wrong):
        return "error", "a right and a wrong answer are the same"
    if case.has_a_best and len(case.answers) > len(LETTERS):
        return "error", f"there are {len(case.answers)} answers, and at most {len(LETTERS)} can be compared"
    return None
