"""Cleaning: what happens to a text, which candidates go out, and that every one of them is counted."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import clean_candidates
from rayrm.cleaning import CleaningConfig, clean_row, clean_table, clean_text
from rayrm.config import build_config
from rayrm.errors import ConfigError, SchemaError
from rayrm.languages import script_fraction
from rayrm.shards import read_table


def config(**values):
    return build_config(CleaningConfig, values, "the test")


def clean(candidates, lang="de", source="A dog.", **options):
    new, reasons = clean_row({"source": source, "lang": lang, "candidates": candidates}, config(**options))
    return (None if new is None else new["candidates"]), reasons


def test_text_is_cut_at_the_first_stop_string_and_stripped():
    options = config(stop=["</s>", "###"])
    assert clean_text(" Ein Hund. </s> ### more", options) == "Ein Hund."
    assert clean_text("Ein ### Hund</s>", options) == "Ein"
    assert clean_text("Ein </S> Hund", options) == "Ein </S> Hund"
    assert clean_text("</s>Ein Hund", options) == ""


@pytest.mark.parametrize(
    ("rule", "expected"), [("keep", "a\n\nb\r\nc"), ("join", "a; b; c"), ("space", "a b c"), ("cut", "a")]
)
def test_line_breaks(rule, expected):
    assert clean_text("\na\n\nb\r\nc\n", config(newlines=rule)) == expected


def test_unicode_line_breaks_count_as_breaks():
    assert clean_text("a\u2028b \x85 c", config(newlines="join")) == "a; b; c"


def test_duplicates_and_empty_candidates_go_out_in_order():
    kept, reasons = clean(["b", "a", " b ", "", None, "a", "c"])
    assert kept == ["b", "a", "c"]
    assert reasons == ["duplicate", "empty", "empty", "duplicate"]


def test_case_and_normal_forms_are_different_texts():
    kept, reasons = clean(["é", "e\u0301", "É"])
    assert (len(kept), reasons) == (3, [])


def test_row_without_candidates_is_dropped():
    assert clean([]) == (None, ["no_candidates"])
    assert clean(None) == (None, ["no_candidates"])
    assert clean(["</s>"], stop=["</s>"]) == (None, ["empty", "no_candidates"])


def test_copies_of_the_source_go_out_only_when_asked():
    assert clean(["a  DOG.", "Ein Hund."]) == (["a  DOG.", "Ein Hund."], [])
    assert clean(["a  DOG.", "Ein Hund."], drop_source_copies=True) == (["Ein Hund."], ["source_copy"])


def test_wrong_script_goes_out():
    texts = ["Собака спит.", "A dog sleeps.", "Собака Rex спит.", "123!"]
    assert clean(texts, lang="ru", min_script_fraction=0.5) == (
        ["Собака спит.", "Собака Rex спит.", "123!"],
        ["wrong_script"],
    )
    assert clean(["犬が寝る。", "개"], lang="ja", min_script_fraction=0.5) == (["犬が寝る。"], ["wrong_script"])
    assert script_fraction("Собака Rex", ("CYRILLIC",)) == pytest.approx(6 / 9)


def test_rows_that_a_filter_cannot_judge_pass_it():
    assert clean(["x"], lang="xx", min_script_fraction=0.5) == (["x"], [])
    assert clean(["x"], source=None, drop_source_copies=True) == (["x"], [])


def test_filters_with_nothing_to_look_at_are_refused(tmp_path):
    source = candidates_file(tmp_path / "in.parquet", source=pa.nulls(3, pa.string()), lang=["xx", "xx", "yy"])
    for option, message in [("drop_source_copies=true", "no sources"), ("min_script_fraction=0.5", "is in xx, yy")]:
        with pytest.raises(SchemaError, match=message):
            clean_candidates.main([source, f"output={tmp_path / 'out'}", f"cleaning.{option}"])
    assert not (tmp_path / "out").exists()


def test_counts_of_the_old_candidates_go():
    row = {"source": ["s"], "lang": ["de"], "candidates": [["a", "a"]], "num_unfinished": [1]}
    table = clean_table(pa.table(row), config())
    assert "num_unfinished" not in table.column_names
    assert table["candidates"].to_pylist() == [["a"]]


def test_empty_stop_string_is_refused():
    with pytest.raises(ConfigError, match=r"stop\.0"):
        config(stop=[""])


def candidates_file(path, **more):
    rows = {
        "id": ["0", "1", "2"],
        "group": ["a", "b", "c"],
        "prompt": [[{"role": "user", "content": "p"}]] * 3,
        "source": ["s", "t", "u"],
        "lang": ["de"] * 3,
        "candidates": pa.array([["a", "b", "a"], ["", " "], ["c</s>d"]]),
        **more,
    }
    pq.write_table(pa.table(rows), path)
    return f"input={path}"


@pytest.mark.ray
def test_job_counts_what_it_drops(tmp_path, ray_cluster):
    source = candidates_file(tmp_path / "in.parquet", extra=[1, 2, 3])
    clean_candidates.main([source, f"output={tmp_path / 'out'}", "cleaning.stop=['</s>']"])
    rows = {row["id"]: row for row in read_table(str(tmp_path / "out")).to_pylist()}
    assert {name: row["candidates"] for name, row in rows.items()} == {"0": ["a", "b"], "2": ["c"]}
    assert rows["2"]["extra"] == 3
    counts = json.loads((tmp_path / "out" / "run.json").read_text())["counts"]
    assert (counts["read"], counts["written"]) == (3, 2)
    assert counts["dropped"] == {"duplicate": 1, "empty": 2, "no_candidates": 1}


def test_scored_rows_are_refused(tmp_path):
    source = candidates_file(tmp_path / "in.parquet", scores=[{"bleurt": [1.0]}] * 3)
    with pytest.raises(SchemaError, match="clean before scoring"):
        clean_candidates.main([source, f"output={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()
