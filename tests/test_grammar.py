"""The demo corpus: agreement, one sentence a meaning, and the count of errors."""

import json
from collections import Counter, defaultdict

import pyarrow.parquet as pq
import pytest

from jobs import write_corpus
from rayrm.config import build_config
from rayrm.errors import ConfigError
from rayrm.rows import Preference
from rayrm.scoring.grammar import GrammarScorer, GrammarScoring, count_errors
from rayrm.shards import read_table
from rayrm.sources.grammar import (
    _LEXICON,
    Entry,
    GrammarConfig,
    Meaning,
    Phrase,
    draw_meanings,
    render_sentence,
    write_sentences,
)
from rayrm.sources.grammar_pairs import spoil


def entry(kind, english):
    return next(e for e in _LEXICON[kind] if e.line.startswith(f"{english} "))


def phrase(determiner, adjective, noun, kind):
    adjective = entry(f"of {kind}", adjective) if adjective else None
    return Phrase(entry("determiner", determiner), adjective, entry(kind, noun))


def sentences(meaning):
    return [render_sentence(meaning, lang) for lang in ("en", "de", "ru", "es")]


def test_determiners_adjectives_and_verbs_agree():
    meaning = Meaning(
        phrase("my", "old", "sister", "person"),
        entry("with object", "buys"),
        True,
        (phrase("this", "red", "hat", "thing"), phrase("our", None, "key", "thing")),
        time=Entry("yesterday | gestern | вчера | ayer"),
    )
    assert sentences(meaning) == [
        "My old sister bought this red hat and our key yesterday.",
        "Meine alte Schwester kaufte gestern diesen roten Hut und unseren Schlüssel.",
        "Вчера моя старая сестра покупала эту красную шляпу и наш ключ.",
        "Mi hermana vieja compró este sombrero rojo y nuestra llave ayer.",
    ]


def test_neuter_and_masculine_agree():
    meaning = Meaning(
        phrase("our", "small", "child", "person"),
        entry("with object", "sees"),
        False,
        (phrase("my", "big", "window", "thing"),),
        place=entry("place", "at the market"),
    )
    assert sentences(meaning) == [
        "Our small child sees my big window at the market.",
        "Unser kleines Kind sieht mein großes Fenster auf dem Markt.",
        "Наш маленький ребёнок видит моё большое окно на рынке.",
        "Nuestro niño pequeño ve mi ventana grande en el mercado.",
    ]


def test_intransitive_sentence():
    meaning = Meaning(
        phrase("this", "tired", "teacher", "person"),
        entry("without object", "works"),
        True,
        (),
        entry("place", "in the garden"),
    )
    assert sentences(meaning)[1:] == [
        "Dieser müde Lehrer arbeitete im Garten.",
        "Этот усталый учитель работал в саду.",
        "Este profesor cansado trabajó en el jardín.",
    ]


def test_every_sentence_has_one_translation_and_four_to_twelve_words():
    table = write_sentences(GrammarConfig(num_sentences=5000)).to_pylist()
    translations = defaultdict(set)
    for row in table:
        translations[row["src_lang"], row["trg_lang"], row["src_text"]].add(row["trg_text"])
        assert 4 <= len(row["src_text"].split()) <= 12
        assert "  " not in row["src_text"] and row["src_text"].endswith(".")
    assert max(len(found) for found in translations.values()) == 1
    assert Counter((r["src_lang"], r["trg_lang"]) for r in table) == dict.fromkeys(
        [("en", "de"), ("de", "en"), ("en", "ru"), ("ru", "en"), ("en", "es"), ("es", "en")], 5000
    )
    assert len(translations) == 30000


def test_seed_decides_and_a_longer_draw_begins_with_the_shorter():
    short = list(draw_meanings(GrammarConfig(num_sentences=20, seed=1)))
    assert short == list(draw_meanings(GrammarConfig(num_sentences=50, seed=1)))[:20]
    assert short != list(draw_meanings(GrammarConfig(num_sentences=20, seed=2)))


def test_unknown_language_is_refused():
    with pytest.raises(ConfigError, match="the grammar has de, ru, es"):
        build_config(GrammarConfig, {"languages": ["fr"]}, "the test")


@pytest.mark.parametrize(
    ("candidate", "errors"),
    [
        ("Mein Bruder sieht heute dieses Buch.", 0),
        ("mein  bruder sieht heute dieses buch .", 0),
        ("Meine Bruder sieht heute dieses Buch.", 1),
        ("Bruder sieht heute dieses Buch.", 1),
        ("Mein lieber Bruder sieht heute dieses Buch.", 1),
        ("Heute mein Bruder sieht dieses Buch.", 1),
        ("Mein Bruder sieht heute dieses Buch", 1),
        ("Mein Bruder Bruder sieht heute das Buch.", 2),
        ("", 7),
        ("x", 7),
        ("My brother sees this book today.", 6),
    ],
)
def test_errors_are_counted_in_words(candidate, errors):
    reference = "Mein Bruder sieht heute dieses Buch."
    assert count_errors(candidate, reference) == errors
    assert count_errors(reference, candidate) == errors


def test_scorer_gives_minus_the_errors():
    rows = [
        {"reference": "a b c", "candidates": ["a b c", "a x c", " "]},
        {"reference": None, "candidates": ["a"]},
        {"reference": "a", "candidates": None},
    ]
    assert GrammarScorer(GrammarScoring()).score(rows) == [
        [(0.0, "ok"), (-1.0, "ok"), (None, "empty")],
        [(None, "error")],
        [],
    ]


def test_job_writes_the_corpus_once(tmp_path):
    words = [f"output={tmp_path / 'corpus'}", "grammar.num_sentences=10", "grammar.languages=[ru]"]
    write_corpus.main(words)
    path = tmp_path / "corpus" / "corpus.parquet"
    written = path.stat().st_mtime_ns
    assert read_table(str(tmp_path / "corpus")).num_rows == 20
    assert pq.read_schema(path).names == ["src_text", "trg_text", "src_lang", "trg_lang"]
    assert json.loads((tmp_path / "corpus" / "run.json").read_text())["counts"] == {"written": 20}
    write_corpus.main(words)
    assert path.stat().st_mtime_ns == written


def test_pairs_are_the_same_in_every_language(tmp_path):
    write_corpus.main([f"output={tmp_path / 'pairs'}", "rows=preferences", "grammar.num_sentences=30"])
    Preference.check_files(str(tmp_path / "pairs"))
    rows = read_table(str(tmp_path / "pairs")).to_pylist()
    assert len(rows) == 30 * 4 and {row["lang"] for row in rows} == {"en", "de", "ru", "es"}
    for row in rows:
        right, wrong = row["chosen"][0]["content"], row["rejected"][0]["content"]
        assert row["prompt"][0]["content"] == right != wrong
        words, spoilt = right.lower().removesuffix(".").split(), wrong.lower().removesuffix(".").split()
        if row["subset"] == "swapped":
            assert sorted(words) == sorted(spoilt)
        elif row["subset"] == "dropped":
            assert len(words) == len(spoilt) + 1 and not set(spoilt) - set(words)
    subsets = {(row["id"], row["subset"]) for row in rows}
    assert len(subsets) == 30


def test_a_sentence_is_spoilt_at_its_place():
    assert spoil("The old man sleeps.", "dropped", 0.0) == "Old man sleeps."
    assert spoil("The old man sleeps.", "dropped", 0.99) == "The old sleeps."
    assert spoil("The old man sleeps.", "swapped", 0.0) == "Old the man sleeps."
    assert spoil("The old man sleeps.", "swapped", 0.99) == "The old sleeps man."
