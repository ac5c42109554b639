"""Sentences that stand in many languages → Prompt rows in every direction; FLORES-200's folders hold such sentences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import pyarrow as pa

from rayrm import files
from rayrm.errors import ConfigError, SchemaError
from rayrm.languages import LANGUAGES, flores_code
from rayrm.prompts import direct_prompt
from rayrm.rows import Prompt
from rayrm.sources.parallel import ENGLISH


class Sentence(NamedTuple):
    """One sentence in several languages."""

    key: str
    """What its rows' ids begin with."""
    group: str
    """Group of all its rows: the digest of its English text, as parallel text has it."""
    texts: dict[str, str]
    """Language code to text."""


def find_languages(root: str, split: str) -> list[str]:
    """The languages of the table that have a file `<root>/<split>/<code>.<split>`, in the table's order.

    Raises ConfigError when there are fewer than two.
    """
    found = [code for code in LANGUAGES if files.exists(_path(root, split, code))]
    if len(found) < 2:
        raise ConfigError(
            f"'{root}' has {len(found)} files '{split}/<code>.{split}', and a translation needs two languages; give "
            f"the folder that holds '{split}/{flores_code(ENGLISH)}.{split}'."
        )
    return found


def read_flores(root: str, split: str, languages: Sequence[str]) -> list[Sentence]:
    """The sentences of one split of a FLORES-200 folder in some languages, ISO codes.

    Sentences are grouped by their English text where the folder has one, asked for or not. Raises ConfigError for a
    language without a file, and SchemaError for files that do not stand line by line beside one another.
    """
    columns = {code: _read_lines(_path(root, split, code)) for code in languages}
    english = _path(root, split, ENGLISH)
    keys = columns.get(ENGLISH) or (_read_lines(english) if files.exists(english) else columns[languages[0]])
    for code, lines in columns.items():
        if len(lines) != len(keys):
            raise SchemaError(
                f"'{_path(root, split, code)}' has {len(lines):,} lines and another file of the split {len(keys):,}; "
                "all languages of a split have the same sentences."
            )
    return [
        Sentence(f"{split}-{number}", files.digest(key), {code: lines[number] for code, lines in columns.items()})
        for number, key in enumerate(keys)
    ]


def make_directions(sentences: Iterable[Sentence]) -> pa.Table:
    """Prompt rows from each language of a sentence into each other one, with the direct prompt."""
    rows = []
    for key, group, texts in sentences:
        for src_lang, source in texts.items():
            for tgt_lang in texts:
                if src_lang != tgt_lang:
                    prompt = direct_prompt(source, src_lang, tgt_lang)
                    rows.append(
                        {
                            "id": f"{key}/{src_lang}-{tgt_lang}",
                            "group": group,
                            "prompt": [{"role": "user", "content": prompt}],
                            "source": source,
                            "reference": texts[tgt_lang],
                            "src_lang": src_lang,
                            "tgt_lang": tgt_lang,
                            "lang": tgt_lang,
                        }
                    )
    return pa.Table.from_pylist(rows, pa.schema(list(Prompt.columns.items())))


def _path(root: str, split: str, code: str) -> str:
    return files.join(root, split, f"{flores_code(code)}.{split}")


def _read_lines(path: str) -> list[str]:
    fs, inner = files.filesystem(path)
    if not fs.exists(inner):
        raise ConfigError(f"There is no file '{path}'; leave that language out, or name another split.")
    with fs.open(inner, "rb") as handle:
        data = handle.read()
    try:
        # Only "\n" parts sentences: some hold other characters that `splitlines` would part them at.
        lines = [line.strip() for line in data.decode("utf-8").removesuffix("\n").split("\n")]
    except UnicodeDecodeError as error:
        raise SchemaError(f"'{path}' is not UTF-8.") from error
    if "" in lines:
        raise SchemaError(f"Line {lines.index('') + 1} of '{path}' is empty; each line is a sentence.")
    return lines
