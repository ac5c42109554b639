"""Sets of every layout become rows of ours: columns found by name and content, benchmarks from copies, counts."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayrm.errors import ConfigError, SchemaError
from rayrm.evaluation.benchmarks import M_REWARD_BENCH, REWARD_BENCH, REWARD_BENCH_2
from rayrm.evaluation.sets import EvaluatedOn, EvaluationSet, PreparedSets, benchmark_sets, prepare_sets
from rayrm.shards import read_table
from rayrm.sources.detection import find_rows, find_source_columns
from rayrm.sources.preferences import SourceColumns


def user(text):
    return [{"role": "user", "content": text}]


def answer(text):
    return [{"role": "assistant", "content": text}]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prepare(folder, *sets, **fields):
    """Rows by type, and the mark."""
    config = PreparedSets(sets=[EvaluationSet(**part) for part in sets], output=str(folder / "out"), **fields)
    rows = {part.rows: read_table(part.path).to_pylist() for part in prepare_sets(config)}
    return rows, json.loads((folder / "out" / "run.json").read_text())


PAIR = {"chosen": "So.", "rejected": "No."}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Why?", **PAIR},
        {"question": "Why?", **PAIR},
        {"input": "Why?", **PAIR},
        {"prompt": user("Why?"), **PAIR},
        {"chosen": user("Why?") + answer("So."), "rejected": user("Why?") + answer("No.")},
        {"prompt": "Why?", "chosen": user("Why?") + answer("So."), "rejected": user("Why?") + answer("No.")},
        {"prompt": user("Why?"), "chosen": answer("So."), "rejected": answer("No.")},
    ],
    ids=["prompt", "question", "input", "messages", "conversations", "conversations_and_prompt", "answers"],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".json"])
def test_pairs_of_every_shape_give_the_same_row(tmp_path, row, suffix):
    path = write(tmp_path / f"in{suffix}", [row])
    rows, _ = prepare(tmp_path, {"input": path})
    (found,) = rows["preference"]
    assert found["prompt"] == user("Why?")
    assert (found["chosen"], found["rejected"]) == (answer("So."), answer("No."))
    assert (found["lang"], found["set"], found["subset"]) == ("en", "preferences", None)


def test_prompt_goes_before_question_and_subset_before_source(tmp_path):
    row = {"prompt": "Why?", "question": "What?", "subset": "a", "source": "b", "language": "deu_Latn", **PAIR}
    rows, _ = prepare(tmp_path, {"input": write(tmp_path / "in.jsonl", [row])})
    (found,) = rows["preference"]
    assert (found["prompt"], found["subset"], found["lang"]) == (user("Why?"), "a", "de")
    assert json.loads(found["metadata"]) == {"question": "What?"}
    rows, _ = prepare(
        tmp_path / "b", {"input": write(tmp_path / "b" / "in.jsonl", [{**PAIR, "prompt": "Why?", "source": "b"}])}
    )
    assert rows["preference"][0]["subset"] == "b"


def test_conversations_and_lists_of_answers_are_told_from_pairs(tmp_path):
    conversation = {"messages": user("Why?") + answer("So."), "kind": 3}
    lists = {"prompt": "Why?", "chosen": ["So.", "Thus."], "rejected": ["No."], "id": "tied:4", "subset": "Ties"}
    rows, mark = prepare(
        tmp_path,
        {"input": write(tmp_path / "a.jsonl", [conversation]), "name": "a"},
        {"input": write(tmp_path / "b.jsonl", [lists]), "name": "b"},
    )
    (found,) = rows["conversation"]
    assert (found["prompt"], found["candidates"], found["set"]) == (user("Why?"), ["So."], "a")
    assert json.loads(found["metadata"]) == {"kind": 3}
    (found,) = rows["best_of"]
    assert (found["candidates"], found["num_correct"], found["id"]) == (["So.", "Thus.", "No."], 2, "tied:4")
    assert mark["num_rows"] == {"conversation": 1, "best_of": 1}


def test_pairs_go_before_conversations_unless_those_are_wanted(tmp_path):
    row = {"prompt": "Why?", **PAIR, "messages": user("What?") + answer("This.")}
    path = write(tmp_path / "in.jsonl", [row])
    assert prepare(tmp_path, {"input": path})[0].keys() == {"preference"}
    rows, _ = prepare(tmp_path / "b", {"input": path, "rows": "conversation"})
    assert rows["conversation"][0]["candidates"] == ["This."]


def test_a_set_without_answers_is_refused_until_its_columns_are_named(tmp_path):
    path = write(tmp_path / "in.jsonl", [{"prompt": "Why?", "good": "So.", "bad": "No.", "note": 1}])
    with pytest.raises(SchemaError, match=r"no columns chosen and rejected, or messages.*prompt \(string\), good"):
        prepare(tmp_path, {"input": path})
    rows, _ = prepare(tmp_path / "b", {"input": path, "columns": {"chosen": "good", "rejected": "bad"}})
    (found,) = rows["preference"]
    assert found["chosen"] == answer("So.") and json.loads(found["metadata"]) == {"note": 1}
    with pytest.raises(SchemaError, match="lacks nothing"):
        prepare(tmp_path / "c", {"input": path, "columns": {"chosen": "good", "rejected": "bad", "subset": "nothing"}})


def test_conversations_bring_their_prompt_whatever_stands_beside_them(tmp_path):
    row = {"prompt": "id-3", "chosen": user("Why?") + answer("So."), "rejected": user("Why?") + answer("No.")}
    rows, _ = prepare(tmp_path, {"input": write(tmp_path / "in.jsonl", [row])})
    assert rows["preference"][0]["prompt"] == user("Why?")


def test_columns_that_hold_no_text_ride_along_as_metadata(tmp_path):
    row = {"prompt": "Why?", **PAIR, "subset": "a", "source": ["u", "v"], "topic": "t"}
    path = write(tmp_path / "in.jsonl", [row])
    rows, _ = prepare(tmp_path, {"input": path}, keep=["topic"])
    (found,) = rows["preference"]
    assert json.loads(found["metadata"]) == {"source": ["u", "v"]} and found["topic"] == "t"


def test_ids_of_prompts_part_no_rows(tmp_path):
    sides = [{"chosen": f"So {n}.", "rejected": "No."} for n in range(3)]
    rows = [{"prompt": f"Why {i}?", "id": i, **side} for i in range(2) for side in sides]
    found, mark = prepare(tmp_path, {"input": write(tmp_path / "in.jsonl", rows)})
    assert len({row["id"] for row in found["preference"]}) == 6
    (counts,) = mark["sets"].values()
    assert counts["dropped"] == {}


def test_rows_that_are_none_are_counted(tmp_path):
    bad = [
        {"chosen": " ", "rejected": "No."},
        {"chosen": "So.", "rejected": "So."},
        {"chosen": None, "rejected": "No."},
    ]
    rows = [{"prompt": f"Why {i}?", **PAIR} for i in range(5)] + [{"prompt": "Why?", **row} for row in bad]
    found, mark = prepare(tmp_path, {"input": write(tmp_path / "in.jsonl", rows)})
    assert len(found["preference"]) == 5
    (counts,) = mark["sets"].values()
    assert (counts["read"], counts["written"]) == (8, 5)
    assert counts["dropped"] == {"empty_content": 1, "identical_responses": 1, "missing_field": 1}


def test_only_rows_of_the_languages_count(tmp_path):
    rows = [{"prompt": f"Why {i}?", "lang": lang, **PAIR} for i, lang in enumerate(["de", "fr", "de", "el"])]
    path = write(tmp_path / "in.jsonl", rows)
    found, mark = prepare(tmp_path, {"input": path}, languages=["de", "el"])
    assert [row["lang"] for row in found["preference"]] == ["de", "de", "el"]
    (counts,) = mark["sets"].values()
    assert counts["dropped"] == {"other_language": 1}
    with pytest.raises(ConfigError, match="No row of the sets is in one of the languages ja"):
        prepare(tmp_path / "b", {"input": path}, languages=["ja"])
    with pytest.raises(ValueError, match="there is no language xx"):
        EvaluatedOn(sets=[EvaluationSet(input=path)], languages=["de", "xx"], output="x")


def test_ids_of_subsets_are_kept_apart(tmp_path):
    rows = [{"prompt": f"Why {i}?", "id": i % 2, "subset": "ab"[i // 2], **PAIR} for i in range(4)]
    found, _ = prepare(tmp_path, {"input": write(tmp_path / "in.jsonl", rows)})
    assert [row["id"] for row in found["preference"]] == ["a/0", "a/1", "b/0", "b/1"]
    unique = [{**row, "id": i} for i, row in enumerate(rows)]
    found, _ = prepare(tmp_path / "b", {"input": write(tmp_path / "b" / "in.jsonl", unique)})
    assert [row["id"] for row in found["preference"]] == ["0", "1", "2", "3"]


def test_finished_sets_are_not_read_again(tmp_path):
    path = write(tmp_path / "in.jsonl", [{"prompt": "Why?", **PAIR}])
    prepare(tmp_path, {"input": path})
    shard = next((tmp_path / "out" / "preference").glob("*.parquet"))
    before = shard.stat().st_mtime_ns
    prepare(tmp_path, {"input": path})
    assert shard.stat().st_mtime_ns == before


def core_row(number, subset):
    models = {"chosen_model": "human", "rejected_model": "machine"}
    return {"prompt": f"Why {number}?", **PAIR, **models, "subset": subset, "id": number}


def copy_reward_bench(folder):
    """A copy of the layout of RewardBench and of the prior sets on the hub."""
    rows = [core_row(1, "alpacaeval-easy"), core_row(2, "hep-cpp")]
    write(folder / "reward-bench" / "data" / "filtered-00000-of-00001.parquet", rows)
    write(folder / "reward-bench" / "data" / "raw-00000-of-00001.parquet", [core_row(9, "alpacaeval-easy")])
    for name in REWARD_BENCH.prior_sets:
        prior = {"prompt": user(f"Of {name}?"), **PAIR, "subset": "none of it", "id": 1}
        write(folder / "pref-test-sets" / "data" / f"{name}-00000-of-00001.parquet", [prior])
    return str(folder)


def test_reward_bench_is_read_from_a_copy(tmp_path):
    sets = benchmark_sets(REWARD_BENCH, None, copy_reward_bench(tmp_path / "copy"))
    rows, _ = prepare(tmp_path, *(part.model_dump(exclude_unset=True) for part in sets))
    found = rows["preference"]
    assert [row["subset"] for row in found] == ["alpacaeval-easy", "hep-cpp", *REWARD_BENCH.prior_sets]
    assert [row["id"] for row in found[:3]] == ["1", "2", "anthropic_helpful/1"] and {row["set"] for row in found} == {
        "reward_bench"
    }
    assert json.loads(found[0]["metadata"]) == {"chosen_model": "human", "rejected_model": "machine"}


def test_translated_benchmark_has_a_set_for_each_language(tmp_path):
    for code in ("deu_Latn", "ell_Grek"):
        row = {**core_row(30, "alpacaeval-easy"), "language": code, "prompt": f"Why in {code}?"}
        write(tmp_path / "copy" / "multilingual-reward-bench" / code / "test-00000-of-00001.parquet", [row])
    sets = benchmark_sets(M_REWARD_BENCH, ["de", "el"], str(tmp_path / "copy"))
    rows, _ = prepare(tmp_path, *(part.model_dump(exclude_unset=True) for part in sets))
    assert [(row["id"], row["lang"]) for row in rows["preference"]] == [("30", "de"), ("30", "el")]
    assert len(benchmark_sets(M_REWARD_BENCH, None, None)) == 23
    assert benchmark_sets(M_REWARD_BENCH, ["zh"], None)[0].config == "zho_Hans"
    english, german = benchmark_sets(M_REWARD_BENCH, ["de", "en"], None)
    assert (english.input, english.split, english.lang) == ("allenai/reward-bench", "filtered", "en")
    assert (german.name, german.lang) == (english.name, "de")
    with pytest.raises(ConfigError, match="m_reward_bench is not translated into sw"):
        benchmark_sets(M_REWARD_BENCH, ["de", "sw"], None)


def test_best_of_four_is_read_from_a_copy(tmp_path):
    row = {
        "id": "7",
        "prompt": "Why?",
        "chosen": ["So."],
        "rejected": ["a", "b", "c"],
        "num_correct": 1,
        "num_incorrect": 3,
        "total_completions": 4,
        "models": ["m"],
        "subset": "Math",
        "additional_metadata": {"category": "x"},
    }
    write(tmp_path / "copy" / "reward-bench-2" / "data" / "test-00000-of-00001.parquet", [row])
    sets = benchmark_sets(REWARD_BENCH_2, None, str(tmp_path / "copy"))
    rows, _ = prepare(tmp_path, *(part.model_dump(exclude_unset=True) for part in sets))
    (found,) = rows["best_of"]
    assert (found["candidates"], found["num_correct"], found["subset"]) == (["So.", "a", "b", "c"], 1, "Math")
    assert json.loads(found["metadata"])["additional_metadata"] == {"category": "x"}


def test_a_split_that_is_not_there_is_named(tmp_path):
    copy = copy_reward_bench(tmp_path / "copy")
    with pytest.raises(ConfigError, match="with split 'nothing'"):
        prepare(tmp_path, {"input": f"{copy}/reward-bench", "split": "nothing"})
    path = write(tmp_path / "in.jsonl", [{"prompt": "Why?", **PAIR}])
    with pytest.raises(ConfigError, match="give the file of the split as input"):
        prepare(tmp_path / "b", {"input": path, "split": "test"})


def test_columns_are_found_by_name_and_content():
    text, texts = pa.string(), pa.list_(pa.string())
    schema = pa.schema([("question", text), ("input", text), ("chosen", text), ("rejected", text), ("source", texts)])
    assert find_rows(schema, None, SourceColumns(), "x") == "preference"
    columns = find_source_columns(schema.empty_table(), "preference", SourceColumns())
    assert (columns.prompt, columns.subset, columns.id) == ("question", None, None)
    assert columns.keep == ("input", "source")
    with pytest.raises(SchemaError, match="hold best_of rows"):
        find_rows(schema, "best_of", SourceColumns(), "x")
