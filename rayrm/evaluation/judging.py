"""Rows of answers → what a judge is asked of each, and what its words make of them: a winner, ratings, a credit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from rayrm.evaluation.answers import Answer, key_of
from rayrm.evaluation.asking import Call
from rayrm.evaluation.benchmarks import TIES, NoVerdictRule, rating_credit, verdict_credit
from rayrm.evaluation.cases import Case, Status
from rayrm.evaluation.results import by_language, score_results
from rayrm.scoring.judge import (
    Judgement,
    Judging,
    Placing,
    Question,
    chat_request,
    combine,
    judge_messages,
    load_judge_template,
    placings,
    read_reply,
)

WORDLESS = ("length", "content_filter")
"""Ends of an answer that leave a judge without a verdict, and not without an opinion."""
TIES_TEMPLATE = "rating_ties"
"""Template for prompts with several right answers, which are rated whatever others are asked."""


class Asked(NamedTuple):
    """One question of a case."""

    key: str
    judging: Judging
    placing: Placing


class Verdict(NamedTuple):
    """What a judge said of a case."""

    winner: int | None
    """Number of the best answer; null for a tie, and where there is no verdict."""
    status: Status
    """ok: all was read; parse_error: the judge answered, and something cannot be read; empty: it was not asked, since
    an answer has no text; any other word: a call failed."""
    credit: float | None = None
    """What the case counts, 0 to 1; null where it counts nothing."""
    ratings: Sequence[int | None] | None = None
    """Of each answer; null as a whole for a judge that names winners."""
    probabilities: Sequence[float] | None = None
    is_consistent: bool | None = None
    """Whether both orders have the same winner; null with one order, or where one cannot be read."""
    orders: Sequence[Sequence[int]] = ()
    """Of each question: numbers of the answers in the order in which they stood."""
    verdicts: Sequence[int | None] = ()
    """Of each question: number of the best answer, or the rating."""
    statuses: Sequence[str] = ()
    texts: Sequence[str | None] = ()
    """Of each question: the judge's own words."""
    detail: str | None = None
    """Why a call failed, or why nothing was asked."""


class Examiner:
    """What is asked of cases, with the templates that it takes."""

    def __init__(self, judging: Judging) -> None:
        """Raises ConfigError for a template that is not there."""
        ties = {"kind": "rating", "template": TIES_TEMPLATE, "orders": "one"}
        ties["method"] = "text" if judging.method == "labels" else judging.method
        self._judging, self._ties = judging, judging.model_copy(update=ties)
        self._templates = {each.template_name: load_judge_template(each) for each in (self._judging, self._ties)}

    def judging_of(self, case: Case) -> Judging:
        """How a case is judged: where no answer is the best one, all are rated."""
        return self._judging if case.has_a_best else self._ties

    def ask(self, case: Case, model: str) -> list[tuple[Asked, Call]]:
        """The questions of a case to a model; none for a case with a fault.

        Placings hang on the row's id, and not on its language: translations of a row are placed alike.
        """
        if case.fault:
            return []
        judging = self.judging_of(case)
        if judging.kind == "rating":
            return [
                self._question(judging, model, Question(case.prompt, [answer], *case.languages), Placing((0,)))
                for answer in case.answers
            ]
        question = Question(case.prompt, case.answers, *case.languages)
        orders = placings(judging, len(case.answers), case.id)
        return [self._question(judging, model, question, placing) for placing in orders]

    def read(
        self, case: Case, asked: Sequence[Asked], find: Callable[[str], Answer | None], rule: NoVerdictRule
    ) -> Verdict:
        """What the stored answers to the questions of a case make of it.

        A call that failed leaves the case without a credit, whatever the rule says of answers without a verdict.
        """
        is_rating = self.judging_of(case).kind == "rating"
        if case.fault:
            ratings = [None] * len(case.answers) if is_rating else None
            return Verdict(None, case.fault[0], ratings=ratings, detail=case.fault[1])
        read = [_read(each, find(each.key)) for each in asked]
        judgements = [judgement for judgement, _, _ in read]
        told: dict[str, Any] = {
            "orders": [(number,) if is_rating else each.placing.order for number, each in enumerate(asked)],
            "verdicts": [judgement.verdict for judgement in judgements],
            "statuses": [status for _, status, _ in read],
            "texts": [judgement.text for judgement in judgements],
            "detail": next((detail for _, _, detail in read if detail), None),
        }
        failed = next((status for _, status, _ in read if status not in ("ok", "parse_error")), None)
        if failed is not None:
            return Verdict(None, failed, ratings=told["verdicts"] if is_rating else None, **told)
        if is_rating:
            return _judge_ratings(case, told, rule)
        found = combine(judgements)
        credit = verdict_credit(found.winner, found.status, rule)
        shown = (found.probabilities, found.is_consistent)
        return Verdict(found.winner, found.status, credit, None, *shown, **told)

    def _question(self, judging: Judging, model: str, question: Question, placing: Placing) -> tuple[Asked, Call]:
        body = partial(_body, judging, self._templates[judging.template_name], question, placing)
        key = key_of(model, body())
        return Asked(key, judging, placing), Call(key, body, partial(read_reply, judging, placing=placing))


def _body(judging: Judging, template: str, question: Question, placing: Placing) -> dict[str, Any]:
    return chat_request(judging, judge_messages(judging, template, question, placing), len(placing.order))


def rule_of(no_verdict: NoVerdictRule | None, benchmark: str | None) -> NoVerdictRule:
    """What an answer without a verdict counts: as told, else as the benchmark has it, and nothing in any other set."""
    if no_verdict is not None:
        return no_verdict
    if benchmark is None:
        return "unscored"
    return "quarter" if benchmark == "reward_bench_2" else "half"


def _judge_ratings(case: Case, told: Mapping[str, Any], rule: NoVerdictRule) -> Verdict:
    ratings = told["verdicts"]
    known = [rating for rating in ratings if rating is not None]
    is_whole = len(known) == len(ratings)
    best = [number for number, rating in enumerate(ratings) if known and rating == max(known)]
    winner = best[0] if is_whole and len(best) == 1 else None
    status: Status = "ok" if is_whole else "parse_error"
    credit = None
    if case.subset != TIES:
        # Of a pair RewardBench wants both ratings and a difference; of more answers it takes what there is.
        credit = (
            verdict_credit(winner, status, rule) if case.is_pair else rating_credit(ratings, rule, case.num_correct)
        )
    return Verdict(winner, status, credit, ratings, **told)


def _read(asked: Asked, answer: Answer | None) -> tuple[Judgement, Status, str | None]:
    nothing = Judgement("parse_error", None, None, None, "")
    if answer is None or answer.reply is None:
        return nothing, "error" if answer is None else answer.status, None if answer is None else answer.detail
    try:
        found = read_reply(asked.judging, answer.reply, asked.placing)
    except ValueError as error:
        return nothing, "error", str(error)
    end = answer.reply["choices"][0].get("finish_reason")
    if not found.text and end in WORDLESS:
        return nothing, "error", f"the judge was stopped before it said a word (finish_reason {end}); raise max_tokens"
    return found, found.status, None


def check_benchmark(benchmark: str, cases: Iterable[Case]) -> None:
    """Find out before anything is paid for whether the rows can have a score.

    Raises EvaluationError when the rows of a language are of no subset of the benchmark, or rows of Ties have no ids of
    their form.
    """
    verdicts = ((case, Verdict(None, "ok", 0.0, [None] * len(case.answers))) for case in cases)
    rows = result_rows("", "", benchmark, verdicts)
    for name in {row["set"] for row in rows}:
        for own in by_language(row for row in rows if row["set"] == name).values():
            score_results(own)


def vote(case: Case, verdicts: Sequence[Verdict], rule: NoVerdictRule) -> Verdict:
    """What a panel says of a case: the answer that more than half of its members name.

    A member without a winner has no vote. Without such a majority the status is error, and the case counts nothing: no
    coin is thrown.
    """
    if case.fault:
        return Verdict(None, case.fault[0], detail=case.fault[1])
    votes = [each.winner for each in verdicts]
    winner = next((named for named in votes if named is not None and 2 * votes.count(named) > len(votes)), None)
    if winner is None:
        told = ", ".join("none" if named is None else str(named) for named in votes)
        return Verdict(None, "error", verdicts=votes, detail=f"no majority (votes: {told})")
    return Verdict(winner, "ok", verdict_credit(winner, "ok", rule), verdicts=votes)


def result_rows(
    model: str, model_type: str, benchmark: str | None, judged: Iterable[tuple[Case, Verdict]]
) -> list[dict[str, Any]]:
    """Result rows of one judge."""
    return [
        {
            "model": model,
            "model_type": model_type,
            "benchmark": benchmark,
            "set": case.set,
            "id": case.id,
            "group": case.group,
            "lang": case.lang,
            "subset": case.subset,
            "num_correct": case.num_correct,
            "rewards": verdict.ratings,
            "lengths": [len(answer) for answer in case.answers],
            "credit": verdict.credit,
            "status": verdict.status,
        }
        for case, verdict in judged
    ]
