"""Preferences for people to judge: which rows, in which order the two sides stand, and what people made of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from rayrm.config import Config
from rayrm.errors import EvaluationError, SchemaError
from rayrm.evaluation.analysis.agreement import Agreement, cohen_kappa
from rayrm.evaluation.preferences import Floats
from rayrm.seeds import seed_of

ANNOTATION, ANSWER_KEY = "annotation", "answer_key"
TASK_COLUMNS = ("id", "prompt", "completion_a", "completion_b", "preferred")
KEY_COLUMNS = ("id", "set", "subset", "chosen", "credit")
Side = Literal["A", "B"]


class SamplingConfig(Config):
    """Which rows people judge."""

    num_rows: int = Field(50, ge=1)
    """Rows of each language at the most: equally many for each credit that the model's results have."""
    languages: list[str] = Field([])
    """Languages that are written, by code; empty for all that have rows."""
    seed: int = 0
    """Seed of the choice of rows and of their order."""


class Task(NamedTuple):
    """A row as people see it, and the key to it."""

    id: str
    prompt: str
    completion_a: str
    completion_b: str
    chosen: Side
    """The side that is right."""
    set: str
    subset: str
    credit: float
    """What the row counts for the model by whose results it was chosen."""


class Answer(NamedTuple):
    """What a person said of a row."""

    id: str
    chosen: Side
    """The side that is right."""
    credit: float
    preferred: Side | None
    """The side that the person prefers; null where there is none."""
    is_readable: bool
    """False where something stands there that names no side."""


def sample_by_credit(credits: Mapping[str, float], config: SamplingConfig, lang: str) -> list[str]:
    """Ids of rows, equally many for each credit: min(num_rows // kinds, rows of the rarest kind).

    The choice and the order hang on the rows' ids and the seed alone. Raises EvaluationError when that makes no row.
    """
    kinds: defaultdict[float, list[str]] = defaultdict(list)
    for name in sorted(credits, key=lambda name: (seed_of(config.seed, lang, name), name)):
        kinds[credits[name]].append(name)
    num = min([config.num_rows // max(1, len(kinds)), *map(len, kinds.values())])
    if not kinds or not num:
        raise EvaluationError(
            f"{config.num_rows} rows for {len(kinds)} kinds of credit in {lang} leave none for each; raise num_rows."
            if kinds
            else f"No row in {lang} has both a credit and its texts; nothing can be annotated."
        )
    chosen = {name for names in kinds.values() for name in names[:num]}
    return sorted(chosen, key=lambda name: (seed_of(config.seed, lang, "order", name), name))


def make_task(preference: Mapping[str, Any], result: Mapping[str, Any], seed: int) -> Task:
    """A Preference row for people, its sides swapped or not by the row's id and the seed."""
    sides = (_text(preference["chosen"]), _text(preference["rejected"]))
    is_swapped = bool(seed_of(seed, "swap", preference["lang"], preference["id"]) & 1)
    first, second = sides[::-1] if is_swapped else sides
    return Task(
        preference["id"],
        _text(preference["prompt"]),
        first,
        second,
        "B" if is_swapped else "A",
        result["set"],
        result["subset"] or "",
        result["credit"],
    )


def _text(messages: Sequence[Mapping[str, str]]) -> str:
    """One message as it is; several with their roles."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"[{message['role']}]\n{message['content']}" for message in messages)


def read_answers(
    rows: Iterable[Mapping[str, str | None]], key: Iterable[Mapping[str, str]], where: str
) -> list[Answer]:
    """The answers to the rows of a key, in its order; a row without one, or with an empty one, has none.

    `A`, `B` and `1`, `2` name a side, in any case and with blanks around. Raises SchemaError for a column that is not
    there, and for a row that is no row of the key or comes twice.
    """
    wanted = {row["id"]: row for row in key}
    said: dict[str, str] = {}
    for row in rows:
        missing = [name for name in ("id", "preferred") if name not in row]
        if missing:
            raise SchemaError(f"{where} lacks the column '{missing[0]}'; found {', '.join(filter(None, row))}.")
        name = row["id"] or ""
        if name not in wanted or name in said:
            fault = "comes twice" if name in said else "is no row of the answer key"
            raise SchemaError(f"Row '{name}' of {where} {fault}; hand in the file that was written, each row once.")
        said[name] = (row["preferred"] or "").strip().upper()
    sides: dict[str, Side] = {"A": "A", "1": "A", "B": "B", "2": "B"}
    found = []
    for name, row in wanted.items():
        word = said.get(name, "")
        chosen: Side = "A" if row["chosen"] == "A" else "B"
        found.append(Answer(name, chosen, float(row["credit"]), sides.get(word), not word or word in sides))
    return found


class Verdicts(NamedTuple):
    """How often people agree with something that names a side."""

    num_rows: int
    """Rows where both name a side."""
    share: float | None
    """Share of them with the same side; null without any."""
    kappa: float | None
    """Cohen's κ of both, over A and B; null without a row."""


class Annotated(NamedTuple):
    """What people made of the rows of a language."""

    lang: str
    num_rows: int
    num_answers: int
    num_missing: int
    """Rows that nobody answered; they count as neither right nor wrong."""
    num_unreadable: int
    """Answers that name no side; they count as neither."""
    gold: Verdicts
    """Against the side that is right."""
    decided: Verdicts
    """The same, where the credit is not 0.5."""
    models: dict[str, Verdicts]
    """Model to the agreement with the side that it prefers, where it prefers one."""


def compare_answers(
    lang: str, answers: Sequence[Answer], credits: Mapping[str, Mapping[str, float | None]]
) -> Annotated:
    """Answers against the right sides and against models. `credits` are those of each model by id."""
    num_answers = sum(answer.preferred is not None for answer in answers)
    num_unreadable = sum(not answer.is_readable for answer in answers)
    gold: list[Side | None] = [answer.chosen for answer in answers]
    decided = [answer for answer in answers if answer.credit != 0.5]
    return Annotated(
        lang,
        len(answers),
        num_answers,
        len(answers) - num_answers - num_unreadable,
        num_unreadable,
        _verdicts(answers, gold),
        _verdicts(decided, [answer.chosen for answer in decided]),
        {model: _verdicts(answers, model_sides(answers, own)) for model, own in credits.items()},
    )


def model_sides(answers: Sequence[Answer], credits: Mapping[str, float | None]) -> list[Side | None]:
    """The side that a model prefers: the right one where its credit is 1, the other where it is 0, else none."""
    found: list[Side | None] = []
    for answer in answers:
        credit = credits.get(answer.id)
        other: Side = "B" if answer.chosen == "A" else "A"
        found.append(answer.chosen if credit == 1 else other if credit == 0 else None)
    return found


def disagreements(answers: Sequence[Answer], sides: Sequence[Side | None]) -> list[Answer]:
    """The answers that name another side."""
    pairs = zip(answers, sides, strict=True)
    return [answer for answer, side in pairs if answer.preferred and side and answer.preferred != side]


def _verdicts(answers: Sequence[Answer], sides: Sequence[Side | None]) -> Verdicts:
    found: Agreement | None = cohen_kappa(_coded([answer.preferred for answer in answers]), _coded(sides))
    return Verdicts(0, None, None) if found is None else Verdicts(found.num_rows, found.share, found.kappa)


def _coded(sides: Sequence[Side | None]) -> Floats:
    return np.array([np.nan if side is None else float(side == "A") for side in sides], float)
