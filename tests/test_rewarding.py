"""Scores become rewards: of one scorer with a factor, or of several as a composition says; none without a score."""

import json
import math

import pyarrow as pa
import pytest

from rayrm.composing import (
    Composition,
    Unit,
    Unscored,
    asked_units,
    compose,
    read_constants,
    shape,
    with_constants,
)
from rayrm.config import build_config
from rayrm.errors import ConfigError, SchemaError
from rayrm.placing import place
from rayrm.rewarding import RewardingConfig, check_rewarding, choose_scorer, reward_table
from rayrm.runs import input_paths


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


# Compositions.


def part(scorer, **options):
    return {"scorer": scorer, **options}


def composition(**values):
    return build_config(Composition, values, "a test")


def whole(text, **scores):
    return {(name, "text"): [Unit(0, len(text), score)] for name, score in scores.items()}


def composed(values, **scores):
    """(reward, whether the gate is open) of a text with one score for each part."""
    found = compose("ja", whole("ja", **scores), composition(**values))
    return found.total, found.is_open


HOLISTIC, ASPECT = part("h", weight=3, mean=-2, std=4), part("a", weight=2, mean=10, std=5)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        # h is 3 · (4 + 2) / 4 and a 2 · (5 − 10) / 5.
        ({"type": "holistic_only", "holistic": HOLISTIC}, 4.5),
        ({"type": "aspect_only", "aspects": [ASPECT]}, -2.0),
        ({"type": "weighted_sum", "holistic": HOLISTIC, "aspects": [ASPECT]}, 2.5),
        ({"type": "weighted_sum", "holistic": HOLISTIC, "aspects": [ASPECT, part("b", weight=-1)]}, -4.5),
        ({"type": "hierarchical", "holistic": HOLISTIC, "aspects": [ASPECT], "threshold": 1.5}, 2.5),
        ({"type": "hierarchical", "holistic": HOLISTIC, "aspects": [ASPECT], "threshold": 1.6}, 4.5),
    ],
)
def test_every_type_by_hand(values, expected):
    names = {p["scorer"] for p in [*values.get("aspects", []), *([values["holistic"]] if "holistic" in values else [])]}
    scores = {name: score for name, score in {"h": 4.0, "a": 5.0, "b": 7.0}.items() if name in names}
    is_open = values["threshold"] <= 1.5 if "threshold" in values else None
    assert composed(values, **scores) == (pytest.approx(expected), is_open)


@pytest.mark.parametrize(("raw", "is_open"), [(1.999, False), (2.0, True), (2.001, True)])
def test_the_gate_closes_only_below_the_threshold(raw, is_open):
    # The shaped holistic score is never above 0.5, and would never open it; nor does the weight count.
    gated = {"holistic": part("h", mean=0, std=4, weight=0.1, shaping="centred_sigmoid"), "aspects": [part("a")]}
    reward, found = composed({"type": "hierarchical", "threshold": 0.5, **gated}, h=raw, a=10.0)
    assert found == is_open
    assert reward == pytest.approx(0.1 * (1 / (1 + math.exp(-raw / 4)) - 0.5) + (10.0 if is_open else 0.0))


@pytest.mark.parametrize(
    ("score", "shaped"),
    [(0.5, 0.62246), (-0.5, 0.37754), (0.3, 0.57444), (-0.3, 0.42556), (0.0, 0.5), (-1.0, 0.26894), (-800.0, 0.0)],
)
def test_shaped_values_of_the_paper(score, shaped):
    found = [shape(score, shaping) for shaping in ("none", "sigmoid", "centred_sigmoid")]
    assert found == [score, pytest.approx(shaped, abs=5e-6), pytest.approx(shaped - 0.5, abs=5e-6)]
    assert composed({"type": "aspect_only", "aspects": [part("a", shaping="sigmoid")]}, a=score)[0] == found[1]


def of_sentences(*scores, **options):
    units = [Unit(3 * i, 3 * (i + 1), score) for i, score in enumerate(scores)]
    aspects = [part("fact", unit="sentences", **options)]
    return compose(
        "Ja." * len(scores), {("fact", "sentences"): units}, composition(type="aspect_only", aspects=aspects)
    )


def test_two_wrong_sentences_beat_a_right_one_with_plain_sigmoid_only():
    wrong, right = (-0.5, -0.5), (0.5,)
    assert of_sentences(*wrong, shaping="sigmoid").total == pytest.approx(0.75508, abs=1e-5)
    assert of_sentences(*right, shaping="sigmoid").total == pytest.approx(0.62246, abs=1e-5)
    centred = [of_sentences(*scores, shaping="centred_sigmoid").total for scores in (wrong, right)]
    assert centred == pytest.approx([-0.24492, 0.12246], abs=1e-5)
    mean = [of_sentences(*scores, shaping="sigmoid", aggregate="mean").total for scores in (wrong, right)]
    assert mean == pytest.approx([0.37754, 0.62246], abs=1e-5)


def test_sentences_stand_at_their_ends_and_the_whole_at_the_end():
    text = "Ja. Nein! Gut."
    units = [
        Unit(start, end, score) for (start, end), score in zip(asked_units(text, "sentences"), (1, 2, 4), strict=True)
    ]
    values = {"type": "weighted_sum", "holistic": part("h"), "aspects": [part("a", unit="sentences", weight=0.5)]}
    found = compose(text, {("a", "sentences"): units, **whole(text, h=8.0)}, composition(**values))
    assert found.points == [(14, 8.0), (3, 0.5), (9, 1.0), (14, 2.0)]
    assert (found.total, found.parts, found.is_open) == (11.5, {"h": 8.0, "a.sentences": 3.5}, None)
    assert place(found.points, [3, 4, 9, 14, 14]).tolist() == [0.5, 0.0, 1.0, 0.0, 10.0]


def test_spans_are_shaped_one_by_one_and_no_span_is_zero():
    values = composition(type="aspect_only", aspects=[part("g", unit="spans", shaping="centred_sigmoid", weight=2)])
    found = compose("abcdef", {("g", "spans"): [Unit(0, 2, -1.0), Unit(4, 5, -1.0)]}, values)
    assert found.points == [(2, pytest.approx(-0.46212, abs=1e-5)), (5, pytest.approx(-0.46212, abs=1e-5))]
    assert compose("abcdef", {("g", "spans"): []}, values) == ([], 0.0, {"g.spans": 0.0}, None)


GATED = {
    "type": "hierarchical",
    "holistic": part("h", mean=0, std=1),
    "aspects": [part("a"), part("b")],
    "threshold": 0.0,
}


def test_a_text_whose_reward_lacks_a_score_has_none():
    found = whole("ja", h=1.0, a=1.0, b=1.0)
    for key, unit, told in [
        (("b", "text"), Unit(0, 2, None, "timeout"), ("b", "timeout")),
        (("h", "text"), Unit(0, 2, None, "empty"), ("h", "empty")),
        (("a", "text"), Unit(0, 2, math.nan), ("a", "nan")),
        (("h", "text"), Unit(0, 2, math.inf), ("h", "nan")),
    ]:
        assert compose("ja", {**found, key: [unit]}, composition(**GATED)) == Unscored(*told)
    assert compose("ja", {**found, ("a", "text"): None}, composition(**GATED)) == Unscored("a", "error")
    assert compose("", {**found, ("a", "text"): []}, composition(**GATED)) == Unscored("a", "empty")


def test_behind_a_closed_gate_aspects_are_told_and_may_be_missing():
    found = {**whole("ja", h=-1.0, a=4.0), ("b", "text"): [Unit(0, 2, None, "timeout")]}
    assert compose("ja", found, composition(**GATED)) == ([(2, -1.0)], -1.0, {"h": -1.0, "a": 4.0, "b": None}, False)


def test_sums_of_rewards_are_those_of_their_parts():
    values = {
        "type": "weighted_sum",
        "holistic": part("h", weight=0.3, std=0.7),
        "aspects": [part("a", unit="sentences", aggregate="mean", shaping="sigmoid"), part("g", unit="spans")],
    }
    for num in range(1, 8):
        text = "Ja. " * num
        found = {
            **whole(text, h=0.1 * num),
            ("a", "sentences"): [Unit(*ends, 0.3 * i) for i, ends in enumerate(asked_units(text, "sentences"))],
            ("g", "spans"): [Unit(i, i + 1, -0.1) for i in range(0, len(text), 3)],
        }
        reward = compose(text, found, composition(**values))
        assert sum(reward.parts.values()) == pytest.approx(reward.total, rel=1e-12)
        placed = place(reward.points, list(range(1, len(text) + 1)))
        assert placed.sum() == pytest.approx(reward.total, rel=1e-9)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({}, "type holistic_only needs holistic"),
        ({"type": "aspect_only"}, "type aspect_only needs aspects"),
        (
            {"type": "hierarchical", "holistic": part("h", mean=0, std=1)},
            "type hierarchical needs aspects and threshold",
        ),
        ({"holistic": part("h"), "aspects": [part("a")]}, "type holistic_only does not use aspects; leave it out"),
        ({"type": "aspect_only", "holistic": part("h"), "aspects": [part("a")]}, "does not use holistic"),
        (
            {"type": "weighted_sum", "holistic": part("h"), "aspects": [part("a")], "threshold": 0.0},
            "type weighted_sum does not use threshold",
        ),
        (
            {**GATED, "holistic": part("h")},
            "threshold is in standard deviations, and holistic has none; set its calibrat",
        ),
        ({**GATED, "holistic": part("h", std=2.0)}, "set its calibration, or both mean and std"),
        ({**GATED, "holistic": part("h", mean=2.0)}, "set its calibration, or both mean and std"),
        ({"holistic": part("h", unit="sentences")}, "the unit of holistic is 'sentences'"),
        ({"holistic": part("h", weight=0)}, "the weight of h is 0"),
        ({**GATED, "aspects": [part("a"), part("b", weight=0)]}, "the weight of b is 0"),
        ({**GATED, "aspects": [part("a"), part("a", shaping="sigmoid")]}, "a is in more than one part"),
        ({**GATED, "aspects": [part("h")]}, "h is in more than one part"),
        ({"holistic": part("h", std=0)}, "greater than 0"),
        ({"holistic": part("h", mean=1.0, calibration="x")}, "mean and std of 'h' are set beside calibration"),
        ({"holistic": part("h", aggregate="mean")}, "aggregate of 'h' is 'mean', and a text is one unit"),
        ({**GATED, "aspects": [part("g", unit="spans", calibration="x")]}, "a calibration holds no scores of spans"),
    ],
)
def test_what_does_not_fit_its_type_is_refused(values, told):
    with pytest.raises(ConfigError, match=told):
        composition(**values)


def test_a_holistic_score_may_be_a_gate_alone_and_a_scorer_give_two_units():
    values = {**GATED, "holistic": part("h", mean=0, std=1, weight=0), "aspects": [part("h", unit="sentences")]}
    found = {("h", "text"): [Unit(0, 3, 1.0)], ("h", "sentences"): [Unit(0, 3, 5.0)]}
    assert compose("Ja.", found, composition(**values)).total == 5.0


# Sentences.


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("Ja. Nein! Gut?", ["Ja.", " Nein!", " Gut?"]),
        ("猫は寝ている。犬も！本当？", ["猫は寝ている。", "犬も！", "本当？"]),
        ("هل هذا بيت؟ نعم.", ["هل هذا بيت؟", " نعم."]),
        ("यह घर है। वह नहीं।", ["यह घर है।", " वह नहीं।"]),
        ("Dr. Meier kam um 3.15 Uhr. Er ging.", ["Dr. Meier kam um 3.15 Uhr.", " Er ging."]),
        ("- Eins\n- Zwei\n\n", ["- Eins", "\n- Zwei\n\n"]),
        ("Ja. ... 42", ["Ja. ... 42"]),
        ("12. Mai", ["12. Mai"]),
        ("...", ["..."]),
        (" \n", [" \n"]),
        ("", []),
    ],
)
def test_sentences_cover_their_text(text, sentences):
    ends = asked_units(text, "sentences")
    assert [text[start:end] for start, end in ends] == sentences and "".join(sentences) == text
    assert asked_units(text, "text") == ([(0, len(text))] if text else [])


# Constants.


def calibrated(tmp_path, **scores):
    known = {name: {"mean": mean, "std": std, "num": 9, "languages": {}} for name, (mean, std) in scores.items()}
    (tmp_path / "run.json").write_text(json.dumps({"scores": known, "digest": "x"}))
    return str(tmp_path)


def test_constants_come_from_the_calibration(tmp_path):
    path = calibrated(tmp_path, h=(2.0, 4.0), a=(-1.0, 0.5))
    values = composition(**{**GATED, "holistic": part("h", calibration=path), "aspects": [part("a", calibration=path)]})
    assert set(input_paths(values).values()) == {path}
    with pytest.raises(ValueError, match=r"constants of 'h' stand in .*; read them by with_constants"):
        compose("ja", whole("ja", h=3.0, a=0.0), values)
    read = with_constants(values)
    assert [(p.mean, p.std, p.calibration) for p in read.parts] == [(2.0, 4.0, None), (-1.0, 0.5, None)]
    assert compose("ja", whole("ja", h=3.0, a=0.0), read).total == pytest.approx(0.25 + 2.0)


def test_constants_that_are_not_there_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"run.json' holds no calibration of scores; run calibrate_scores"):
        read_constants(str(tmp_path / "none"), "h")
    path = calibrated(tmp_path, h=(2.0, 4.0), length=(30.0, 9.0))
    with pytest.raises(ConfigError, match=r"has no calibration of 'bleurt', and has h, length"):
        read_constants(path, "bleurt")
    assert read_constants(path, "length") == (30.0, 9.0)
    for own in ({"mean": 1.0, "std": 0.0}, {"mean": 1.0}, {"mean": None, "std": 1.0}, [1.0, 2.0]):
        (tmp_path / "run.json").write_text(json.dumps({"scores": {"h": own}}))
        with pytest.raises(ConfigError, match="has no mean and no std above 0 of 'h' but .*; run calibrate_scores"):
            read_constants(path, "h")


# Compositions of rows.


def with_composition(**values):
    return build_config(RewardingConfig, {"composition": values}, "a test")


def test_rows_are_rewarded_by_a_composition():
    table = scored([["a", "b", "c"], ["d"]], h=[[-1.0, 0.0, None], [1.0]], a=[[1.0, 2.0, 3.0], [None]])
    rewarded = reward_table(table, with_composition(**{**GATED, "aspects": [part("a", weight=10)]}))
    assert rewarded["rewards"].to_pylist() == [[-1.0, 20.0, None], [None]]
    assert rewarded["_kept"].to_pylist() == [True, True] and "scores" not in rewarded.column_names


def test_rows_with_spans_are_rewarded_by_them():
    kind = pa.list_(pa.list_(pa.struct([("start", pa.int64()), ("end", pa.int64()), ("score", pa.float64())])))
    marked = [[{"start": 0, "end": 1, "score": -1.0}] * 2, [], None]
    table = scored([["ab", "c", "d"], ["e"]], g=[[-2.0, 0.0, None], [0.0]])
    spans = pa.StructArray.from_arrays([pa.array([marked, []], kind)], ["g"])
    table = table.append_column("spans", spans)
    config = with_composition(type="aspect_only", aspects=[part("g", unit="spans", weight=0.5)])
    check_rewarding(table.schema, config, "'x'")
    rewarded = reward_table(table, config)
    assert rewarded["rewards"].to_pylist() == [[-1.0, 0.0, None], None]
    assert rewarded["_dropped"].to_pylist() == [[], ["unequal_lengths"]]
    with pytest.raises(ConfigError, match=r"'x' has no spans of 'g', whose part in rewarding\.composition"):
        check_rewarding(table.drop_columns("spans").schema, config, "'x'")


def test_compositions_that_rows_cannot_fill_are_refused():
    with pytest.raises(ConfigError, match=r"a\.sentences wants scores of sentences, and rows have scores of whole"):
        with_composition(type="aspect_only", aspects=[part("a", unit="sentences")])
    with pytest.raises(ConfigError, match="scorer and scale are set beside composition"):
        build_config(RewardingConfig, {"composition": {"holistic": part("h")}, "scale": 100}, "a test")
    table = scored([["a"]], h=[[1.0]])
    with pytest.raises(ConfigError, match=r"rewarding\.composition names 'a', and 'x' has scores of h only"):
        check_rewarding(table.schema, with_composition(**{**GATED, "aspects": [part("a")]}), "'x'")
