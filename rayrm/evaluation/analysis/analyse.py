"""All that is found out about the models of a set: the analyses together, and their numbers for metrics.json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple, Protocol, TypeVar

from pydantic import Field

from rayrm.config import Config
from rayrm.errors import ConfigError
from rayrm.evaluation.analysis import agreement, bias, consistency, ensembles, leaderboard, probability, significance
from rayrm.evaluation.analysis.grid import EvaluatedSet, all_rewards
from rayrm.evaluation.preferences import BootstrapConfig
from rayrm.evaluation.results import Score


class AnalysisConfig(Config):
    """What is worked out of results, and how."""

    sets: list[str] = Field([])
    """Sets that are analysed, in this order; empty for all."""
    bootstrap: BootstrapConfig = BootstrapConfig()
    """How intervals of accuracies are drawn."""
    num_bins: int = Field(10, ge=1)
    """Bins of equal width, from 0.5 to 1, in which confidence is compared with accuracy."""
    num_top: int = Field(10, ge=1)
    """Models that figures show, the best ones; tables have all."""
    alpha: float = Field(0.05, gt=0, lt=1)
    """Significance level, after Holm's correction, at which models part into groups."""
    ensembles: list[Annotated[list[str], Field(min_length=2)]] = Field([])
    """Reward models that decide together, by name, two or more a list."""
    sweep_ensembles: bool = False
    """Also measure every combination of two reward models or more; their number doubles with each model."""
    ensemble_penalty: float = Field(1.0, ge=0)
    """What the uncertainty ensemble takes off the mean, in standard deviations of the members' rewards."""


class SetAnalysis(NamedTuple):
    """What was found out about one set."""

    evaluated: EvaluatedSet
    scores: dict[str, dict[str, Score]]
    """By model and language."""
    boards: dict[str, list[leaderboard.Standing]]
    """`overall`, then each section."""
    groups: dict[str, dict[str, list[str]]]
    """Trait to group to languages."""
    accuracies: list[leaderboard.Accuracy]
    with_english: list[agreement.Compared]
    between_models: list[agreement.Compared]
    by_row: list[agreement.RowAgreement]
    translations: list[consistency.Translated]
    lengths: list[bias.LengthBias]
    categories: list[bias.CategoryAccuracy]
    probabilities: list[probability.Probability]
    differences: list[significance.Difference]
    letters: dict[str, str]
    ensembles: list[ensembles.Ensemble]


class _Slice(Protocol):
    @property
    def model(self) -> str: ...
    @property
    def language(self) -> str: ...


SliceT = TypeVar("SliceT", bound=_Slice)


def check_analysis(sets: Sequence[EvaluatedSet], config: AnalysisConfig) -> None:
    """Find out before a run is claimed whether the ensembles can be made.

    Raises ConfigError for an ensemble of models that have no rewards on a set, and when there is nothing to sweep.
    """
    for evaluated in sets:
        ensembles.check_ensembles(evaluated, config.ensembles)
    if config.sweep_ensembles and all(len(ensembles.rewarding_models(evaluated)) < 2 for evaluated in sets):
        raise ConfigError("'sweep_ensembles' is on, and no set has two models with rewards; leave it off.")


def analyse_set(evaluated: EvaluatedSet, config: AnalysisConfig) -> SetAnalysis:
    """All analyses of a set."""
    grid = evaluated.grid
    scores = leaderboard.score_languages(evaluated)
    boards = leaderboard.leaderboards(evaluated, scores)
    differences = significance.compare_all(grid)
    ranked = sorted(boards["overall"], key=leaderboard.rank)
    spreads = {
        model: float(all_rewards(row for rows in evaluated.rows[model].values() for row in rows).std())
        for model in ensembles.rewarding_models(evaluated)
    }
    wanted = [tuple(members) for members in config.ensembles]
    if config.sweep_ensembles:
        wanted += [members for members in ensembles.all_combinations(list(spreads)) if members not in wanted]
    return SetAnalysis(
        evaluated=evaluated,
        scores=scores,
        boards=boards,
        groups={trait: leaderboard.group_languages(grid.languages, trait) for trait in leaderboard.TRAITS},
        accuracies=leaderboard.accuracies(grid, config.bootstrap),
        with_english=agreement.compare_with_english(grid),
        between_models=agreement.compare_models(grid),
        by_row=agreement.agreement_by_row(grid),
        translations=consistency.compare_translations(grid, spreads),
        lengths=bias.length_bias(grid),
        categories=bias.by_length_category(grid),
        probabilities=probability.measure_probability(grid, config.num_bins),
        differences=differences,
        letters=significance.letter_groups([line.model for line in ranked], differences, config.alpha),
        ensembles=ensembles.measure_ensembles(evaluated, wanted, config.ensemble_penalty),
    )


def overall(analysis: SetAnalysis, found: Sequence[SliceT]) -> list[SliceT]:
    """Of each model its `all`, or its only language in a set that has one, in the leaderboard's order."""
    chosen: dict[str, SliceT] = {}
    for item in found:
        if item.language == "all" or item.model not in chosen:
            chosen[item.model] = item
    return [chosen[line.model] for line in analysis.boards["overall"] if line.model in chosen]


def list_metrics(analysis: SetAnalysis, config: AnalysisConfig) -> dict[str, Any]:
    """The main numbers of a set, ready for JSON: by model, then the ensembles that the config names."""
    kappas = {item.model: item for item in agreement.summarise_agreement(analysis.with_english)}
    steady = {item.model: item for item in consistency.summarise_translations(analysis.translations, True)}
    fits = {item.model: item for item in overall(analysis, analysis.probabilities)}
    intervals = {item.model: item for item in overall(analysis, analysis.accuracies)}
    models = {}
    for line in analysis.boards["overall"]:
        name = line.model
        models[name] = {
            "type": line.model_type,
            "average": line.average,
            "deviation": line.deviation,
            "drop": line.drop,
            "scores": line.scores,
            "letters": analysis.letters[name],
            "sections": {
                part: {"average": own.average, "scores": own.scores}
                for part, board in analysis.boards.items()
                for own in board
                if part != "overall" and own.model == name
            },
            "accuracy": _plain(intervals.get(name)),
            "kappa_with_english": _plain(kappas.get(name)),
            "against_english": _plain(steady.get(name)),
            "probability": _plain(fits.get(name)),
            "num_unscored": sum(score.num_unscored for score in analysis.scores[name].values()),
        }
    named = [item for item in analysis.ensembles if list(item.models) in config.ensembles]
    teams = [{**item._asdict(), "models": list(item.models)} for item in named]
    correlations = leaderboard.correlate_with_english(analysis.boards["overall"])
    names = ("pearson", "spearman")
    return {
        "benchmark": analysis.evaluated.benchmark,
        "models": models,
        "english_with_average": None if correlations is None else dict(zip(names, correlations, strict=True)),
        "ensembles": teams,
    }


def _plain(item: Any) -> dict[str, Any] | None:
    if item is None:
        return None
    return {name: value for name, value in item._asdict().items() if name not in ("model", "bins")}
