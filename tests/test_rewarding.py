"""Scores become rewards: one scorer, a factor, null for what is not a number."""

import math

import pyarrow as pa
import pytest

from rayrm.errors import ConfigError, SchemaError
from rayrm.rewarding import RewardingConfig, choose_scorer, reward_table


def scored(candidates, **scores):
    num = len(candidates)
    columns = {"id": [str(i) for i in range(num)], "candidates": candidates}
    rows = [{name: values[i] for name, values in scores.items()} for i in range(num)]
    kind = pa.struct([(name, pa.list_(pa.float64())) for name in scores])
    return pa.table({**columns, "scores": pa.array(rows, kind), "status": pa.array([None] * num)})


def test_rewards_are_scores_times_scale_in_any_shape():
    table = scored([["a", "b"], [], ["c"]], bleurt=[[0.5, -0.25], [], [1.5]])
    rewarded = reward_table(table, RewardingConfig(scale=100))
    assert rewarded["rewards"].to_pylist() == [[50.0, -25.0], [], [150.0]]
    assert rewarded["candidates"].to_pylist() == [["a", "b"], [], ["c"]]
    assert not {"scores", "status"} & set(rewarded.column_names)
    assert rewarded["_kept"].to_pylist() == [True] * 3


def test_nan_and_null_scores_are_null_rewards_and_infinity_stays():
    table = scored([["a", "b", "c", "d"]], bleurt=[[math.nan, None, math.inf, 0.0]])
    assert reward_table(table, RewardingConfig())["rewards"].to_pylist() == [[None, None, math.inf, 0.0]]


def test_lists_of_unequal_length_drop_the_row():
    table = scored([["a", "b"], ["c", "d"], ["e"]], bleurt=[[1.0], [1.0, 2.0], None])
    rewarded = reward_table(table, RewardingConfig())
    assert rewarded["_kept"].to_pylist() == [False, True, False]
    assert rewarded["_dropped"].to_pylist() == [["unequal_lengths"], [], ["unequal_lengths"]]
    assert rewarded["rewards"][1].as_py() == [1.0, 2.0]


def test_a_slice_of_a_table_gives_the_rewards_of_its_rows():
    table = scored([["a"], ["b", "c"], ["d"]], bleurt=[[1.0], [2.0, 3.0], [4.0]]).slice(1, 2)
    assert reward_table(table, RewardingConfig())["rewards"].to_pylist() == [[2.0, 3.0], [4.0]]


def test_scorer_is_chosen_by_name():
    table = scored([["a"]], bleurt=[[1.0]], other=[[2.0]])
    assert reward_table(table, RewardingConfig(scorer="other"))["rewards"].to_pylist() == [[2.0]]
    with pytest.raises(ConfigError, match=r"bleurt, other; set rewarding\.scorer"):
        choose_scorer(table.schema, RewardingConfig(), "'x'")
    with pytest.raises(ConfigError, match="'comet', and 'x' has scores of bleurt, other only"):
        choose_scorer(table.schema, RewardingConfig(scorer="comet"), "'x'")


def test_scores_that_are_no_struct_of_numbers_are_refused():
    with pytest.raises(SchemaError, match="list<item: double>, and rewards need a struct"):
        choose_scorer(pa.schema([("scores", pa.list_(pa.float64()))]), RewardingConfig(), "'x'")
    words = pa.struct([("bleurt", pa.list_(pa.string()))])
    with pytest.raises(SchemaError, match="rewards need lists of numbers"):
        choose_scorer(pa.schema([("scores", words)]), RewardingConfig(), "'x'")
