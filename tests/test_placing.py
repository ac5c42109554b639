"""Where rewards stand: by characters, on the token that reaches them; nothing is lost and nothing is moved."""

import random

import numpy as np
import pytest

from rayrm.composing import Composition, Unit, asked_units, compose
from rayrm.models.creation import CreationConfig, train_tokenizer
from rayrm.placing import Point, place, token_ends
from rayrm.scoring.base import Span

TEXTS = [
    "Das ist ein Haus.",
    "Вчера было так.",
    "猫は寝ている。犬も。",
    "Grüße 🙂 a👩‍👩‍👧 b",
    "कल मौसम अच्छा था।",
    "هل هذا بيت؟ نعم.",
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS[:2], CreationConfig(vocab_size=300))


@pytest.fixture(scope="module")
def decode(tokenizer):
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


# Placing.


def test_a_reward_stands_on_the_first_token_that_reaches_its_end():
    # "Ja. Nein" in tokens "J", "a.", " Ne", "in" and an end token.
    placed = place([Point(3, 1.0), Point(4, 2.0), Point(6, 4.0), Point(8, 8.0)], [1, 3, 6, 8, 8])
    assert placed.tolist() == [0.0, 1.0, 6.0, 0.0, 8.0]
    assert placed.dtype == np.float64


def test_what_the_whole_text_earns_stands_on_the_last_token():
    assert place([Point(8, 3.0)], [3, 8, 8]).tolist() == [0.0, 0.0, 3.0]
    assert place([Point(8, 3.0)], [3, 8]).tolist() == [0.0, 3.0]
    # A text that goes on where its tokens have ended.
    assert place([Point(9, 3.0)], [3, 8]).tolist() == [0.0, 3.0]


def test_rewards_on_one_token_add_up():
    assert place([Point(2, 0.5), Point(3, 0.25), Point(5, -1.0), Point(5, 3.0)], [3, 5]).tolist() == [0.75, 2.0]


def test_what_stands_before_all_text_is_the_first_tokens():
    assert place([Point(0, -1.0)], [1, 2]).tolist() == [-1.0, 0.0]


def test_texts_of_unequal_length_lose_no_reward():
    # Padded to the longest on the left, the 3.0 of the shorter ones fell behind their ends.
    for num in (1, 2, 7, 40):
        ends = [2 * (i + 1) for i in range(num)]
        placed = place([Point(2 * num, 3.0), Point(2, 0.5)], ends)
        assert len(placed) == num and placed.sum() == 3.5 and placed[-1] >= 3.0


def test_no_points_are_no_reward():
    assert place([], [4, 9]).tolist() == [0.0, 0.0]


def test_sums_hold_for_any_points_and_ends():
    rng = random.Random(0)
    for _ in range(200):
        ends = sorted(rng.randint(0, 50) for _ in range(rng.randint(1, 30)))
        points = [Point(rng.randint(0, 50), rng.gauss(0, 10 ** rng.randint(-3, 3))) for _ in range(rng.randint(0, 9))]
        placed = place(points, ends)
        assert placed.sum() == pytest.approx(sum(point.value for point in points), rel=1e-9, abs=1e-9)
        for point in points:
            wanted = [i for i, end in enumerate(ends) if end >= point.end]
            token = len(ends) - 1 if point.end >= ends[-1] else wanted[0]
            assert placed[token] == pytest.approx(sum(p.value for p in points if same_token(p, point, ends)))


def same_token(one, other, ends):
    first, second = ((ends < np.array(p.end)).sum() if p.end < ends[-1] else len(ends) - 1 for p in (one, other))
    return first == second


@pytest.mark.parametrize("points", [[], [Point(3, 1.0)]])
def test_no_tokens_are_refused(points):
    with pytest.raises(ValueError, match="and no tokens; leave out texts without tokens"):
        place(points, [])


def test_what_is_not_finite_and_ends_that_go_back_are_refused():
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"rewards of 2 tokens sum to (nan|inf), and the points to (nan|inf)"):
            place([Point(3, value)], [3, 5])
    with pytest.raises(ValueError, match=r"ends of tokens go back: \[3, 2\]"):
        place([Point(3, 1.0)], [3, 2])


# Ends of tokens.


def whole_characters(tokenizer, ids):
    """By the bytes of each beginning: characters that are all there."""
    table = {character: byte for byte, character in byte_table().items()}
    data, ends = b"", []
    for token in tokenizer.convert_ids_to_tokens(ids):
        data += bytes(table[character] for character in token)
        ends.append(len(data.decode(errors="ignore")))
    return ends


def byte_table():
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


@pytest.mark.parametrize("text", TEXTS)
def test_ends_count_characters_when_they_are_whole(tokenizer, decode, text):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert decode(ids) == text
    assert token_ends(ids, decode) == whole_characters(tokenizer, ids)


def test_a_character_over_several_tokens_counts_with_the_last_of_them(tokenizer, decode):
    ids = tokenizer("a🙂b", add_special_tokens=False).input_ids
    assert len(ids) == 6 and token_ends(ids, decode) == [1, 1, 1, 1, 2, 3]


def test_end_tokens_have_the_end_of_the_text(tokenizer, decode):
    ids = tokenizer("Haus.", add_special_tokens=False).input_ids
    ends = token_ends([*ids, tokenizer.eos_token_id], decode)
    assert ends == [*token_ends(ids, decode), 5]
    # Special tokens within a text make no characters.
    assert token_ends([ids[0], tokenizer.pad_token_id, *ids[1:]], decode) == [ends[0], *ends[:-1]]
    assert token_ends([], decode) == [] and token_ends([tokenizer.eos_token_id], decode) == [0]


def test_bytes_that_never_make_a_character_end_with_the_text(tokenizer, decode):
    cut = tokenizer("a🙂", add_special_tokens=False).input_ids[:-1]
    assert decode(cut) == "a\ufffd" and token_ends(cut, decode) == [1, 1, 1, 2]
    rng = random.Random(1)
    for _ in range(50):
        ids = [rng.randrange(5, len(tokenizer)) for _ in range(rng.randint(1, 40))]
        ends, text = token_ends(ids, decode), decode(ids)
        assert ends == sorted(ends) and ends[-1] == len(text)
        # Nothing counts before its bytes are there.
        for i, end in enumerate(ends[:-1]):
            assert decode(ids[: i + 1])[:end] == text[:end]


def test_only_few_tokens_are_decoded_at_a_time(tokenizer, decode):
    sizes = []

    def spy(ids):
        sizes.append(len(ids))
        return decode(ids)

    ids = tokenizer(" ".join(TEXTS * 5), add_special_tokens=False).input_ids
    token_ends(ids, spy)
    assert sizes[0] == len(ids) > 300 and max(sizes[1:]) <= 8


PIECES = ["", "▁", "▁Das", "▁ist", "▁gut", "▁.", "n", "▁'", "t", "。"]


def metaspace(ids):
    """As SentencePiece decodes: a space before each word but the first; 0 is a special token."""
    text = "".join(PIECES[i] for i in ids).replace("▁", " ")
    return text[1:] if text.startswith(" ") else text


def cleaned(ids):
    """As `clean_up_tokenization_spaces` does: marks lose the space before them, when more of the text is there."""
    return metaspace(ids).replace(" .", ".").replace("n 't", "n't")


def test_spaces_between_words_are_kept():
    assert token_ends([2, 3, 4, 5], metaspace) == [3, 7, 11, 13]
    assert metaspace([1, 2]) == " Das" and token_ends([1, 2, 0, 3, 0, 0], metaspace) == [0, 4, 4, 8, 8, 8]
    assert token_ends([2, 1, 1, 3], metaspace) == [3, 4, 5, 9]


def test_texts_that_are_cleaned_up_afterwards_have_ends_too():
    ids = [2, 6, 7, 8, 5]
    assert [cleaned(ids[: i + 1]) for i in range(5)] == ["Das", "Dasn", "Dasn '", "Dasn't", "Dasn't."]
    assert token_ends(ids, cleaned) == [3, 4, 4, 6, 7]


# From scores to tokens, by hand.

TEXT = "\n Grüß. 猫！"
"""With the white space that it begins with; a token is a byte, and the last one its end:
\\n 0, space 1, G 2, r 3, ü 4 and 5, ß 6 and 7, full stop 8, space 9, 猫 10 to 12, ！ 13 to 15, end 16."""
WANTED = {
    "h": {16: 1.5},  # 3 · (2 − 1) / 2 on the last token.
    "a": {8: 0.5, 16: -2.0},  # Half of 1 and −4, at the ends of "Grüß." and " 猫！".
    "g": {5: -1.0, 12: -0.5},  # "rü" and "猫", whose last bytes make them whole.
}
PARTS = {
    "type": "weighted_sum",
    "holistic": {"scorer": "h", "weight": 3, "mean": 1, "std": 2},
    "aspects": [{"scorer": "a", "unit": "sentences", "weight": 0.5}, {"scorer": "g", "unit": "spans"}],
}


class Bytes:
    """A tokenizer whose tokens are bytes, and 256 the end."""

    all_special_ids = (256,)

    def decode(self, ids, skip_special_tokens=True):
        return bytes(token for token in ids if token < 256).decode("utf-8", "replace")


def on_tokens(num, *wanted):
    return [sum(part.get(token, 0.0) for part in wanted) for token in range(num)]


def test_sentences_and_spans_of_bytes_stand_where_they_end():
    text, ids = TEXT[2:], [*TEXT[2:].encode(), 256]
    assert asked_units(text, "sentences") == [(0, 5), (5, 8)]
    found = {
        ("h", "text"): [Unit(0, 8, 2.0)],
        ("a", "sentences"): [Unit(0, 5, 1.0), Unit(5, 8, -4.0)],
        ("g", "spans"): [Unit(1, 3, -1.0), Unit(6, 7, -0.5)],
    }
    composed = compose(text, found, Composition.model_validate(PARTS))
    assert composed.parts == {"h": 1.5, "a.sentences": -1.5, "g.spans": -1.5} and composed.total == -1.5
    placed = place(composed.points, token_ends(ids, Bytes().decode))
    # Without the two tokens of white space.
    assert placed.tolist() == on_tokens(17, *WANTED.values())[2:] and placed.sum() == -1.5


def test_a_sample_has_its_rewards_on_its_own_tokens_behind_its_white_space():
    from rayrm.models.vllm import Drawn
    from rayrm.training.ppo.collecting import Collector, PromptRow
    from rayrm.training.ppo.settings import PPO

    ids = [*TEXT.encode(), 256]
    seen = {}

    class Rollouts:
        def draw(self, requests):
            yield requests, [[Drawn(ids, [-1.0] * len(ids), True)] for _ in requests], None

    class Scorers:
        """What was asked for is what was told here; a row brings the columns that a scorer may need."""

        def submit(self, name, unit, rows):
            (seen[name],) = rows
            if unit == "spans":
                return [[[Span(1, 3, -1.0), Span(6, 7, -0.5)]]]
            return [[(score, "ok") for score in {"h": [2.0], "a": [1.0, -4.0]}[name]]]

        def result(self, ticket):
            return ticket

        def take_busy(self):
            return 0.0

    scorers = [{"type": "custom", "name": name, "scorer": "x"} for name in WANTED]
    training = PPO.model_validate({"model": "x", "scorers": scorers, "rewarding": PARTS})
    values = {"id": "1", "lang": "de", "prompt": [{"role": "user", "content": "p"}], "tools": "[]", "topic": "t"}
    (sample,) = Collector(training, Bytes(), Rollouts(), Scorers()).collect([(0, PromptRow(values, [1]))], "v").samples
    assert sample.fault is None and sample.reward == -1.5 and sum(sample.token_rewards) == -1.5
    assert sample.token_rewards == on_tokens(17, *WANTED.values())
    assert {name: row["candidates"] for name, row in seen.items()} == {
        "h": ["Grüß. 猫！"],
        "a": ["Grüß.", " 猫！"],
        "g": ["Grüß. 猫！"],
    }
    assert all((row["tools"], row["topic"]) == ("[]", "t") for row in seen.values())
