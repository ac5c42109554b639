"""Metrics of preferences, against numbers that can be checked by head."""

import numpy as np
import pyarrow as pa
import pytest

from rayrm.errors import EvaluationError
from rayrm.evaluation.preferences import BootstrapConfig, bootstrap, flatten, measure, read_pairs

CONFIG = BootstrapConfig(num_resamples=400, seed=3)


def row(chosen_reward, rejected_reward, chosen="aaaa", rejected="bb", **more):
    says = {
        name: [{"role": "assistant", "content": text}] for name, text in (("chosen", chosen), ("rejected", rejected))
    }
    base = {"group": "g", "src_lang": "en", "tgt_lang": "de", "lang": "de", "subset": None}
    return {**base, **says, "chosen_reward": chosen_reward, "rejected_reward": rejected_reward, **more}


def metrics_of(rows):
    return flatten(measure(read_pairs(pa.Table.from_pylist(rows)), CONFIG, "the test's rows"))


def test_accuracy_ties_margins_and_unscored():
    rows = [row(2.0, 1.0), row(0.5, 0.5), row(0.0, 3.0), row(4.0, 0.0), row(None, 1.0), row(1.0, float("nan"))]
    found = metrics_of([{**r, "group": f"g{i}"} for i, r in enumerate(rows)])
    assert found["num_rows"] == 4
    assert found["num_unscored"] == 2
    assert found["accuracy"] == 0.5
    assert found["accuracy_half_ties"] == 0.625
    assert found["num_ties"] == 1
    assert found["mean_margin"] == pytest.approx((1 + 0 - 3 + 4) / 4)
    assert found["accuracy/en-de"] == 0.5
    assert found["num_groups"] == 4


def test_language_keys_and_subsets():
    rows = [
        row(1, 0, subset="news"),
        row(0, 1, src_lang="de", tgt_lang="en", lang="en", subset="chat"),
        row(1, 0, src_lang=None, tgt_lang=None, lang="uk"),
        row(1, 0, src_lang="en", tgt_lang=None, lang="uk"),
    ]
    found = metrics_of(rows)
    assert found["accuracy/en-de"] == 1
    assert found["accuracy/de-en"] == 0
    assert found["accuracy/uk"] == 1
    assert found["num_rows/uk"] == 2
    assert found["accuracy/subset/news"] == 1
    assert found["accuracy/subset/chat"] == 0
    assert "num_rows/subset/" not in found


def test_slice_without_a_score_has_only_counts():
    found = metrics_of([row(1, 0), row(None, None, src_lang="en", tgt_lang="uk", lang="uk")])
    assert found["num_rows/en-uk"] == 0
    assert found["num_unscored/en-uk"] == 1
    assert "accuracy/en-uk" not in found


def test_nothing_scored_is_an_error():
    with pytest.raises(EvaluationError, match=r"None of the 2 rows of the test's rows"):
        metrics_of([row(None, 1.0), row(float("inf"), 1.0)])


def test_length_only_takes_the_better_direction():
    # Chosen is shorter in three rows, longer in one; the model is right in the longer one and in one shorter one.
    rows = [
        row(1, 0, "a", "bb"),
        row(0, 1, "a", "bbb"),
        row(0, 1, "a", "bb"),
        row(1, 0, "aaa", "b"),
    ]
    found = metrics_of(rows)
    assert found["length_only"] == "shorter"
    assert found["length_only_accuracy"] == 0.75
    assert found["longer_accuracy"] == 0.25
    assert found["shorter_accuracy"] == 0.75
    assert found["accuracy_gain"] == pytest.approx(0.5 - 0.75)


def test_equal_lengths_give_the_length_only_judge_half_a_point():
    found = metrics_of([row(0, 0, "aa", "bb"), row(1, 0, "aa", "bb"), row(1, 0, "aaa", "b")])
    assert found["length_only"] == "longer"
    assert found["length_only_accuracy"] == pytest.approx((0.5 + 0.5 + 1) / 3)
    assert found["accuracy_gain"] == pytest.approx(2 / 3 - 2 / 3)


def test_length_counts_characters_of_all_messages():
    turns = [{"role": "assistant", "content": "ab"}, {"role": "user", "content": "ї"}]
    pairs = read_pairs(pa.Table.from_pylist([{**row(1, 0, rejected="жук!"), "chosen": turns}]))
    assert pairs.extra_length.tolist() == [3 - 4]


def test_one_group_has_an_interval_without_width():
    found = metrics_of([row(1, 0), row(0, 1), row(1, 0), row(1, 0)])
    assert found["accuracy_interval"] == [0.75, 0.75]


def test_resampling_is_by_group():
    # Two groups of 50 equal rows: a resample has accuracy 0, 0.5 or 1, so the 95 % interval is everything.
    values = np.repeat([1.0, 0.0], 50)[:, None]
    low, high = bootstrap(values, np.repeat([0, 1], 50), CONFIG, "x")
    assert (low[0], high[0]) == (0.0, 1.0)
    low, high = bootstrap(values, np.arange(100), CONFIG, "x")
    assert 0.35 < low[0] < 0.45 < 0.55 < high[0] < 0.65


def test_interval_matches_the_normal_one_and_is_seeded():
    values = (np.arange(1000) % 4 > 0).astype(float)[:, None]
    config = BootstrapConfig(num_resamples=4000)
    low, high = bootstrap(values, np.arange(1000), config, "x")
    half = 1.96 * (0.75 * 0.25 / 1000) ** 0.5
    assert low[0] == pytest.approx(0.75 - half, abs=0.004)
    assert high[0] == pytest.approx(0.75 + half, abs=0.004)
    again = bootstrap(values, np.arange(1000), config, "x")
    assert (again[0][0], again[1][0]) == (low[0], high[0])


def test_resamples_in_chunks_are_those_in_one_piece():
    # 3,000 groups make chunks of 666 resamples; the mean of a column of ones is one in every resample.
    low, high = bootstrap(np.ones((3000, 1)), np.arange(3000), BootstrapConfig(num_resamples=1500), "x")
    assert (low[0], high[0]) == (1.0, 1.0)


def test_difference_is_paired():
    # The model and the length-only judge are right on the same rows: the difference is zero in every resample.
    rows = [row(1, 0, "aaa", "b", group=f"g{i}") for i in range(6)] + [
        row(0, 1, "a", "bbb", group=f"h{i}") for i in range(4)
    ]
    found = metrics_of(rows)
    assert found["accuracy_interval"][0] < found["accuracy_interval"][1]
    assert found["accuracy_gain_interval"] == [0.0, 0.0]
