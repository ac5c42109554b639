"""Pairs in the documented meaning of the recipe's options, and the job around them."""

import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import build_preferences
from rayrm import files
from rayrm.config import build_config
from rayrm.errors import ConfigError, EvaluationError, SchemaError
from rayrm.pairing import Pair, PairingConfig, merge_ranks, pair_row, pair_table, rank_table
from rayrm.rows import with_hidden
from rayrm.shards import read_table

NAN = math.nan
INF = math.inf


def config(**values):
    return build_config(PairingConfig, values, "the test")


def rewarded(rows, langs=None):
    """Rewarded rows of (candidates, rewards)."""
    langs = langs or [("en", "de")] * len(rows)
    return pa.table(
        {
            "id": [f"r{i}" for i in range(len(rows))],
            "group": [f"g{i}" for i in range(len(rows))],
            "prompt": [[{"role": "user", "content": "p"}] for _ in rows],
            "src_lang": pa.array([s for s, _ in langs], pa.string()),
            "tgt_lang": pa.array([t for _, t in langs], pa.string()),
            "lang": [t or "de" for _, t in langs],
            "candidates": pa.array([texts for texts, _ in rows], pa.list_(pa.string())),
            "rewards": pa.array([rewards for _, rewards in rows], pa.list_(pa.float64())),
        }
    )


@pytest.mark.parametrize(
    ("rewards", "options", "pair", "reasons"),
    [
        ([3.0, 1.0, 2.0], {}, Pair(0, 1), []),
        ([1.0, 5.0, 1.0, 5.0], {}, Pair(1, 0), []),
        ([5.0, 1.0, 5.0, 1.0], {}, Pair(0, 1), []),
        ([30.0, 10.0], {"min_margin": 20}, Pair(0, 1), []),
        ([70.1, 50.1], {"min_margin": 20}, None, ["narrow_margin"]),
        ([2.0, 2.0], {}, None, ["tie"]),
        ([2.0], {}, None, ["few_candidates"]),
        ([], {}, None, ["few_candidates"]),
        ([NAN, 1.0, 3.0], {}, Pair(2, 1), ["no_reward"]),
        ([None, 1.0, None], {}, None, ["no_reward", "no_reward", "few_candidates"]),
        ([20.0, 95.0, 19.9, 95.1], {"valid_score_range": [20, 95]}, Pair(1, 0), ["out_of_range", "out_of_range"]),
        ([20.0, 96.0], {"valid_score_range": [20, 95]}, None, ["out_of_range", "few_candidates"]),
        ([70.0, 10.0], {"min_chosen_reward": 70}, Pair(0, 1), []),
        ([69.9, 10.0], {"min_chosen_reward": 70}, None, ["low_rewards"]),
        ([50.0, 40.0, 90.0, 0.0], {"max_candidates": 2}, Pair(0, 1), []),
        ([INF, 1.0], {}, Pair(0, 1), []),
        ([INF, -INF], {"min_margin": 20}, Pair(0, 1), []),
        ([-INF, -INF], {}, None, ["tie"]),
        ([1.0, -INF], {"min_margin": 20}, Pair(0, 1), []),
        ([INF, 1.0, 0.0], {"valid_score_range": [0, 95]}, Pair(1, 2), ["out_of_range"]),
    ],
)
def test_pair_row(rewards, options, pair, reasons):
    assert pair_row(rewards, config(**options)) == (pair, reasons)


def test_range_must_go_upwards():
    with pytest.raises(ConfigError, match="valid_score_range must be"):
        config(valid_score_range=[95, 20])


def test_table_of_pairs_has_messages_rewards_and_margins():
    table = rewarded([(["a", "b", "c"], [3.0, 1.0, 2.0]), (["d", "e"], [1.0, 1.0]), (["f", "g"], [0.0, 4.5])])
    pairs = pair_table(table, config(), {})
    assert pairs["_kept"].to_pylist() == [True, False, True]
    assert pairs["_dropped"].to_pylist() == [[], ["tie"], []]
    kept = pairs.filter(pairs["_kept"]).to_pylist()
    assert [row["chosen"] for row in kept] == [[{"role": "assistant", "content": text}] for text in ("a", "g")]
    assert [row["rejected"][0]["content"] for row in kept] == ["b", "f"]
    assert [(row["margin"], row["chosen_reward"], row["rejected_reward"]) for row in kept] == [
        (2.0, 3.0, 1.0),
        (4.5, 4.5, 0.0),
    ]
    assert not {"candidates", "rewards"} & set(pairs.column_names)


def test_texts_are_those_of_the_row_beside_odd_rows():
    rows = [([], []), (None, None), (["x", None, "y"], [1.0, 9.0, 2.0]), (["p"], [1.0, 2.0]), (["s", "t"], [1.0, 0.0])]
    pairs = pair_table(rewarded(rows), config(), {})
    assert pairs["_dropped"].to_pylist() == [
        ["few_candidates"],
        ["few_candidates"],
        ["no_reward"],
        ["unequal_lengths"],
        [],
    ]
    texts = [(r["chosen"][0]["content"], r["rejected"][0]["content"]) for r in pairs.filter(pairs["_kept"]).to_pylist()]
    assert texts == [("y", "x"), ("s", "t")]


def test_equal_texts_with_different_rewards_are_no_pair():
    pairs = pair_table(rewarded([(["a", "a", "b"], [3.0, 1.0, 2.0])]), config(), {})
    assert pairs["_kept"].to_pylist() == [False]
    assert pairs["_dropped"].to_pylist() == [["equal_texts"]]


def test_rows_dropped_before_stay_dropped_and_uncounted():
    table = with_hidden(rewarded([(["a", "b"], [1.0]), (["c", "d"], [1.0, 0.0])]))
    table = table.set_column(table.column_names.index("_kept"), "_kept", pa.array([False, True]))
    pairs = pair_table(table, config(), {})
    assert pairs["_kept"].to_pylist() == [False, True]
    assert pairs["_dropped"].to_pylist() == [[], []]


def test_table_without_rows_has_the_columns_of_pairs():
    assert {"chosen", "rejected", "margin"} <= set(pair_table(rewarded([]), config(), {}).column_names)


def limits_of(tables, options):
    return merge_ranks([rank_table(t, options) for t in tables], options.max_pairs_per_lang_pair)


def kept_ids(tables, options, limits):
    pairs = [pair_table(t, options, limits) for t in tables]
    return {i for t in pairs for i in t.filter(t["_kept"])["id"].to_pylist()}


def test_widest_margins_stay_in_each_language_pair():
    margins = [5.0, 1.0, 4.0, 9.0, 2.0, 3.0]
    langs = [("en", "de")] * 4 + [("de", "en"), (None, None)]
    table = rewarded([(["a", "b"], [m, 0.0]) for m in margins], langs)
    options = config(max_pairs_per_lang_pair=2)
    whole = limits_of([table], options)
    assert whole == {"en-de": (-5.0, "r0"), "de-en": (-2.0, "r4"), "de": (-3.0, "r5")}
    assert kept_ids([table], options, whole) == {"r0", "r3", "r4", "r5"}
    pairs = pair_table(table, options, whole)
    assert pairs["_dropped"].to_pylist() == [[], ["over_limit"], ["over_limit"], [], [], []]


@pytest.mark.parametrize("pick", ["largest_margin", "sample"])
def test_limits_do_not_hang_on_sharding(pick):
    table = rewarded([(["a", "b"], [float(i % 5 + 1), 0.0]) for i in range(200)])
    options = config(max_pairs_per_lang_pair=30, pick=pick, seed=3)
    parts = [table.slice(i, 7) for i in range(0, 200, 7)]
    limits = limits_of([table], options)
    assert limits == limits_of(reversed(parts), options)
    kept = kept_ids(parts, options, limits)
    assert len(kept) == 30
    if pick == "sample":
        other = config(max_pairs_per_lang_pair=30, pick=pick, seed=4)
        assert kept != kept_ids([table], other, limits_of([table], other))
        assert len({int(name[1:]) % 5 for name in kept}) == 5
    else:
        assert {int(name[1:]) % 5 for name in kept} == {4}


def scored_file(path, num_rows=200):
    """Rows of two language pairs; row i of en-de has scores 0.5 and 0.5 + i/1000, fr-en rows have ties."""
    langs = [("en", "de") if i % 2 == 0 else ("fr", "en") for i in range(num_rows)]
    table = rewarded([([f"a{i}", f"b{i}"], [0.0, 0.0]) for i in range(num_rows)], langs).drop_columns(["rewards"])
    scores = [{"bleurt": [0.5, 0.5 + (i / 1000 if i % 2 == 0 else 0)]} for i in range(num_rows)]
    table = table.append_column("scores", pa.array(scores))
    table = table.append_column("status", pa.array([{"bleurt": ["ok", "ok"]}] * num_rows))
    pq.write_table(table, path)
    return str(path)


@pytest.mark.ray
def test_job_limits_prints_stores_and_resumes_exactly_once(tmp_path, ray_cluster, capsys):
    words = [
        f"input={scored_file(tmp_path / 'scored.parquet')}",
        f"output={tmp_path / 'out'}",
        "shard_rows=32",
        "rewarding.scale=100",
        "pairing.min_margin=5",
        "pairing.max_pairs_per_lang_pair=20",
    ]
    build_preferences.main(words)
    assert "Without a row: fr-en" in capsys.readouterr().out
    rows = read_table(str(tmp_path / "out")).to_pylist()
    # Margins of at least 5 have the even rows from 50 on; the widest 20 of them are rows 160 to 198.
    expected = {f"r{i}" for i in range(160, 200, 2)}
    assert {row["id"] for row in rows} == expected and len(rows) == 20
    assert all(row["chosen"][0]["content"] == "b" + row["id"][1:] for row in rows)
    done = files.read_json(str(tmp_path / "out" / "run.json"))
    assert done["counts"]["read"] == 200
    assert done["counts"]["dropped"] == {"narrow_margin": 24, "over_limit": 55, "tie": 101}
    assert done["languages"] == {
        "total": 20,
        "counts": {"en": {"de": 20}},
        "shares": {"en": {"de": 1.0}},
        "empty": ["fr-en"],
    }
    kept_shard = tmp_path / "out" / "shard-00006-of-00007.parquet"
    before = kept_shard.stat().st_mtime_ns
    (tmp_path / "out" / "run.json").unlink()
    (tmp_path / "out" / "shard-00005-of-00007.parquet").unlink()
    build_preferences.main(words)
    again = read_table(str(tmp_path / "out"))["id"].to_pylist()
    assert sorted(again) == sorted(expected)
    assert kept_shard.stat().st_mtime_ns == before
    assert files.read_json(str(tmp_path / "out" / "run.json"))["digest"] == done["digest"]


@pytest.mark.ray
def test_job_without_a_single_pair_says_why(tmp_path, ray_cluster):
    path = scored_file(tmp_path / "scored.parquet", 10)
    with pytest.raises(EvaluationError, match="10 rows read, 0 written, dropped: 4 narrow_margin, 6 tie"):
        build_preferences.main([f"input={path}", f"output={tmp_path / 'out'}", "pairing.min_margin=50"])
    assert not (tmp_path / "out" / "run.json").exists()


def test_bad_input_is_named_and_nothing_is_written(tmp_path):
    good = scored_file(tmp_path / "scored.parquet", 10)
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match=r"rewarding.scorer is 'comet'"):
        build_preferences.main([f"input={good}", f"output={out}", "rewarding.scorer=comet"])
    table = pq.read_table(good)
    pq.write_table(table.drop_columns(["scores"]), tmp_path / "lacking.parquet")
    with pytest.raises(SchemaError, match="lacks scores"):
        build_preferences.main([f"input={tmp_path / 'lacking.parquet'}", f"output={out}"])
    pq.write_table(table.slice(0, 0), tmp_path / "empty.parquet")
    with pytest.raises(SchemaError, match="holds no rows"):
        build_preferences.main([f"input={tmp_path / 'empty.parquet'}", f"output={out}"])
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(SchemaError, match="cannot be read as parquet"):
        build_preferences.main([f"input={tmp_path / 'torn.parquet'}", f"output={out}"])
    with pytest.raises(ConfigError, match="nothing at"):
        build_preferences.main([f"input={tmp_path / 'nowhere'}", f"output={out}"])
    assert not out.exists()
