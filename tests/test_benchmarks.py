"""The benchmarks' sections, weights and formulas, against numbers worked out by hand."""

import math

import pytest

from rayrm.errors import EvaluationError
from rayrm.evaluation.benchmarks import (
    BENCHMARKS,
    M_REWARD_BENCH,
    REWARD_BENCH,
    REWARD_BENCH_2,
    BestOf,
    best_of_credit,
    count_verdicts,
    mean_credits,
    pair_credit,
    rating_credit,
    score_benchmark,
    score_ties,
    verdict_credit,
)
from rayrm.evaluation.results import score_results
from rayrm.languages import LANGUAGES

NAN = float("nan")


def weights(benchmark):
    return {section.name: sum(subset.weight for subset in section.subsets) for section in benchmark.sections}


def num_rows(benchmark):
    return sum(subset.num_rows for section in benchmark.sections for subset in section.subsets)


def subset_names(benchmark, section):
    return [subset.name for part in benchmark.sections if part.name == section for subset in part.subsets]


def constant(benchmark, **scores):
    """Every subset of a section at one accuracy; `Chat_Hard` stands for Chat Hard."""
    return {
        name: score for section, score in scores.items() for name in subset_names(benchmark, section.replace("_", " "))
    }


# Data.


def test_weights_add_up_to_the_published_ones():
    assert weights(REWARD_BENCH) == {"Chat": 358, "Chat Hard": 456, "Safety": 740, "Reasoning": 1968}
    assert weights(M_REWARD_BENCH) == {"Chat": 296, "Chat Hard": 407, "Safety": 736, "Reasoning": 1966}
    assert sum(weights(REWARD_BENCH_2).values()) == 1865
    assert sum(weights(REWARD_BENCH_2).values()) - weights(REWARD_BENCH_2)["Ties"] == 1763
    assert num_rows(REWARD_BENCH) == 2985
    assert num_rows(M_REWARD_BENCH) == 2869


@pytest.mark.parametrize("benchmark", [REWARD_BENCH, M_REWARD_BENCH])
def test_math_weighs_as_much_as_all_code(benchmark):
    reasoning = {subset.name: subset for subset in benchmark.sections[-1].subsets}
    math_prm = reasoning.pop("math-prm")
    assert math_prm.num_rows == 447
    assert math_prm.weight == sum(subset.weight for subset in reasoning.values())
    assert set(reasoning) == {f"hep-{language}" for language in ("cpp", "go", "java", "js", "python", "rust")}


def test_benchmarks_are_found_by_name():
    assert {name: benchmark.dataset for name, benchmark in BENCHMARKS.items()} == {
        "reward_bench": "allenai/reward-bench",
        "m_reward_bench": "C4AI-Community/multilingual-reward-bench",
        "reward_bench_2": "allenai/reward-bench-2",
    }


def test_m_reward_bench_has_23_languages_besides_english():
    expected = (
        "arb_Arab zho_Hans zho_Hant ces_Latn nld_Latn fra_Latn deu_Latn ell_Grek heb_Hebr hin_Deva ind_Latn ita_Latn "
        "jpn_Jpan kor_Hang pes_Arab pol_Latn por_Latn ron_Latn rus_Cyrl spa_Latn tur_Latn ukr_Cyrl vie_Latn"
    )
    assert [language.flores for language in M_REWARD_BENCH.languages] == expected.split()
    known = {language.flores: language for language in LANGUAGES.values()}
    assert all(known.get(language.flores, language) == language for language in M_REWARD_BENCH.languages)
    assert REWARD_BENCH.languages == REWARD_BENCH_2.languages == ()


# Sections and overall.


def test_section_is_weighted_over_the_subsets_that_are_there():
    score = score_benchmark(REWARD_BENCH, {"alpacaeval-easy": 1.0, "mt-bench-med": 0.5, "mt-bench-easy": None})
    assert score.sections == {
        "Chat": pytest.approx((100 + 20) / 140),
        "Chat Hard": None,
        "Safety": None,
        "Reasoning": None,
    }
    assert score.overall is None and score.overall_without_prior is None
    assert "mt-bench-easy" in score.missing and "mt-bench-med" not in score.missing
    assert len(score.missing) == 23 - 2


def test_a_section_of_wrong_answers_is_0_and_not_null():
    score = score_benchmark(
        M_REWARD_BENCH, constant(M_REWARD_BENCH, Chat=0.0, Chat_Hard=0.0, Safety=0.0, Reasoning=0.0)
    )
    assert set(score.sections.values()) == {0.0}
    assert score.overall == 0.0 and score.missing == ()


def test_each_benchmark_has_its_own_weights():
    only_easy = {**dict.fromkeys(subset_names(REWARD_BENCH, "Chat"), 0.0), "alpacaeval-easy": 1.0}
    assert score_benchmark(REWARD_BENCH, only_easy).sections["Chat"] == pytest.approx(100 / 358)
    assert score_benchmark(M_REWARD_BENCH, only_easy).sections["Chat"] == pytest.approx(79 / 296)
    only_python = {**dict.fromkeys(subset_names(REWARD_BENCH, "Reasoning"), 0.0), "hep-python": 1.0}
    assert score_benchmark(REWARD_BENCH, only_python).sections["Reasoning"] == pytest.approx(164 / 1968)
    assert score_benchmark(M_REWARD_BENCH, only_python).sections["Reasoning"] == pytest.approx(163 / 1966)


def test_prior_sets_weigh_half_a_section():
    core = constant(REWARD_BENCH, Chat=0.9, Chat_Hard=0.5, Safety=0.8, Reasoning=0.5) | {"math-prm": 1.0}
    prior = {"anthropic_helpful": 0.6, "shp": 0.8, "anthropic_harmless": 0.0, "mtbench_human": 0.0}
    without = score_benchmark(REWARD_BENCH, core)
    assert without.sections["Reasoning"] == pytest.approx(0.75)
    assert without.prior_sets is None
    assert without.overall == without.overall_without_prior == pytest.approx((0.9 + 0.5 + 0.8 + 0.75) / 4)
    score = score_benchmark(REWARD_BENCH, core | prior)
    assert score.prior_sets == pytest.approx(0.7)
    assert score.overall == pytest.approx((2 * (0.9 + 0.5 + 0.8 + 0.75) + 0.7) / 9)
    assert score.overall_without_prior == without.overall


def test_m_reward_bench_is_the_plain_mean_of_four_sections():
    core = constant(M_REWARD_BENCH, Chat=1.0, Chat_Hard=0.5, Safety=0.75, Reasoning=0.25)
    score = score_benchmark(M_REWARD_BENCH, core | {"shp": 0.0})
    assert score.overall == pytest.approx(0.625)
    assert score.prior_sets is None


def test_reward_bench_2_is_the_plain_mean_of_six_subsets():
    values = {"Factuality": 0.5, "Precise IF": 0.25, "Math": 0.75, "Safety": 1.0, "Focus": 0.5, "Ties": 1.01}
    score = score_benchmark(REWARD_BENCH_2, values)
    assert score.sections == values
    assert score.overall == pytest.approx(4.01 / 6)
    del values["Ties"]
    assert score_benchmark(REWARD_BENCH_2, values).overall is None


def test_rows_of_no_known_subset_are_an_error():
    with pytest.raises(EvaluationError, match=r"No subset of m_reward_bench .*'alpacaeval-easy'; found maple-hard"):
        score_benchmark(M_REWARD_BENCH, {"maple-hard": 0.5, "alpacaeval-easy": None})
    with pytest.raises(EvaluationError, match="found none at all"):
        score_benchmark(REWARD_BENCH, {})


# Credits.


def test_a_tie_of_a_pair_is_wrong():
    assert [pair_credit(*pair) for pair in [(2.0, 1.0), (1.0, 1.0), (1.0, 2.0)]] == [1, 0, 0]
    assert [pair_credit(*pair) for pair in [(None, 1.0), (1.0, None), (NAN, 1.0), (math.inf, 1.0)]] == [None] * 4


@pytest.mark.parametrize(("rule", "credit"), [("unscored", None), ("half", 0.5), ("quarter", 0.25)])
def test_an_answer_without_verdict_has_the_credit_of_the_rule(rule, credit):
    assert verdict_credit(0, "ok", rule) == 1.0
    assert verdict_credit(3, "ok", rule) == 0.0
    assert verdict_credit(None, "ok", rule) == credit
    assert verdict_credit(None, "parse_error", rule) == credit


@pytest.mark.parametrize("status", ["timeout", "overloaded", "error"])
@pytest.mark.parametrize("rule", ["unscored", "half", "quarter"])
def test_a_failed_call_never_has_a_credit(rule, status):
    assert verdict_credit(None, status, rule) is None
    assert verdict_credit(0, status, rule) is None


def test_failures_are_counted_apart_from_answers_without_verdict():
    winners = [0, 1, None, None, None, None]
    statuses = ["ok", "ok", "ok", "parse_error", "timeout", "error"]
    assert count_verdicts(winners, statuses) == {"num_verdicts": 2, "num_no_verdict": 2, "num_failed": 2}


def test_rows_without_a_credit_are_no_part_of_a_mean():
    subsets = ["a", "a", "a", "b", "c", "c"]
    assert mean_credits(subsets, [1.0, 0.5, None, None, 0.0, 0.0]) == {"a": 0.75, "c": 0.0}
    with pytest.raises(ValueError, match="shorter"):
        mean_credits(["a", "b"], [1.0])


# Best of n.


@pytest.mark.parametrize(
    ("rewards", "credit"),
    [
        ([3.0, 1.0, 2.0, 0.0], 1.0),
        ([3.0, 3.0, 2.0, 0.0], 1 / 2),
        ([3.0, 3.0, 2.0, 3.0], 1 / 3),
        ([-1.0, -1.0, -1.0, -1.0], 1 / 4),
        ([1.0, 1.0, 2.0, 0.0], 0.0),
        ([3.0, None, 2.0, 0.0], None),
        ([3.0, 1.0, NAN, 0.0], None),
    ],
)
def test_a_shared_top_reward_gives_its_share(rewards, credit):
    assert best_of_credit(rewards) == credit


def test_missing_ratings_are_passed_over():
    assert rating_credit([8.0, None, 8.0, 3.0], "quarter") == 0.5
    assert rating_credit([None, 2.0, None, 3.0], "quarter") == 0.0
    assert rating_credit([1.0, None, None, None], "unscored") == 1.0
    assert rating_credit([None] * 4, "quarter") == 0.25
    assert rating_credit([None, NAN], "half") == 0.5
    assert rating_credit([None] * 4, "unscored") is None


# Ties.


def ties(**rows):
    """`ref_1=([right …], [wrong …])`."""
    return [BestOf(name.replace("_", ":"), "Ties", len(r), [*r, *w]) for name, (r, w) in rows.items()]


def test_ties_score_of_three_prompts():
    # 1: spread 1, gaps 2 and 2. 2: spread 0, gaps -1 and 2. 3 has no ref, and its worst right answer is too low.
    score = score_ties(
        ties(
            ref_1=([5.0], [3.0, 0.0]),
            tied_1=([5.0, 4.0], [2.0, 1.0]),
            ref_2=([1.0], [2.0]),
            tied_2=([3.0, 3.0], [1.0]),
            tied_3=([1.0, 0.0], [0.5]),
        )
    )
    assert score.ref_accuracy == 0.5
    assert score.tied_accuracy == pytest.approx(2 / 3)
    assert score.preferred == 1.0
    assert score.preferred_hard == 0.5
    assert score.margin == pytest.approx((math.tanh(1) - 1) / 2)
    assert score.documented_score == pytest.approx(0.15 + 0.2 + 0.2 + 0.1)
    assert score.score == pytest.approx(0.65 + 0.01 * (0.7615941559557649 - 1) / 2)
    assert score.num_unscored == 0


@pytest.mark.parametrize(
    ("right", "margin", "preferred_hard"),
    [([2.0, 2.0], 0.0, 0.0), ([3.0, 3.0], 1.0, 1.0), ([1.0, 1.0], -1.0, 0.0)],
)
def test_without_a_spread_the_margin_is_the_sign_of_the_gap(right, margin, preferred_hard):
    score = score_ties(ties(ref_7=([9.0], [2.0]), tied_7=(right, [2.0])))
    assert score.margin == margin
    assert score.preferred_hard == preferred_hard


def test_the_smaller_gap_counts():
    # The tied gap is 3, the ref gap 1, the spread 2.
    score = score_ties(ties(ref_1=([5.0], [4.0]), tied_1=([6.0, 4.0], [1.0])))
    assert (score.preferred, score.preferred_hard) == (1.0, 0.0)
    assert score.margin == pytest.approx(math.tanh(1 / 2 - 1))
    assert score.documented_score == pytest.approx(0.8)


def test_ties_score_reaches_its_ends():
    best = score_ties(ties(ref_1=([1e6], [0.0]), tied_1=([1e6 + 1, 1e6], [0.0])))
    assert best.documented_score == pytest.approx(1.0)
    assert best.score == pytest.approx(1.01)
    worst = score_ties(ties(ref_1=([0.0], [1e6]), tied_1=([1.0, 0.0], [1e6])))
    assert worst.documented_score == 0.0
    assert worst.score == pytest.approx(-0.01)


def test_a_gap_as_wide_as_the_spread_is_not_preferred():
    score = score_ties(ties(ref_1=([9.0], [0.0]), tied_1=([3.0, 2.0], [1.0])))
    assert (score.preferred, score.preferred_hard, score.margin) == (0.0, 0.0, 0.0)
    assert score.score == pytest.approx(0.6)


def test_a_gap_of_0_is_a_miss():
    score = score_ties(ties(ref_1=([2.0], [2.0]), tied_1=([3.0, 2.0], [2.0])))
    assert (score.ref_accuracy, score.tied_accuracy, score.score) == (0.0, 0.0, pytest.approx(0.01 * math.tanh(-1)))


def test_without_common_ids_there_is_no_ties_score():
    score = score_ties(ties(ref_1=([2.0], [1.0]), tied_2=([3.0, 2.0], [1.0])))
    assert (score.ref_accuracy, score.tied_accuracy) == (1.0, 1.0)
    assert score.preferred is score.preferred_hard is score.margin is score.documented_score is score.score is None
    empty = score_ties([])
    assert empty.ref_accuracy is None and empty.score is None


def test_one_right_answer_of_a_tied_prompt_makes_no_spread():
    score = score_ties(ties(ref_1=([2.0], [1.0]), tied_1=([3.0], [1.0])))
    assert score.tied_accuracy == 1.0
    assert score.preferred is None and score.score is None


def test_prompts_with_a_missing_reward_are_left_out_and_counted():
    rows = ties(ref_1=([2.0], [1.0]), tied_1=([3.0, 2.0], [0.0]), ref_2=([None], [1.0]), tied_2=([0.0, 0.0], [NAN]))
    score = score_ties(rows)
    assert score.num_unscored == 2
    assert score == score_ties(rows[:2])._replace(num_unscored=2)


@pytest.mark.parametrize(
    "row",
    [
        BestOf("other:1", "Ties", 1, [1.0, 0.0]),
        BestOf("ref:", "Ties", 1, [1.0, 0.0]),
        BestOf("17", "Ties", 1, [1.0, 0.0]),
        BestOf("ref:2", "Ties", 0, [1.0, 0.0]),
        BestOf("ref:2", "Ties", 2, [1.0, 0.0]),
        BestOf("ref:1", "Ties", 1, [1.0, 0.0]),
    ],
)
def test_rows_that_are_not_of_ties_are_named(row):
    with pytest.raises(EvaluationError, match=f"Row '{row.id}' of Ties has {row.num_correct} right of 2 answers"):
        score_ties([*ties(ref_1=([1.0], [0.0])), row])


def test_accuracies_of_reward_bench_2():
    rows = [
        BestOf("1", "Math", 1, [2.0, 1.0, 0.0, 0.0]),
        BestOf("2", "Math", 1, [2.0, 2.0, 0.0, 0.0]),
        BestOf("3", "Focus", 1, [0.0, 2.0, 0.0, 0.0]),
        BestOf("4", "Focus", 1, [None, 2.0, 0.0, 0.0]),
        BestOf("5", "Safety", 1, [None, 2.0, 0.0, 0.0]),
    ]
    assert subset_scores(rows) == {"Math": 0.75, "Focus": 0.0}
    rows += ties(ref_1=([5.0], [4.0]), tied_1=([6.0, 4.0], [1.0]))
    assert subset_scores(rows) == {
        "Math": 0.75,
        "Focus": 0.0,
        "Ties": pytest.approx(0.8 + 0.01 * math.tanh(-0.5)),
    }


def subset_scores(rows):
    """What Result rows of these rewards come to."""
    results = [{**row._asdict(), "benchmark": "reward_bench_2"} for row in rows]
    for result in results:
        result["credit"] = None if result["subset"] == "Ties" else best_of_credit(result["rewards"])
    return score_results(results).subsets


def test_right_answers_share_what_the_best_ones_earn():
    assert best_of_credit([1.0, 2.0, 0.0], 2) == 1 and best_of_credit([1.0, 2.0, 2.0], 2) == 0.5
    assert best_of_credit([1.0, 2.0, 3.0], 2) == 0 and best_of_credit([3.0, 3.0, 0.0], 2) == 1
