"""Preferences go to people as CSV files and come back with their answers."""

import csv

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import read_annotations, write_annotations
from rayrm import files
from rayrm.errors import ConfigError, EvaluationError, OutputExistsError, SchemaError
from rayrm.evaluation.annotation.annotations import (
    Answer,
    SamplingConfig,
    compare_answers,
    disagreements,
    make_task,
    model_sides,
    read_answers,
    sample_by_credit,
)
from rayrm.evaluation.results import JUDGE, write_results
from rayrm.evaluation.sheets import read_sheet, write_sheet
from rayrm.rows import Preference

CREDITS = [1.0, 1.0, 1.0, 0.0, 0.0, 0.5]


def message(text, role="assistant"):
    return [{"role": role, "content": text}]


def preference(number, lang="de"):
    return {
        "id": f"r{number}",
        "group": f"g{number}",
        "prompt": message(f"Frage {number}, „ja“ oder\nnein?", "user"),
        "chosen": message(f"right {number}"),
        "rejected": message(f"wrong {number}"),
        "margin": None,
        "src_lang": None,
        "tgt_lang": None,
        "lang": lang,
        "subset": "chat",
    }


def result(number, credit, model="judge", lang="de", **columns):
    return {
        "model": model,
        "model_type": JUDGE,
        "benchmark": None,
        "set": "s",
        "id": f"r{number}",
        "group": f"g{number}",
        "lang": lang,
        "subset": "chat",
        "num_correct": 1,
        "rewards": None,
        "lengths": [7, 7],
        "credit": credit,
        "status": "ok",
        **columns,
    }


# Choosing.


def test_rows_are_equally_many_for_each_credit():
    credits = {f"r{number}": credit for number, credit in enumerate(CREDITS)}
    # Three kinds: 9 // 3 would be 3 of each, and the rarest kind has one.
    found = sample_by_credit(credits, SamplingConfig(num_rows=9), "de")
    assert sorted(credits[name] for name in found) == [0, 0.5, 1]
    two = {name: credit for name, credit in credits.items() if credit != 0.5}
    assert sorted(two[name] for name in sample_by_credit(two, SamplingConfig(num_rows=5), "de")) == [0, 0, 1, 1]


def test_the_choice_hangs_on_ids_and_the_seed_alone():
    credits = {f"r{number}": float(number % 2) for number in range(200)}
    found = sample_by_credit(credits, SamplingConfig(num_rows=40), "de")
    backwards = dict(reversed(list(credits.items())))
    assert sample_by_credit(backwards, SamplingConfig(num_rows=40), "de") == found
    assert sample_by_credit(credits, SamplingConfig(num_rows=40, seed=1), "de") != found
    kinds = [credits[name] for name in found]
    assert kinds != sorted(kinds), "rows of a kind must not stand together"


def test_too_few_rows_are_refused():
    with pytest.raises(EvaluationError, match="1 rows for 2 kinds of credit in de leave none for each; raise num_rows"):
        sample_by_credit({"a": 1.0, "b": 0.0}, SamplingConfig(num_rows=1), "de")
    with pytest.raises(EvaluationError, match="No row in fr has both a credit and its texts"):
        sample_by_credit({}, SamplingConfig(), "fr")


def test_sides_are_swapped_for_about_half_of_the_rows_and_the_key_knows():
    tasks = [make_task(preference(number), result(number, 1.0), 0) for number in range(200)]
    for task in tasks:
        right = task.completion_a if task.chosen == "A" else task.completion_b
        assert right == f"right {task.id[1:]}"
    assert 75 < sum(task.chosen == "A" for task in tasks) < 125


def test_several_turns_show_their_roles():
    row = preference(0) | {"prompt": [*message("a", "user"), *message("b"), *message("c", "user")]}
    assert make_task(row, result(0, 1.0), 0).prompt == "[user]\na\n\n[assistant]\nb\n\n[user]\nc"


# Answers.


def key_row(name, chosen="A", credit="1.0"):
    return {"id": name, "set": "s", "subset": "", "chosen": chosen, "credit": credit}


def test_answers_are_read_and_missing_ones_told_from_unreadable_ones():
    key = [key_row(name) for name in "abcdef"]
    said = {"a": "A", "b": " b ", "c": "", "d": "both", "e": "2"}
    rows = [{"id": name, "preferred": word} for name, word in reversed(said.items())]
    found = read_answers(rows, key, "file")
    assert [(x.id, x.preferred, x.is_readable) for x in found] == [
        ("a", "A", True),
        ("b", "B", True),
        ("c", None, True),
        ("d", None, False),
        ("e", "B", True),
        ("f", None, True),
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": "x", "preferred": "A"}], "Row 'x' of file is no row of the answer key"),
        ([{"id": "a", "preferred": "A"}] * 2, "Row 'a' of file comes twice"),
        ([{"id": "a", "choice": "A"}], "file lacks the column 'preferred'; found id, choice"),
    ],
)
def test_files_that_were_not_written_here_are_refused(rows, message):
    with pytest.raises(SchemaError, match=message):
        read_answers(rows, [key_row("a")], "file")


def test_agreement_counts_neither_missing_nor_unreadable_answers():
    answers = [
        Answer("a", "A", 1.0, "A", True),
        Answer("b", "B", 0.0, "A", True),
        Answer("c", "A", 0.5, "A", True),
        Answer("d", "A", 1.0, None, True),
        Answer("e", "A", 1.0, None, False),
    ]
    found = compare_answers("de", answers, {"judge": {"a": 1.0, "b": 0.0, "c": 0.5, "d": 0.0}})
    assert (found.num_rows, found.num_answers, found.num_missing, found.num_unreadable) == (5, 3, 1, 1)
    assert (found.gold.num_rows, found.gold.share) == (3, pytest.approx(2 / 3))
    assert (found.decided.num_rows, found.decided.share) == (2, 0.5)
    # The judge names A for the first row, and A, the wrong side, for the second.
    assert found.models["judge"] == (2, 1.0, 1.0)
    assert compare_answers("de", answers[3:], {}).gold == (0, None, None)


def test_disagreements_are_answers_that_name_another_side():
    answers = [Answer("a", "A", 1.0, "B", True), Answer("b", "A", 0.0, "B", True), Answer("c", "A", 1.0, None, True)]
    assert [x.id for x in disagreements(answers, ["A", "A", "A"])] == ["a", "b"]
    assert model_sides(answers, {"a": 1.0, "b": 0.0, "c": 0.5}) == ["A", "B", None]
    assert [x.id for x in disagreements(answers, model_sides(answers, {"a": 1.0, "b": 0.0}))] == ["a"]


# Files.


def test_sheets_come_back_as_a_spreadsheet_saves_them(tmp_path):
    path = str(tmp_path / "a.csv")
    write_sheet(path, ["id", "text"], [["a", 'ja; "nein",\nвсё'], ["b", None]])
    assert (tmp_path / "a.csv").read_bytes().startswith(b"\xef\xbb\xbfid,text\n")
    assert read_sheet(path) == [{"id": "a", "text": 'ja; "nein",\nвсё'}, {"id": "b", "text": ""}]
    (tmp_path / "b.csv").write_bytes(b'id;preferred\r\na;"A"\r\n;\r\nb\r\n')
    assert read_sheet(str(tmp_path / "b.csv")) == [{"id": "a", "preferred": "A"}, {"id": "b", "preferred": ""}]


def test_broken_sheets_are_refused(tmp_path):
    (tmp_path / "a.csv").write_bytes("id,text\nä,b\n".encode("latin-1"))
    with pytest.raises(SchemaError, match="is not UTF-8"):
        read_sheet(str(tmp_path / "a.csv"))
    (tmp_path / "b.csv").write_text("id,text\na,b,c\n")
    with pytest.raises(SchemaError, match="Row 2 of '.*b.csv' has more cells than the header"):
        read_sheet(str(tmp_path / "b.csv"))


# Both jobs.


@pytest.fixture
def folder(tmp_path):
    rows = [preference(number, lang) for lang in ("de", "fr") for number in range(6)]
    schema = pa.schema([(name, kind) for name, kind in Preference.columns.items() if kind is not None])
    (tmp_path / "preferences").mkdir()
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "preferences" / "rows.parquet")
    judged = [result(n, credit, lang=lang) for lang in ("de", "fr") for n, credit in enumerate(CREDITS)]
    write_results(str(tmp_path / "judge"), judged)
    write_results(str(tmp_path / "model"), [result(n, 1.0, "org/model") for n in range(6)])
    write_annotations.main(
        [f"preferences={tmp_path}/preferences", f"results={tmp_path}/judge", f"output={tmp_path}/tasks"]
    )
    return tmp_path


def fill_in(folder, lang, answer):
    """Fill in a file as a person would: `answer` of the row's id and its right side."""
    with (folder / "tasks" / f"{lang}-answer_key.csv").open(encoding="utf-8-sig", newline="") as handle:
        chosen = {row["id"]: row["chosen"] for row in csv.DictReader(handle)}
    rows = read_sheet(str(folder / "tasks" / f"{lang}-annotation.csv"))
    filled = [[*list(row.values())[:-1], answer(row["id"], chosen[row["id"]])] for row in rows]
    write_sheet(str(folder / "filled" / f"{lang}-annotation.csv"), list(rows[0]), filled)


def read(folder, *more):
    words = [f"answer_key={folder}/tasks", f"annotations={folder}/filled", f"output={folder}/people"]
    read_annotations.main([*words, f"results=[{folder}/judge, {folder}/model]", *more])
    return files.read_json(str(folder / "people" / "metrics.json"))


def test_round_trip_through_both_jobs(folder, capsys):
    tasks = read_sheet(str(folder / "tasks" / "de-annotation.csv"))
    assert len(tasks) == 3 and all(row["preferred"] == "" for row in tasks)
    fill_in(folder, "de", lambda name, chosen: chosen)
    metrics = read(folder)
    assert list(metrics) == ["de"], "nobody handed in French"
    assert metrics["de"]["gold"] == {"num_rows": 3, "share": 1.0, "kappa": 1.0}
    assert metrics["de"]["decided"]["num_rows"] == 2
    assert metrics["de"]["models"]["org/model"]["share"] == 1.0
    # The judge is right on one of its two rows with a verdict.
    assert (metrics["de"]["models"]["judge"]["num_rows"], metrics["de"]["models"]["judge"]["share"]) == (2, 0.5)
    assert read_sheet(str(folder / "people" / "de-disagreements-gold.csv")) == []
    wrong = read_sheet(str(folder / "people" / "de-disagreements-judge.csv"))
    assert [row["id"] for row in wrong] == [row["id"] for row in tasks if row["id"] in ("r3", "r4")]
    assert "wrong" in wrong[0]["completion_a"] + wrong[0]["completion_b"]
    assert "<h1>What people prefer</h1>" in (folder / "people" / "report.html").read_text()
    assert "100.0% (3)" in capsys.readouterr().out


def test_other_answers_are_other_work(folder):
    fill_in(folder, "de", lambda name, chosen: chosen)
    read(folder)
    read(folder)
    fill_in(folder, "de", lambda name, chosen: "")
    with pytest.raises(OutputExistsError, match="annotations.de"):
        read(folder)


def test_files_may_be_filled_in_where_they_were_written(folder):
    fill_in(folder, "fr", lambda name, chosen: "B")
    (folder / "filled" / "fr-annotation.csv").replace(folder / "tasks" / "fr-annotation.csv")
    (folder / "tasks" / "de-annotation.csv").unlink()
    metrics = read(folder, f"annotations={folder}/tasks")
    assert metrics["fr"]["num_answers"] == 3
    assert files.read_json(str(folder / "people" / files.RUN_MARK))["inputs"].keys() >= {"annotations.fr"}


def test_faults_of_the_jobs_are_told(folder):
    with pytest.raises(ConfigError, match="holds no file '{lang}-annotation.csv'"):
        read(folder)
    words = [f"preferences={folder}/preferences", f"output={folder}/other"]
    with pytest.raises(ConfigError, match="'model' is 'x', and the results hold judge; name one"):
        write_annotations.main([*words, f"results={folder}/judge", "model=x"])
    write_results(str(folder / "two"), [result(0, 1.0), result(0, 1.0, "other")])
    with pytest.raises(ConfigError, match="'model' is not given, and the results hold judge, other; name one"):
        write_annotations.main([*words, f"results={folder}/two"])
    write_results(str(folder / "far"), [result(99, 1.0)])
    with pytest.raises(ConfigError, match="ids must match"):
        write_annotations.main([*words, f"results={folder}/far"])
    assert not (folder / "other").exists()
