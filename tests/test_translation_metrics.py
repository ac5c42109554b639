"""Translation metrics against sacreBLEU itself, means by hand, and intervals of paired differences."""

import importlib.util

import numpy as np
import pyarrow as pa
import pytest
from sacrebleu.metrics import BLEU, CHRF

from rayrm.errors import ConfigError, EvaluationError
from rayrm.evaluation.preferences import BootstrapConfig
from rayrm.evaluation.report import render
from rayrm.evaluation.translation.bootstrap import (
    MIN_GROUPS,
    Resampler,
    slice_draws,
    summarise,
    summarise_difference,
)
from rayrm.evaluation.translation.drift import LanguageGuess, distinct, measure_drift
from rayrm.evaluation.translation.entropy import HIGHEST, LOWEST, find_temperature
from rayrm.evaluation.translation.matrices import make_matrix
from rayrm.evaluation.translation.measuring import measure_set
from rayrm.evaluation.translation.metrics import (
    check_tokenizers,
    count_bleu,
    count_chrf,
    flatten_text,
    score_bleu,
    score_chrf,
    tokenize,
    tokenizer_of,
)
from rayrm.evaluation.translation.policies import Answers
from rayrm.evaluation.translation.report import build_report, differences_table, means_table, tell_unscored
from rayrm.seeds import seed_of

SENTENCE = "ein roter Hund läuft über die grüne Wiese und zwei kleine Kinder stehen am alten Fluss"
WORDS = SENTENCE.split()
PAIRS = [("en", "de"), ("en", "fr"), ("de", "en"), ("de", "fr"), ("fr", "de")]


def sentence(rng, length=None):
    return " ".join(rng.choice(WORDS, length or rng.integers(4, 14)))


def spoil(text, rng, share):
    return " ".join(word if rng.random() > share else rng.choice(WORDS) for word in text.split())


def make_set(num_groups=30, seed=0):
    """Rows of every pair of `PAIRS`, five of one group standing together."""
    rng = np.random.default_rng(seed)
    rows = []
    for group in range(num_groups):
        texts = {lang: sentence(rng) for lang in ("en", "de", "fr")}
        for src, tgt in PAIRS:
            row = {"set": "s", "id": f"{group}/{src}", "group": f"g{group}", "src_lang": src, "tgt_lang": tgt}
            rows.append({**row, "lang": tgt, "source": texts[src], "reference": texts[tgt]})
    return pa.Table.from_pylist(rows)


def make_answers(rows, share, num_samples=1, seed=1, **scores):
    rng = np.random.default_rng(seed)
    samples = [[spoil(text, rng, share) for text in rows["reference"].to_pylist()] for _ in range(num_samples)]
    num = rows.num_rows
    faults = {name: {"nan": int(np.isnan(value).sum())} for name, value in scores.items()}
    found = {name: np.array(value, float) for name, value in scores.items()}
    return Answers(samples, [0] * num, [False] * num, found, faults)


def rows_of(rows, pair, column="reference"):
    return [row[column] for row in rows.to_pylist() if (row["src_lang"], row["tgt_lang"]) == pair]


@pytest.mark.parametrize(
    ("hypotheses", "references"),
    [
        (["the cat sat on the mat today", "a dog"], ["the cat sat on a mat today", "a dog runs fast"]),
        # No match of four words, so that it is smoothed; texts too short for an order; nothing at all.
        (["the cat on mat the", "dog a"], ["the cat sat on the mat", "a dog runs fast"]),
        (["cat", "dog"], ["cat", "cat"]),
        (["", ""], ["the cat", "a dog"]),
        (["xyz uvw", "q"], ["the cat", "a dog"]),
        (["", "the cat sat on the mat"], ["a dog", "the cat sat on the mat"]),
    ],
)
def test_scores_of_summed_statistics_are_those_of_sacrebleu(hypotheses, references):
    bleu = count_bleu([hypotheses], references, "de")
    chrf = count_chrf([hypotheses], references, "de")
    expected = BLEU(effective_order=True).corpus_score(hypotheses, [references]).score
    assert score_bleu(bleu.numbers.sum(axis=1)) == pytest.approx([expected], abs=1e-9)
    expected = CHRF().corpus_score(hypotheses, [references]).score
    assert score_chrf(chrf.numbers.sum(axis=1)) == pytest.approx([expected], abs=1e-9)
    assert "tok:13a" in bleu.signature and "eff:yes" in bleu.signature and "nc:6" in chrf.signature


def test_a_resample_is_the_corpus_score_of_the_rows_that_it_draws():
    rows = make_set(12)
    own = make_answers(rows, 0.4, num_samples=2)
    groups = rows["group"].to_pylist()
    pairs = list(zip(rows["src_lang"].to_pylist(), rows["tgt_lang"].to_pylist(), strict=True))
    resampler = Resampler(pairs, groups, BootstrapConfig(num_resamples=3), "s")
    references = rows["reference"].to_pylist()
    weights = np.concatenate(list(resampler._times()))
    assert weights.shape == (4, 12) and set(weights.sum(axis=1)) == {12}
    for count, score, metric in (
        (count_bleu, score_bleu, BLEU(effective_order=True)),
        (count_chrf, score_chrf, CHRF()),
    ):
        statistics = [
            count([[text[i] for i in part] for text in own.samples], [references[i] for i in part], "de").numbers
            for part in resampler.rows
        ]
        draws = resampler.draw(statistics, score)
        assert draws.shape == (4, len(PAIRS))
        for draw, times in enumerate(weights):
            for place, part in enumerate(resampler.rows):
                drawn = [i for i in part for _ in range(int(times[resampler.groups[i]]))]
                scores = [
                    metric.corpus_score([text[i] for i in drawn], [[references[i] for i in drawn]]).score
                    for text in own.samples
                ]
                assert draws[draw, place] == pytest.approx(np.mean(scores), abs=1e-9)
        assert len({round(value, 6) for value in draws[:, 0]}) > 1
        assert np.array_equal(draws, resampler.draw(statistics, score))


def test_each_language_has_its_tokenizer():
    expected = {
        "zh": ("zh", "zho_Hans", "zh-Hant", "zh_TW", "zho_Hant", "yue_Hant"),
        "ja-mecab": ("ja", "jpn_Jpan", "ja-JP"),
        "ko-mecab": ("ko", "kor_Hang", "ko-KR"),
        "char": ("th", "tha_Thai", "lo", "lao_Laoo", "khm_Khmr", "my-MM", "mya_Mymr"),
        "13a": ("de", "pt-BR", "por_Latn", "hin_Deva", "nothing_known"),
    }
    assert {
        name: tuple(filter(lambda c: tokenizer_of(c) == name, langs)) for name, langs in expected.items()
    } == expected


@pytest.mark.parametrize(
    ("lang", "hypothesis", "reference", "tokens", "signature"),
    [
        (
            "jpn_Jpan",
            "茶色の犬が緑の芝生の上を走っている。",
            "茶色い犬が緑の芝生の上を走っています。",
            "茶色 の 犬 が 緑 の 芝生 の 上 を 走っ て いる 。",
            "tok:ja-mecab-",
        ),
        (
            "ko",
            "갈색 개가 푸른 잔디밭 위를 달리고 있다.",
            "갈색 개가 푸른 잔디밭 위로 달리고 있습니다.",
            "갈색 개 가 푸른 잔디밭 위 를 달리 고 있 다 .",
            "tok:ko-mecab-",
        ),
        ("zh-Hant", "一隻狗在跑。", "一隻狗在跳。", "一 隻 狗 在 跑 。", "tok:zh|"),
        ("th", "หมาวิ่ง", "หมาเดิน", "ห ม า ว ิ ่ ง", "tok:char|"),
    ],
)
def test_bleu_takes_the_words_of_its_language(lang, hypothesis, reference, tokens, signature):
    assert tokenize([hypothesis], lang) == [tokens.split()]
    counted = count_bleu([[hypothesis]], [reference], lang)
    assert signature in counted.signature
    expected = BLEU(tokenize=tokenizer_of(lang), effective_order=True).corpus_score([hypothesis], [[reference]]).score
    assert score_bleu(counted.numbers.sum(axis=1)) == pytest.approx([expected]) and 10 < expected < 90
    # A sentence without blanks is one word to 13a, so that nothing of it would match.
    if lang != "ko":
        assert BLEU(effective_order=True).corpus_score([hypothesis], [[reference]]).score < expected


def test_a_tokenizer_without_its_packages_is_told(monkeypatch):
    check_tokenizers(["de", "ja", "kor_Hang"])
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ipadic" else there(name))
    check_tokenizers(["de", "ko"])
    with pytest.raises(ConfigError, match=r"in jpn_Jpan .* by ja-mecab, .* ipadic are not .* 'sacrebleu\[ja\]'"):
        check_tokenizers(["de", "jpn_Jpan"])


def test_texts_are_scored_on_one_line():
    assert flatten_text("  ein\nHund\r\n läuft\u2028 ") == "ein Hund läuft"


def test_means_are_unweighted_over_pairs():
    # English is English in all of its codes.
    pairs = [("en", "de"), ("eng_Latn", "fr"), ("de", "en-GB"), ("fr", "de")]
    draws = np.array([[10.0, 20.0, 40.0, 5.0], [1.0, np.nan, 3.0, np.nan]])
    slices = slice_draws(draws, pairs, [10] * 4)
    assert {name: values[0] for name, values in slices.items()} == {
        "": 18.75,
        "en-x": 15.0,
        "x-en": 40.0,
        "x-x": 5.0,
        "en-de": 10.0,
        "eng_Latn-fr": 20.0,
        "de-en-GB": 40.0,
        "fr-de": 5.0,
    }
    # A draw without a row of a pair leaves that pair out.
    assert slices[""][1] == 2.0 and slices["en-x"][1] == 1.0 and np.isnan(slices["x-x"][1])
    assert "x-x" not in slice_draws(draws[:, :3], pairs[:3], [10] * 3)
    # One pair of few groups takes the interval of every mean that it is in, and one without any is in none.
    short = slice_draws(draws, pairs, [10, 9, 10, 0])
    assert [len(short[name]) for name in ("", "en-x", "eng_Latn-fr", "x-en", "en-de", "x-x")] == [1, 1, 1, 2, 2, 2]
    assert short["en-x"][0] == 15.0
    found = summarise("bleu", slices, 0.95)
    assert found["bleu"] == 18.75 and found["bleu/x-x"] == 5.0 and found["bleu_interval/x-x"] is None
    matrix = make_matrix(found, "bleu", pairs)
    assert (matrix.sources, matrix.targets) == (["en", "eng_Latn", "de", "fr"], ["en-GB", "de", "fr"])
    nothing = np.nan
    rows = [[nothing, 10, nothing], [nothing, nothing, 20], [40, nothing, nothing], [nothing, 5, nothing]]
    assert np.array_equal(matrix.values, rows, equal_nan=True)


def test_p_value_counts_resamples_on_the_rarer_side():
    found = summarise_difference("bleu", {"": np.array([2.0, *([1.0] * 38), -1.0])}, 0.95)
    # One of 39 resamples is at or below zero, and the difference itself counts once more: 2 · (1 + 1) / 40.
    assert found["bleu_p_value"] == pytest.approx(0.1)
    assert summarise_difference("bleu", {"": np.zeros(40)}, 0.95)["bleu_p_value"] == 1.0


def measure(rows, answers, metric_names=("bleu", "chrf"), num_resamples=200):
    return measure_set("s", rows, answers, metric_names, BootstrapConfig(num_resamples=num_resamples))


def test_a_paired_resample_is_the_difference_of_two_corpus_scores_of_the_same_captions():
    rows = make_set(12)
    answers = {"a": make_answers(rows, 0.5, seed=1), "b": make_answers(rows, 0.3, seed=2)}
    (found,) = measure(rows, answers, num_resamples=20).differences
    table, groups = rows.to_pylist(), sorted(set(rows["group"].to_pylist()))
    by_group = {name: [i for i, row in enumerate(table) if row["group"] == name] for name in groups}
    rng = np.random.default_rng(seed_of(BootstrapConfig().seed, "translation", "s"))
    resamples = [range(12), *rng.integers(0, 12, (20, 12)).tolist()]
    for name, metric in (("bleu", BLEU(effective_order=True)), ("chrf", CHRF())):
        draws = []
        for resample in resamples:
            drawn = [i for place in resample for i in by_group[groups[place]]]
            gaps = []
            for pair in PAIRS:
                own = [i for i in drawn if (table[i]["src_lang"], table[i]["tgt_lang"]) == pair]
                references = [[table[i]["reference"] for i in own]]
                a, b = ([answers[policy].samples[0][i] for i in own] for policy in "ab")
                gaps.append(metric.corpus_score(b, references).score - metric.corpus_score(a, references).score)
            draws.append((np.mean(gaps), gaps[3]))
        for place, end in enumerate(("", "/de-fr")):
            value, *others = [draw[place] for draw in draws]
            assert found[f"{name}{end}"] == pytest.approx(value)
            assert found[f"{name}_interval{end}"] == pytest.approx(np.quantile(others, [0.025, 0.975]).tolist())
            beyond = min(sum(gap <= 0 for gap in others), sum(gap >= 0 for gap in others)) + 1
            assert found[f"{name}_p_value{end}"] == pytest.approx(min(1, 2 * beyond / 21))


def test_few_captions_have_no_interval():
    for num, is_there in ((MIN_GROUPS - 1, False), (MIN_GROUPS, True)):
        rows = make_set(num)
        scores = [0.5] * rows.num_rows
        answers = {name: make_answers(rows, 0.4, seed=i, bleurt=scores) for i, name in enumerate("ab")}
        result = measure(rows, answers, ("bleu", "bleurt"))
        for metric in ("bleu", "bleurt"):
            for end in ("", "/x-x", "/de-fr"):
                assert (result.metrics["a"][f"{metric}_interval{end}"] is not None) == is_there
                assert (result.differences[0][f"{metric}_interval{end}"] is not None) == is_there
                assert (result.differences[0][f"{metric}_p_value{end}"] is not None) == is_there
        config = BootstrapConfig(num_resamples=200)
        cells = [row[2] for table in (means_table, differences_table) for row in table(result, ["bleu"], config).rows]
        assert all(cell.endswith(" –") != is_there for cell in cells)
        page = render(build_report({"s": result}, ["bleu", "bleurt"], {}, config))
        assert "has fewer than 10" in page
    # What a scorer failed on does not count: nine captions are left in every pair.
    scores = [np.nan if row["group"] == "g0" else 0.5 for row in rows.to_pylist()]
    failed = {"a": answers["a"], "b": make_answers(rows, 0.4, bleurt=scores)}
    result = measure(rows, failed, ("bleurt",))
    assert result.metrics["a"]["bleurt_interval"] == [0.5, 0.5]
    assert result.metrics["b"]["bleurt_interval"] is result.differences[0]["bleurt_interval/de-fr"] is None


def test_equal_policies_have_no_difference():
    rows = make_set()
    own = make_answers(rows, 0.4)
    (found,) = measure(rows, {"a": own, "b": own}).differences
    assert (found["policy"], found["baseline"]) == ("b", "a")
    for metric in ("bleu", "chrf"):
        assert found[metric] == 0 and found[f"{metric}_interval"] == [0, 0] and found[f"{metric}_p_value"] == 1


def test_policies_that_differ_by_chance_have_an_interval_around_zero():
    rows = make_set(60)
    answers = {"a": make_answers(rows, 0.4, seed=1), "b": make_answers(rows, 0.4, seed=2)}
    (found,) = measure(rows, answers).differences
    for metric in ("bleu", "chrf"):
        low, high = found[f"{metric}_interval"]
        assert low < 0 < high and found[f"{metric}_p_value"] > 0.05


def test_a_policy_that_is_better_everywhere_has_an_interval_above_zero():
    rows = make_set()
    answers = {"worse": make_answers(rows, 0.6), "better": make_answers(rows, 0.2)}
    result = measure(rows, answers)
    (found,) = result.differences
    for metric in ("bleu", "chrf"):
        for name in ("", "/en-x", "/x-en", "/x-x", "/de-fr"):
            assert found[f"{metric}_interval{name}"][0] > 0 and found[f"{metric}_p_value{name}"] < 0.02
        gap = result.metrics["better"][f"{metric}/de-fr"] - result.metrics["worse"][f"{metric}/de-fr"]
        assert found[f"{metric}/de-fr"] == pytest.approx(gap)
        low, high = result.metrics["better"][f"{metric}_interval"]
        assert low < result.metrics["better"][metric] < high
    hypotheses, references = [], rows_of(rows, ("de", "fr"))
    for row, text in zip(rows.to_pylist(), answers["better"].samples[0], strict=True):
        if (row["src_lang"], row["tgt_lang"]) == ("de", "fr"):
            hypotheses.append(text)
    expected = BLEU(effective_order=True).corpus_score(hypotheses, [references]).score
    assert result.metrics["better"]["bleu/de-fr"] == pytest.approx(expected)
    # Paired intervals are narrower than the sum of two single ones.
    widths = [np.ptp(result.metrics[name]["chrf_interval"]) for name in answers]
    assert np.ptp(found["chrf_interval"]) < sum(widths)


def test_the_interval_of_a_mean_takes_the_rows_of_a_group_together():
    # Every row of a group has the same score, so that five pairs say no more than one.
    rows = make_set(40)
    scores = [float(int(group[1:]) % 2) for group in rows["group"].to_pylist()]
    own = make_answers(rows, 0.4, bleurt=scores)
    found = measure(rows, {"a": own}, ("bleurt",), 2000).metrics["a"]
    assert found["bleurt"] == found["bleurt/de-fr"] == 0.5
    assert found["bleurt_interval"] == pytest.approx(found["bleurt_interval/de-fr"])
    # The standard error of a mean of 40 coin tosses is 0.079.
    assert np.ptp(found["bleurt_interval"]) == pytest.approx(2 * 1.96 * 0.079, rel=0.1)


def test_failed_scores_are_in_no_mean_and_on_neither_side_of_a_difference():
    rows = make_set(2)
    first = [1.0] * 5 + [0.0] * 5
    answers = {
        "a": make_answers(rows, 0, bleurt=first),
        "b": make_answers(rows, 0, bleurt=[np.nan] * 5 + [0.25] * 5),
    }
    result = measure(rows, answers, ("bleurt",))
    assert result.metrics["a"]["bleurt"] == 0.5 and result.metrics["b"]["bleurt"] == 0.25
    assert (result.metrics["a"]["bleurt_unscored"], result.metrics["b"]["bleurt_unscored"]) == (0, 5)
    assert result.differences[0]["bleurt"] == 0.25 and result.differences[0]["bleurt_unscored"] == 5
    assert tell_unscored(result, ["bleurt"]) == (
        "5 rows of b have no BLEURT (5 nan); 5 rows are left out of both sides of b − a in BLEURT."
    )
    assert tell_unscored(measure(rows, {"a": answers["a"]}, ("bleurt",)), ["bleurt"]) == ""


def test_silence_costs():
    rows = make_set(12)
    whole = make_answers(rows, 0.2)
    silent = whole._replace(samples=[["" if i % 2 else text for i, text in enumerate(whole.samples[0])]])
    (found,) = measure(rows, {"whole": whole, "silent": silent}).differences
    assert found["bleu"] < -30 and found["chrf"] < -20
    own = [
        text
        for text, row in zip(silent.samples[0], rows.to_pylist(), strict=True)
        if (row["src_lang"], row["tgt_lang"]) == ("de", "fr")
    ]
    expected = BLEU(effective_order=True).corpus_score(own, [rows_of(rows, ("de", "fr"))]).score
    assert "" in own
    assert measure(rows, {"silent": silent}).metrics["silent"]["bleu/de-fr"] == pytest.approx(expected)


def test_drift_is_counted():
    base = {"src_lang": "en", "tgt_lang": "ru", "source": "A dog runs over the wet grass"}
    references = ["Собака бежит по мокрой траве", "Собака бежит по траве", "Собака лежит на траве", "Собака спит дома"]
    rows = [{**base, "reference": text} for text in references]
    texts = [["Собака бежит по мокрой траве", " a DOG runs  over the wet grass", "", "The dog sleeps at home"]]
    answers = Answers(texts, [1, 0, 0, 0], [False, False, True, False], {}, {})
    found = measure_drift(rows, answers, LanguageGuess([("ru", t) for t in references] + [("en", base["source"])]))
    assert {name: found[name] for name in ("unfinished", "empty", "dropped", "source_copy")} == dict.fromkeys(
        ("unfinished", "empty", "dropped", "source_copy"), 0.25
    )
    assert found["wrong_script"] == found["wrong_language"] == pytest.approx(2 / 3)
    assert found["num_rows"] == 4 and found["unfinished/en-ru"] == 0.25
    length = sum(len(text.strip()) for text in texts[0]) / sum(map(len, references))
    assert found["length_ratio"] == pytest.approx(length)


def test_a_language_of_the_same_script_is_told_by_its_letters():
    guess = LanguageGuess(
        [("de", "ein Hund läuft schnell durch das nasse Gras"), ("nl", "een hond rent snel door het natte gras")]
    )
    assert guess.guess("der Hund läuft durch das Haus") == "de"
    assert guess.guess("een hond rent door het huis") == "nl"
    assert guess.guess("Hund") is None
    assert LanguageGuess([("de", "ein Hund")]).guess("ein Hund läuft schnell") is None


def test_distinct_counts_different_sequences_by_all():
    assert distinct([["a", "b", "a", "b"], ["a"]], 1) == 2 / 5
    assert distinct([["a", "b", "a", "b"], ["a"]], 2) == 2 / 3
    assert distinct([["a"]], 2) == 0.0


def test_a_temperature_is_found_by_the_entropy_that_it_gives():
    logits = np.array([2.0, 1.0, 0.0, -1.0])

    def entropy(temperature):
        p = np.exp(logits / temperature)
        p /= p.sum()
        return float(-(p * np.log(p)).sum())

    tried = []

    def measure(temperature):
        tried.append(temperature)
        return entropy(temperature)

    # Below where it starts, just there, above it, and far above it.
    for wanted in (0.06, 0.6, 1.0, 1.7, 11.0):
        found = find_temperature(measure, entropy(wanted), 1.0, "Policy 'a'")
        assert found == pytest.approx(wanted, rel=3e-3)
    assert min(tried) >= LOWEST and max(tried) <= HIGHEST
    with pytest.raises(
        EvaluationError, match=r"Policy 'a' has .* 1\.38\d nats .* temperature 16, the highest .* 5\.000"
    ):
        find_temperature(measure, 5.0, 1.0, "Policy 'a'")
    with pytest.raises(EvaluationError, match=r"at temperature 0\.05, the lowest .* less decided"):
        find_temperature(measure, 0.0, 1.0, "Policy 'a'")
