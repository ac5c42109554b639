"""An evaluated reward model → the files of RewardBench and M-RewardBench."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from rayrm import files
from rayrm.errors import ConfigError
from rayrm.evaluation.benchmarks import BENCHMARKS, M_REWARD_BENCH, Benchmark, BestOf
from rayrm.evaluation.exports import (
    Evaluated,
    Measured,
    ResultFolder,
    ScoredPair,
    ScoredText,
    path_of,
    write_best_of_scores,
    write_eval_set,
    write_eval_set_scores,
    write_pairs,
    write_texts,
    write_translated_pairs,
)
from rayrm.evaluation.models import EvaluatedModel
from rayrm.evaluation.results import Score, own_id, score_results
from rayrm.languages import flores_code
from rayrm.models.folders import load_tokenizer, read_mark
from rayrm.rows import Message
from rayrm.scoring import model_type_of

Render = Callable[[Sequence[Message], str | None], str]
"""(prompt, completion or null for the prompt alone) → the text that the model reads."""


def export_model(evaluated: EvaluatedModel, title: str, benchmark: str | None, output: str) -> list[str]:
    """Write all files of a model, which they call `title`, below `output`; give their paths.

    Sets that are no benchmark's, and sets of a benchmark that are several, stand in folders of their names; the languages
    of a benchmark, where it is M-RewardBench or they are several, in folders of their FLORES-200 codes.
    """
    about, render = describe_model(evaluated.config, title), make_render(evaluated.config)
    bench = BENCHMARKS[benchmark] if benchmark else None
    names = {rows: evaluated.sets(rows) for rows in evaluated.tables}
    has_one_set = len({name for found in names.values() for name in found}) == 1
    paths = []
    for rows, found in names.items():
        for name in found:
            folder = output if bench and has_one_set else files.join(output, name)
            if rows == "conversation":
                scored = [_scored_text(row, evaluated.config.name, render) for row in _rows(evaluated, rows, name)]
                paths.append(write_texts(folder, about, scored))
                continue
            languages: list[str | None] = [None]
            if bench:
                languages = list(dict.fromkeys(row["lang"] for row in evaluated.results if row["set"] == name))
            for lang in languages:
                is_split = bench is not None and (len(languages) > 1 or bench.languages)
                where = files.join(folder, flores_code(lang or "")) if is_split else folder
                part = _Part(evaluated, name, lang, about, render)
                paths += part.export_best_of(where) if rows == "best_of" else part.export_pairs(where, bench)
    return paths


def _rows(evaluated: EvaluatedModel, rows: str, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = evaluated.select(rows, name).to_pylist()
    return found


class _Part(NamedTuple):
    """What a model made of one set in one language, or in all of them."""

    evaluated: EvaluatedModel
    name: str
    lang: str | None
    about: Evaluated
    render: Render

    def _select(self, rows: str) -> list[dict[str, Any]]:
        return [row for row in _rows(self.evaluated, rows, self.name) if self.lang in (None, row["lang"])]

    def _score(self) -> Score:
        results = self.evaluated.results
        return score_results([row for row in results if row["set"] == self.name and self.lang in (None, row["lang"])])

    def export_pairs(self, where: str, benchmark: Benchmark | None) -> list[str]:
        pairs = [scored_pair(row, self.render) for row in self._select("preference")]
        if benchmark is None:
            return write_pairs(where, self.about, pairs, None)
        score = self._score()
        if benchmark.languages:
            sections = score.benchmark.sections if score.benchmark else {}
            measured = Measured(M_REWARD_BENCH.dataset, flores_code(self.lang or ""), score.subsets, sections)
            return write_translated_pairs(where, self.about, measured, pairs)
        return _export_sections(self.about, pairs, score.subsets, benchmark, where)

    def export_best_of(self, where: str) -> list[str]:
        rows, name = self._select("best_of"), self.evaluated.config.name
        best = [
            BestOf(own_id(row["id"], row["subset"]), row["subset"], int(row["num_correct"]), row["scores"][name])
            for row in rows
        ]
        texts = [[self.render(row["prompt"], text) for text in row["candidates"]] for row in rows]
        return [
            write_eval_set(where, self.about, self._score().subsets),
            write_best_of_scores(where, self.about, best, texts),
        ]


def _export_sections(
    about: Evaluated, pairs: Sequence[ScoredPair], accuracies: dict[str, float], benchmark: Benchmark, output: str
) -> list[str]:
    """The core set and the prior sets, apart."""
    paths = []
    folders: tuple[tuple[ResultFolder, bool], ...] = (("eval-set", False), ("pref-sets", True))
    for folder, is_prior in folders:
        part = [pair for pair in pairs if (pair.subset in benchmark.prior_sets) == is_prior]
        found = {name: value for name, value in accuracies.items() if (name in benchmark.prior_sets) == is_prior}
        if not part:
            continue
        if not is_prior:
            paths += write_pairs(output, about, part, found)
        paths.append(write_eval_set(output, about, found, folder))
        paths.append(write_eval_set_scores(output, about, part, folder))
    return paths


def list_titles(configs: Sequence[Any]) -> list[str]:
    """What the files call each model: its hub id or path, and its name too where several have the same one."""
    own = [getattr(config, "model", None) or config.name for config in configs]
    paths = [path_of(each) for each in own]
    return [
        f"{each}-{config.name}" if paths.count(path) > 1 else each
        for config, each, path in zip(configs, own, paths, strict=True)
    ]


def describe_model(config: Any, title: str) -> Evaluated:
    """What the files say of a model."""
    template = getattr(config, "chat_template", None) or "tokenizer"
    return Evaluated(title, model_type_of(config), getattr(config, "ref_model", None), None, template)


def make_render(config: Any) -> Render:
    """How a model's conversations read: by its own template where it has one here, else turn after turn."""
    if getattr(config, "type", None) not in ("reward_model", "implicit"):
        return _plain
    from jinja2 import TemplateError

    from rayrm.models.rendering import Renderer, load_template

    stored = read_mark(config.model).get("rendering", {})
    tokenizer = load_tokenizer(config.model, getattr(config, "trust_remote_code", False))
    template = load_template(stored.get("chat_template") or config.chat_template, tokenizer, config.model)
    renderer = Renderer(tokenizer, template)

    def render(prompt: Sequence[Message], completion: str | None) -> str:
        try:
            if completion is None:
                return renderer.turn_text(prompt)
            return renderer.prompt_text(prompt) + renderer.completion_text(prompt, completion)
        except (TemplateError, ConfigError):
            # Such as a system turn, for a template that knows none.
            return _plain(prompt, completion)

    return render


def _plain(prompt: Sequence[Message], completion: str | None) -> str:
    turns = [*prompt, *([] if completion is None else [Message(role="assistant", content=completion)])]
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


def scored_pair(row: dict[str, Any], render: Render) -> ScoredPair:
    """A RewardedPreference row as the files tell it, with the id and columns that it came with."""
    subset, name = row["subset"], own_id(row["id"], row["subset"])
    own: dict[str, Any] = {
        "id": int(name) if name.isdigit() else name,
        "subset": subset,
        "language": flores_code(row["lang"]),
    }
    chosen, rejected = (
        render([*row["prompt"], *row[side][:-1]], row[side][-1]["content"]) for side in ("chosen", "rejected")
    )
    return ScoredPair(
        id=own["id"],
        subset=subset,
        prompt=render(row["prompt"], None),
        text_chosen=chosen,
        text_rejected=rejected,
        chosen_reward=row["chosen_reward"],
        rejected_reward=row["rejected_reward"],
        metadata={**own, **json.loads(row["metadata"])},
    )


def _scored_text(row: dict[str, Any], name: str, render: Render) -> ScoredText:
    (text,) = row["candidates"]
    return ScoredText(
        row["prompt"][0]["content"], render(row["prompt"], text), row["scores"][name][0], json.loads(row["metadata"])
    )
