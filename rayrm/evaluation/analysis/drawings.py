"""Which figures an analysis has, with what stands above and below them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from rayrm.evaluation.analysis import figures
from rayrm.evaluation.analysis.agreement import matrix_of_models, summarise_agreement
from rayrm.evaluation.analysis.analyse import SetAnalysis, overall
from rayrm.evaluation.analysis.grid import EvaluatedSet
from rayrm.evaluation.analysis.leaderboard import Standing, correlate_with_english, rank
from rayrm.evaluation.drawing import to_svg
from rayrm.evaluation.preferences import Floats
from rayrm.evaluation.report import Figure as PageFigure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Drawn(NamedTuple):
    """A figure with its title and a sentence on how to read it."""

    figure: Figure
    title: str
    caption: str

    def on_page(self) -> PageFigure:
        """The figure as a page has it."""
        return PageFigure(to_svg(self.figure), self.title, self.caption)


def best_models(analysis: SetAnalysis, num: int) -> list[Standing]:
    """The best models in the order of the leaderboard."""
    board = analysis.boards["overall"]
    best = {line.model for line in sorted(board, key=rank)[:num]}
    return [line for line in board if line.model in best]


def draw_analysis(analysis: SetAnalysis, num_top: int) -> dict[str, Drawn]:
    """File name to figure, of the best `num_top` models; a figure with nothing to show is left out."""
    lines = best_models(analysis, num_top)
    names = [line.model for line in lines]
    drawn = {
        "heatmap": Drawn(
            figures.draw_heatmap(lines),
            "Score by language",
            "Per cent. Avg is the mean over the languages other than English; zh is the mean of both written forms of "
            "Chinese, where the set has both.",
        )
    }
    if any(line.english and line.average for line in lines):
        shown = [line for line in lines if line.english and line.average]
        drawn["english-drop"] = Drawn(
            figures.draw_drops(shown),
            "Against English",
            _correlations(analysis.boards["overall"])
            + "Numbers are "
            + "; ".join(f"{i} {figures.shorten(line.model)}" for i, line in enumerate(shown, 1))
            + ".",
        )
    for trait, groups in analysis.groups.items():
        if len(groups) > 1:
            drawn[trait.replace(" ", "-")] = Drawn(
                figures.draw_groups(lines, groups),
                f"By {trait}",
                _ABOUT_TRAIT[trait] + " The bar is the mean over models, dots are single models.",
            )
    drawn.update(_draw_agreement(analysis, names))
    lengths = [item for item in overall(analysis, analysis.lengths) if item.model in names]
    if lengths:
        drawn["length-bias"] = Drawn(
            figures.draw_lengths(lengths),
            "Accuracy by length",
            "A model that follows length is far better where the right answer is the longer one, or the shorter one.",
        )
    fits = [item for item in overall(analysis, analysis.probabilities) if item.model in names]
    if fits:
        drawn["calibration"] = Drawn(
            figures.draw_reliability(fits),
            "Calibration",
            "Above the dashed line a model is right more often than σ of its reward gap claims.",
        )
    rewards = {model: found for model, found in rewards_by_side(analysis.evaluated).items() if model in names}
    if rewards:
        drawn["rewards"] = Drawn(
            figures.draw_rewards(rewards),
            "Rewards",
            "Raw rewards over all languages, 30 bins: blue of right answers, orange of wrong ones.",
        )
    return drawn


def _correlations(lines: Sequence[Standing]) -> str:
    found = correlate_with_english(lines)
    if found is None:
        return ""
    return f"Over all models Pearson's correlation is {found[0]:.2f}, Spearman's {found[1]:.2f}. "


_ABOUT_TRAIT = {
    "resource class": "Classes of Joshi et al. (2020), 5 having most data; English and languages without a class are left out.",
    "family": "In brackets how many languages; English is left out.",
    "script": "ISO 15924 codes; in brackets how many languages; English is left out.",
}


def _draw_agreement(analysis: SetAnalysis, names: list[str]) -> dict[str, Drawn]:
    drawn = {}
    kappas = [item for item in summarise_agreement(analysis.with_english) if item.model in names]
    if kappas:
        drawn["kappa"] = Drawn(
            figures.draw_kappas(kappas),
            "Agreement with English",
            "Cohen's κ of a model's results in a language and in English: mean and standard deviation over languages.",
        )
    if len(names) > 1 and analysis.between_models:
        matrix = matrix_of_models(analysis.evaluated.grid, analysis.between_models)
        places = [analysis.evaluated.grid.models.index(name) for name in names]
        drawn["model-agreement"] = Drawn(
            figures.draw_matrix(names, matrix[np.ix_(places, places)]),
            "Agreement between models",
            "Cohen's κ, a mean over languages.",
        )
    return drawn


def rewards_by_side(evaluated: EvaluatedSet) -> Mapping[str, tuple[Floats, Floats]]:
    """Model to the rewards of all right and of all wrong answers; models without either are left out."""
    found = {}
    for model, languages in evaluated.rows.items():
        rows = [row for own in languages.values() for row in own if row["rewards"]]
        right = _finite([reward for row in rows for reward in row["rewards"][: row["num_correct"]]])
        wrong = _finite([reward for row in rows for reward in row["rewards"][row["num_correct"] :]])
        if len(right) and len(wrong):
            found[model] = (right, wrong)
    return found


def _finite(rewards: list[float | None]) -> Floats:
    values = np.array(rewards, float)
    return values[np.isfinite(values)]
