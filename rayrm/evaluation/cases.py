"""Rows → cases: answers to a prompt, the right ones first, that a judge is asked about."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import pyarrow as pa

from rayrm.errors import SchemaError
from rayrm.evaluation.benchmarks import TIES
from rayrm.languages import language_name
from rayrm.rows import Candidates, Message, Preference, RowType, drop_nulls
from rayrm.scoring.judge import LETTERS
from rayrm.shards import iter_tables, read_schemas

NUM_CORRECT, TRANSLATED_FROM = "num_correct", "translated_from"
BestOfCandidates = RowType(
    "BestOfCandidates", {**Candidates.columns, NUM_CORRECT: pa.int64()}, tuple(Candidates.nullable)
)
"""Candidates of which the first `num_correct` are right and the others wrong."""
Status = Literal["ok", "parse_error", "timeout", "overloaded", "error", "empty"]


class Case(NamedTuple):
    """Answers to a prompt, the right ones first."""

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


def row_type_of(path: str, kind: str) -> RowType:
    """The type of rows that a judge of a kind is asked about: for ratings, whichever the columns tell."""
    has_num_correct = any(NUM_CORRECT in schema.names for _, schema in read_schemas(path))
    return BestOfCandidates if kind == "four_way" or (kind == "rating" and has_num_correct) else Preference


def read_cases(path: str, row_type: RowType, tell_languages: bool) -> tuple[list[Case], dict[str, int]]:
    """The cases of all rows at `path`, and how many rows were dropped by reason.

    Raises SchemaError for rows of another type, and for two rows with the same id and language.
    """
    row_type.check_files(path)
    cases: list[Case] = []
    dropped: Counter[str] = Counter()
    seen: set[tuple[str, str]] = set()
    for table in iter_tables(path):
        rows = drop_nulls(row_type.conform(table), row_type)
        names = [
            name for name in (*row_type.columns, TRANSLATED_FROM, "_kept", "_dropped") if name in rows.column_names
        ]
        for row in rows.select(names).to_pylist():
            if not row["_kept"]:
                dropped.update(row["_dropped"])
                continue
            if (row["id"], row["lang"]) in seen:
                raise SchemaError(
                    f"'{path}' has several rows with the id '{row['id']}' and the language '{row['lang']}'; a row needs "
                    "an id of its own in its language."
                )
            seen.add((row["id"], row["lang"]))
            cases.append(_case(row, tell_languages))
    return cases, dict(dropped)


def _case(row: Mapping[str, Any], tell_languages: bool) -> Case:
    is_pair = "chosen" in row
    answers = (
        [_text(row[side]) for side in ("chosen", "rejected")] if is_pair else [text or "" for text in row["candidates"]]
    )
    num_correct = 1 if is_pair else row[NUM_CORRECT]
    languages: tuple[str | None, str | None] = (None, None)
    if tell_languages:
        # A row that was translated is in its new language as a whole.
        is_translated = row.get(TRANSLATED_FROM) is not None
        codes = [None if is_translated else row[name] for name in ("src_lang", "tgt_lang")]
        languages = (language_name(codes[0] or row["lang"]), language_name(codes[1] or row["lang"]))
    about = (row["id"], row["group"], row["lang"], row["subset"], num_correct)
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
