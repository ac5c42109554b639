"""An analysis as CSV files, one table each, with the names that M-RewardBench gives to leaderboards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rayrm import files
from rayrm.evaluation.analysis.analyse import SetAnalysis
from rayrm.evaluation.analysis.grid import ENGLISH
from rayrm.evaluation.analysis.leaderboard import Standing, group_means
from rayrm.evaluation.sheets import Sheet, write_sheet


def write_sheets(folder: str, analysis: SetAnalysis) -> list[str]:
    """Write every sheet that has a row into a folder; give the paths."""
    paths = []
    for name, (header, rows) in list_sheets(analysis).items():
        if rows:
            paths.append(files.join(folder, f"{name}.csv"))
            write_sheet(paths[-1], header, rows)
    return paths


def list_sheets(analysis: SetAnalysis) -> dict[str, Sheet]:
    """File name, without its ending, to what stands in it; scores and shares are from 0 to 1, drops per cent."""
    languages = analysis.evaluated.grid.languages
    others = [code for code in languages if code != ENGLISH]
    board = analysis.boards["overall"]
    sheets = {_sheet_name(part): _leaderboard(lines, languages, analysis) for part, lines in analysis.boards.items()}
    sheets["drops"] = (
        ["model", "average", *others],
        [[line.model, line.drop, *map(line.drops.get, others)] for line in board if line.drops],
    )
    sheets["groups"] = (
        ["model", "trait", "group", "num_languages", "score"],
        [
            [line.model, trait, group, len(groups[group]), score]
            for line in board
            for trait, groups in analysis.groups.items()
            for group, score in group_means(line.scores, groups).items()
        ],
    )
    sheets["scores"] = (
        ["model", "language", "score", "num_rows", "num_unscored"],
        [
            [model, code, score.score, score.num_rows, score.num_unscored]
            for model, found in analysis.scores.items()
            for code, score in found.items()
        ],
    )
    sheets["subsets"] = (
        ["model", "language", "subset", "score"],
        [
            [model, code, subset, value]
            for model, found in analysis.scores.items()
            for code, score in found.items()
            for subset, value in score.subsets.items()
        ],
    )
    sheets["accuracies"] = _fields(analysis.accuracies)
    sheets["agreement-english"] = _compared(analysis.with_english)
    sheets["agreement-models"] = _compared(analysis.between_models)
    sheets["agreement-rows"] = _fields(analysis.by_row)
    sheets["consistency"] = _fields(analysis.translations)
    sheets["length-bias"] = (
        ["model", "language", *(f"{part}_{side}" for side in _SIDES for part in ("rows", "accuracy")), "correlation"],
        [
            [
                item.model,
                item.language,
                *(part[side] for side in _SIDES for part in (item.num_rows, item.accuracy)),
                item.correlation,
            ]
            for item in analysis.lengths
        ],
    )
    sheets["length-categories"] = (
        ["model", "language", *_CATEGORIES],
        [[item.model, item.language, *(item.accuracy[name] for name in _CATEGORIES)] for item in analysis.categories],
    )
    sheets["probability"] = _fields(analysis.probabilities, leave_out=("bins",))
    sheets["probability-bins"] = (
        ["model", "language", "low", "high", "confidence", "accuracy", "num_rows"],
        [[item.model, item.language, *part] for item in analysis.probabilities for part in item.bins],
    )
    sheets["significance"] = _fields(analysis.differences)
    sheets["ensembles"] = (
        ["models", "method", "average", "num_rows", *languages],
        [
            [" + ".join(item.models), item.method, item.average, item.num_rows, *map(item.scores.get, languages)]
            for item in analysis.ensembles
        ],
    )
    return sheets


_SIDES = ("longer", "equal", "shorter")
_CATEGORIES = ("longer", "neutral", "shorter")


def _sheet_name(part: str) -> str:
    return "leaderboard" if part == "overall" else part.lower().replace(" ", "-")


def _leaderboard(lines: Sequence[Standing], languages: Sequence[str], analysis: SetAnalysis) -> Sheet:
    return (
        ["model", "type", "avg", "std", "letters", *languages],
        [
            [line.model, line.model_type, line.average, line.deviation, analysis.letters[line.model]]
            + [line.scores[code] for code in languages]
            for line in lines
        ],
    )


def _fields(items: Sequence[Any], leave_out: Sequence[str] = ()) -> Sheet:
    names = [name for name in (items[0]._fields if items else ()) if name not in leave_out]
    return names, [[getattr(item, name) for name in names] for item in items]


def _compared(items: Sequence[Any]) -> Sheet:
    names = ["model", "other_model", "language", "other_language"]
    header = [*names, "num_rows", "share", "kappa", "constant"]
    return header, [[*(getattr(item, name) for name in names), *item.agreement] for item in items]
