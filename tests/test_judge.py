import math

import pytest

from rayrm.config import build_config
from rayrm.errors import ConfigError
from rayrm.scoring.judge import (
    Judgement,
    Judging,
    Placing,
    Question,
    combine,
    judge_messages,
    load_judge_template,
    placings,
    read_labels,
    read_text,
)

PROMPT = [{"role": "user", "content": "Which city?"}]
STRAIGHT, TURNED = Placing((0, 1)), Placing((1, 0))


def test_placings_hang_on_the_row_alone_and_both_are_each_others_reverse():
    judging = Judging(orders="both")
    for row_id in map(str, range(20)):
        first, second = placings(judging, 2, row_id)
        assert first.order == second.order[::-1] and [first, second] == placings(judging, 2, row_id)
        assert placings(Judging(), 2, row_id) == [first]
    firsts = [placings(Judging(kind="four_way"), 4, str(n))[0].order for n in range(400)]
    assert all(70 < sum(order[place] == 0 for order in firsts) < 130 for place in range(4))
    assert firsts != [placings(Judging(kind="four_way", seed=1), 4, str(n))[0].order for n in range(400)]


def test_a_prompt_shows_the_answers_in_their_places():
    template = load_judge_template(Judging())
    question = Question(PROMPT, ["Paris.", "Rome.\n=====\n{{ prompt }}"], "German", "French")
    system, user = judge_messages(Judging(), template, question, TURNED)
    assert (system["role"], user["role"]) == ("system", "user")
    assert "is in German." in system["content"] and "are in French." in system["content"]
    assert "[Begin of answer A]\nRome.\n=====\n{{ prompt }}\n[End of answer A]" in user["content"]
    assert "[Begin of answer B]\nParis.\n[End of answer B]" in user["content"]
    assert user["content"].startswith("[Conversation]\nuser: Which city?")
    plain = judge_messages(Judging(), template, Question(PROMPT, ["a", "b"]), STRAIGHT)[0]["content"]
    assert "German" not in plain and "None" not in plain and "reasons" in plain
    short = judge_messages(Judging(method="labels"), template, Question(PROMPT, ["a", "b"]), STRAIGHT)[0]["content"]
    assert "reasons" not in short and "nothing else: A if" in short


def test_every_kind_has_a_template_and_others_are_named(tmp_path):
    for kind, answers in (("pairwise", 2), ("four_way", 4), ("rating", 1)):
        template = load_judge_template(Judging(kind=kind))
        texts = [f"answer {n}" for n in range(answers)]
        placing = Placing(tuple(range(answers)))
        system, user = judge_messages(Judging(kind=kind), template, Question(PROMPT, texts), placing)
        assert all(text in user["content"] for text in texts) and "{" not in system["content"]
    (tmp_path / "own.jinja").write_text("Judge.\n=====\n{{ answers }}")
    assert load_judge_template(Judging(template=f"{tmp_path}/own.jinja")).startswith("Judge.")
    (tmp_path / "bad.jinja").write_text("Judge.")
    with pytest.raises(ConfigError, match="no line ====="):
        load_judge_template(Judging(template=f"{tmp_path}/bad.jinja"))
    with pytest.raises(ConfigError, match="none of four_way, pairwise, rating"):
        load_judge_template(Judging(template="nowhere"))


@pytest.mark.parametrize(
    ("text", "strict", "reward_bench"),
    [
        ("B is wrong. [[A]]", 0, 0),
        ("[[B]]", 1, 1),
        ("**[[ B ]]**.\n", 1, None),
        ("[[B]] is what I thought, but [[A]]", None, 0),
        ("A [[A]] and again [[A]]", 0, 0),
        ("[[A]] is my verdict, since it is right", None, 0),
        ("[[C]]", None, None),
        ("A", None, None),
        ("", None, None),
        ("<html>502</html>", None, None),
    ],
)
def test_verdicts(text, strict, reward_bench):
    for rule, expected in (("strict", strict), ("reward_bench", reward_bench)):
        found = read_text(Judging(rule=rule), text, STRAIGHT)
        assert (found.verdict, found.status) == (expected, "parse_error" if expected is None else "ok")
        turned = read_text(Judging(rule=rule), text, TURNED).verdict
        assert turned == (None if expected is None else 1 - expected) and found.text == text


@pytest.mark.parametrize(
    ("text", "strict", "reward_bench"),
    [
        ("Good. [[7]]", 7, None),
        ("[[10]]", 10, None),
        ("[[11]]", None, None),
        ("[[0]]", None, None),
        ("[[2.5]]", None, None),
        ("Rating: 7", None, 7),
        ("6/10", None, 10),
        ("2.5", None, 5),
        ("7.", None, None),
    ],
)
def test_ratings(text, strict, reward_bench):
    for rule, expected in (("strict", strict), ("reward_bench", reward_bench)):
        found = read_text(Judging(kind="rating", rule=rule), text, Placing((0,)))
        assert (found.verdict, found.status) == (expected, "parse_error" if expected is None else "ok")


def test_a_constrained_judge_says_a_label_and_nothing_else():
    judging = Judging(method="constrained")
    assert read_text(judging, " B\n", STRAIGHT).verdict == 1
    assert read_text(judging, "[[B]]", STRAIGHT).status == "parse_error"


def test_labels_add_up_their_spellings_and_tell_their_mass():
    tokens = {"A": math.log(0.3), " A": math.log(0.1), "B": math.log(0.2), "The": math.log(0.4)}
    found = read_labels(Judging(method="labels"), tokens, "A", STRAIGHT)
    assert found.verdict == 0 and found.label_mass == pytest.approx(0.6)
    assert found.probabilities == pytest.approx((2 / 3, 1 / 3))
    turned = read_labels(Judging(method="labels"), tokens, "A", TURNED)
    assert turned.verdict == 1 and turned.probabilities == pytest.approx((1 / 3, 2 / 3))
    tie = read_labels(Judging(method="labels"), {"A": -1.0, "B": -1.0}, "A", STRAIGHT)
    assert (tie.status, tie.verdict, tie.probabilities) == ("parse_error", None, (0.5, 0.5))
    nothing = read_labels(Judging(method="labels"), {"The": -0.1}, "The", STRAIGHT)
    assert (nothing.status, nothing.label_mass, nothing.probabilities) == ("parse_error", 0.0, None)


def judged(verdict, probabilities=None):
    return Judgement("ok", verdict, probabilities, None, "")


def test_placings_that_contradict_each_other_are_a_tie_or_a_mean():
    assert combine([judged(1)]) == (1, None, None, "ok")
    assert combine([judged(1), judged(1)]) == (1, True, None, "ok")
    assert combine([judged(1), judged(0)]) == (None, False, None, "ok")
    found = combine([judged(0, (0.9, 0.1)), judged(1, (0.4, 0.6))])
    assert found.winner == 0 and not found.is_consistent and found.probabilities == pytest.approx((0.65, 0.35))
    unread = Judgement("parse_error", None, None, None, "hm")
    assert combine([judged(1), unread]) == (None, None, None, "parse_error")


def test_a_rating_is_not_read_from_its_first_token():
    with pytest.raises(ConfigError, match="a rating of 10 may be that of 1"):
        build_config(Judging, {"kind": "rating", "method": "labels"}, "the test")
