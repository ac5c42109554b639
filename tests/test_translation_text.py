"""Texts to sentences and back, and what is seen to be wrong with a translation."""

import time
import unicodedata

import pytest

from rayrm.translation.checks import (
    TranslationChecks,
    copied_fraction,
    find_faults,
    longest_loop,
)
from rayrm.translation.text import join_text, split_text

MARKDOWN = """\
# Making tea

  Boil the water.  Wait 3.5 minutes!   Then pour.

1. Take a cup. Any cup will do.
2) Add sugar:
   - one lump
   * [ ] or two

> Tea is good. Said e.g. by Dr. A. Smith.

```python
def tea():  # Boil. Wait. Pour.

    return "tea. hot."
```

| name | price |
|------|------:|
| green tea | 3.50 |
https://example.com/tea?a=1.
\t42\u3000
~~~
unclosed. code
"""
TEXTS = {
    "markdown": MARKDOWN,
    "windows": MARKDOWN.replace("\n", "\r\n"),
    "quoted_fence": "> Look. Here:\n> ```\n> a. B. c\n> ```\n> The end. Really.",
    "chinese": "你好。“再见！”他说。\n\n一、苹果　二、梨。\n1、买菜；2、做饭……好的！谢谢？是",
    "japanese": "「はい。」と言った。それから帰った！\n　・一つ目\n　・二つ目（例。）終わり",
    "arabic": "هل أنت بخير؟ نعم. شكرا!\n\n- واحد\n- اثنان؛ ثلاثة",
    "hindi": "यह एक वाक्य है। यह दूसरा है।तीसरा क्या है?\n१. पहला\n२. दूसरा",
    "thai": "ผมชอบแมว  แมวมี 3 ตัว มาก ๆ ครับ\n\n- ข้อหนึ่ง ข้อสอง",
    "korean": "네. 알겠습니다. 감사합니다!",
    "greek": "Τι κάνεις; Καλά. Εσύ;",
    "odd_ends": "a.\x0bB. c\u2028D\x85\n\n \r\r\n",
    "spaces": "  \n\t ",
    "empty": "",
    "no_letters": "12 + 30 = 42.\n---\n***",
}


def sentences(text, **settings):
    return list(split_text(text, **settings).sentences)


@pytest.mark.parametrize("max_length", [800, 12, 1])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_untranslated_sentences_give_the_text_again(text, max_length):
    split = split_text(text, max_length)
    assert join_text(split, split.sentences) == text
    assert "".join(gap + part for gap, part in zip(split.gaps, (*split.sentences, ""), strict=True)) == text
    assert all(part == part.strip() and any(map(str.isalpha, part)) for part in split.sentences)
    assert all(len(part) <= max_length for part in split.sentences)


def test_what_of_markdown_is_translated():
    assert sentences(MARKDOWN) == [
        "Making tea",
        "Boil the water.",
        "Wait 3.5 minutes!",
        "Then pour.",
        "Take a cup.",
        "Any cup will do.",
        "Add sugar:",
        "one lump",
        "or two",
        "Tea is good.",
        "Said e.g. by Dr. A. Smith.",
        "name",
        "price",
        "green tea",
    ]


def test_layout_stays_around_translations():
    split = split_text("- One. Two.\n\n    Three\n```\ncode. Code.\n```\n> Four")
    text = join_text(split, [f"<{part}>" for part in split.sentences])
    assert text == "- <One.> <Two.>\n\n    <Three>\n```\ncode. Code.\n```\n> <Four>"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # Latin, Cyrillic
        ("Mr. Smith met J. R. Tolkien. They talked.", ["Mr. Smith met J. R. Tolkien.", "They talked."]),
        ("It is 3.14. The rest, see p. 5 or No. 7.", ["It is 3.14.", "The rest, see p. 5 or No. 7."]),
        ("She said no. Then she left.", ["She said no.", "Then she left."]),
        ("The U.S. Army came, i.e. The men.", ["The U.S. Army came, i.e. The men."]),
        ('"Yes!" he said. "No?" (Why?) Well... OK.', ['"Yes!" he said.', '"No?"', "(Why?)", "Well...", "OK."]),
        ("Es war z. B. Am 3. Oktober kalt. Und bzw. Ja.", ["Es war z. B. Am 3. Oktober kalt.", "Und bzw. Ja."]),
        ("It was 1999. April came.", ["It was 1999.", "April came."]),
        ("¿Qué? ¡Nada! Vale.", ["¿Qué?", "¡Nada!", "Vale."]),
        ("Он жил на ул. Мира, т.е. В центре. Потом уехал.", ["Он жил на ул. Мира, т.е. В центре.", "Потом уехал."]),
        ("Go to example.com. It works.", ["Go to example.com.", "It works."]),
        ("1 and 2. 3 and 4", ["1 and 2.", "3 and 4"]),
        # Greek
        ("Τι κάνεις; Καλά.", ["Τι κάνεις;", "Καλά."]),
        ("One; Two.", ["One; Two."]),
        # Chinese, Japanese, Korean
        ("你好。“再见！”他说。", ["你好。", "“再见！”", "他说。"]),
        ("真的?是的!好", ["真的?", "是的!", "好"]),
        ("版本2.0发布了。", ["版本2.0发布了。"]),
        ("「はい。」と言った。次。", ["「はい。」と言った。", "次。"]),
        ("네. 알겠습니다.", ["네.", "알겠습니다."]),
        # Arabic, Urdu, Devanagari, Thai, Armenian, Amharic
        ("هل أنت بخير؟ نعم. شكرا", ["هل أنت بخير؟", "نعم.", "شكرا"]),
        ("یہ ہے۔ وہ ہے۔", ["یہ ہے۔", "وہ ہے۔"]),
        ("यह है।वह है॥ क्या?", ["यह है।", "वह है॥", "क्या?"]),
        ("ผมชอบแมว แมวมี 3 ตัว มาก ๆ", ["ผมชอบแมว", "แมวมี 3 ตัว", "มาก ๆ"]),
        ("Բարեւ։ Այո։", ["Բարեւ։", "Այո։"]),
        ("ሰላም። አዎ።", ["ሰላም።", "አዎ።"]),
    ],
)
def test_sentences_end_by_the_rules_of_their_script(text, expected):
    assert sentences(text) == expected


def test_time_grows_with_length_alone():
    start = time.perf_counter()
    for text in ("." * 50_000, "。」と" * 20_000, "。" * 50_000 + "」と", "- " * 30_000, "a. " * 20_000, "`" * 50_000):
        split = split_text(text)
        assert join_text(split, split.sentences) == text
    # Squared, the first alone takes seconds.
    assert time.perf_counter() - start < 1.5


def test_long_sentences_are_cut_near_the_middle_at_the_best_place():
    assert sentences("one two three, four five six seven", max_length=20) == ["one two three,", "four five six seven"]
    assert sentences("aaaa bbbb cccc dddd", max_length=10) == ["aaaa bbbb", "cccc dddd"]
    assert sentences("我们今天去公园，然后回家吃饭了", max_length=8) == ["我们今天去公园，", "然后回家吃饭了"]
    assert sentences("abcdefgh", max_length=4) == ["abcd", "efgh"]


def test_a_cut_within_a_word_keeps_signs_with_their_letter():
    word = "कि" * 9
    parts = sentences(word, max_length=4)
    assert "".join(parts) == word
    assert not any(unicodedata.category(part[0]).startswith("M") for part in parts)


def test_length_is_what_the_caller_measures():
    text = "aa bb cccc dd"
    assert sentences(text, max_length=2, measure=lambda part: len(part.split())) == ["aa bb", "cccc dd"]


def test_spaces_between_sentences_are_those_of_the_target():
    english = split_text("One. Two.\nThree. Four.")
    assert join_text(english, ["一。", "二。", "三。", "四。"]) == "一。二。\n三。四。"
    assert join_text(english, ["하나.", "둘.", "셋.", "넷."]) == "하나. 둘.\n셋. 넷."
    chinese = split_text("一。二。\n三。　四。")
    assert join_text(chinese, ["One.", "Two.", "Three.", "Four."]) == "One. Two.\nThree.　Four."
    assert join_text(chinese, ["いち。", "に。", "さん。", "よん。"]) == "いち。に。\nさん。　よん。"
    assert join_text(split_text("- 一。\n- 二。"), ["One.", "Two."]) == "- One.\n- Two."


def test_each_sentence_needs_a_translation():
    with pytest.raises(ValueError):
        join_text(split_text("One. Two."), ["Eins."])


def test_compat_joins_lines_and_sentences_with_one_space():
    split = split_text("# A title\n\n- One.  Two.\n```\nx = 1\n```\n42", is_compat=True)
    assert split.sentences == ("# A title", "- One.", "Two.", "```", "x = 1", "```", "42")
    assert join_text(split, [*"甲乙丙丁戊己", "42"]) == "甲 乙 丙 丁 戊 己 42"
    for text in ("", " \n\n"):
        empty = split_text(text, is_compat=True)
        assert empty.sentences == () and join_text(empty, []) == ""


CHECKS = TranslationChecks()
SOURCE = "The old fisherman rowed his boat across the quiet lake before the sun came up."
GERMAN = "Der alte Fischer ruderte sein Boot über den stillen See, bevor die Sonne aufging."


@pytest.mark.parametrize(
    ("translation", "lang", "reasons"),
    [
        (GERMAN, "de", []),
        (GERMAN, "deu_Latn", []),
        ("日が昇る前に、年老いた漁師は静かな湖をボートで渡った。", "ja", []),
        ("太阳升起之前，老渔夫划船穿过平静的湖面。", "zh", []),
        ("해가 뜨기 전에 늙은 어부는 고요한 호수를 배로 건넜다.", "ko", []),
        ("عبر الصياد العجوز البحيرة الهادئة بقاربه قبل شروق الشمس.", "arb_Arab", []),
        ("", "de", ["empty"]),
        (" \n", "de", ["empty"]),
        ("Der Fischer.", "de", ["length_ratio"]),
        (
            GERMAN + " " + "So war das an jenem Tag und auch an vielen anderen Tagen im langen Jahr danach. " * 2,
            "de",
            ["length_ratio"],
        ),
        (SOURCE, "de", ["source_copy"]),
        (SOURCE.upper(), "de", ["source_copy"]),
        (GERMAN, "ru", ["wrong_script"]),
        (SOURCE, "hi", ["source_copy", "wrong_script"]),
        ("Der alte Fischer ruderte und ruderte und ruderte und ruderte und ruderte und ruderte.", "de", ["repetition"]),
        # No script is known for a language outside of the table.
        (GERMAN, "bod_Tibt", []),
    ],
)
def test_faults_of_a_translation(translation, lang, reasons):
    assert find_faults(SOURCE, translation, lang, CHECKS) == reasons


def test_nothing_is_asked_of_nothing():
    assert find_faults("", "", "de", CHECKS) == []
    assert find_faults(" ", "", "de", CHECKS) == []


def test_short_texts_may_double_and_stay_as_they_are():
    assert find_faults("Hi!", "Guten Tag!", "de", CHECKS) == []
    assert find_faults("Barack Obama", "Barack Obama", "de", CHECKS) == []


def test_length_ratio_by_hand():
    # (10 + 10) / (30 + 10) = 0.5; Chinese: (12 * 2.5 + 10) / (30 + 10) = 1
    half = {"min_length_ratio": 0.5, "max_loop": 100}
    assert find_faults("ab" * 15, "cd" * 5, "de", TranslationChecks(**half)) == []
    assert find_faults("ab" * 15, "cd" * 5, "de", TranslationChecks(**half | {"min_length_ratio": 0.51})) == [
        "length_ratio"
    ]
    tight = TranslationChecks(min_length_ratio=1, max_length_ratio=1, max_loop=100)
    assert find_faults("ab" * 15, "天地玄黄宇宙洪荒日月盈昃", "zh", tight) == []


def test_loops_by_hand():
    assert longest_loop("One two three. Four five.") == 0
    assert longest_loop("Na na na!") == 0  # three times
    assert longest_loop("Well: na, NA, na, na!") == 8
    assert longest_loop("我不知道" * 5) == 20
    assert longest_loop("ไปไปไปไปไป ครับ") == 10
    assert longest_loop("और फिर " * 4) == 4 * len("औरफिर")
    assert longest_loop("0000000000 -------- ........ ") == 0


def test_a_source_that_repeats_itself_may_be_repeated():
    chant = "row, row, row, row, row, row, row, row, row, row!"
    assert find_faults(chant, "ruder, " * 10, "de", CHECKS) == []
    assert find_faults("row and row and go home now, dear friend", "ruder, " * 10, "de", CHECKS) == ["repetition"]


def test_copies_by_hand():
    # 24 letters are 17 runs of 8; those from the first 12 letters alone are 5.
    source, half = "abcdefghijklmnopqrstuvwx", "abcdefghijkl" + "äöüñéèêàâùûç"
    assert copied_fraction(source, source) == 1.0
    assert copied_fraction(source, half) == 5 / 17
    assert copied_fraction(source, source[:19]) == 0.0
    assert copied_fraction("", source) == 0.0
