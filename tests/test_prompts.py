"""Instructions: the recipe's strings, and a choice that hangs on the id."""

from collections import Counter

from rayrm.prompts import DIVERSE, anchored_prompt, direct_prompt, diverse_prompt


def test_direct_prompt_names_both_languages():
    text = direct_prompt("Hallo.", "de", "en")
    assert text == "Translate the following text from German into English:\nGerman: Hallo.\nEnglish:"


def test_anchored_prompt_shows_the_english_version():
    assert anchored_prompt("Hallo.", "Hello.", "de", "ru") == (
        "Given a German text and its English version as a reference, translate the source text into Russian.\n"
        "German Source: Hallo.\nEnglish Reference: Hello.\nRussian Translation:"
    )


def test_unknown_language_stands_for_itself():
    assert direct_prompt("a", "xx", "tlh") == "Translate the following text from xx into tlh:\nxx: a\ntlh:"


def test_braces_in_texts_are_safe():
    assert "{source} {0} {" in direct_prompt("{source} {0} {", "de", "en")
    assert "Reference: {text}}" in anchored_prompt("{x}", "{text}}", "de", "ru")
    assert all("{y}" in diverse_prompt("{y}", "de", "en", str(i), 0) for i in range(50))


def test_there_are_twenty_different_templates_with_a_text_each():
    assert len(set(DIVERSE)) == 20
    assert all(t.count("{text}") == 1 and t.endswith(":") for t in DIVERSE)
    assert DIVERSE[7].format(source="German", target="English", text="a") == (
        "Translate this German text into English:\nSource: a\nTranslation:"
    )
    assert DIVERSE[19].format(source="German", target="English", text="a") == "German: a\nEnglish:"


def test_choice_of_template_hangs_on_id_and_seed():
    first = [diverse_prompt("a", "de", "en", str(i), 1) for i in range(2000)]
    assert first == [diverse_prompt("a", "de", "en", str(i), 1) for i in range(2000)]
    assert first != [diverse_prompt("a", "de", "en", str(i), 2) for i in range(2000)]
    counts = Counter(first)
    assert len(counts) == 20 and min(counts.values()) > 60
