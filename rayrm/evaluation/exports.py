"""Results in the files of RewardBench and M-RewardBench, with their names and keys, so that their leaderboards read them.

Every file stands below the output folder, whatever the model is called. A result or score that is missing is null and
no part of an accuracy.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, Literal, NamedTuple

from rayrm import files
from rayrm.errors import ConfigError
from rayrm.evaluation.benchmarks import TIES, BestOf, best_of_credit, pair_credit

ResultFolder = Literal["eval-set", "pref-sets"]
"""Where a leaderboard looks for the benchmark itself, and for the prior sets."""


class Evaluated(NamedTuple):
    """The model that was evaluated, as the files tell of it."""

    model: str
    """Hub id, or path."""
    model_type: str = "Seq. Classifier"
    """The benchmarks' own word: also `DPO`, `DPO Ref. Free`, `Custom Classifier`, `Generative RM`."""
    ref_model: str | None = None
    tokenizer: str | None = None
    """Null for the model's own."""
    chat_template: str | None = None
    """Name of a template, or `tokenizer` for the tokenizer's own."""
    revision: str | None = None


class ScoredPair(NamedTuple):
    """A preference as a reward model has read and rewarded it."""

    id: str | int
    subset: str | None
    prompt: str
    text_chosen: str
    """Prompt and chosen completion, rendered."""
    text_rejected: str
    chosen_reward: float | None
    rejected_reward: float | None
    metadata: Mapping[str, Any]
    """Further columns of the row."""

    @property
    def result(self) -> int | None:
        """1 where the chosen side is preferred, else 0; null where a reward is missing."""
        return pair_credit(self.chosen_reward, self.rejected_reward)


class ScoredText(NamedTuple):
    """A conversation of an instruction set as a reward model has read and rewarded it."""

    prompt: str
    text: str
    reward: float | None
    metadata: Mapping[str, Any]


class Measured(NamedTuple):
    """What was measured on a set in one language."""

    dataset: str
    """Hub id or path of the set."""
    lang: str
    """FLORES-200 code."""
    accuracies: dict[str, float]
    """Of the subsets."""
    sections: Mapping[str, float | None]


def path_of(model: str) -> str:
    """A model's name as a relative path: a hub id stays as it is, and a path or URL begins with its first folder.

    Raises ConfigError for a name of which nothing is left.
    """
    parts = [part for part in model.split("://", 1)[-1].split("/") if part not in ("", ".", "..")]
    if not parts:
        raise ConfigError(f"The model '{model}' has no name to call a file by; give a hub id or the path of a folder.")
    return "/".join(parts)


def flat_name(model: str, lang: str) -> str:
    """How M-RewardBench's files of a model and a language begin, such as `org___model-deu_Latn`."""
    return f"{path_of(model).replace('/', '___')}-{lang}"


def write_pairs(
    output: str, evaluated: Evaluated, pairs: Sequence[ScoredPair], accuracies: dict[str, float] | None
) -> list[str]:
    """Write `{model}_outputs.jsonl`, `{model}_all.jsonl` and `{model}.json` of a preference set; give their paths.

    `accuracies` are those of the subsets of RewardBench's core set; null for any other set.
    """
    stem = files.join(output, path_of(evaluated.model))
    return [
        _write_lines(f"{stem}_outputs.jsonl", map(_pair_row, pairs)),
        _write_lines(f"{stem}_all.jsonl", map(_both_scores, pairs)),
        _write_json(f"{stem}.json", {**_summary(evaluated, pairs), "extra_results": accuracies}),
    ]


def write_texts(output: str, evaluated: Evaluated, texts: Iterable[ScoredText]) -> str:
    """Write `{model}_outputs.jsonl` of an instruction set, whose results are rewards; give its path."""
    return _write_lines(files.join(output, f"{path_of(evaluated.model)}_outputs.jsonl"), map(_text_row, texts))


def write_eval_set(
    output: str, evaluated: Evaluated, accuracies: Mapping[str, float], folder: ResultFolder = "eval-set"
) -> str:
    """Write `{folder}/{model}.json`, the score of each subset beside what the model is; give its path."""
    path = files.join(output, folder, f"{_leaderboard_name(evaluated)}.json")
    ref_model = {"ref_model": evaluated.ref_model} if evaluated.model_type.startswith("DPO") else {}
    return _write_json(path, {**_about(evaluated), **ref_model, **accuracies}, sort_keys=True)


def write_eval_set_scores(
    output: str, evaluated: Evaluated, pairs: Sequence[ScoredPair], folder: ResultFolder = "eval-set"
) -> str:
    """Write `{folder}-scores/{model}.json`, the rows of a preference set as columns; give its path."""
    rows = list(map(_pair_row, pairs))
    names = ("text_chosen", "text_rejected", "results", "scores_chosen", "scores_rejected")
    columns = {name: [row[name] for row in rows] for name in names}
    whence = {"subset": [pair.subset for pair in pairs], "id": [pair.id for pair in pairs]}
    return _write_scores(output, evaluated, {**columns, **whence}, folder)


def write_best_of_scores(
    output: str, evaluated: Evaluated, rows: Sequence[BestOf], texts: Sequence[Sequence[str]]
) -> str:
    """Write `eval-set-scores/{model}.json` of RewardBench 2, where rows of Ties have no result; give its path.

    `texts` are the rendered answers of each row, in the order of its rewards.
    """
    columns = {
        "text": [list(answers) for _, answers in zip(rows, texts, strict=True)],
        "scores": [list(map(_number, row.rewards)) for row in rows],
        "results": [None if row.subset == TIES else best_of_credit(row.rewards, row.num_correct) for row in rows],
        "subset": [row.subset for row in rows],
        "id": [row.id for row in rows],
        "num_correct": [row.num_correct for row in rows],
    }
    return _write_scores(output, evaluated, columns, "eval-set")


def write_translated_pairs(
    output: str, evaluated: Evaluated, measured: Measured, pairs: Sequence[ScoredPair]
) -> list[str]:
    """Write M-RewardBench's `{org___model}-{lang}.json` and `…-all.jsonl` of a reward model; give their paths.

    Its analyses look for the files of a language in a folder of that name: `output` is `…/deu_Latn` for them.
    """
    stem = files.join(output, flat_name(evaluated.model, measured.lang))
    extra = measured.accuracies if "reward-bench" in measured.dataset else None
    value = {**_summary(evaluated, pairs), "extra_results": extra, "subset_results": measured.accuracies}
    return [_write_json(f"{stem}.json", value), _write_lines(f"{stem}-all.jsonl", map(_both_scores, pairs))]


def write_translated_verdicts(
    output: str, evaluated: Evaluated, measured: Measured, credits: Sequence[float | None]
) -> str:
    """Write M-RewardBench's `{org___model}-{lang}.json` of a judge; give its path. `credits` has one for each row.

    A section without a score is 0 there.
    """
    known = [credit for credit in credits if credit is not None]
    totals = {"num_correct": sum(known), "num_total": len(known), "results": list(credits)}
    value = {
        "dataset": measured.dataset,
        "model": evaluated.model,
        "chat_template": evaluated.chat_template,
        "scores": {"accuracy": fmean(known) if known else None, **totals},
        "leaderboard": {section: score or 0 for section, score in measured.sections.items()},
        "subset": {**_about(evaluated), **measured.accuracies},
    }
    return _write_json(files.join(output, f"{flat_name(evaluated.model, measured.lang)}.json"), value)


def _leaderboard_name(evaluated: Evaluated) -> str:
    return path_of(_about(evaluated)["model"]) + ("_ref_free" if evaluated.model_type == "DPO Ref. Free" else "")


def _about(evaluated: Evaluated) -> dict[str, Any]:
    model = f"{evaluated.model}-{evaluated.revision}" if evaluated.revision else evaluated.model
    return {"model": model, "model_type": evaluated.model_type, "chat_template": evaluated.chat_template}


def _summary(evaluated: Evaluated, pairs: Sequence[ScoredPair]) -> dict[str, Any]:
    results = [pair.result for pair in pairs if pair.result is not None]
    return {
        "accuracy": fmean(results) if results else None,
        "num_prompts": len(results),
        "model": evaluated.model,
        "ref_model": evaluated.ref_model,
        "tokenizer": evaluated.tokenizer or evaluated.model,
        "chat_template": evaluated.chat_template,
    }


def _pair_row(pair: ScoredPair) -> dict[str, Any]:
    columns = {
        "prompt": pair.prompt,
        "results": pair.result,
        "scores_chosen": _number(pair.chosen_reward),
        "scores_rejected": _number(pair.rejected_reward),
        "text_chosen": pair.text_chosen,
        "text_rejected": pair.text_rejected,
    }
    return {**columns, **pair.metadata, **columns}


def _text_row(text: ScoredText) -> dict[str, Any]:
    columns = {"prompt": text.prompt, "results": _number(text.reward), "text": text.text}
    return {**columns, **text.metadata, **columns}


def _both_scores(pair: ScoredPair) -> dict[str, Any]:
    # RewardBench has a model's output here as it comes, a list of one number.
    return {"chosen": [_number(pair.chosen_reward)], "rejected": [_number(pair.rejected_reward)]}


def _number(reward: float | None) -> float | None:
    return reward if reward is not None and math.isfinite(reward) else None


def _write_scores(output: str, evaluated: Evaluated, columns: dict[str, Any], folder: ResultFolder) -> str:
    path = files.join(output, f"{folder}-scores", f"{_leaderboard_name(evaluated)}.json")
    return _write_json(path, {**columns, **_about(evaluated)}, sort_keys=True)


def _write_json(path: str, value: dict[str, Any], sort_keys: bool = False) -> str:
    with files.atomic_file(path) as handle:
        handle.write(json.dumps(value, indent=4, sort_keys=sort_keys, allow_nan=False).encode())
    return path


def _write_lines(path: str, rows: Iterable[dict[str, Any]]) -> str:
    with files.atomic_file(path) as handle:
        handle.writelines(json.dumps(row, default=str).encode() + b"\n" for row in rows)
    return path
