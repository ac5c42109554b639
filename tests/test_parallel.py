"""Parallel text becomes Prompt rows: direct, anchored, counted, and with errors that name what is wrong."""

import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import prepare_prompts
from rayrm import files
from rayrm.config import build_config
from rayrm.errors import ConfigError, OutputExistsError, SchemaError
from rayrm.matrix import count_languages, draw_languages, summarise_languages
from rayrm.rows import Prompt
from rayrm.shards import list_shards, read_table
from rayrm.sources.parallel import ParallelConfig, Selection, find_references, find_targets, make_prompts, select_texts
from rayrm.sources.tables import rebatch

ROWS = [
    ("Hallo.", "Hello.", "de", "en"),
    ("Hello.", "Hallo.", "en", "de"),
    ("Hallo.", "Hi.", "de", "en"),
    ("Hello.", "Bonjour.", "en", "fr"),
    ("Chat {x}.", "Cat {x}.", "fr", "en"),
    ("Sawubona.", "Hello.", "zu", "en"),
]


def parallel(rows, **more):
    names = ("src_text", "trg_text", "src_lang", "trg_lang")
    columns = {name: pa.array([row[i] for row in rows], pa.string()) for i, name in enumerate(names)}
    return pa.table({**columns, **more})


def prepare(table, **options):
    """(rows, selection) without a job."""
    config = build_config(ParallelConfig, options, "the test")
    targets = find_targets([table], config, "x") if config.type == "anchored" else ()
    selection = Selection(config, targets, find_references([table], config, "x") if config.references else None)
    tables = [make_prompts(t, texts, selection) for t, texts in select_texts(lambda: [table], selection, "x")]
    return pa.concat_tables(tables).to_pylist(), selection


def test_direct_rows_are_kept_as_they_are():
    rows, selection = prepare(parallel(ROWS))
    assert [(r["source"], r["reference"], r["src_lang"], r["tgt_lang"], r["lang"]) for r in rows] == [
        (s, t, a, b, b) for s, t, a, b in ROWS if t != "Hi."
    ]
    assert selection.dropped == {"duplicate_source": 1}
    first = rows[0]
    assert first["prompt"] == [
        {"role": "user", "content": "Translate the following text from German into English:\nGerman: Hallo.\nEnglish:"}
    ]
    assert "from zu into English:\nzu: Sawubona." in rows[-1]["prompt"][0]["content"]
    assert "French: Chat {x}." in rows[3]["prompt"][0]["content"]
    assert first["anchor"] is None and first["subset"] is None
    assert len({row["id"] for row in rows}) == 5


def test_group_is_that_of_the_english_side():
    rows, _ = prepare(parallel([*ROWS, ("Hallo.", "Bonjour.", "de", "fr"), ("Bonjour.", "Hallo.", "fr", "de")]))
    groups = {(r["src_lang"], r["tgt_lang"]): r["group"] for r in rows}
    hello = files.digest("Hello.")
    assert {pair for pair, group in groups.items() if group == hello} == {
        ("de", "en"),
        ("en", "de"),
        ("en", "fr"),
        ("zu", "en"),
    }
    assert groups["de", "fr"] == groups["fr", "de"] == files.digest("Bonjour.")


def test_what_is_left_out_is_counted_by_reason():
    rows = [
        (None, "a", "de", "en"),
        ("  ", "a", "de", "en"),
        ("a", None, "de", "en"),
        ("a", "", "de", "en"),
        ("a", "b", None, "en"),
        ("a", "b", "en", "en"),
        ("a", "b", "ja", "en"),
        ("a", "b", "de", "en"),
        ("a", "c", "de", "en"),
        ("a ", "c", "de", "en"),
        ("d", "c", "de", "en"),
    ]
    kept, selection = prepare(parallel(rows), languages=["de", "ru"], max_rows_per_lang_pair=2)
    assert [row["source"] for row in kept] == ["a", "a "]
    assert selection.read == 11
    assert selection.dropped == {
        "no_source": 2,
        "no_reference": 2,
        "no_language": 1,
        "same_language": 1,
        "other_language": 1,
        "duplicate_source": 1,
        "over_limit": 1,
    }


def test_anchored_rows_go_between_all_other_languages():
    rows, selection = prepare(parallel(ROWS), type="anchored")
    assert [(r["source"], r["anchor"], r["src_lang"], r["tgt_lang"]) for r in rows] == [
        ("Hallo.", "Hello.", "de", "fr"),
        ("Hallo.", "Hello.", "de", "zu"),
        ("Chat {x}.", "Cat {x}.", "fr", "de"),
        ("Chat {x}.", "Cat {x}.", "fr", "zu"),
        ("Sawubona.", "Hello.", "zu", "de"),
        ("Sawubona.", "Hello.", "zu", "fr"),
        ("Bonjour.", "Hello.", "fr", "de"),
        ("Bonjour.", "Hello.", "fr", "zu"),
    ]
    # Twice the German text: once with another English side, once from the other direction.
    assert selection.dropped == {"duplicate_source": 2}
    assert selection.read == 6
    assert rows[0]["reference"] is None and rows[0]["group"] == files.digest("Hello.")
    assert rows[0]["prompt"][0]["content"] == (
        "Given a German text and its English version as a reference, translate the source text into French.\n"
        "German Source: Hallo.\nEnglish Reference: Hello.\nFrench Translation:"
    )
    assert len({(row["id"], row["lang"]) for row in rows}) == 8


def test_anchored_rows_may_have_the_text_of_the_same_english_as_reference():
    table = parallel([*ROWS[:2], ROWS[3], ("Hund.", "Dog.", "de", "en")])
    rows, _ = prepare(table, type="anchored", references=True, prompt="direct")
    # "Dog." has no French side, and "Hello." has one from English and a German one.
    assert [(r["source"], r["anchor"], r["reference"], r["src_lang"], r["tgt_lang"]) for r in rows] == [
        ("Hallo.", "Hello.", "Bonjour.", "de", "fr"),
        ("Bonjour.", "Hello.", "Hallo.", "fr", "de"),
    ]
    assert "Hello." not in rows[0]["prompt"][0]["content"]
    shown, _ = prepare(table, type="anchored", references=True)
    assert [row["id"] for row in shown] == [row["id"] for row in rows] and "Hello." in shown[0]["prompt"][0]["content"]


def test_anchored_keeps_rows_into_english_before_rows_from_english():
    rows, _ = prepare(
        parallel([("From.", "a", "en", "de"), ("a", "Into.", "de", "en"), ("b", "B.", "fr", "en")]), type="anchored"
    )
    assert {row["anchor"] for row in rows if row["src_lang"] == "de"} == {"Into."}


def test_anchored_rows_without_english_are_counted():
    rows, selection = prepare(
        parallel([("a", "b", "de", "fr"), ("a", "c", "de", "en"), ("x", "", "fr", "en")]), type="anchored"
    )
    assert [(r["src_lang"], r["tgt_lang"]) for r in rows] == [("de", "fr")]
    assert selection.dropped == {"no_english": 1, "no_anchor": 1}


def test_own_ids_are_kept_and_unique():
    table = parallel(ROWS[:2], id=[7, 8])
    assert [row["id"] for row in prepare(table)[0]] == ["7", "8"]
    expanded, _ = prepare(parallel([*ROWS[3:5], ROWS[0]], id=[7, 7, 7]), type="anchored")
    assert {(r["id"], r["lang"]) for r in expanded} == {
        ("7/fr-en/de", "de"),
        ("7/de-en/fr", "fr"),
        ("7/en-fr/de", "de"),
    }
    twice = parallel([ROWS[0], ROWS[4]], id=["a", "a"])
    with pytest.raises(SchemaError, match="'a' stands for two rows into 'en'"):
        prepare(twice)
    assert len(prepare(twice, columns={"id": None})[0]) == 2


def test_other_columns_ride_along():
    rows, _ = prepare(parallel(ROWS, domain=list("abcdef"), subset=["s"] * 6, prompt=[1] * 6))
    assert [row["domain"] for row in rows] == ["a", "b", "d", "e", "f"]
    assert {row["subset"] for row in rows} == {"s"}
    assert all(isinstance(row["prompt"], list) for row in rows)
    assert "src_text" not in rows[0]


def test_diverse_instructions_hang_on_the_id():
    table = parallel([(f"Satz {i}.", f"Sentence {i}.", "de", "en") for i in range(100)])
    rows, _ = prepare(table, instructions="diverse", seed=1)
    again, _ = prepare(table.slice(50), instructions="diverse", seed=1)
    assert rows[50:] == again
    assert len({row["prompt"][0]["content"].replace(row["source"], "") for row in rows}) > 10
    with pytest.raises(ConfigError, match="one wording only"):
        build_config(ParallelConfig, {"type": "anchored", "instructions": "diverse"}, "the test")
    with pytest.raises(ConfigError, match="set type: anchored"):
        build_config(ParallelConfig, {"references": True}, "the test")


def test_rebatch_keeps_rows_and_order():
    tables = [pa.table({"a": list(range(i, i + 3))}) for i in range(0, 12, 3)]
    sizes = [table["a"].to_pylist() for table in rebatch(tables, 5)]
    assert sizes == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11]]


def test_language_matrix_has_english_first_and_names_the_empty():
    table = pa.table(
        {"src_lang": ["de", "en", "en", None], "tgt_lang": ["en", "de", "de", None], "lang": ["en", "de", "de", "fr"]}
    )
    counts = count_languages([table, table.slice(0, 1)])
    assert counts == Counter({("de", "en"): 2, ("en", "de"): 2, ("-", "fr"): 1})
    facts = summarise_languages(counts, wanted=[("en", "de"), ("en", "xx")])
    assert list(facts["counts"]) == ["en", "-", "de"]
    assert facts["shares"]["en"] == {"de": 0.4}
    assert facts["empty"] == ["en-xx"]
    drawn = draw_languages(facts).splitlines()
    assert drawn[0] == "Rows by language, 5 in all (rows: source, columns: target)"
    assert drawn[2].split() == ["en", "de", "fr", "total"]
    assert drawn[3].split() == ["en", "0", "2", "0", "2"]
    assert "40.00 %" in drawn[-6] and drawn[-1] == "Without a row: en-xx"


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_job_writes_shards_counts_and_languages(tmp_path, form, capsys):
    table = parallel(ROWS, note=list("abcdef"))
    path = tmp_path / f"rows.{form}"
    if form == "parquet":
        pq.write_table(table, path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    words = [f"input={path}", f"output={tmp_path / 'out'}", "shard_rows=2", "prompts.languages=[de,fr,ru]"]
    prepare_prompts.main(words)
    assert "Rows by language, 4 in all" in capsys.readouterr().out
    done = json.loads((tmp_path / "out" / "run.json").read_text())
    assert done["counts"] == {
        "read": 6,
        "written": 4,
        "dropped": {"duplicate_source": 1, "other_language": 1},
        "status": {},
    }
    assert done["languages"]["counts"] == {"en": {"de": 1, "fr": 1}, "de": {"en": 1}, "fr": {"en": 1}}
    assert [shard.num_rows for shard in list_shards(str(tmp_path / "out"), 10)] == [2, 2]
    rows = read_table(str(tmp_path / "out"))
    Prompt.check(rows.schema, "the output")
    assert rows["note"].to_pylist() == ["a", "b", "d", "e"]
    # A shard that is there is not written again; what lacks is.
    kept, lost = sorted((tmp_path / "out").glob("*.parquet"))
    before = kept.stat().st_mtime_ns
    lost.unlink()
    (tmp_path / "out" / "run.json").unlink()
    prepare_prompts.main(words)
    assert read_table(str(tmp_path / "out")).equals(rows) and kept.stat().st_mtime_ns == before
    with pytest.raises(OutputExistsError, match="shard_rows: 2 there, 3 here"):
        prepare_prompts.main([*words, "shard_rows=3"])


def test_empty_language_pairs_are_facts(tmp_path):
    pq.write_table(parallel([("a", "A", "de", "en"), ("", "B", "fr", "en")]), tmp_path / "rows.parquet")
    prepare_prompts.main([f"input={tmp_path / 'rows.parquet'}", f"output={tmp_path / 'out'}"])
    assert json.loads((tmp_path / "out" / "run.json").read_text())["languages"]["empty"] == ["fr-en"]


def test_columns_can_be_named(tmp_path):
    table = parallel(ROWS).rename_columns(["text", "translation", "from", "to"])
    pq.write_table(table, tmp_path / "rows.parquet")
    names = ("src_text=text", "trg_text=translation", "src_lang=from", "trg_lang=to")
    prepare_prompts.main(
        [f"input={tmp_path / 'rows.parquet'}", f"output={tmp_path / 'out'}", *(f"prompts.columns.{n}" for n in names)]
    )
    assert read_table(str(tmp_path / "out")).num_rows == 5


def test_bad_input_is_named_and_nothing_is_written(tmp_path):
    out = f"output={tmp_path / 'out'}"

    def refuse(error, match, name, table, *words):
        pq.write_table(table, tmp_path / name)
        with pytest.raises(error, match=match):
            prepare_prompts.main([f"input={tmp_path / name}", out, *words])

    good = parallel(ROWS)
    refuse(
        SchemaError,
        r"lacks trg_text \(columns.trg_text\); found src_text",
        "a.parquet",
        good.drop_columns(["trg_text"]),
    )
    refuse(SchemaError, "'src_text' of .* is int64", "b.parquet", good.set_column(0, "src_text", pa.array(range(6))))
    refuse(SchemaError, "gives no prompt: 0 rows read", "c.parquet", good.slice(0, 0))
    refuse(SchemaError, "dropped: 6 other_language", "d.parquet", good, "prompts.languages=[ja]")
    refuse(SchemaError, r"lacks key \(columns.id\)", "e.parquet", good, "prompts.columns.id=key")
    refuse(ConfigError, "is no hub dataset", "f.parquet", good, "split=train")
    (tmp_path / "torn.parquet").write_bytes((tmp_path / "f.parquet").read_bytes()[:-20])
    with pytest.raises(SchemaError, match="cannot be read as parquet"):
        prepare_prompts.main([f"input={tmp_path / 'torn.parquet'}", out])
    with pytest.raises(ConfigError, match="nothing at"):
        prepare_prompts.main([f"input={tmp_path / 'nowhere.parquet'}", out])
    assert not (tmp_path / "out").exists()


def test_hub_dataset_is_loaded_with_its_split(tmp_path, monkeypatch):
    import datasets

    asked = []

    def load(path, name, split):
        asked.append((path, split))
        if path == "some/missing":
            raise datasets.exceptions.DatasetNotFoundError("Dataset 'some/missing' doesn't exist on the Hub.")
        return datasets.Dataset(parallel(ROWS))

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.chdir(tmp_path)
    prepare_prompts.main(["input=some/corpus", "split=dev", f"output={tmp_path / 'out'}"])
    assert read_table(str(tmp_path / "out")).num_rows == 5
    assert json.loads((tmp_path / "out" / "run.json").read_text())["inputs"] == {"input": "hub:some/corpus"}
    with pytest.raises(ConfigError, match="nor does the hub give one: Dataset 'some/missing' doesn't exist"):
        prepare_prompts.main(["input=some/missing", f"output={tmp_path / 'other'}"])
    assert asked == [("some/corpus", "dev"), ("some/missing", "train")]


def test_real_captions(tmp_path, shared_data):
    words = [f"input={shared_data / 'parallel' / 'test.parquet'}", f"output={tmp_path / 'out'}"]
    prepare_prompts.main([*words, "prompts.type=anchored", "prompts.max_rows_per_lang_pair=100"])
    rows = read_table(str(tmp_path / "out"))
    pairs = Counter(zip(rows["src_lang"].to_pylist(), rows["tgt_lang"].to_pylist(), strict=True))
    assert set(pairs) == {(a, b) for a in ("cs", "de", "fr") for b in ("cs", "de", "fr") if a != b}
    assert set(pairs.values()) == {100}


def test_input_may_lie_above_the_working_folder(tmp_path, monkeypatch):
    pq.write_table(parallel(ROWS), tmp_path / "rows.parquet")
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    prepare_prompts.main(["input=../rows.parquet", "output=out"])
    assert read_table("out").num_rows == 5
