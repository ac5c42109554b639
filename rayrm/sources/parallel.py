"""Parallel text → Prompt rows: direct translation into and from English, or between other languages by way of it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import pyarrow as pa
from pydantic import Field, model_validator

from rayrm import files
from rayrm.config import Config
from rayrm.errors import SchemaError
from rayrm.matrix import LangPair
from rayrm.prompts import Instructions, anchored_prompt, direct_prompt, diverse_prompt
from rayrm.rows import HIDDEN, Prompt

ENGLISH = "en"


class ParallelColumns(Config):
    """What the columns of a parallel file are called."""

    src_text: str = "src_text"
    """Text to translate."""
    trg_text: str = "trg_text"
    """Its translation."""
    src_lang: str = "src_lang"
    """Language code of the text; any code will do."""
    trg_lang: str = "trg_lang"
    """Language code of the translation."""
    id: str | None = "id"
    """Column of the rows' own ids, unique within a target language; null, or without a column `id`, ids are made
    from the content."""


class ParallelConfig(Config):
    """How parallel rows become prompts."""

    type: Literal["direct", "anchored"] = "direct"
    """direct: each row is a prompt with a reference. anchored: each text that has an English side is a prompt into
    every other language, with the English side as its anchor and, unless `references` says so, without a reference."""
    references: bool = False
    """With type anchored, take what the input has in the target language for the same English side as the reference,
    and only targets that have one. Holds all texts beside English in memory."""
    prompt: Literal["anchored", "direct"] = "anchored"
    """With type anchored, what a prompt shows: the source and its anchor, or the source alone."""
    columns: ParallelColumns = ParallelColumns()
    """What the columns of the input are called."""
    languages: tuple[str, ...] | None = None
    """Take only these languages, and English; left out, all that the input has."""
    max_rows_per_lang_pair: int | None = Field(None, ge=1)
    """Take only the first so many rows of a language pair, repeated sources not counted."""
    instructions: Instructions = "fixed"
    """Wording of direct prompts: the recipe's fixed one, or one of twenty chosen by a row's id."""
    seed: int = 0
    """Seed of `instructions: diverse`."""

    @model_validator(mode="after")
    def _check_instructions(self) -> ParallelConfig:
        if self.type == "direct" and (self.references or self.prompt == "direct"):
            raise ValueError("references and prompt say something of anchored rows; set type: anchored")
        if self.type == "anchored" and self.prompt == "anchored" and self.instructions == "diverse":
            raise ValueError("anchored prompts have one wording only; set instructions: fixed")
        return self


class Text(NamedTuple):
    """A text to translate, and where it came from."""

    row: int
    """Row in its table."""
    source: str
    other: str
    """The other side of the row."""
    lang: str
    other_lang: str
    row_id: str | None
    """The row's own id; for an anchored prompt with the direction of the row, whose sides may share an id."""


class Selection:
    """Decides row by row what is taken, and counts the rest. One goes once through a file, in order.

    Remembers a digest of every source that it took, about 100 bytes a row.
    """

    def __init__(
        self, config: ParallelConfig, targets: tuple[str, ...], references: Mapping[tuple[str, str], str] | None = None
    ) -> None:
        self.config = config
        self.targets = targets
        self.references = references
        """What `find_references` found; None to take every target, without a reference."""
        self.read = 0
        """Rows seen."""
        self.dropped: Counter[str] = Counter()
        """Rows left out, by reason."""
        self.wanted: set[LangPair] = set()
        """Language pairs that the input asks for, whether or not a row of theirs was taken."""
        self.taken: Counter[LangPair] = Counter()
        self._sources: set[bytes] = set()
        self._ids: set[bytes] = set()

    def select(self, table: pa.Table, passage: int = 0) -> list[Text]:
        """The texts of a table that are taken. Anchored rows go twice: first those into English, then the others."""
        names = self.config.columns
        columns = [table[n].to_pylist() for n in (names.src_text, names.trg_text, names.src_lang, names.trg_lang)]
        has_ids = names.id is not None and names.id in table.column_names
        ids = table[names.id].to_pylist() if has_ids else [None] * table.num_rows
        found = []
        for index, (src_text, trg_text, src_lang, trg_lang, own_id) in enumerate(zip(*columns, ids, strict=True)):
            row_id = None if own_id is None else str(own_id)
            text = Text(index, src_text, trg_text, src_lang, trg_lang, row_id)
            if self.config.type == "anchored":
                if (src_lang == ENGLISH) != (passage == 1):
                    continue
                row_id = row_id and f"{row_id}/{src_lang}-{trg_lang}"
                text = text._replace(row_id=row_id)
                if passage == 1:
                    text = Text(index, trg_text, src_text, trg_lang, src_lang, row_id)
            self.read += 1
            reason = self._judge(text)
            if reason is None:
                self._check_id(text)
                found.append(text)
            else:
                self.dropped[reason] += 1
        return found

    def pairs(self, text: Text) -> list[LangPair]:
        """The language pairs that a text is translated in."""
        if self.config.type == "direct":
            return [(text.lang, text.other_lang)]
        targets = [target for target in self.targets if target != text.lang]
        return [(text.lang, target) for target in targets if self.references is None or self.reference(text, target)]

    def reference(self, text: Text, target: str) -> str | None:
        """The translation of a text into `target`, as far as it is known."""
        if self.config.type == "direct":
            return text.other
        return None if self.references is None else self.references.get((text.other, target))

    def _judge(self, text: Text) -> str | None:
        is_direct = self.config.type == "direct"
        if not text.lang or not text.other_lang:
            return "no_language"
        if text.lang == text.other_lang:
            return "same_language"
        if not is_direct and text.other_lang != ENGLISH:
            return "no_english"
        known = self.config.languages
        if known is not None and not {text.lang, text.other_lang} <= {ENGLISH, *known}:
            return "other_language"
        self.wanted.update(self.pairs(text))
        if not (text.source or "").strip():
            return "no_source"
        if not (text.other or "").strip():
            return "no_reference" if is_direct else "no_anchor"
        if self.references is not None and not self.pairs(text):
            return "no_reference"
        pair = (text.lang, text.other_lang)
        key = _digest(*pair, text.source)
        if key in self._sources:
            return "duplicate_source"
        if self.config.max_rows_per_lang_pair is not None and self.taken[pair] >= self.config.max_rows_per_lang_pair:
            return "over_limit"
        self._sources.add(key)
        self.taken[pair] += 1
        return None

    def _check_id(self, text: Text) -> None:
        if text.row_id is None:
            return
        key = _digest(text.row_id, text.other_lang)
        if key in self._ids:
            raise SchemaError(
                f"The id '{text.row_id}' stands for two rows into '{text.other_lang}', and ids are unique within a "
                "target language; set prompts.columns.id=null to make ids from the content."
            )
        self._ids.add(key)


def _digest(*parts: str) -> bytes:
    return hashlib.blake2b("\x1f".join(parts).encode(), digest_size=12).digest()


def check_columns(schema: pa.Schema, columns: ParallelColumns, where: str) -> None:
    """Raise SchemaError unless `schema` has the columns of a parallel file, as text."""
    names = columns.model_dump()
    wanted = {field: names[field] for field in ("src_text", "trg_text", "src_lang", "trg_lang")}
    if columns.id != "id" and columns.id is not None:
        wanted["id"] = columns.id
    missing = [f"{name} (columns.{field})" for field, name in wanted.items() if name not in schema.names]
    if missing:
        raise SchemaError(
            f"{where} lacks {', '.join(missing)}; found {', '.join(schema.names) or 'no column'}; "
            "name its columns by prompts.columns."
        )
    for field, name in wanted.items():
        kind = schema.field(name).type
        is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)
        if field != "id" and not is_text:
            raise SchemaError(f"Column '{name}' of {where} is {kind}, and a parallel file needs text there.")


def find_targets(tables: Iterable[pa.Table], config: ParallelConfig, where: str) -> tuple[str, ...]:
    """The languages beside English that anchored prompts go between: those of the config, or all in `tables`.

    Raises SchemaError when `where` lacks a column.
    """
    if config.languages is not None:
        return tuple(lang for lang in dict.fromkeys(config.languages) if lang != ENGLISH)
    found: set[str] = set()
    for table in tables:
        check_columns(table.schema, config.columns, where)
        for name in (config.columns.src_lang, config.columns.trg_lang):
            found.update(table[name].unique().to_pylist())
    return tuple(sorted(lang for lang in found if lang and lang != ENGLISH))


def find_references(tables: Iterable[pa.Table], config: ParallelConfig, where: str) -> dict[tuple[str, str], str]:
    """(English text, language) → the first text of `tables` that has that English side; for prompts between languages.

    Raises SchemaError when `where` lacks a column.
    """
    found: dict[tuple[str, str], str] = {}
    for table in tables:
        check_columns(table.schema, config.columns, where)
        names = config.columns
        columns = [table[n].to_pylist() for n in (names.src_text, names.trg_text, names.src_lang, names.trg_lang)]
        for src_text, trg_text, src_lang, trg_lang in zip(*columns, strict=True):
            if src_lang == ENGLISH:
                src_text, trg_text, trg_lang, src_lang = trg_text, src_text, src_lang, trg_lang
            if trg_lang == ENGLISH and src_lang and trg_text and (src_text or "").strip():
                found.setdefault((trg_text, src_lang), src_text)
    return found


def select_texts(
    read: Callable[[], Iterable[pa.Table]], selection: Selection, where: str
) -> Iterator[tuple[pa.Table, list[Text]]]:
    """Go through a file as often as its prompts need, with what is taken of each table.

    `read` gives the tables of the file, the same each time. Raises SchemaError when `where` lacks a column.
    """
    for passage in range(1 if selection.config.type == "direct" else 2):
        for table in read():
            check_columns(table.schema, selection.config.columns, where)
            yield table, selection.select(table, passage)


def make_prompts(table: pa.Table, texts: list[Text], selection: Selection) -> pa.Table:
    """Prompt rows for the texts taken of a table; columns that no Prompt has ride along."""
    config = selection.config
    rows, indices = [], []
    for text in texts:
        for _, tgt_lang in selection.pairs(text):
            rows.append(_make_row(text, tgt_lang, config, selection.reference(text, tgt_lang)))
            indices.append(text.row)
    subset = table["subset"].cast(pa.string()).take(indices) if "subset" in table.column_names else None
    prompts = pa.Table.from_pylist(rows, pa.schema([(n, t) for n, t in Prompt.columns.items() if n != "subset"]))
    prompts = prompts.append_column("subset", pa.nulls(len(rows), pa.string()) if subset is None else subset)
    own = {*config.columns.model_dump().values(), *Prompt.columns, *HIDDEN}
    for column in table.column_names:
        if column not in own:
            prompts = prompts.append_column(table.schema.field(column), table[column].take(indices))
    return prompts


def _make_row(text: Text, tgt_lang: str, config: ParallelConfig, reference: str | None) -> dict[str, Any]:
    is_direct = config.type == "direct"
    src_lang = text.lang
    english = [side for side, lang in ((text.other, text.other_lang), (text.source, text.lang)) if lang == ENGLISH]
    if text.row_id is None:
        row_id = files.digest([src_lang, tgt_lang, text.source, text.other])
    else:
        row_id = text.row_id if is_direct else f"{text.row_id}/{tgt_lang}"
    if not is_direct and config.prompt == "anchored":
        prompt = anchored_prompt(text.source, text.other, src_lang, tgt_lang)
    elif config.instructions == "diverse":
        prompt = diverse_prompt(text.source, src_lang, tgt_lang, row_id, config.seed)
    else:
        prompt = direct_prompt(text.source, src_lang, tgt_lang)
    return {
        "id": row_id,
        # Without an English side, both directions of a row must fall into one group all the same.
        "group": files.digest(english[0] if english else min(text.source, text.other)),
        "prompt": [{"role": "user", "content": prompt}],
        "source": text.source,
        "reference": reference,
        "anchor": None if is_direct else text.other,
        "src_lang": src_lang,
        "tgt_lang": tgt_lang,
        "lang": tgt_lang,
    }
