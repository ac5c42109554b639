"""Models beside one another: their scores on each set, by section of a benchmark, and by language."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from rayrm.evaluation.report import Section, Table, Text
from rayrm.evaluation.results import Score, score_languages, score_results

NONE = "–"


class Overview:
    """The scores of Result rows of any number of models and sets."""

    def __init__(self, results: Sequence[dict[str, Any]]) -> None:
        self.models = list(dict.fromkeys(row["model"] for row in results))
        self.sets = list(dict.fromkeys(row["set"] for row in results))
        self.languages = sorted({row["lang"] for row in results}, key=lambda lang: (lang != "en", lang))
        groups: defaultdict[tuple[str, str], defaultdict[str, list[dict[str, Any]]]]
        groups = defaultdict(lambda: defaultdict(list))
        for row in results:
            groups[row["model"], row["set"]][row["lang"]].append(row)
        self.scores: dict[tuple[str, str, str | None], Score] = {}
        """By model, set and language; null for all languages together."""
        for (model, name), languages in groups.items():
            found = {lang: score_results(rows) for lang, rows in languages.items()}
            self.scores |= {(model, name, lang): score for lang, score in found.items()}
            self.scores[model, name, None] = score_languages(found, [r for rows in languages.values() for r in rows])

    def metrics(self, model: str, name: str) -> dict[str, Any]:
        """`score`, `score/de`, `score/section/Chat` and `num_unscored` of a model on a set."""
        found: dict[str, Any] = {}
        for lang in (None, *self.languages):
            score = self.scores.get((model, name, lang))
            if score is None:
                continue
            suffix = "" if lang is None else f"/{lang}"
            found[f"score{suffix}"] = score.score
            if lang is None and score.benchmark is not None:
                found |= {f"score/section/{part}": value for part, value in score.benchmark.sections.items()}
                found["score/prior_sets"] = score.benchmark.prior_sets
                found["missing_subsets"] = list(score.benchmark.missing)
            if lang is None:
                found["num_unscored"] = score.num_unscored
        return found

    def tables(self) -> list[Table]:
        """A row for each model and set; where there are several languages, also a row for each of them."""
        return [self._by_model(), *([self._by_language()] if len(self.languages) > 1 else [])]

    def section(self) -> Section:
        """The tables on a page."""
        about = (
            "The score is the benchmark's own where rows are of one, and of several languages the mean over those that "
            "are not English; else it is the share of rows that the model gets right. A tie is a miss, and a row without "
            "a reward counts nothing. A section that has no row is left open, and so is then the score. Rows whose sides "
            "are the same or have no text are dropped and counted, where RewardBench counts them as wrong."
        )
        return Section("Scores", [Text(about), *self.tables()])

    def _by_model(self) -> Table:
        parts: dict[str, None] = {}
        for score in self.scores.values():
            if score.benchmark is not None:
                parts |= dict.fromkeys(score.benchmark.sections)
        header = ["model", *(["set"] if len(self.sets) > 1 else []), "score", *parts, "rows", "unscored"]
        rows = []
        for model in self.models:
            for name in self.sets:
                found = self.scores.get((model, name, None))
                if found is None:
                    continue
                sections = found.benchmark.sections if found.benchmark else {}
                cells = [_percent(found.score), *(_percent(sections.get(part)) for part in parts)]
                own = [model, *([name] if len(self.sets) > 1 else [])]
                rows.append([*own, *cells, f"{found.num_rows:,}", f"{found.num_unscored:,}"])
        return Table(header, rows, num_labels=2 if len(self.sets) > 1 else 1)

    def _by_language(self) -> Table:
        columns = [(model, name) for model in self.models for name in self.sets if (model, name, None) in self.scores]
        titles = [f"{model} · {name}" if len(self.sets) > 1 else model for model, name in columns]
        rows = []
        for lang in self.languages:
            found = [self.scores.get((model, name, lang)) for model, name in columns]
            rows.append([lang, *(_percent(score.score if score else None) for score in found)])
        return Table(["language", *titles], rows, "The same by language.")


def rewards_table(tables: dict[str, pa.Table]) -> Table:
    """Mean and standard deviation of the rewards of Scored rows with one candidate, by the model that scored them."""
    rows = []
    for model, table in tables.items():
        names = np.array(table["set"].to_pylist())
        scores = np.array([np.nan if (s := row[model][0]) is None else s for row in table["scores"].to_pylist()], float)
        for name in dict.fromkeys(names.tolist()):
            found = scores[(names == name) & np.isfinite(scores)]
            missing = int((names == name).sum()) - len(found)
            told = [f"{found.mean():.4f}", f"{found.std():.4f}"] if len(found) else [NONE, NONE]
            rows.append([model, name, f"{len(found):,}", *told, f"{missing:,}"])
    return Table(["model", "set", "rows", "mean reward", "standard deviation", "unscored"], rows, num_labels=2)


def _percent(score: float | None) -> str:
    return NONE if score is None else f"{100 * score:.1f}"
