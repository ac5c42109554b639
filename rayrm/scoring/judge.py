"""Generative judges: what they are asked, in which orders, and what their words mean.

Plain text in and out, shared by the judging endpoint and the evaluation job: whoever calls sends the messages to a
language model, and brings its words, or the log-probabilities of its first token, back.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, model_validator

from rayrm.config import TEMPLATE, Config
from rayrm.errors import ConfigError
from rayrm.rows import Message
from rayrm.seeds import seed_of

LETTERS = "ABCDEFGH"
"""What answers are called; there are never more."""
SEPARATOR = "\n=====\n"
"""In a template, between the instruction and what is judged."""
MAX_RATING = 10
MAX_TOKENS = 2048
"""Of a judge's reasons and verdict."""
TOP_LOGPROBS = 20
"""As many as endpoints give."""
VERDICT = "verdict"
"""Key of a constrained verdict."""
Kind = Literal["pairwise", "four_way", "rating"]
Status = Literal["ok", "parse_error"]


class Judging(Config):
    """What a judge is asked and how its answer is read."""

    kind: Kind = "pairwise"
    """The better one of two answers, the best one of several, or a rating from 1 to 10 of each."""
    template: str | None = Field(None, json_schema_extra=TEMPLATE)  # type: ignore[arg-type]
    """Name or path of the prompt's Jinja template; null for the one of the kind's name."""
    method: Literal["text", "constrained", "labels"] = "text"
    """text: reasons and a marked verdict; constrained: nothing but a verdict, which the engine cannot miss; labels: the
    probabilities of the verdicts as first token."""
    orders: Literal["one", "both"] = "one"
    """One placing of the answers, drawn from the row's id, or that one and its reverse."""
    rule: Literal["strict", "reward_bench"] = "strict"
    """strict: exactly one verdict is marked, at the end; reward_bench: the first letter, in the order of the alphabet,
    that is marked anywhere, as that benchmark reads it."""
    system_prompt: bool = True
    """Whether the instruction is a system turn; false puts it before the conversation, for templates without one."""
    request: dict[str, Any] = Field({})
    """Fields of the request beside or in place of ours, such as max_tokens; null takes one out."""
    seed: int = 0
    """Draws the placing, together with the row's id."""

    @property
    def template_name(self) -> str:
        """Name or path of the template."""
        return self.template or self.kind

    @model_validator(mode="after")
    def _ratings_are_read_whole(self) -> Judging:
        if self.kind == "rating" and self.method == "labels":
            raise ValueError("the first token of a rating of 10 may be that of 1; set method to text or constrained")
        return self


class Placing(NamedTuple):
    """An order in which answers stand in a prompt."""

    order: tuple[int, ...]
    """Numbers of the answers, in the order of the letters."""

    def answer_of(self, letter: str) -> int:
        """The number of the answer that a letter stands for."""
        return self.order[LETTERS.index(letter)]


class Judgement(NamedTuple):
    """What a judge's answer to one prompt means."""

    status: Status
    verdict: int | None
    """Number of the best answer, or the rating; null where none can be read."""
    probabilities: tuple[float, ...] | None
    """Of each answer; they sum to 1. Null for a judge that was asked for words."""
    label_mass: float | None
    """Probability that the judge put on the verdicts at all; a low one tells of a judge that would say something else."""
    text: str
    """The judge's own words."""


class Combined(NamedTuple):
    """The judgements of all placings of the same answers."""

    winner: int | None
    """Number of the best answer; null for a tie, and where no judgement can be read."""
    is_consistent: bool | None
    """Whether all placings have the same winner; null with one placing, or where one cannot be read."""
    probabilities: tuple[float, ...] | None
    """Mean over the placings."""
    status: Status


def placings(judging: Judging, num_answers: int, row_id: str) -> list[Placing]:
    """The orders in which answers are shown; the same for the same row, whatever else is judged."""
    order = list(range(num_answers))
    random.Random(seed_of(judging.seed, row_id)).shuffle(order)
    found = [Placing(tuple(order))]
    return [*found, Placing(tuple(reversed(order)))] if judging.orders == "both" else found


def load_judge_template(judging: Judging) -> str:
    """The Jinja text of the judge's prompt.

    Raises ConfigError for a name that is nowhere, for a template without the line ===== that separates the instruction
    from what is judged, and for one that is no Jinja or asks for what it is not given.
    """
    from jinja2 import TemplateError

    name = judging.template_name
    packaged = resources.files("rayrm") / "judges" / f"{name}.jinja"
    if packaged.is_file():
        text = packaged.read_text(encoding="utf-8")
    elif name.endswith(".jinja") and Path(name).is_file():
        text = Path(name).read_text(encoding="utf-8")
    else:
        known = sorted(p.name.removesuffix(".jinja") for p in (resources.files("rayrm") / "judges").iterdir())
        raise ConfigError(
            f"The judge's template '{name}' is no .jinja file that is there, and none of {', '.join(known)}."
        )
    if SEPARATOR not in text:
        raise ConfigError(f"The judge's template '{name}' has no line ===== between instruction and conversation.")
    try:
        judge_messages(judging, text, Question([Message(role="user", content="a")], ["b", "c"]), Placing((0, 1)))
    except TemplateError as error:
        raise ConfigError(f"The judge's template '{name}' cannot be filled in: {error}.") from error
    return text


class Question(NamedTuple):
    """What is judged."""

    prompt: Sequence[Message]
    answers: Sequence[str]
    source_language: str | None = None
    """English name of the prompt's language, for the judge to be told; null to say nothing of it."""
    target_language: str | None = None
    """That of the answers."""


def judge_messages(judging: Judging, template: str, question: Question, placing: Placing) -> list[Message]:
    """A system and a user turn that ask for a verdict, or one user turn."""
    lettered = [(LETTERS[place], question.answers[number]) for place, number in enumerate(placing.order)]
    parts = [
        part.render(
            prompt=list(question.prompt),
            answers=lettered,
            source_language=question.source_language,
            target_language=question.target_language,
            wants_reasons=judging.method == "text",
        )
        for part in _parts(template)
    ]
    instruction, judged = (part.strip() for part in parts)
    if not judging.system_prompt:
        return [{"role": "user", "content": f"{instruction}\n\n{judged}"}]
    return [{"role": "system", "content": instruction}, {"role": "user", "content": judged}]


@lru_cache(maxsize=32)
def _parts(template: str) -> tuple[Any, Any]:
    """The templates of the system turn and of the user turn."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    # Each part is rendered alone, so that a line ===== in an answer separates nothing.
    instruction, judged = template.split(SEPARATOR, 1)
    return environment.from_string(instruction), environment.from_string(judged)


def labels(judging: Judging, num_answers: int) -> list[str]:
    """The verdicts that a judge can give."""
    if judging.kind == "rating":
        return [str(rating) for rating in range(1, MAX_RATING + 1)]
    return list(LETTERS[:num_answers])


def chat_request(judging: Judging, messages: Sequence[Message], num_answers: int) -> dict[str, Any]:
    """What an OpenAI-compatible endpoint is asked, but for its model's name."""
    body: dict[str, Any] = {"messages": list(messages), "temperature": 0.0, "max_tokens": MAX_TOKENS}
    if judging.method == "labels":
        body |= {"max_tokens": 1, "logprobs": True, "top_logprobs": TOP_LOGPROBS}
    elif judging.method == "constrained":
        schema = {
            "type": "object",
            "properties": {VERDICT: {"type": "string", "enum": labels(judging, num_answers)}},
            "required": [VERDICT],
            "additionalProperties": False,
        }
        wanted = {"type": "json_schema", "json_schema": {"name": VERDICT, "strict": True, "schema": schema}}
        body |= {"response_format": wanted, "max_tokens": 64}
    return {name: value for name, value in (body | judging.request).items() if value is not None}


def read_reply(judging: Judging, reply: Mapping[str, Any], placing: Placing) -> Judgement:
    """What an endpoint's reply to `chat_request` means. Raises ValueError for one that is no chat completion."""
    try:
        choice = reply["choices"][0]
        text = choice["message"]["content"] or ""
        if not isinstance(text, str):
            raise TypeError("its content is no text")
        if judging.method == "labels":
            first = choice["logprobs"]["content"][0]
            told = first["top_logprobs"] or [first]
            return read_labels(judging, {each["token"]: each["logprob"] for each in told}, text, placing)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"the endpoint's reply is no chat completion ({error!r})") from None
    if judging.method == "constrained":
        try:
            verdict = str(json.loads(text)[VERDICT])
        except (ValueError, KeyError, TypeError):
            verdict = ""
        return read_text(judging, verdict, placing)._replace(text=text)
    return read_text(judging, text, placing)


def read_text(judging: Judging, text: str, placing: Placing) -> Judgement:
    """What a judge's words mean. A judge without a verdict is a parse_error, never a guess."""
    allowed = labels(judging, len(placing.order))
    if judging.method == "constrained":
        found = text.strip() if text.strip() in allowed else None
    elif judging.rule == "reward_bench":
        found = _first_in_alphabet(text, allowed) if judging.kind != "rating" else _rating_at_the_end(text)
    else:
        found = _only_mark(text, allowed)
    if found is None:
        return Judgement("parse_error", None, None, None, text)
    verdict = int(found) if judging.kind == "rating" else placing.answer_of(found)
    return Judgement("ok", verdict, None, None, text)


def read_labels(judging: Judging, first_token: Mapping[str, float], text: str, placing: Placing) -> Judgement:
    """What the log-probabilities of a judge's first token mean, by token; spellings with and without a space add up.

    The verdict is the likeliest one; a tie is a parse_error, as is a judge that gave no label a chance.
    """
    masses = dict.fromkeys(labels(judging, len(placing.order)), 0.0)
    for token, logprob in first_token.items():
        if token.strip() in masses:
            masses[token.strip()] += math.exp(logprob)
    total = sum(masses.values())
    if total <= 0:
        return Judgement("parse_error", None, None, 0.0, text)
    by_answer = {placing.answer_of(label): mass / total for label, mass in masses.items()}
    probabilities = tuple(by_answer[number] for number in range(len(by_answer)))
    best = [index for index, share in enumerate(probabilities) if share == max(probabilities)]
    if len(best) > 1:
        return Judgement("parse_error", None, probabilities, total, text)
    return Judgement("ok", best[0], probabilities, total, text)


def combine(judgements: Sequence[Judgement]) -> Combined:
    """One winner from the judgements of all placings.

    With probabilities it is the answer with the highest mean one; without, the one that most placings name, where a
    contradiction is a tie. A placing that cannot be read makes the whole a parse_error.
    """
    if any(each.status != "ok" for each in judgements):
        return Combined(None, None, None, "parse_error")
    named = Counter(each.verdict for each in judgements)
    is_consistent = len(named) == 1 if len(judgements) > 1 else None
    known = [each.probabilities for each in judgements if each.probabilities is not None]
    if len(known) == len(judgements):
        means = tuple(sum(column) / len(known) for column in zip(*known, strict=True))
        best = [index for index, mean in enumerate(means) if mean == max(means)]
        return Combined(best[0] if len(best) == 1 else None, is_consistent, means, "ok")
    (first, num), *others = named.most_common()
    is_tie = bool(others) and others[0][1] == num
    return Combined(None if is_tie else first, is_consistent, None, "ok")


def _only_mark(text: str, allowed: Sequence[str]) -> str | None:
    """The verdict that ends the text, where no other one is marked before it."""
    marks = re.findall(r"\[\[\s*(\w+)\s*\]\]", text)
    ends = re.search(r"\[\[\s*(\w+)\s*\]\][\s.*_]*$", text)
    return marks[0] if ends and len(set(marks)) == 1 and marks[0] in allowed else None


def _first_in_alphabet(text: str, allowed: Sequence[str]) -> str | None:
    return next((letter for letter in allowed if f"[[{letter}]]" in text), None)


def _rating_at_the_end(text: str) -> str | None:
    found = re.search(r"\b([1-9]|10)\b\s*$", text.strip())
    return found.group(1) if found else None
