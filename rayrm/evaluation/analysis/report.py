"""The page of an analysis: leaderboard, languages, agreement, consistency, length, calibration, ensembles, tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from rayrm.evaluation.analysis.agreement import summarise_agreement
from rayrm.evaluation.analysis.analyse import AnalysisConfig, SetAnalysis, overall
from rayrm.evaluation.analysis.consistency import summarise_translations
from rayrm.evaluation.analysis.drawings import Drawn
from rayrm.evaluation.analysis.grid import ENGLISH
from rayrm.evaluation.analysis.leaderboard import Standing
from rayrm.evaluation.report import Block, Figures, Report, Section, Table, Text, Tile, Tone

NONE = "–"
MAX_ROWS = 30
"""Rows of a table that grows with pairs of models or with ensembles; files have all."""


def build_report(
    analyses: Sequence[SetAnalysis],
    drawings: Sequence[Mapping[str, Drawn]],
    lead: str,
    facts: dict[str, str],
    config: AnalysisConfig,
) -> Report:
    """The page: the sections of each set in turn."""
    sections = []
    for analysis, drawn in zip(analyses, drawings, strict=True):
        behind = f" · {analysis.evaluated.name}" if len(analyses) > 1 else ""
        for title, blocks in _parts(analysis, drawn, config).items():
            if blocks:
                sections.append(Section(title + behind, blocks))
    return Report("Evaluation by language", lead, _tiles(analyses[0]), facts, sections)


def _parts(analysis: SetAnalysis, drawn: Mapping[str, Drawn], config: AnalysisConfig) -> dict[str, list[Block]]:
    return {
        "Leaderboard": _leaderboard(analysis, drawn, config),
        "Languages": _languages(analysis, drawn),
        "Agreement": _agreement(analysis, drawn),
        "Consistency over translations": _consistency(analysis),
        "Length": _lengths(analysis, drawn),
        "Rewards": _rewards(analysis, drawn, config),
        "Ensembles": _ensembles(analysis, config),
        "Significance": _significance(analysis, config),
    }


def leaderboard_table(analysis: SetAnalysis, confidence: float) -> Table:
    """A line for each model; intervals hold `confidence` of the resamples."""
    intervals = {item.model: item for item in overall(analysis, analysis.accuracies)}
    header = ["model", "type", "average", "std", "English", "drop", "lowest", "highest"]
    rows = []
    for line in analysis.boards["overall"]:
        own = intervals.get(line.model)
        unscored = sum(score.num_unscored for score in analysis.scores[line.model].values())
        row = [line.model, line.model_type, _percent(line.average), _percent(line.deviation), _percent(line.english)]
        row += [_signed(line.drop), *_extremes(line)]
        row.append(f"{100 * own.accuracy:.1f} ({100 * own.low:.1f} – {100 * own.high:.1f})" if own else NONE)
        rows.append([*row, analysis.letters[line.model], f"{unscored:,}"])
    return Table([*header, f"accuracy ({confidence:.0%})", "groups", "unscored"], rows, num_labels=2)


def _tiles(analysis: SetAnalysis) -> list[Tile]:
    board = analysis.boards["overall"]
    grid = analysis.evaluated.grid
    tiles = []
    ranked = [line for line in board if line.average is not None]
    if ranked:
        best = max(ranked, key=lambda line: line.average or 0)
        tiles.append(Tile("Best average", _percent(best.average), best.model))
    drops = [line.drop for line in board if line.drop is not None]
    if drops:
        tone: Tone = "bad" if fmean(drops) < -1 else "plain"
        tiles.append(Tile("Mean drop against English", f"{fmean(drops):+.1f}%", f"over {len(drops)} models", tone))
    num_types = len(set(analysis.evaluated.types.values()))
    tiles.append(Tile("Models", f"{len(grid.models)}", f"of {num_types} types" if num_types > 1 else ""))
    tiles.append(Tile("Languages", f"{len(grid.languages)}", "English among them" if ENGLISH in grid.languages else ""))
    return [*tiles, Tile("Rows", f"{len(grid.ids):,}", "in each language at the most")]


def _leaderboard(analysis: SetAnalysis, drawn: Mapping[str, Drawn], config: AnalysisConfig) -> list[Block]:
    about = (
        "Scores are per cent. Average and std (of a sample) are over the languages other than English; a model that "
        "lacks one of them has none. Drop is the average against English, in per cent of the score in English. Accuracy "
        "is the plain mean of what rows count in those languages; its interval comes from "
        f"{config.bootstrap.num_resamples:,} resamples of whole groups of rows, a row's translations being of its "
        f"group. Models that share a letter do not differ significantly at {config.alpha:g}."
    )
    blocks: list[Block] = [Text(about), leaderboard_table(analysis, config.bootstrap.confidence)]
    return [*blocks, drawn["heatmap"].on_page()]


def _languages(analysis: SetAnalysis, drawn: Mapping[str, Drawn]) -> list[Block]:
    languages = analysis.evaluated.grid.languages
    board = analysis.boards["overall"]
    blocks: list[Block] = []
    if len(languages) > 1:
        rows = [[line.model, *(_percent(line.scores[code]) for code in languages)] for line in board]
        blocks.append(Table(["model", *languages], rows))
    names = [part for part in analysis.boards if part != "overall"]
    if names:
        lines = {part: {line.model: line for line in analysis.boards[part]} for part in names}
        sections = [[own.model, *(_percent(_headline(lines[part][own.model])) for part in names)] for own in board]
        caption = "Sections: the average over the languages other than English, or English where it is the only one."
        blocks.append(Table(["model", *names], sections, caption))
    shown = [drawn[name].on_page() for name in ("english-drop", "resource-class", "family", "script") if name in drawn]
    return [*blocks, Figures(shown)] if shown else blocks


def _agreement(analysis: SetAnalysis, drawn: Mapping[str, Drawn]) -> list[Block]:
    found = summarise_agreement(analysis.with_english)
    shown = [drawn[name].on_page() for name in ("kappa", "model-agreement") if name in drawn]
    if not found and not shown:
        return []
    about = (
        "Cohen's κ of results coded as right, wrong and anything between, on rows that both have. Where both have one "
        "and the same result throughout, κ has no value: such a language counts as 1 and is counted as constant."
    )
    blocks: list[Block] = [Text(about)]
    if found:
        rows = [
            [x.model, f"{x.mean:.3f}", f"{x.deviation:.3f}", str(x.num_languages), str(x.num_constant)] for x in found
        ]
        blocks.append(Table(["model", "mean κ with English", "std", "languages", "constant"], rows))
    return [*blocks, Figures(shown)] if shown else blocks


def _consistency(analysis: SetAnalysis) -> list[Block]:
    pairs = {item.model: item for item in summarise_translations(analysis.translations, against_english=False)}
    english = {item.model: item for item in summarise_translations(analysis.translations, against_english=True)}
    if not pairs:
        return []
    about = (
        "Flips are rows where a model prefers another side in another language. Gap difference is the mean size of the "
        "difference of the reward gaps, in standard deviations of the model's rewards; correlation is Pearson's, of "
        "the gaps. Judges have neither."
    )
    header = ["model", "flips, English", "gap difference", "correlation", "flips, all pairs", "gap difference"]
    rows = []
    for model, item in pairs.items():
        own = english.get(model)
        row = [
            model,
            *([_share(own.flips), _fixed(own.gap_difference), _fixed(own.correlation)] if own else [NONE] * 3),
        ]
        rows.append([*row, _share(item.flips), _fixed(item.gap_difference), _fixed(item.correlation)])
    return [Text(about), Table([*header, "correlation"], rows)]


def _lengths(analysis: SetAnalysis, drawn: Mapping[str, Drawn]) -> list[Block]:
    found = overall(analysis, analysis.lengths)
    if not found:
        return []
    rows = [
        [
            item.model,
            *(_percent(item.accuracy[side]) for side in item.accuracy),
            *(f"{num:,}" for num in item.num_rows.values()),
            _fixed(item.correlation),
        ]
        for item in found
    ]
    header = ["model", "right is longer", "equal", "shorter", "rows longer", "equal", "shorter", "correlation"]
    caption = "Correlation is Spearman's, of the right answer's extra characters with the reward gap or the result."
    blocks: list[Block] = [Table(header, rows, caption)]
    categories = overall(analysis, analysis.categories)
    if categories:
        names = list(categories[0].accuracy)
        table = [[item.model, *(_percent(item.accuracy[name]) for name in names)] for item in categories]
        about = "RewardBench's subsets by where the right answer mostly is the longer one, neither, or the shorter one."
        blocks.append(Table(["model", *names], table, about))
    return [*blocks, Figures([drawn["length-bias"].on_page()])] if "length-bias" in drawn else blocks


def _rewards(analysis: SetAnalysis, drawn: Mapping[str, Drawn], config: AnalysisConfig) -> list[Block]:
    found = overall(analysis, analysis.probabilities)
    blocks: list[Block] = []
    if found:
        about = (
            "σ of the reward gap taken as the probability that the right answer is preferred. Calibration error is over "
            f"{config.num_bins} bins of equal width from 0.5 to 1, weighted by rows. A coin has Brier 0.25 and log loss "
            "0.693."
        )
        rows = [
            [x.model, f"{x.num_rows:,}", f"{x.expected_error:.3f}", f"{x.brier:.3f}", f"{x.log_loss:.3f}"]
            for x in found
        ]
        blocks += [Text(about), Table(["model", "rows", "calibration error", "Brier", "log loss"], rows)]
    if "calibration" in drawn:
        blocks.append(Figures([drawn["calibration"].on_page()]))
    return [*blocks, drawn["rewards"].on_page()] if "rewards" in drawn else blocks


def _ensembles(analysis: SetAnalysis, config: AnalysisConfig) -> list[Block]:
    if not analysis.ensembles:
        return []
    about = (
        "Each model's rewards are standardised over all its rewards on the set. Uncertainty is their mean minus "
        f"{config.ensemble_penalty:g} times their standard deviation. Best first."
    )
    ranked = sorted(analysis.ensembles, key=lambda item: -(_team_score(item.average, item.scores.get(ENGLISH)) or 0))
    rows = [
        [" + ".join(x.models), x.method, _percent(x.average), _percent(x.scores.get(ENGLISH)), f"{x.num_rows:,}"]
        for x in ranked[:MAX_ROWS]
    ]
    header = ["models", "method", "average", "English", "rows"]
    return [Text(about), Table(header, rows, _cut(len(ranked), "ensembles"), num_labels=2)]


def _significance(analysis: SetAnalysis, config: AnalysisConfig) -> list[Block]:
    if not analysis.differences:
        return []
    about = (
        "McNemar's test on rows that both models have; a row and its translations are one, better where a model has "
        "more of them right. The exact binomial test is taken below 25 differing rows, χ² with continuity correction "
        "from there on. Adjusted p-values are Holm's, for all pairs."
    )
    ranked = sorted(analysis.differences, key=lambda item: item.p_value)[:MAX_ROWS]
    tests = {"exact": "exact", "chi_squared": "χ²"}
    rows = [
        [x.model, x.other_model, f"{x.num_rows:,}", f"{x.better:,}", f"{x.worse:,}", tests[x.test]]
        + [_p_value(x.p_value), _p_value(x.adjusted), "yes" if x.adjusted < config.alpha else "no"]
        for x in ranked
    ]
    header = ["model", "against", "rows", "better", "worse", "test", "p", "adjusted", f"differ at {config.alpha:g}"]
    return [Text(about), Table(header, rows, _cut(len(analysis.differences), "pairs"), num_labels=2)]


def _headline(line: Standing) -> float | None:
    return _team_score(line.average, line.english)


def _team_score(average: float | None, english: float | None) -> float | None:
    return english if average is None else average


def _extremes(line: Standing) -> list[str]:
    known = {code: score for code, score in line.scores.items() if score is not None and code != ENGLISH}
    if not known:
        return [NONE, NONE]
    return [
        f"{code} {100 * known[code]:.1f}"
        for code in (min(known, key=known.__getitem__), max(known, key=known.__getitem__))
    ]


def _cut(num: int, what: str) -> str:
    return f"The first {MAX_ROWS} of {num:,} {what}; the CSV file has all." if num > MAX_ROWS else ""


def _percent(score: float | None) -> str:
    return NONE if score is None else f"{100 * score:.1f}"


def _share(share: float) -> str:
    return f"{share:.1%}"


def _signed(percent: float | None) -> str:
    return NONE if percent is None else f"{percent:+.1f}%"


def _fixed(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}"


def _p_value(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
