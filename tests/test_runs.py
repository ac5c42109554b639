"""Runs: shards, completion, resume, counted drops."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import Field

from rayrm import files, runs
from rayrm.config import TEMPLATE, load_config
from rayrm.errors import ConfigError, EvaluationError, OutputExistsError, SchemaError
from rayrm.quarantine import quarantine_path, read_dropped
from rayrm.rows import Candidates, Prompt, RowType, map_rows, map_table
from rayrm.runs import Committing, RowsJob, shard_path, start_run, transform_rows
from rayrm.shards import list_shards, read_shard, read_table


def prompts(num_rows):
    return pa.table(
        {
            "id": [f"r{i}" for i in range(num_rows)],
            "group": [f"g{i}" for i in range(num_rows)],
            "prompt": [[{"role": "user", "content": f"text {i}"}] for i in range(num_rows)],
            "lang": ["de"] * num_rows,
            "extra": list(range(num_rows)),
        }
    )


@pytest.fixture
def folder(tmp_path):
    pq.write_table(prompts(50), tmp_path / "rows.parquet")
    return tmp_path


def answer(row, config):
    """Two candidates; every tenth row is dropped, and every fifth loses a candidate."""
    number = int(row["id"][1:])
    if number % 10 == 0:
        return None, ["tenth"]
    return {"candidates": [row["id"]]}, ["fifth"] if number % 5 == 0 else []


class Answer:
    """Counts its calls in a file, as a model stage that must not be called twice for a shard."""

    def __init__(self, log):
        self.log = log

    def __call__(self, table):
        with open(self.log, "a") as handle:
            handle.writelines(f"{i}\n" for i in table["id"].to_pylist())
        return map_table(table, answer, None, ["id"], Candidates)


def run(config, log):
    return transform_rows(
        config,
        Prompt,
        Candidates,
        lambda rows: rows.map_batches(
            Answer, fn_constructor_args=(str(log),), batch_format="pyarrow", batch_size=None, concurrency=1
        ),
    )


@pytest.mark.ray
def test_a_run_is_resumed_shard_by_shard_and_counts_exactly(folder, ray_cluster):
    config = RowsJob(input=str(folder / "rows.parquet"), output=str(folder / "out"), shard_rows=8)
    done = run(config, folder / "calls")
    assert done["counts"] == {"read": 50, "written": 45, "dropped": {"fifth": 5, "tenth": 5}, "status": {}}
    kept = [f"r{i}" for i in range(50) if i % 10]
    table = read_table(str(folder / "out"))
    assert table["id"].to_pylist() == kept
    assert table["extra"].to_pylist() == [i for i in range(50) if i % 10]
    assert not {"_shard", "_kept", "_dropped"} & set(table.column_names)

    before = {p.name: p.stat().st_mtime_ns for p in (folder / "out").glob("shard-*")}
    (folder / "out" / "run.json").unlink()
    (folder / "out" / "shard-00002-of-00007.parquet").unlink()
    (folder / "calls").unlink()
    assert run(config, folder / "calls")["counts"] == done["counts"]
    assert sorted((folder / "calls").read_text().split()) == sorted(f"r{i}" for i in range(16, 24))
    assert read_table(str(folder / "out"))["id"].to_pylist() == kept
    after = {p.name: p.stat().st_mtime_ns for p in (folder / "out").glob("shard-*")}
    assert {name for name in after if after[name] != before[name]} == {"shard-00002-of-00007.parquet"}

    (folder / "calls").unlink()
    run(config, folder / "calls")
    assert not (folder / "calls").exists(), "a complete run calls no model"


@pytest.mark.ray
def test_another_config_or_input_is_refused_by_field(folder, ray_cluster):
    config = RowsJob(input=str(folder / "rows.parquet"), output=str(folder / "out"), shard_rows=25)
    run(config, folder / "calls")
    with pytest.raises(OutputExistsError, match="shard_rows: 25 there, 10 here"):
        run(config.model_copy(update={"shard_rows": 10}), folder / "calls")
    pq.write_table(prompts(51), folder / "rows.parquet")
    with pytest.raises(OutputExistsError, match=r"inputs\.input"):
        run(config, folder / "calls")
    assert read_table(str(folder / "out")).num_rows == 45


class Doubling(RowsJob):
    """Two rows of each, and what is dropped is kept."""

    keeps_dropped = True

    def rows_per_row(self):
        return 2


def double(table):
    table = map_table(table, answer, None, ["id"], Candidates)
    return pa.concat_tables([table, table])


@pytest.mark.ray
def test_a_stage_may_make_several_rows_of_each_and_keep_what_it_drops(folder, ray_cluster):
    config = Doubling(input=str(folder / "rows.parquet"), output=str(folder / "out"), shard_rows=16)

    def run_doubled():
        return transform_rows(
            config, Prompt, Candidates, lambda rows: rows.map_batches(double, batch_format="pyarrow", batch_size=None)
        )

    counts = {"read": 50, "written": 90, "dropped": {"fifth": 10, "tenth": 10}, "status": {}}
    assert run_doubled()["counts"] == counts
    names = [f"shard-0000{i}-of-00004.json" for i in range(4)]
    assert sorted(path.name for path in (folder / "out" / "quarantine").iterdir()) == names
    dropped = list(read_dropped(config.output))
    assert [row["id"] for row in dropped] == ["r0", "r10", "r0", "r10", "r20", "r30", "r20", "r30", "r40", "r40"]
    assert dropped[0] == {
        **{"id": "r0", "group": "g0", "prompt": [{"role": "user", "content": "text 0"}], "lang": "de", "extra": 0},
        **dict.fromkeys(["source", "reference", "anchor", "src_lang", "tgt_lang", "subset", "candidates"]),
        "dropped": ["tenth"],
    }
    assert read_table(config.output).num_rows == 90, "the quarantine is not read as rows"

    (folder / "out" / "run.json").unlink()
    (folder / "out" / "shard-00001-of-00004.parquet").unlink()
    assert run_doubled()["counts"] == counts
    assert list(read_dropped(config.output)) == dropped


def test_dropped_rows_are_in_the_quarantine_before_their_shard_is_in_place(tmp_path, monkeypatch):
    committing = Committing(str(tmp_path), 3, 1, keeps_dropped=True)
    table = map_table(Prompt.conform(prompts(12)), answer, None, ["id"], Candidates)
    shard, quarantine = shard_path(str(tmp_path), 0, 3), quarantine_path(str(tmp_path), 0, 3)

    def fail(*_):
        raise OSError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(runs.pq, "write_table", fail)
        with pytest.raises(OSError, match="power cut"):
            runs._commit_block(table, committing, Candidates, [12, 12, 12])
    assert files.exists(quarantine) and not files.exists(shard)
    # The next try finds other faults.
    fewer = table.set_column(table.column_names.index("_kept"), "_kept", pa.array([True] * 12))
    assert runs._commit_block(fewer, committing, Candidates, [12, 12, 12])["num_rows"].to_pylist() == [12]
    assert files.exists(shard) and list(read_dropped(str(tmp_path))) == []
    with pytest.raises(RuntimeError, match="shard 0 came with 12 of its 24 rows"):
        runs._commit_block(table, committing._replace(rows_per_row=2), Candidates, [12, 12, 12])


class Templated(RowsJob):
    """A job with a template."""

    chat_template: str | None = Field(None, json_schema_extra=TEMPLATE)
    """Its name or file."""


def test_a_template_file_is_an_input_and_a_templates_name_is_not(folder):
    def begin(template):
        words = [f"input={folder}/rows.parquet", f"output={folder}/out", f"chat_template={template}"]
        return start_run(load_config(Templated, None, words))

    path = folder / "own.jinja"
    path.write_text("{{ messages }}")
    assert begin(path) and begin(path)
    path.write_text("{{ messages | length }}")
    with pytest.raises(OutputExistsError, match=r"inputs\.chat_template"):
        begin(path)
    with pytest.raises(OutputExistsError, match="chat_template: .* there, 'chatml' here"):
        begin("chatml")


@pytest.mark.ray
def test_all_rows_filtered_is_an_error_with_the_reasons(folder, ray_cluster):
    config = RowsJob(input=str(folder / "rows.parquet"), output=str(folder / "none"))
    with pytest.raises(EvaluationError, match="50 rows read, 0 written, dropped: 50 all; relax the filter"):
        transform_rows(
            config, Prompt, Candidates, lambda rows: map_rows(rows, drop_all, None, reads=["id"], writes=Candidates)
        )
    assert not (folder / "none" / "run.json").exists()


def drop_all(row, config):
    return None, ["all"]


def test_missing_column_wrong_type_empty_and_unreadable_input(folder):
    def job(name):
        return RowsJob(input=str(folder / name), output=str(folder / "out"))

    pq.write_table(prompts(5).drop_columns("prompt"), folder / "missing.parquet")
    pq.write_table(prompts(5).set_column(0, "id", pa.array([1, 2, 3, 4, 5])), folder / "type.parquet")
    pq.write_table(prompts(0), folder / "empty.parquet")
    (folder / "broken.parquet").write_bytes(b"PAR1 nothing")
    (folder / "empty.jsonl").write_bytes(b"")
    (folder / "broken.jsonl").write_bytes(b'{"id": ')
    cases = {
        "missing.parquet": (SchemaError, "lacks prompt; found id, group, lang, extra"),
        "type.parquet": (SchemaError, "Column 'id' of .* is int64, and a Prompt row needs string"),
        "empty.parquet": (SchemaError, "holds no rows"),
        "empty.jsonl": (SchemaError, "holds no rows"),
        "broken.parquet": (SchemaError, "cannot be read as parquet"),
        "broken.jsonl": (SchemaError, "cannot be read as jsonl"),
        "nowhere": (ConfigError, "There is nothing at"),
    }
    for name, (error, message) in cases.items():
        with pytest.raises(error, match=message):
            transform_rows(job(name), Prompt, Candidates, lambda rows: rows)
    assert not (folder / "out").exists(), "a refused run leaves nothing behind"


def test_the_second_file_of_a_folder_and_damaged_pages_are_found_too(folder):
    mixed = folder / "mixed"
    mixed.mkdir()
    pq.write_table(prompts(5), mixed / "a.parquet")
    pq.write_table(prompts(5).drop_columns("prompt"), mixed / "b.parquet")
    with pytest.raises(SchemaError, match=r"b\.parquet' is not a file of Prompt rows: it lacks prompt"):
        transform_rows(RowsJob(input=str(mixed), output=str(folder / "o")), Prompt, Candidates, lambda rows: rows)
    pq.write_table(prompts(500), folder / "damaged.parquet")
    content = bytearray((folder / "damaged.parquet").read_bytes())
    content[4:2000] = bytes(1996)
    (folder / "damaged.parquet").write_bytes(content)
    with pytest.raises(SchemaError, match="damaged.parquet' cannot be read as parquet"):
        read_shard(list_shards(str(folder / "damaged.parquet"), 100)[0])


def test_neither_of_input_and_output_holds_the_other_and_foreign_rows_are_not_claimed(folder):
    for name in ("", "deep/er"):
        with pytest.raises(ConfigError, match="neither may hold the other"):
            start_run(RowsJob(input=str(folder), output=str(folder / name)))
    (folder / "full").mkdir()
    pq.write_table(prompts(5), folder / "full" / "mine.parquet")
    with pytest.raises(OutputExistsError, match=r"holds '.*mine\.parquet', and no run that wrote it"):
        start_run(RowsJob(input=str(folder / "rows.parquet"), output=str(folder / "full")))


@pytest.mark.ray
def test_rows_with_null_where_none_may_be_are_dropped_and_counted(folder, ray_cluster):
    table = prompts(12)
    for name, place in (("id", 3), ("prompt", 4), ("group", 4)):
        values = table[name].to_pylist()
        values[place] = None
        kind = table.schema.field(name).type
        table = table.set_column(table.column_names.index(name), name, pa.array(values, kind))
    pq.write_table(table, folder / "nulls.parquet")
    done = run(RowsJob(input=str(folder / "nulls.parquet"), output=str(folder / "out")), folder / "calls")
    assert done["counts"]["dropped"] == {"fifth": 1, "null_group": 1, "null_id": 1, "null_prompt": 1, "tenth": 2}
    assert done["counts"]["written"] == 8


def test_an_unfinished_run_or_the_output_itself_is_no_input(folder):
    files.write_json(str(folder / "half" / "started.json"), {})
    pq.write_table(prompts(5), folder / "half" / "shard-00000-of-00002.parquet")
    with pytest.raises(ConfigError, match="a run that has not finished"):
        transform_rows(RowsJob(input=str(folder / "half"), output=str(folder / "o")), Prompt, Prompt, lambda rows: rows)
    with pytest.raises(ConfigError, match="a run that has not finished"):
        transform_rows(RowsJob(input=str(folder), output=f"{folder}-all"), Prompt, Prompt, lambda rows: rows)
    with pytest.raises(ConfigError, match="a run never writes where it reads"):
        same = str(folder / "rows.parquet")
        transform_rows(RowsJob(input=same, output=same), Prompt, Prompt, lambda rows: rows)


def test_a_checkpoint_is_finished_when_it_says_so_itself(folder):
    files.write_json(str(folder / "trained" / "started.json"), {})
    files.write_json(str(folder / "trained" / "model" / "rayrm.json"), {"digest": "d"})
    shutil.copy(folder / "rows.parquet", folder / "trained" / "model")
    assert start_run(RowsJob(input=str(folder / "trained" / "model"), output=f"{folder}-out"))


def test_a_shard_is_the_same_whatever_the_row_groups(folder):
    for size in (7, 20, 1000):
        pq.write_table(prompts(100), folder / "groups.parquet", row_group_size=size)
        for shard_rows in (9, 33, 200):
            shards = list_shards(str(folder / "groups.parquet"), shard_rows)
            assert [read_shard(shard)["extra"].to_pylist() for shard in shards] == [
                list(range(i, min(i + shard_rows, 100))) for i in range(0, 100, shard_rows)
            ]
    assert read_shard(shards[0], limit=3)["extra"].to_pylist() == [0, 1, 2]


def test_shards_cover_files_of_any_kind_once(folder):
    with (folder / "more.jsonl").open("w") as handle:
        handle.writelines(json.dumps({"id": f"j{i}"}) + "\n" for i in range(7))
    pq.write_table(prompts(20), folder / "grouped.parquet", row_group_size=6)
    shards = list_shards(str(folder), 9)
    assert sum(shard.num_rows for shard in shards) == 50 + 7 + 20
    assert [s.num_rows for s in shards if s.path.endswith("grouped.parquet")] == [9, 9, 2]
    assert read_table(str(folder / "grouped.parquet"))["id"].to_pylist() == [f"r{i}" for i in range(20)]


def test_atomic_file_leaves_nothing_of_a_failed_write(tmp_path):
    with pytest.raises(RuntimeError, match="power"), files.atomic_file(str(tmp_path / "x")) as handle:
        handle.write(b"half")
        raise RuntimeError("power cut")
    assert list(tmp_path.iterdir()) == []


def test_rows_work_on_other_filesystems():
    files.write_json("memory://bucket/a.json", {"a": 1})
    assert files.read_json("memory://bucket/a.json") == {"a": 1}
    with files.atomic_file("memory://bucket/rows.parquet") as handle:
        pq.write_table(prompts(3), handle)
    assert read_table("memory://bucket")["id"].to_pylist() == ["r0", "r1", "r2"]


def test_nullable_columns_are_added_and_large_types_cast():
    row = RowType("Thing", {"id": pa.string(), "note": pa.string()}, ["note"])
    table = row.conform(pa.table({"id": pa.array(["a"], pa.large_string())}))
    assert table.schema.field("id").type == pa.string() and table["note"].to_pylist() == [None]
