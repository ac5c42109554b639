"""Foreign preferences, ratings and steps become rows of ours: every form of chat, every reason, mixtures, resuming."""

import json
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import prepare_preferences
from rayrm import files
from rayrm.errors import ConfigError, OutputExistsError, SchemaError
from rayrm.rows import Preference, Rated, Stepwise
from rayrm.seeds import seed_of
from rayrm.shards import iter_tables, list_files, list_shards, read_schemas, read_shard, read_table
from rayrm.sources.kinds import COMMON, ROW_KINDS, make_row
from rayrm.sources.preferences import PreferenceSource, SourceColumns
from rayrm.sources.validation import REASONS, InvalidRow


def chat(*turns):
    """`chat("u:Hi", "a:Hello")` as messages."""
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return [{"role": roles.get(turn[0], turn[0]), "content": turn[2:]} for turn in turns]


def make(kind="preference", lang="en", **fields):
    """A row without a file, or the reason why there is none."""
    options = {name: fields.pop(name) for name in ("margin_from_scores", "name", "source_weight") if name in fields}
    if "source_weight" in options:
        options["weight"] = options.pop("source_weight")
    try:
        return make_row(fields, PreferenceSource(input="x", lang=lang, **options), ROW_KINDS[kind])
    except InvalidRow as error:
        return error.reason


def pair(**fields):
    return make(**{"prompt": "Why?", "chosen": "So.", "rejected": "No.", **fields})


def write(path, rows):
    """Rows as JSONL, or as parquet where the name says so."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(folder, *sources, **fields):
    """(rows, mark) of the job; fields are words, values JSON."""
    words = [f"{name}={json.dumps(value)}" for name, value in {"sources": list(sources), **fields}.items()]
    prepare_preferences.main([*words, f"output={folder / 'out'}"])
    return read_table(str(folder / "out")).to_pylist(), json.loads((folder / "out" / "run.json").read_text())


PAIRS = [{"prompt": f"Question {i}?", "chosen": f"Good {i}.", "rejected": f"Bad {i}."} for i in range(10)]


def test_every_form_of_prompt_gives_the_same_row():
    turns = chat("u:Why?")
    forms = [
        pair(),
        pair(prompt=turns),
        pair(chosen=chat("a:So."), rejected=chat("a:No.")),
        pair(prompt=None, chosen=chat("u:Why?", "a:So."), rejected=chat("u:Why?", "a:No.")),
        pair(prompt="Why?", chosen=chat("u:Why?", "a:So."), rejected=chat("u:Why?", "a:No.")),
    ]
    assert forms[0]["prompt"] == turns
    assert forms[0]["chosen"] == chat("a:So.") and forms[0]["rejected"] == chat("a:No.")
    assert all(form == forms[0] for form in forms)
    assert forms[0]["weight"] == 1 and forms[0]["margin"] is None and forms[0]["label"] is None


def test_a_system_turn_may_lead_and_does_not_move_the_group():
    plain = pair()
    led = pair(prompt=chat("s:Be brief.", "u:Why?"))
    whole = pair(
        prompt=None, chosen=chat("s:Be brief.", "u:Why?", "a:So."), rejected=chat("s:Be brief.", "u:Why?", "a:No.")
    )
    assert led["prompt"] == chat("s:Be brief.", "u:Why?")
    assert pair(system="Be brief.") == whole == led
    assert led["group"] == plain["group"] and led["id"] != plain["id"]
    assert pair(system="  ") == plain
    assert pair(prompt=" Why?\n")["group"] == plain["group"] != pair(prompt="What?")["group"]


def test_several_turns_and_tool_turns_are_kept():
    prompt = chat("u:2+2?", "a:Let me see.", "t:4", "t:four", "a:4.", "u:Sure?")
    row = pair(prompt=prompt, chosen=chat("a:I ask.", "t:4", "a:Yes."), rejected="No.")
    assert row["prompt"] == prompt and row["chosen"][1]["role"] == "tool"
    assert pair(prompt=chat("u:2+2?", "a:Let me see.", "t:4"))["prompt"][-1]["role"] == "tool"


def test_tools_become_json_without_the_nulls_that_files_add():
    tools = [{"name": "add", "unit": None, "arguments": [{"type": "int", "enum": None}]}]
    expected = '[{"name": "add", "arguments": [{"type": "int"}]}]'
    assert pair(tools=tools)["tools"] == expected == pair(tools=expected)["tools"]
    assert pair(tools=[])["tools"] is None and pair(tools="")["tools"] is None and pair(tools="null")["tools"] is None
    assert pair(tools="add(a, b)") == pair(tools='{"name": "add"}') == "tools_not_json"


@pytest.mark.parametrize(
    ("reason", "fields"),
    [
        ("missing_field", {"chosen": None}),
        ("missing_field", {"rejected": []}),
        ("missing_field", {"prompt": None}),
        ("missing_field", {"lang": None}),
        ("missing_field", {"chosen": [None]}),
        ("bad_role_order", {"prompt": chat("a:Hello.", "u:Why?")}),
        ("bad_role_order", {"prompt": chat("u:Why?", "s:Be brief.")}),
        ("bad_role_order", {"prompt": chat("u:Why?", "u:Why?")}),
        ("bad_role_order", {"prompt": chat("u:Why?", "a:So.")}),
        ("bad_role_order", {"prompt": chat("s:Be brief.")}),
        ("bad_role_order", {"prompt": chat("s:Be brief.", "u:Why?"), "system": "Be brief."}),
        ("bad_role_order", {"prompt": chat("human:Why?")}),
        ("bad_role_order", {"chosen": chat("a:So.", "u:Why?", "a:So.")}),
        ("bad_role_order", {"chosen": chat("t:4", "a:So.")}),
        (
            "bad_role_order",
            {"prompt": None, "chosen": chat("a:1", "u:2", "a:3"), "rejected": chat("a:1", "u:2", "a:4")},
        ),
        ("not_ending_in_assistant", {"chosen": chat("a:So.", "t:4")}),
        ("not_ending_in_assistant", {"prompt": None, "chosen": chat("u:Why?"), "rejected": chat("u:Why?")}),
        ("prompt_mismatch", {"prompt": None, "chosen": chat("u:A", "a:So."), "rejected": chat("u:B", "a:No.")}),
        (
            "prompt_mismatch",
            {"prompt": None, "chosen": chat("u:A", "a:So."), "rejected": chat("u:A", "a:B", "u:C", "a:D")},
        ),
        ("prompt_mismatch", {"chosen": chat("u:What?", "a:So."), "rejected": chat("u:What?", "a:No.")}),
        ("prompt_mismatch", {"chosen": chat("u:Why?", "a:So."), "rejected": "No."}),
        ("empty_content", {"chosen": " \n"}),
        ("empty_content", {"prompt": ""}),
        ("empty_content", {"rejected": [{"role": "assistant", "content": None}]}),
        ("tool_calls", {"chosen": [{"role": "assistant", "content": "", "tool_calls": [{"name": "add"}]}]}),
        ("identical_responses", {"chosen": "No."}),
        ("identical_responses", {"chosen": chat("a:No."), "rejected": "No."}),
        ("non_finite_margin", {"margin": math.nan}),
        ("non_finite_margin", {"margin": "-inf"}),
        ("non_finite_margin", {"margin_from_scores": True, "chosen_score": math.inf, "rejected_score": 1.0}),
        ("not_a_number", {"margin": "much"}),
        ("not_a_number", {"chosen_score": "high"}),
        ("label_not_in_0_to_1", {"label": 1.01}),
        ("label_not_in_0_to_1", {"label": math.nan}),
        ("weight_not_0_or_more", {"weight": -1}),
        ("weight_not_0_or_more", {"weight": math.inf}),
    ],
)
def test_an_invalid_pair_has_its_reason(reason, fields):
    assert pair(**fields) == reason and reason in REASONS


def test_numbers_ride_along_and_a_margin_comes_from_scores_only_when_asked():
    row = pair(chosen_score=3, rejected_score="1.5", label=0.75, weight=4, source_weight=0.5)
    assert (row["chosen_score"], row["rejected_score"], row["margin"]) == (3.0, 1.5, None)
    assert (row["label"], row["weight"]) == (0.75, 2.0)
    scores = {"chosen_score": 3.0, "rejected_score": 4.5, "margin_from_scores": True}
    assert pair(**scores)["margin"] == -1.5
    assert pair(**scores, margin=2)["margin"] == 2.0
    assert pair(**{**scores, "chosen_score": math.nan})["margin"] is None
    assert pair(**{**scores, "chosen_score": math.nan})["chosen_score"] is None
    assert pair(weight=0)["weight"] == 0 and pair(source_weight=0.25)["weight"] == 0.25


def test_ids_groups_and_subsets_are_the_rows_own_where_they_have_them():
    own = pair(id=7, group=3, subset="s", name="set", src_lang="de", tgt_lang="en")
    assert (own["id"], own["group"], own["subset"]) == ("set/7", "3", "s")
    assert (own["src_lang"], own["tgt_lang"]) == ("de", "en")
    assert pair(id="7")["id"] == "7"
    made = pair(name="set", group="")
    assert made["id"] == pair(id="")["id"] and made["subset"] == "set"
    assert made["id"] == files.digest([None, chat("u:Why?"), chat("a:So."), chat("a:No.")])
    assert made["group"] == files.digest([["user", "Why?"]])


def test_ratings_are_measured_or_null():
    rated = make("rated", prompt="Why?", completion="So.", ratings={"help": 3, "true": math.nan, "safe": True})
    assert rated["completion"] == chat("a:So.") and rated["prompt"] == chat("u:Why?")
    assert rated["ratings"] == {"help": 3.0, "true": None, "safe": 1.0}
    whole = make("rated", completion=chat("s:Be brief.", "u:Why?", "a:So."), ratings={"help": 0})
    assert whole["prompt"] == chat("s:Be brief.", "u:Why?") and whole["ratings"] == {"help": 0.0}
    assert make("rated", prompt="Why?", completion="So.", ratings={"help": None, "true": math.nan}) == "no_rating"
    assert make("rated", prompt="Why?", completion="So.", ratings=None) == "no_rating"
    assert make("rated", prompt="Why?", completion="So.", ratings={"help": math.inf}) == "non_finite_rating"
    assert make("rated", completion=chat("a:Hi", "u:Why?"), ratings={"help": 1}) == "not_ending_in_assistant"


def test_steps_have_labels_of_any_kind():
    row = make("stepwise", prompt="2+2?", steps=["2+2=4.", "So 4."], labels=["+", "-"])
    assert (row["steps"], row["labels"], row["prompt"]) == (["2+2=4.", "So 4."], [1.0, 0.0], chat("u:2+2?"))
    assert make("stepwise", prompt="2+2?", steps=["a", "b", "c"], labels=[True, None, 0.25])["labels"] == [
        1,
        None,
        0.25,
    ]
    for reason, steps, labels in [
        ("unequal_lengths", ["a", "b"], [True]),
        ("label_not_in_0_to_1", ["a"], [-1]),
        ("not_a_number", ["a"], ["good"]),
        ("no_label", ["a", "b"], [None, None]),
        ("empty_content", ["a", " "], [True, True]),
        ("empty_content", [], []),
        ("missing_field", None, [True]),
    ]:
        assert make("stepwise", prompt="2+2?", steps=steps, labels=labels) == reason


def test_job_writes_shards_and_counts_and_goes_on_where_it_was(tmp_path, capsys):
    rows = [*PAIRS, {**PAIRS[0], "chosen": None}, {**PAIRS[1], "chosen": "Bad 1."}, PAIRS[2]]
    source = {"input": write(tmp_path / "rows.jsonl", rows), "name": "set", "lang": "en"}
    written, mark = run(tmp_path, source, shard_rows=4)
    dropped = {"duplicate_id": 1, "identical_responses": 1, "missing_field": 1}
    expected = {"read": 13, "written": 10, "dropped": dropped, "status": {}}
    assert mark["counts"] == expected and mark["sources"] == {"set": expected}
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split() == ["source", "read", "written", *dropped]
    assert shown[2].split() == ["set", "13", "10", "1", "1", "1"]
    assert [shard.num_rows for shard in list_shards(str(tmp_path / "out"), 100)] == [4, 4, 2]
    assert [row["chosen"][0]["content"] for row in written] == [f"Good {i}." for i in range(10)]
    Preference.check_files(str(tmp_path / "out"))
    first, second = sorted((tmp_path / "out").glob("*.parquet"))[:2]
    before, content = first.stat().st_mtime_ns, second.read_bytes()
    second.unlink()
    (tmp_path / "out" / "run.json").unlink()
    assert run(tmp_path, source, shard_rows=4) == (written, mark)
    assert first.stat().st_mtime_ns == before and second.read_bytes() == content
    assert run(tmp_path, source, shard_rows=4) == (written, mark)


def test_a_run_is_told_from_another_by_what_its_sources_hold(tmp_path):
    source = {"input": write(tmp_path / "rows.jsonl", PAIRS), "lang": "en"}
    run(tmp_path, source)
    with pytest.raises(OutputExistsError, match="sources"):
        run(tmp_path, {**source, "weight": 2})
    write(tmp_path / "rows.jsonl", PAIRS[1:])
    with pytest.raises(OutputExistsError, match=r"sources.0.input"):
        run(tmp_path, source)
    with pytest.raises(ConfigError, match="never writes where it reads"):
        prepare_preferences.main([f"sources=[{{input: {tmp_path / 'out'}}}]", f"output={tmp_path / 'out'}"])


def test_a_mixture_keeps_its_sources_apart(tmp_path):
    one = [{"id": i, **PAIRS[i], "origin": "web", "note": i} for i in range(4)]
    two = [{"id": str(i), **PAIRS[i + 2], "subset": None, "lang": None, "origin": "book"} for i in range(4)]
    two[3]["lang"] = "de"
    sources = [
        {"input": write(tmp_path / "one.jsonl", one), "name": "one", "lang": "en", "columns": {"keep": ["note"]}},
        {
            "input": write(tmp_path / "two.parquet", two),
            "name": "two",
            "lang": "fr",
            "weight": 3,
            "columns": {"id": "id", "keep": ["origin"]},
        },
    ]
    rows, mark = run(tmp_path, *sources, shard_rows=3)
    assert [row["id"] for row in rows] == [f"{name}/{i}" for name in ("one", "two") for i in range(4)]
    assert [row["subset"] for row in rows] == ["one"] * 4 + ["two"] * 4
    assert [row["weight"] for row in rows] == [1.0] * 4 + [3.0] * 4
    assert [row["lang"] for row in rows] == ["en"] * 4 + ["fr"] * 3 + ["de"]
    assert [row["note"] for row in rows] == [0, 1, 2, 3, None, None, None, None]
    assert [row["origin"] for row in rows] == [None] * 4 + ["book"] * 4
    # Questions 2 and 3 stand in both sources.
    assert [rows[2]["group"], rows[3]["group"]] == [rows[4]["group"], rows[5]["group"]]
    assert len({row["group"] for row in rows}) == 6
    assert [mark["sources"][name]["written"] for name in ("one", "two")] == [4, 4]
    assert mark["counts"]["read"] == 8


def test_a_row_of_two_sources_is_taken_once(tmp_path):
    rows = [{"id": i, **PAIRS[i]} for i in range(10)]
    one, two = write(tmp_path / "one.jsonl", rows[:6]), write(tmp_path / "two.jsonl", rows[4:])
    first = sorted(range(6), key=lambda i: seed_of(0, str(i)))
    for max_rows in (None, 5, 1):
        output = tmp_path / str(max_rows)
        taken, mark = run(output, {"input": one, "lang": "en", "max_rows": max_rows}, {"input": two, "lang": "en"})
        expected = {*first[:max_rows], *range(4, 10)}
        assert sorted(int(row["id"]) for row in taken) == sorted(expected)
        twice = len({*first[:max_rows]} & {4, 5})
        assert mark["sources"][two]["dropped"] == ({"duplicate_id": twice} if twice else {})
    made = {"id": None}
    again, mark = run(
        tmp_path, {"input": one, "lang": "en", "columns": made}, {"input": two, "lang": "en", "columns": made}
    )
    assert len(again) == 10 and mark["counts"]["dropped"] == {"duplicate_id": 2}


def test_a_sample_hangs_on_seed_and_ids_alone(tmp_path):
    rows = [{"id": f"r{i}", **PAIRS[i]} for i in range(10)]
    rows[0]["chosen"] = ""
    best = sorted((seed_of(5, row["id"]), row["id"]) for row in rows[1:])[:3]
    for name, order in (("a", rows), ("b", rows[::-1])):
        (tmp_path / name).mkdir()
        source = {"input": write(tmp_path / f"{name}.jsonl", order), "lang": "en", "max_rows": 3}
        taken, mark = run(tmp_path / name, source, seed=5)
        assert {row["id"] for row in taken} == {row_id for _, row_id in best}
        assert mark["counts"]["dropped"] == {"empty_content": 1, "over_limit": 6}


def test_a_policy_ends_the_run_at_the_first_row(tmp_path):
    rows = [*PAIRS[:3], {**PAIRS[3], "chosen": "Bad 3.", "id": "x"}, {**PAIRS[4], "chosen": ""}]
    source = {"input": write(tmp_path / "rows.jsonl", rows), "name": "set", "lang": "en"}
    with pytest.raises(
        SchemaError, match="Row 4 with the id 'x' of 'set' is invalid by identical_responses: chosen and"
    ):
        run(tmp_path, source, on_invalid={"identical_responses": "error", "empty_content": "error"})
    with pytest.raises(SchemaError, match="Row 5 of 'set' is invalid by empty_content"):
        run(tmp_path, source, on_invalid={"identical_responses": "drop", "empty_content": "error"})
    assert not (tmp_path / "out").exists()


def test_a_source_that_keeps_too_little_is_refused(tmp_path):
    good = {"input": write(tmp_path / "good.jsonl", PAIRS), "lang": "en"}
    bad = {"input": write(tmp_path / "bad.jsonl", [PAIRS[0], *[{**row, "chosen": ""} for row in PAIRS[1:3]]])}
    bad |= {"lang": "en", "name": "bad", "columns": {"id": None}}
    with pytest.raises(SchemaError, match="'bad' gives too few rows: 3 rows read, 1 written, dropped: 2 empty_content"):
        run(tmp_path, bad, good)
    assert not (tmp_path / "out").exists()
    rows, _ = run(tmp_path, bad, good, min_kept_fraction=0.33)
    assert len(rows) == 10
    clashing = [{"id": i % 3, **PAIRS[i]} for i in range(10)]
    with pytest.raises(SchemaError, match=r"7 duplicate_id, .* \(a name keeps the ids of a source apart from others"):
        run(tmp_path / "b", {"input": write(tmp_path / "ids.jsonl", clashing), "lang": "en"})
    with pytest.raises(SchemaError, match="gives no row: 1 rows read, 0 written, dropped: 1 empty_content"):
        run(
            tmp_path / "b",
            {**good, "input": write(tmp_path / "c.jsonl", [{**PAIRS[0], "chosen": ""}])},
            min_kept_fraction=0,
        )


def test_ratings_come_from_columns_or_a_struct(tmp_path):
    columns = [
        {"prompt": "Why?", "response": "So.", "help": 4, "true": 2},
        {"prompt": "Why?", "response": "No.", "help": 1},
    ]
    struct = [{"messages": chat("u:Who?", "a:Me."), "ratings": {"true": 1.0, "kind": 0.5}}]
    struct += [{"messages": chat("u:Who?", "a:You."), "ratings": None}]
    names = {"completion": "response", "ratings": {"help": "help", "truth": "true"}}
    rows, mark = run(
        tmp_path,
        {"input": write(tmp_path / "one.jsonl", columns), "lang": "en", "columns": names},
        {"input": write(tmp_path / "two.parquet", struct), "lang": "en"},
        rows="rated",
    )
    Rated.check_files(str(tmp_path / "out"))
    nothing = dict.fromkeys(("help", "truth", "true", "kind"))
    assert [row["ratings"] for row in rows] == [
        {**nothing, "help": 4.0, "truth": 2.0},
        {**nothing, "help": 1.0},
        {**nothing, "true": 1.0, "kind": 0.5},
    ]
    assert [row["completion"][0]["content"] for row in rows] == ["So.", "No.", "Me."]
    assert mark["counts"]["dropped"] == {"no_rating": 1}
    assert rows[0]["group"] == rows[1]["group"] != rows[2]["group"] and rows[0]["id"] != rows[1]["id"]


def test_steps_are_read_under_the_name_that_a_source_has(tmp_path):
    steps = [{"prompt": "2+2?", "completions": ["Two and two", "is 4."], "labels": [True, False]}]
    source = {"input": write(tmp_path / "a.parquet", steps), "lang": "en", "columns": {"steps": "completions"}}
    rows, _ = run(tmp_path, source, rows="stepwise")
    Stepwise.check_files(str(tmp_path / "out"))
    assert rows[0]["steps"] == ["Two and two", "is 4."] and rows[0]["labels"] == [1.0, 0.0]


CSV = b"""\xef\xbb\xbfid,prompt,chosen,rejected,margin,weight,lang
007,2020-01-01,"4,
5",5,0.5,,de
8,"Say ""no"".",No.,,,,de
9,Why?,So.,"",1,2,
"""


def test_csv_is_text_with_nulls_where_nothing_stands(tmp_path):
    (tmp_path / "rows.csv").write_bytes(CSV)
    path = str(tmp_path / "rows.csv")
    assert list_files(str(tmp_path)) == [path]
    table = read_table(path)
    assert {str(kind) for kind in table.schema.types} == {"string"}
    assert table["id"].to_pylist() == ["007", "8", "9"] and table["prompt"][1].as_py() == 'Say "no".'
    assert table["rejected"].to_pylist() == ["5", None, ""]
    assert [read_shard(shard)["id"].to_pylist() for shard in list_shards(path, 2)] == [["007", "8"], ["9"]]
    assert [schema.names[0] for _, schema in read_schemas(path)] == ["id"]
    assert [part.column_names for part in iter_tables(path, ["chosen"])] == [["chosen"]]
    rows, mark = run(tmp_path, {"input": path, "lang": "en"}, min_kept_fraction=0)
    assert mark["counts"]["dropped"] == {"empty_content": 1, "missing_field": 1}
    (row,) = rows
    assert row["id"] == "007" and row["chosen"] == chat("a:4,\n5") and row["prompt"] == chat("u:2020-01-01")
    assert (row["margin"], row["weight"], row["lang"]) == (0.5, 1.0, "de")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,b\n1,2,3\n", "cannot be read as csv: .*Expected 2 columns, got 3"),
        (b"a,b\n\xff\xfe,2\n", "cannot be read as csv: .*invalid UTF8"),
        (b"\x00\x01", "cannot be read as csv"),
        (b"prompt,chosen,chosen\nx,y,z\n", "has several columns 'chosen'; rename all but one"),
        (b"prompt,chosen\nx,y\n", r"lacks lang \(columns.lang\), rejected \(columns.rejected\); found prompt, chosen"),
        (b"prompt,chosen,rejected,lang\n", "gives no row: 0 rows read"),
        (b"", "gives no row: 0 rows read"),
    ],
)
def test_a_csv_file_that_is_of_no_use_is_refused(tmp_path, content, message):
    (tmp_path / "rows.csv").write_bytes(content)
    with pytest.raises(SchemaError, match=message):
        run(tmp_path, {"input": str(tmp_path / "rows.csv")})
    assert not (tmp_path / "out").exists()


def test_columns_that_lack_or_hold_something_else_are_named(tmp_path):
    def refuse(error, match, rows=PAIRS, *, kind="preference", **source):
        path = write(tmp_path / "rows.parquet", rows)
        with pytest.raises(error, match=match):
            run(tmp_path, {"input": path, "lang": "en", **source}, rows=kind)

    plain = [{"chosen": "a", "rejected": "b"}]
    refuse(SchemaError, r"lacks lang \(columns.lang\); .* or the language of its rows by lang\.$", lang=None)
    refuse(SchemaError, r"lacks better \(columns.chosen\); found prompt, chosen", columns={"chosen": "better"})
    refuse(SchemaError, r"lacks gap \(columns.margin\)", columns={"margin": "gap"})
    refuse(SchemaError, r"lacks url \(columns.keep\)", columns={"keep": ["url"]})
    refuse(SchemaError, r"lacks chosen_score \(columns.chosen_score\), rejected_score", margin_from_scores=True)
    refuse(SchemaError, r"lacks prompt \(columns.prompt\); found chosen, rejected", plain)
    refuse(SchemaError, r"lacks ratings \(columns.ratings\)", [{"prompt": "a", "completion": "b"}], kind="rated")
    refuse(
        SchemaError, r"lacks completion \(columns.completion\)", [{"prompt": "a", "ratings": {"x": 1}}], kind="rated"
    )
    refuse(
        SchemaError,
        r"lacks speed \(columns.ratings.fast\)",
        [{"prompt": "a", "completion": "b"}],
        kind="rated",
        columns={"ratings": {"fast": "speed"}},
    )
    refuse(
        SchemaError,
        "'chosen' of .* is int64, and columns.chosen needs text or lists of role",
        [{**PAIRS[0], "chosen": 1}],
    )
    refuse(SchemaError, "'chosen' of .* is list<.*needs text or lists", [{**PAIRS[0], "chosen": [{"from": "gpt"}]}])
    refuse(SchemaError, "columns.margin needs numbers; name another column, or null", [{**PAIRS[0], "margin": [1]}])
    refuse(ConfigError, "is no hub dataset", split="train")
    refuse(ConfigError, "columns.steps of .* is no field of preference rows", columns={"steps": "steps"})
    refuse(ConfigError, "keeps 'margin', a column that is written anyway", columns={"keep": ["margin"]})
    refuse(ConfigError, "margin_from_scores, and rated rows have no margin", kind="rated", margin_from_scores=True)
    with pytest.raises(ConfigError, match="'typo' is no reason; they are missing_field, bad_role_order"):
        run(tmp_path, {"input": "x"}, on_invalid={"typo": "drop"})
    with pytest.raises(ConfigError, match="two sources are called 'x'; give each a name"):
        run(tmp_path, {"input": "x"}, {"input": "y", "name": "x"})
    with pytest.raises(ConfigError, match="nothing at"):
        run(tmp_path, {"input": str(tmp_path / "nowhere.csv")})
    assert not (tmp_path / "out").exists()


def test_a_column_that_is_none_of_ours_can_be_left_out(tmp_path):
    rows = [{**row, "label": ["good"], "id": 1} for row in PAIRS]
    source = {"input": write(tmp_path / "rows.parquet", rows), "lang": "en", "columns": {"label": None, "id": None}}
    written, _ = run(tmp_path, source)
    assert len({row["id"] for row in written}) == 10 and {row["label"] for row in written} == {None}


def test_kept_columns_of_different_kinds_are_refused(tmp_path):
    one = {
        "input": write(tmp_path / "one.jsonl", [{**PAIRS[0], "note": 1}]),
        "lang": "en",
        "columns": {"keep": ["note"]},
    }
    two = {**one, "input": write(tmp_path / "two.jsonl", [{**PAIRS[1], "note": "a"}])}
    with pytest.raises(SchemaError, match="does not hold the same in all of them: .*note"):
        run(tmp_path, one, two)
    assert not (tmp_path / "out").exists()


def test_hub_dataset_is_loaded_with_its_split(tmp_path, monkeypatch):
    import datasets

    asked = []

    def load(path, name, split):
        asked.append((path, name, split))
        return datasets.Dataset(pa.Table.from_pylist(PAIRS))

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.chdir(tmp_path)
    rows, mark = run(tmp_path, {"input": "some/pairs", "config": "a", "split": "dev", "lang": "en"})
    assert len(rows) == 10 and asked == [("some/pairs", "a", "dev")]
    assert mark["inputs"] == {"sources.0.input": "hub:some/pairs"} and list(mark["sources"]) == ["some/pairs"]


def test_real_preferences_keep_their_ids_and_group_by_question(tmp_path, shared_data):
    path = shared_data / "preferences" / "qa_feedback_train.jsonl"
    rows, mark = run(tmp_path, {"input": str(path)})
    real = [json.loads(line) for line in path.read_text().splitlines()]
    assert mark["counts"]["read"] == len(real)
    assert mark["counts"]["written"] == len(rows) == len(real) - sum(mark["counts"]["dropped"].values())
    assert [row["id"] for row in rows] == [row["id"] for row in real]
    assert len({row["group"] for row in rows}) == len({row["prompt"].strip() for row in real}) < len(real)
    assert rows[0]["chosen"] == [{"role": "assistant", "content": real[0]["chosen"]}]
    assert {row["subset"] for row in rows} == {"qa_feedback"} and {row["lang"] for row in rows} == {"en"}


def test_every_named_column_is_a_field_of_some_row():
    fields = {name for kind in ROW_KINDS.values() for name in kind.fields}
    assert set(SourceColumns.model_fields) == {*COMMON, *fields, "keep"}


def test_messages_that_are_named_go_before_a_completion(tmp_path):
    row = {"messages": chat("u:Who?", "a:Me."), "prompt": "Why?", "completion": "So.", "ratings": {"true": 1}}
    source = {"input": write(tmp_path / "a.parquet", [row]), "lang": "en"}
    plain, _ = run(tmp_path / "plain", source, rows="rated")
    assert plain[0]["completion"] == chat("a:So.")
    named, _ = run(tmp_path / "named", {**source, "columns": {"messages": "messages", "prompt": None}}, rows="rated")
    assert named[0]["completion"] == chat("a:Me.") and named[0]["prompt"] == chat("u:Who?")
