"""Models by score: in each language, on the whole, against English, and by what languages have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np

from rayrm.evaluation.analysis.correlation import pearson, spearman
from rayrm.evaluation.analysis.grid import ENGLISH, EvaluatedSet, Grid
from rayrm.evaluation.benchmarks import BENCHMARKS
from rayrm.evaluation.preferences import BootstrapConfig, bootstrap
from rayrm.evaluation.results import Score, score_results
from rayrm.languages import LANGUAGES, Language

CHINESE = ("zh", "zh-Hant")
"""Two written forms that a figure shows as one."""
Scores = dict[str, float | None]
"""Language to score, 0 to 1; null where it cannot be formed."""


class Standing(NamedTuple):
    """A line of a leaderboard."""

    model: str
    model_type: str
    scores: Scores
    average: float | None
    """Mean over the languages other than English; null when one of them has no score, or there is none."""
    deviation: float | None
    """Sample standard deviation over the same languages; null as `average`, and for a single one."""

    @property
    def english(self) -> float | None:
        """The score in English."""
        return self.scores.get(ENGLISH)

    @property
    def drops(self) -> Scores:
        """Language to its score against English, per cent of the score in English: negative where it is lower.

        Empty where the set is not in English.
        """
        others = {code: score for code, score in self.scores.items() if code != ENGLISH and ENGLISH in self.scores}
        return {code: relative(score, self.english) for code, score in others.items()}

    @property
    def drop(self) -> float | None:
        """The average against English, in per cent of the score in English."""
        return relative(self.average, self.english)


def relative(score: float | None, english: float | None) -> float | None:
    """(score − English) / English in per cent; null where either is, and where English is 0."""
    return None if score is None or not english else 100 * (score - english) / english


def make_leaderboard(scores: Mapping[str, Scores], types: Mapping[str, str]) -> list[Standing]:
    """A line for each model, by type and then from the highest average down; models without one come last.

    Those stand by their score in English.
    """
    lines = [Standing(model, types[model], found, average(found), deviation(found)) for model, found in scores.items()]
    return sorted(lines, key=lambda line: (line.model_type, *rank(line), line.model))


def rank(line: Standing) -> tuple[bool, float]:
    """A key that sorts from the highest average down, and then, those without one, from the highest in English."""
    score = line.english if line.average is None else line.average
    return line.average is None, -(score or 0)


def average(scores: Scores) -> float | None:
    """Mean over the languages other than English; null when one of them has no score, or there is none."""
    known = _others(scores)
    return fmean(known) if known else None


def deviation(scores: Scores) -> float | None:
    """Sample standard deviation over the languages other than English; null with fewer than two, or a missing one."""
    known = _others(scores)
    return stdev(known) if known and len(known) > 1 else None


def _others(scores: Scores) -> list[float] | None:
    others = [score for code, score in scores.items() if code != ENGLISH]
    known = [score for score in others if score is not None]
    return known if len(known) == len(others) else None


def score_languages(evaluated: EvaluatedSet) -> dict[str, dict[str, Score]]:
    """Model to language to what it gets there; a language that a model was not evaluated in has an empty score."""
    empty = Score(None, None, {}, 0, 0)
    return {
        model: {code: score_results(found[code]) if code in found else empty for code in evaluated.grid.languages}
        for model, found in evaluated.rows.items()
    }


def leaderboards(evaluated: EvaluatedSet, found: dict[str, dict[str, Score]]) -> dict[str, list[Standing]]:
    """`overall`, and the leaderboard of each of the benchmark's sections by its name, of what `score_languages` gave."""
    parts: dict[str, Callable[[Score], float | None]] = {"overall": lambda score: score.score}
    sections = BENCHMARKS[evaluated.benchmark].sections if evaluated.benchmark else ()
    for section in sections:
        parts[section.name] = lambda score, name=section.name: score.benchmark and score.benchmark.sections[name]  # type: ignore[misc]
    return {
        part: make_leaderboard(
            {model: {code: read(score) for code, score in languages.items()} for model, languages in found.items()},
            evaluated.types,
        )
        for part, read in parts.items()
    }


def correlate_with_english(lines: Sequence[Standing]) -> tuple[float, float] | None:
    """Pearson's and Spearman's correlation, over models, of the score in English with the average over the others.

    Null with fewer than two models that have both, and where either is the same for all.
    """
    both = [(line.english, line.average) for line in lines if line.english is not None and line.average is not None]
    english, others = [pair[0] for pair in both], [pair[1] for pair in both]
    found = (pearson(english, others), spearman(english, others))
    return None if found[0] is None or found[1] is None else (found[0], found[1])


def merge_chinese(scores: Scores) -> Scores:
    """Both written forms of Chinese as one `zh`, their mean, where both are there; null when either has no score."""
    if not all(code in scores for code in CHINESE):
        return dict(scores)
    forms = [score for code in CHINESE if (score := scores[code]) is not None]
    merged = fmean(forms) if len(forms) == len(CHINESE) else None
    return {code: merged if code == CHINESE[0] else score for code, score in scores.items() if code != CHINESE[1]}


TRAITS: dict[str, Callable[[Language], str | None]] = {
    "resource class": lambda language: None if language.resource_class is None else str(language.resource_class),
    "family": lambda language: language.family,
    "script": lambda language: language.script,
}
"""What languages can have in common."""


def group_languages(languages: Sequence[str], trait: str) -> dict[str, list[str]]:
    """The languages other than English by a trait; one that is in no table, or lacks the trait, is left out."""
    found: dict[str, list[str]] = {}
    for code in languages:
        name = TRAITS[trait](LANGUAGES[code]) if code in LANGUAGES and code != ENGLISH else None
        if name is not None:
            found.setdefault(name, []).append(code)
    return dict(sorted(found.items()))


def group_means(scores: Scores, groups: Mapping[str, Sequence[str]]) -> Scores:
    """Group to the mean score of its languages; null when one of them has no score."""
    return {name: average({code: scores.get(code) for code in codes}) for name, codes in groups.items()}


class Accuracy(NamedTuple):
    """The plain mean of what rows count, with its bootstrap interval by group."""

    model: str
    language: str
    """`all` for all languages other than English together, where there are any."""
    accuracy: float
    low: float
    high: float
    num_rows: int
    num_groups: int


def accuracies(grid: Grid, config: BootstrapConfig) -> list[Accuracy]:
    """The accuracy of each model in each language and in all but English together; one without a credit is left out.

    The translations of a row are of its group, and are drawn together with it.
    """
    found = []
    others = [number for number, code in enumerate(grid.languages) if code != ENGLISH]
    slices = {"all": others, **{code: [number] for number, code in enumerate(grid.languages)}}
    for number, model in enumerate(grid.models):
        for name, languages in slices.items():
            values = grid.credits[number, languages].ravel()
            known = np.isfinite(values)
            if not known.any():
                continue
            groups = np.tile(grid.groups, len(languages))[known]
            low, high = bootstrap(values[known, None], groups, config, f"{model} {name}")
            num_groups = len(np.unique(groups))
            mean = float(values[known].mean())
            found.append(Accuracy(model, name, mean, float(low[0]), float(high[0]), int(known.sum()), num_groups))
    return found
