"""An evaluated reward model → the files of RewardBench and M-RewardBench."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from rayrm import files
from rayrm.evaluation.benchmarks import BENCHMARKS, M_REWARD_BENCH, Benchmark, BestOf
from rayrm.evaluation.exports import (
    Evaluated,
    Measured,
    ResultFolder,
    ScoredPair,
    ScoredText,
    write_best_of_scores,
    write_eval_set,
    write_eval_set_scores,
    write_pairs,
    write_texts,
    write_translated_pairs,
)
from rayrm.evaluation.models import EvaluatedModel
from rayrm.evaluation.results import score_results
from rayrm.languages import LANGUAGES
from rayrm.models.folders import load_tokenizer, read_mark
from rayrm.rows import Message
from rayrm.scoring import model_type_of

Render = Callable[[Sequence[Message], str | None], str]
"""(prompt, completion or null for the prompt alone) → the text that the model reads."""


def export_model(evaluated: EvaluatedModel, benchmark: str | None, output: str) -> list[str]:
    """Write all files of a model below `output`, those of a set that is no benchmark's below its name; give their paths."""
    about, render = describe_model(evaluated.config), make_render(evaluated.config)
    paths = []
    for name in evaluated.sets("preference"):
        pairs = [scored_pair(row, render) for row in evaluated.select("preference", name).to_pylist()]
        if benchmark is None:
            paths += write_pairs(files.join(output, name), about, [pair for _, pair in pairs], None)
        elif BENCHMARKS[benchmark].languages:
            paths += _export_languages(evaluated, about, pairs, output)
        else:
            paths += _export_sections(evaluated, about, [pair for _, pair in pairs], BENCHMARKS[benchmark], output)
    for name in evaluated.sets("best_of"):
        rows = evaluated.select("best_of", name).to_pylist()
        best = [BestOf(r["id"], r["subset"], int(r["num_correct"]), r["scores"][evaluated.config.name]) for r in rows]
        where = output if benchmark else files.join(output, name)
        texts = [[render(row["prompt"], text) for text in row["candidates"]] for row in rows]
        paths.append(write_eval_set(where, about, score_results(_results(evaluated, name)).subsets))
        paths.append(write_best_of_scores(where, about, best, texts))
    for name in evaluated.sets("conversation"):
        rows = evaluated.select("conversation", name).to_pylist()
        scored = [_scored_text(row, evaluated.config.name, render) for row in rows]
        paths.append(write_texts(files.join(output, name), about, scored))
    return paths


def _results(evaluated: EvaluatedModel, name: str, lang: str | None = None) -> list[dict[str, Any]]:
    return [row for row in evaluated.results if row["set"] == name and lang in (None, row["lang"])]


def _export_sections(
    evaluated: EvaluatedModel, about: Evaluated, pairs: Sequence[ScoredPair], benchmark: Benchmark, output: str
) -> list[str]:
    """The core set and the prior sets, apart."""
    accuracies = score_results(_results(evaluated, benchmark.name)).subsets
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


def _export_languages(
    evaluated: EvaluatedModel, about: Evaluated, pairs: Sequence[tuple[str, ScoredPair]], output: str
) -> list[str]:
    by_language: defaultdict[str, list[ScoredPair]] = defaultdict(list)
    for lang, pair in pairs:
        by_language[lang].append(pair)
    paths = []
    for lang, part in by_language.items():
        score = score_results([row for row in evaluated.results if row["lang"] == lang])
        code = LANGUAGES[lang].flores if lang in LANGUAGES else lang
        sections = score.benchmark.sections if score.benchmark else {}
        measured = Measured(M_REWARD_BENCH.dataset, code, score.subsets, sections)
        paths += write_translated_pairs(files.join(output, code), about, measured, part)
    return paths


def describe_model(config: Any) -> Evaluated:
    """What the files say of a model."""
    own = getattr(config, "model", None) or config.name
    template = getattr(config, "chat_template", None) or "tokenizer"
    return Evaluated(own, model_type_of(config), getattr(config, "ref_model", None), None, template)


def make_render(config: Any) -> Render:
    """How a model's conversations read: by its own template where it has one here, else turn after turn."""
    if getattr(config, "type", None) not in ("reward_model", "implicit"):
        return _plain
    from rayrm.models.rendering import Renderer, load_template

    stored = read_mark(config.model).get("rendering", {})
    tokenizer = load_tokenizer(config.model, getattr(config, "trust_remote_code", False))
    template = load_template(stored.get("chat_template") or config.chat_template, tokenizer, config.model)
    renderer = Renderer(tokenizer, template)

    def render(prompt: Sequence[Message], completion: str | None) -> str:
        if completion is None:
            return renderer.turn_text(prompt)
        return renderer.turn_text([*prompt, Message(role="assistant", content=completion)])

    return render


def _plain(prompt: Sequence[Message], completion: str | None) -> str:
    turns = [*prompt, *([] if completion is None else [Message(role="assistant", content=completion)])]
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


def scored_pair(row: dict[str, Any], render: Render) -> tuple[str, ScoredPair]:
    """A RewardedPreference row's language, and the row as the files tell it, with the id and columns that it came with."""
    subset, metadata = row["subset"], json.loads(row["metadata"])
    chosen, rejected = (
        render([*row["prompt"], *row[side][:-1]], row[side][-1]["content"]) for side in ("chosen", "rejected")
    )
    own_id = row["id"].removeprefix(f"{subset}/")
    return row["lang"], ScoredPair(
        id=own_id,
        subset=subset,
        prompt=render(row["prompt"], None),
        text_chosen=chosen,
        text_rejected=rejected,
        chosen_reward=row["chosen_reward"],
        rejected_reward=row["rejected_reward"],
        metadata=metadata,
    )


def _scored_text(row: dict[str, Any], name: str, render: Render) -> ScoredText:
    (text,) = row["candidates"]
    return ScoredText(
        row["prompt"][-1]["content"], render(row["prompt"], text), row["scores"][name][0], json.loads(row["metadata"])
    )
