"""Preference sets in other languages, by NLLB in Ray Data actors: Preference → Preference."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
from pydantic import Field, field_validator

from rayrm import cluster
from rayrm.config import NOT_IDENTITY, Workers
from rayrm.languages import flores_code, short_code
from rayrm.models.folders import check_model, load_tokenizer
from rayrm.models.nllb import find_languages, language_codes, load_translator
from rayrm.rows import MESSAGES, TEXTS, Message, Preference, map_table, set_column
from rayrm.runs import INPUT
from rayrm.translation.texts import Outcome, TextsConfig, load_chrf, split_texts, translate_texts

if TYPE_CHECKING:
    from ray.data import Dataset

Column = Literal["prompt", "chosen", "rejected"]
COLUMNS: tuple[Column, ...] = ("prompt", "chosen", "rejected")
READS = (*COLUMNS, "lang", "src_lang", "tgt_lang")
PROVENANCE = {
    "translated_from": pa.string(),
    "translated_by": pa.string(),
    "num_retried": pa.int64(),
    "round_trip_chrf": pa.float64(),
}
"""Columns that tell how a row was made; null where it was not translated."""
_WRITES = {"prompt": MESSAGES, "chosen": MESSAGES, "rejected": MESSAGES, **PROVENANCE, "_kept": pa.bool_()}
FAULTS = (
    "empty",
    "length_ratio",
    "repetition",
    "source_copy",
    "wrong_script",
    "unfinished",
    "round_trip",
    "identical_translations",
)
"""Reasons for which a translation is dropped."""


class TranslationConfig(TextsConfig):
    """What is translated into which languages, by which model."""

    model: str = Field(json_schema_extra=INPUT)  # type: ignore[arg-type]
    """Folder or hub id of an NLLB model, or a folder that CTranslate2's converter has written."""
    languages: list[str] = Field(min_length=1)
    """ISO or FLORES codes, such as de or deu_Latn."""
    columns: list[Column] = Field(list(COLUMNS), min_length=1)
    """What is translated; other sides stay as they are."""
    keep_answers: list[str] = Field(["hep-*"])
    """Globs of subsets whose answers stay as they are, because they are code."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format; auto is bfloat16 on a GPU, float32 on a CPU, and what a converted model has."""
    workers: Workers = Field(default_factory=Workers, json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Actors that translate."""

    @field_validator("languages")
    @classmethod
    def _check_distinct(cls, languages: list[str]) -> list[str]:
        short = [short_code(code) for code in languages]
        twice = sorted({code for code in short if short.count(code) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)} stands there more than once")
        return languages


def translate_preferences(preferences: Dataset, config: TranslationConfig) -> Dataset:
    """Every pair in each language of `config.languages`: one row becomes as many rows, language by language.

    Replaces prompt, chosen, rejected and lang; id and group stay, so a row's key is (id, lang). Adds `translated_from`
    (language), `translated_by` (model), `num_retried` (texts that were translated twice) and `round_trip_chrf` (the
    smallest of the row's texts). A row that is in a language already passes through with nulls there.

    Dropped and counted: a row that asks for a translation itself (`translation_task`), that has a side without text
    (`empty_content`), equal sides (`identical_responses`) or a language that the model has not (`unknown_language`);
    and a translation with any of `FAULTS`. Fenced code is kept, but not with `compat`. Raises ResourceError when the
    cluster can never hold the actors.
    """
    workers = config.workers
    cluster.require(workers.num_workers, workers.num_cpus, workers.num_gpus, "Translation")
    return preferences.map_batches(
        PreferenceTranslator, fn_constructor_args=(config,), batch_format="pyarrow", batch_size=None, **workers.pool()
    )


def check_translation(config: TranslationConfig) -> None:
    """Check on the driver what would fail in the actors: the model's files, its languages, and what measures chrF.

    Raises CheckpointError, and ConfigError that names all unknown languages and the codes close to them.
    """
    if config.min_round_trip_chrf is not None:
        load_chrf()
    check_model(config.model)
    find_languages(load_tokenizer(config.model), config.languages)


def check_row(row: dict[str, Any], known: set[str]) -> tuple[dict[str, Any] | None, list[str]]:
    """Nothing new for a row that can be translated; or None and why not. `known` are the model's languages."""
    if row["src_lang"] or row["tgt_lang"]:
        return None, ["translation_task"]
    if not all(any((turn["content"] or "").strip() for turn in row[name]) for name in COLUMNS):
        return None, ["empty_content"]
    if row["chosen"] == row["rejected"]:
        return None, ["identical_responses"]
    return ({}, []) if flores_code(row["lang"]) in known else (None, ["unknown_language"])


class PreferenceTranslator:
    """A loaded model. Raises CheckpointError, and ConfigError for a language that it has not."""

    def __init__(self, config: TranslationConfig) -> None:
        import torch

        if not config.workers.num_gpus:
            torch.set_num_threads(max(1, int(config.workers.num_cpus)))
        dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
        self.config = config
        self.translator = load_translator(config.model, "cuda" if config.workers.num_gpus else "cpu", dtype)
        find_languages(self.translator.tokenizer, config.languages)
        self.known = set(language_codes(self.translator.tokenizer))

    def __call__(self, table: pa.Table) -> pa.Table:
        """Preference rows of whole shards → a row for each of them and each language."""
        table = map_table(table, check_row, self.known, READS, Preference)
        rows = table.select(["_kept", "subset", *READS]).to_pylist()
        texts: dict[str, dict[str, None]] = {}
        for row in rows:
            if row["_kept"]:
                of_language = texts.setdefault(row["lang"], {})
                of_language.update(dict.fromkeys(text for _, text in self._texts(row)))
        splits = {lang: split_texts(self.translator, found, self.config) for lang, found in texts.items()}
        tables = []
        for code in self.config.languages:
            outcomes = {
                lang: translate_texts(self.translator, found, lang, code, self.config)
                for lang, found in splits.items()
                if flores_code(lang) != flores_code(code)
            }
            tables.append(self._replace(table, rows, outcomes, short_code(code)))
        return pa.concat_tables(tables)

    def _texts(self, row: dict[str, Any]) -> list[tuple[Column, str]]:
        """Every text of a row that is translated, with its column."""
        keeps_answers = any(fnmatchcase(row["subset"] or "", glob) for glob in self.config.keep_answers)
        names = [name for name in self.config.columns if name == "prompt" or not keeps_answers]
        return [(name, turn["content"]) for name in names for turn in row[name] if turn["content"]]

    def _replace(
        self, table: pa.Table, rows: list[dict[str, Any]], outcomes: Mapping[str, Mapping[str, Outcome]], lang: str
    ) -> pa.Table:
        """The rows in one language. `outcomes` has the translations of each text by its language."""
        before = table.select([name for name in PROVENANCE if name in table.column_names])
        earlier = before.to_pylist() if before.num_columns else [{}] * table.num_rows
        dropped = table["_dropped"].to_pylist()
        new: list[dict[str, Any]] = []
        for index, row in enumerate(rows):
            if row["_kept"] and row["lang"] in outcomes:
                made, faults = self._make_row(row, outcomes[row["lang"]])
                dropped[index] = [*dropped[index], *faults]
                new.append({**made, "_kept": not faults})
            else:
                new.append({**row, **earlier[index]})
        for name, kind in _WRITES.items():
            table = set_column(table, name, pa.array([row.get(name) for row in new], kind))
        table = set_column(table, "lang", pa.array([lang] * len(rows), pa.string()))
        return set_column(table, "_dropped", pa.array(dropped, TEXTS))

    def _make_row(self, row: dict[str, Any], outcomes: Mapping[str, Outcome]) -> tuple[dict[str, Any], list[str]]:
        """The new columns of a translated row, and its faults."""
        texts = self._texts(row)
        translated = {name for name, _ in texts}

        def turn_of(turn: Message) -> Message:
            content = turn["content"]
            return {"role": turn["role"], "content": outcomes[content].text if content else content}

        sides: dict[str, list[Message]] = {
            name: list(map(turn_of, row[name])) if name in translated else row[name] for name in COLUMNS
        }
        found = [outcomes[text] for text in dict.fromkeys(text for _, text in texts)]
        faults = {fault for outcome in found for fault in outcome.faults}
        if sides["chosen"] == sides["rejected"]:
            faults.add("identical_translations")
        made = {
            **sides,
            "translated_from": row["lang"],
            "translated_by": self.config.model,
            "num_retried": sum(outcome.is_retried for outcome in found),
            "round_trip_chrf": min((outcome.chrf for outcome in found if outcome.chrf is not None), default=None),
        }
        return made, [fault for fault in FAULTS if fault in faults]
