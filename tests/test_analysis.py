"""What analyses find in results, against numbers worked out by hand."""

import math

import numpy as np
import pytest

from rayrm.errors import ConfigError, EvaluationError
from rayrm.evaluation.analysis import agreement, bias, consistency, ensembles, leaderboard, probability, significance
from rayrm.evaluation.analysis.analyse import AnalysisConfig, analyse_set, check_analysis, list_metrics
from rayrm.evaluation.analysis.correlation import pearson, ranks, spearman
from rayrm.evaluation.analysis.grid import gather_sets, make_grid, reward_gap
from rayrm.evaluation.analysis.sheets import list_sheets
from rayrm.evaluation.benchmarks import M_REWARD_BENCH, TIES
from rayrm.evaluation.preferences import BootstrapConfig
from rayrm.evaluation.results import JUDGE, score_results
from rayrm.scoring.base import REWARD_MODEL

NAN = float("nan")


def result(model="rm", lang="en", number=0, credit=1.0, rewards=None, lengths=(10, 20), **columns):
    return {
        "model": model,
        "model_type": JUDGE if rewards is None else REWARD_MODEL,
        "benchmark": None,
        "set": "s",
        "id": f"r{number}",
        "group": f"g{number}",
        "lang": lang,
        "subset": None,
        "num_correct": 1,
        "rewards": None if rewards is None else list(rewards),
        "lengths": list(lengths),
        "credit": credit,
        "status": "ok",
        **columns,
    }


def judged(model, lang, credits, **columns):
    """A row for each credit."""
    return [result(model, lang, number, credit, **columns) for number, credit in enumerate(credits)]


def rewarded(model, lang, gaps, base=0.0):
    """A row for each reward gap."""
    return [
        result(model, lang, number, float(gap > 0), (base + gap, base), model_type=REWARD_MODEL)
        for number, gap in enumerate(gaps)
    ]


# Correlation.


def test_correlations_by_hand():
    # Means 2 and 4: 1·2 + 0·(-3) + (-1)... of (-1, 0, 1) and (-2, -1, 3) is 5; norms √2 and √14.
    assert pearson([1, 2, 3], [2, 3, 7]) == pytest.approx(5 / math.sqrt(28))
    assert spearman([1, 2, 3], [2, 3, 7]) == pytest.approx(1)
    assert ranks(np.array([5.0, 1, 5, 9])).tolist() == [2.5, 1, 2.5, 4]
    assert pearson([1, 1, 1], [1, 2, 3]) is None
    assert pearson([1, NAN, 3], [2, 5, NAN]) is None
    assert pearson([0.1, 0.1, 0.1], [0.1, 0.2, 0.3]) is None


# Gathering.


def test_rows_become_arrays_with_english_first():
    rows = [*rewarded("a", "de", [1, -2]), *rewarded("a", "en", [3]), *judged("b", "de", [0.5, None])]
    grid = make_grid(rows)
    assert (grid.models, grid.languages, grid.ids) == (["a", "b"], ["en", "de"], ["r0", "r1"])
    np.testing.assert_array_equal(grid.gaps[0], [[3, NAN], [1, -2]])
    np.testing.assert_array_equal(grid.credits[1], [[NAN, NAN], [0.5, NAN]])
    assert grid.lengths[0, 1].tolist() == [-10, -10]


def test_gap_is_between_the_worst_right_and_the_best_wrong_answer():
    assert reward_gap(result(rewards=[3, 1, 0.5, -4], num_correct=2)) == 0.5
    assert math.isnan(reward_gap(result(rewards=[3, None])))
    assert math.isnan(reward_gap(result()))


@pytest.mark.parametrize(
    ("rows", "wanted", "error", "message"),
    [
        ([], [], EvaluationError, "hold no row"),
        (judged("a", "en", [1]), ["x"], ConfigError, "'sets' names 'x', and the inputs hold s"),
        (judged("a", "en", [1]) * 2, [], EvaluationError, "Row 'r0' of 's' in en comes twice for 'a'"),
        (
            [result(), result(number=1, benchmark="reward_bench")],
            [],
            EvaluationError,
            "is no benchmark and reward_bench at once",
        ),
    ],
)
def test_inputs_that_cannot_be_compared_are_refused(rows, wanted, error, message):
    with pytest.raises(error, match=message):
        gather_sets(rows, wanted)


# Leaderboard.


def test_average_leaves_english_out_and_std_leaves_the_average_out():
    # Languages 0.5, 0.7, 0.9: mean 0.7; sample deviation √((0.04 + 0 + 0.04) / 2) = 0.2.
    line = leaderboard.make_leaderboard({"a": {"en": 0.8, "de": 0.5, "fr": 0.7, "uk": 0.9}}, {"a": "X"})[0]
    assert line.average == pytest.approx(0.7)
    assert line.deviation == pytest.approx(0.2)
    assert line.drop == pytest.approx(-12.5)
    assert line.drops == {"de": pytest.approx(-37.5), "fr": pytest.approx(-12.5), "uk": pytest.approx(12.5)}


def test_models_stand_by_type_and_then_by_average_with_those_without_one_last():
    scores = {
        "low": {"en": 1.0, "de": 0.2},
        "high": {"en": 0.1, "de": 0.9},
        "half": {"en": 1.0, "de": None},
        "judge": {"en": 0.5, "de": 0.1},
    }
    lines = leaderboard.make_leaderboard(scores, {"low": "B", "high": "B", "half": "B", "judge": "A"})
    assert [line.model for line in lines] == ["judge", "high", "low", "half"]
    assert lines[-1].average is None and lines[-1].drop is None and lines[1].deviation is None
    english = leaderboard.make_leaderboard({"b": {"en": 0.2}, "c": {"en": 0.9}}, {"b": "B", "c": "B"})
    assert [line.model for line in english] == ["c", "b"]


def test_chinese_is_one_column_in_figures_only():
    assert leaderboard.merge_chinese({"en": 1.0, "zh": 0.5, "zh-Hant": 0.7}) == {"en": 1.0, "zh": pytest.approx(0.6)}
    assert leaderboard.merge_chinese({"en": 1.0, "zh": 0.5}) == {"en": 1.0, "zh": 0.5}
    assert leaderboard.merge_chinese({"zh": 0.5, "zh-Hant": None}) == {"zh": None}


def test_languages_are_grouped_by_what_they_share():
    codes = ["en", "ar", "de", "he", "zh-Hant", "tlh"]
    assert leaderboard.group_languages(codes, "resource class") == {"3": ["he"], "5": ["ar", "de"]}
    assert leaderboard.group_languages(codes, "family") == {
        "Afro-Asiatic": ["ar", "he"],
        "Indo-European": ["de"],
        "Sino-Tibetan": ["zh-Hant"],
    }
    assert list(leaderboard.group_languages(codes, "script")) == ["Arab", "Hant", "Hebr", "Latn"]
    scores = {"en": 1.0, "ar": 0.4, "de": 0.6, "he": None}
    assert leaderboard.group_means(scores, {"5": ["ar", "de"], "3": ["he"]}) == {"5": 0.5, "3": None}


def test_facts_about_the_languages_of_m_reward_bench():
    languages = M_REWARD_BENCH.languages
    classes = {number: {x.code for x in languages if x.resource_class == number} for number in (3, 4, 5, None)}
    assert classes[5] == {"ar", "de", "es", "fr", "ja", "zh"}
    assert classes[4] == {"cs", "fa", "hi", "it", "ko", "nl", "pl", "pt", "ru", "tr", "vi"}
    assert classes[3] == {"el", "he", "id", "ro", "uk"}
    assert classes[None] == {"zh-Hant"}
    assert len({language.family for language in languages}) == 8


def test_correlation_with_english_is_over_models():
    lines = leaderboard.make_leaderboard(
        {"a": {"en": 0.5, "de": 0.4}, "b": {"en": 0.7, "de": 0.5}, "c": {"en": 0.9, "de": None}},
        dict.fromkeys("abc", ""),
    )
    assert leaderboard.correlate_with_english(lines) == (pytest.approx(1), pytest.approx(1))
    assert leaderboard.correlate_with_english(lines[:1]) is None


def test_accuracies_have_intervals_by_group():
    rows = [*judged("a", "de", [1, 1, 0, 1]), *judged("a", "fr", [1, 1, 0, None]), *judged("a", "en", [1, 1, 1, 1])]
    found = {item.language: item for item in leaderboard.accuracies(make_grid(rows), BootstrapConfig())}
    assert found["all"].accuracy == pytest.approx(5 / 7)
    assert (found["all"].num_rows, found["all"].num_groups) == (7, 4)
    assert found["all"].low < 5 / 7 < found["all"].high
    assert (found["en"].low, found["en"].accuracy, found["en"].high) == (1, 1, 1)


# Agreement.


def test_kappa_by_hand():
    # Agree on 3 of 4; chance is (3/4)(1/2) + (1/4)(1/2) = 1/2, so κ is (3/4 - 1/2) / (1/2).
    found = agreement.cohen_kappa(np.array([1.0, 1, 1, 0]), np.array([1.0, 1, 0, 0]))
    assert found == (4, 0.75, pytest.approx(0.5), "")


def test_kappa_of_constant_lists_is_told_apart():
    ones, zeros = np.ones(3), np.zeros(3)
    assert agreement.cohen_kappa(ones, ones) == (3, 1, 1, "same")
    assert agreement.cohen_kappa(ones, zeros) == (3, 0, 0, "different")
    assert agreement.cohen_kappa(ones, np.array([1.0, 0, 1])).kappa == 0
    assert agreement.cohen_kappa(ones, np.full(3, NAN)) is None


def test_credits_between_right_and_wrong_are_a_label_of_their_own():
    np.testing.assert_array_equal(agreement.labels(np.array([1, 0, 0.5, 1 / 3, NAN])), [1, 0, 2, 2, NAN])


def test_agreement_with_english_keeps_constant_languages():
    rows = [*judged("a", "en", [1, 1, 1]), *judged("a", "de", [1, 1, 1]), *judged("a", "fr", [1, 1, 0, 1])]
    found = agreement.summarise_agreement(agreement.compare_with_english(make_grid(rows)))
    assert found == [("a", 0.5, 0.5, 2, 1)]


def test_rows_without_english_are_not_compared():
    assert agreement.compare_with_english(make_grid(judged("a", "de", [1, 0]))) == []
    assert agreement.agreement_by_row(make_grid(judged("a", "de", [1, 0]))) == []


def test_agreement_of_models_in_each_language():
    rows = [*judged("a", "en", [1, 1, 1, 0]), *judged("b", "en", [1, 1, 0, 0]), *judged("b", "de", [1, 0])]
    grid = make_grid(rows)
    found = agreement.compare_models(grid)
    assert [(x.model, x.other_model, x.language, x.agreement.kappa) for x in found] == [("a", "b", "en", 0.5)]
    np.testing.assert_allclose(agreement.matrix_of_models(grid, found), [[1, 0.5], [0.5, 1]])


def test_agreement_row_by_row_is_over_models():
    rows = [
        *(row for model, right in zip("abcd", [1, 1, 1, 0], strict=True) for row in judged(model, "en", [right, 1])),
        *(row for model, right in zip("abcd", [1, 1, 0, 0], strict=True) for row in judged(model, "de", [right, 1])),
    ]
    # The first row has κ = 0.5 over the four models; the second is right for all in both languages.
    assert agreement.agreement_by_row(make_grid(rows)) == [("de", "", 2, 0.75, 1)]


# Consistency.


def test_rank_flips_and_gap_differences_over_translations():
    rows = [*rewarded("a", "en", [1, -1, 2, 0]), *rewarded("a", "de", [2, 1, 2, 0])]
    found = consistency.compare_translations(make_grid(rows), {"a": 2.0})
    # One of four signs differs; |1 - 2| and |-1 - 1| are 3 over 4 rows, in units of 2.
    assert [item[:-1] for item in found] == [("a", "en", "de", 4, 0.25, 0.375)]
    assert found[0].correlation == pytest.approx(pearson([1, -1, 2, 0], [2, 1, 2, 0]))


def test_judges_flip_where_their_verdicts_differ():
    rows = [*judged("j", "en", [1, 0, 0.5, 1]), *judged("j", "de", [1, 1, 0.5, None]), *judged("j", "fr", [0, 0, 1])]
    found = consistency.compare_translations(make_grid(rows), {})
    assert [(x.language, x.other_language, x.num_rows, x.flips) for x in found] == [
        ("en", "de", 3, pytest.approx(1 / 3)),
        ("en", "fr", 3, pytest.approx(2 / 3)),
        ("de", "fr", 3, 1.0),
    ]
    assert consistency.summarise_translations(found, True) == [("j", 2, 0.5, None, None)]
    assert consistency.summarise_translations(found, False)[0].flips == pytest.approx(2 / 3)


# Length.


def test_length_bias_by_side():
    lengths = [(9, 5), (9, 5), (3, 8), (4, 4), (2, 9)]
    rows = [
        result("a", "de", n, float(gap > 0), (gap, 0.0), lengths=size)
        for n, (gap, size) in enumerate(zip([2, -1, 1, 3, -2], lengths, strict=True))
    ]
    found = bias.length_bias(make_grid([*rows, result("a", "de", 9, 1.0, (1, 0, 0, 0), (1, 2, 3, 4))]))
    assert [item.language for item in found] == ["all", "de"]
    assert found[0].num_rows == {"longer": 2, "equal": 1, "shorter": 2}
    assert found[0].accuracy == {"longer": 0.5, "equal": 1.0, "shorter": 0.5}
    assert found[0].correlation == pytest.approx(spearman([4, 4, -5, 0, -7], [2, -1, 1, 3, -2]))


def test_length_categories_are_those_of_reward_bench():
    assert sum(map(len, bias.LENGTH_CATEGORIES.values())) == 23
    names = ["alpacaeval-easy", "hep-go", "donotanswer", "donotanswer"]
    rows = [result(number=n, credit=float(n != 2), subset=name) for n, name in enumerate(names)]
    assert bias.by_length_category(make_grid(rows)) == [("rm", "en", {"longer": 1.0, "neutral": 1.0, "shorter": 0.5})]
    assert bias.by_length_category(make_grid(judged("a", "en", [1]))) == []


# Probability.


def test_probability_of_hand_made_gaps():
    # σ(ln 3) = 0.75, and three of four rows are right: no calibration error.
    rows = rewarded("a", "en", [math.log(3)] * 3 + [-math.log(3)])
    found = probability.measure_probability(make_grid([*rows, *judged("j", "en", [1])]), 4)
    assert [item.model for item in found] == ["a"]
    assert found[0].expected_error == pytest.approx(0)
    assert found[0].brier == pytest.approx((3 * 0.25**2 + 0.75**2) / 4)
    assert found[0].log_loss == pytest.approx(-(3 * math.log(0.75) + math.log(0.25)) / 4)


def test_confidence_bins_have_equal_width_and_ties_count_half():
    found = probability.confidence_bins(np.array([0.0, 0.0, math.log(9), -50.0]), 5)
    assert [(part.low, part.high, part.num_rows) for part in found] == [
        (0.5, pytest.approx(0.6), 2),
        (pytest.approx(0.9), pytest.approx(1.0), 2),
    ]
    assert [part.accuracy for part in found] == [0.5, 0.5]
    assert found[1].confidence == pytest.approx(0.95)


def test_huge_gaps_have_finite_losses():
    found = probability.measure_probability(make_grid(rewarded("a", "en", [1e4, -1e4])), 10)[0]
    assert (found.brier, found.log_loss, found.expected_error) == (0.5, 5000.0, 0.5)


# Ensembles.


def test_ensemble_rewards_by_hand():
    values = np.array([[1.0, 4.0], [3.0, 4.0]])
    assert ensembles.combine(values, "mean", 9).tolist() == [2, 4]
    assert ensembles.combine(values, "worst", 9).tolist() == [1, 4]
    assert ensembles.combine(values, "uncertainty", 0.5).tolist() == [1.5, 4]


def test_ensemble_credits_are_those_of_single_rows():
    values = np.array([[1, 0, NAN, NAN], [1, 1, NAN, NAN], [2, 2, 1, 0], [1, 2, 2, 0]], float)
    found = ensembles.ensemble_credits(values, np.array([2, 2, 4, 4]), np.array([1, 1, 1, 1]))
    assert found.tolist() == [1, 0, 0.5, 0]
    assert ensembles.ensemble_credits(values, np.array([2, 2, 4, 4]), np.array([1, 1, 2, 2])).tolist() == [1, 0, 1, 0.5]


def test_ensemble_of_two_models_on_a_set():
    # Both have rewards ±1 and ±10 of mean 0 and so the same scale; together the larger standardised gap wins.
    first = [result("a", "en", n, 1.0, pair) for n, pair in enumerate([(1, -1), (-1, 1), (1, -1)])]
    second = [result("b", "en", n, 1.0, pair) for n, pair in enumerate([(10, -10), (10, -10), (-10, 10)])]
    evaluated = gather_sets([*first, *second, *judged("j", "en", [1, 0, 1])])[0]
    assert ensembles.rewarding_models(evaluated) == ["a", "b"]
    found = ensembles.measure_ensembles(evaluated, [("a", "b")], 1.0)
    # Rows 1 and 2 are ties of 0 and 0 for the mean, of -1 and -1 for the worst: a tie is a miss.
    assert [(item.method, item.scores, item.average, item.num_rows) for item in found] == [
        (method, {"en": pytest.approx(1 / 3)}, None, 3) for method in ("mean", "worst", "uncertainty")
    ]


def test_ensemble_skips_rows_that_a_member_has_no_reward_for():
    rows = [*rewarded("a", "en", [1, -2, 3]), *rewarded("b", "en", [1, -2, 4])]
    rows[-1]["rewards"], rows[-1]["credit"] = [None, 1.0], None
    found = ensembles.measure_ensembles(gather_sets(rows)[0], [("a", "b")], 1.0)
    assert [(item.scores["en"], item.num_rows) for item in found] == [(0.5, 2)] * 3


def test_ensemble_of_equal_models_scores_as_each_does_on_a_benchmark():
    rng = np.random.default_rng(0)
    rows = []
    for number, subset in enumerate(["Factuality", "Math", "Safety", "Focus", "Precise IF"] * 4):
        rows.append(result("a", "en", number, rewards=rng.normal(size=4), lengths=[1] * 4, subset=subset))
    for number in range(3):
        rows.append(result("a", "en", rewards=rng.normal(size=3), lengths=[1] * 3, subset=TIES, id=f"ref:{number}"))
        own = {"subset": TIES, "id": f"tied:{number}", "num_correct": 2}
        rows.append(result("a", "en", rewards=rng.normal(size=4), lengths=[1] * 4, **own))
    for row in rows:
        row["benchmark"] = "reward_bench_2"
        row["credit"] = None if row["subset"] == TIES else float(np.argmax(row["rewards"]) == 0)
    evaluated = gather_sets([*rows, *({**row, "model": "b"} for row in rows)])[0]
    found = ensembles.measure_ensembles(evaluated, [("a", "b")], 1.0)
    assert [item.scores["en"] for item in found] == [pytest.approx(score_results(rows).score)] * 3


def test_all_combinations_have_two_models_or_more():
    assert ensembles.all_combinations(["a", "b", "c"]) == [("a", "b"), ("a", "c"), ("b", "c"), ("a", "b", "c")]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ensembles": [["a", "j"]]}, "'ensembles' names 'j', and an ensemble is made of .* on 's': a"),
        ({"ensembles": [["a", "a"]]}, "names a model twice"),
        ({"sweep_ensembles": True}, "no set has two models with rewards"),
    ],
)
def test_ensembles_that_cannot_be_made_are_refused(fields, message):
    sets = gather_sets([*rewarded("a", "en", [1, 2]), *judged("j", "en", [1, 0])])
    with pytest.raises(ConfigError, match=message):
        check_analysis(sets, AnalysisConfig(**fields))


# Significance.


def test_mcnemar_is_exact_for_few_rows_and_chi_squared_for_many():
    # 2 (1 + 9) / 2⁹ = 20 / 512, and χ² = (|30 - 10| - 1)² / 40 = 9.025.
    assert significance.mcnemar(8, 1) == ("exact", pytest.approx(20 / 512))
    assert significance.mcnemar(0, 0) == ("exact", 1.0)
    assert significance.mcnemar(2, 2) == ("exact", 1.0)
    test, p_value = significance.mcnemar(30, 10)
    assert test == "chi_squared" and p_value == pytest.approx(0.00266, abs=1e-5)
    assert significance.mcnemar(13, 13)[1] == 1.0


def test_holm_steps_down():
    # 3·0.01, 2·0.02, then 0.03 raised to what came before it.
    assert holm_of(0.03, 0.01, 0.02) == pytest.approx([0.04, 0.03, 0.04])
    assert holm_of(0.6, 0.7) == [1, 1]


def holm_of(*p_values):
    return significance.holm(p_values)


def test_translations_of_a_row_are_one_observation():
    rows = [*judged("a", "en", [1, 1, 0, 1]), *judged("a", "de", [1, 0, 1, None])]
    rows += [*judged("b", "en", [0, 1, 1, 1]), *judged("b", "de", [0, 1, 0, 0])]
    # Row 0 is better in both languages, row 1 worse in German, row 2 once better and once worse, row 3 the same.
    found = significance.compare_all(make_grid(rows))
    assert found == [("a", "b", 4, 1, 1, "exact", 1.0, 1.0)]


def test_models_that_do_not_differ_share_a_letter():
    def differ(one, two):
        return significance.Difference(one, two, 9, 9, 0, "exact", 0.001, 0.001)

    assert significance.letter_groups("abc", [], 0.05) == {"a": "a", "b": "a", "c": "a"}
    assert significance.letter_groups("abc", [differ("a", "c")], 0.05) == {"a": "a", "b": "ab", "c": "b"}
    found = significance.letter_groups("abc", [differ("a", "b"), differ("b", "c"), differ("a", "c")], 0.05)
    assert found == {"a": "a", "b": "b", "c": "c"}
    assert significance.letter_groups("ab", [differ("a", "b")._replace(adjusted=0.05)], 0.05) == {"a": "a", "b": "a"}


# Together.


def test_a_set_in_one_language_without_rewards_is_analysed():
    rows = [*judged("a", "en", [1, 0, 1]), *judged("b", "en", [1, 1, 0])]
    found = analyse_set(gather_sets(rows)[0], AnalysisConfig(bootstrap={"num_resamples": 20}))
    metrics = list_metrics(found, AnalysisConfig())["models"]["a"]
    assert metrics["average"] is None and metrics["scores"] == {"en": pytest.approx(2 / 3)}
    assert metrics["probability"] is None and metrics["kappa_with_english"] is None
    assert list_sheets(found)["leaderboard"][1][0][:5] == ["a", JUDGE, None, None, "a"]


def test_sections_of_a_benchmark_have_leaderboards_of_their_own():
    subsets = ["alpacaeval-easy", "mt-bench-hard", "donotanswer", "hep-go"]
    rows = [
        result("a", lang, n, float(n != 1), subset=subset, benchmark="m_reward_bench")
        for lang in ("en", "de")
        for n, subset in enumerate(subsets)
    ]
    found = analyse_set(gather_sets(rows)[0], AnalysisConfig(bootstrap={"num_resamples": 20}))
    assert found.boards["overall"][0].average == 0.75
    sheets = list_sheets(found)
    assert {"chat", "chat-hard", "safety", "reasoning"} <= sheets.keys()
    assert sheets["chat-hard"] == (
        ["model", "type", "avg", "std", "letters", "en", "de"],
        [["a", JUDGE, 0, None, "a", 0, 0]],
    )
