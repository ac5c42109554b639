"""Instructions for translation: text in, text out.

Languages are codes and stand in a prompt by their English names. Only the templates are formatted, so braces in texts
are safe.
"""

from __future__ import annotations

from typing import Literal

from rayrm.languages import language_name
from rayrm.seeds import seed_of

DIRECT = "Translate the following text from {source} into {target}:\n{source}: {text}\n{target}:"
ANCHORED = (
    "Given a {source} text and its {anchor} version as a reference, translate the source text into {target}.\n"
    "{source} Source: {text}\n{anchor} Reference: {anchor_text}\n{target} Translation:"
)
DIVERSE = (
    "Translate the below text from {source} to {target}.\nSource: {text}\nTarget:",
    "Source: {text}\nYour task is to translate the following text from {source} into {target}.\nTarget:",
    "Please provide a translation from {source} to {target} for the following text:\n{text}\nTarget:",
    "Source: {text}\nTranslate the source text from {source} to {target}.\nTarget:",
    "Please translate the following text:\n{source} Source: {text}\n{target} Target:",
    "Source: {text}\nTranslate from {source} to {target}.\nTarget:",
    "Please translate this text from {source} into {target}.\nSource: {text}\nTarget:",
    "Translate this {source} text into {target}:\nSource: {text}\nTranslation:",
    "{source} Source: {text}\n{target} Translation:",
    "Translate the following text from {source} to {target}:\nText: {text}\nAnswer:",
    "Translate the following {source} source text to {target}:\n{source}: {text}\n{target}:",
    "Source: {text}\nCan you translate the given text from {source} into {target}?\nTarget:",
    "Translate the text below from {source} to {target}:\n{text}\nTarget Translation:",
    "Write a translation of the given text from {source} to {target}.\n{source}: {text}\n{target}:",
    "Source: {text}\nGiven the text in {source}, translate it into {target}.\nTarget:",
    "Write the text in {source} in {target}.\nSource: {text}\nTarget:",
    "From {source} to {target}, translate the text:\nSource: {text}\nTarget:",
    "Source: {text}\nProvide a translation of the given text from {source} to {target}.\nTarget:",
    "Make a translation of the given text from {source} to {target}.\n{source}: {text}\n{target}:",
    "{source}: {text}\n{target}:",
)
"""The recipe's (arXiv 2509.19770) instructions for training data, in its order."""

Instructions = Literal["fixed", "diverse"]
"""`fixed` is the direct prompt for every row, `diverse` one of `DIVERSE` by the row's id."""


def direct_prompt(text: str, src_lang: str, tgt_lang: str) -> str:
    """The fixed instruction: sampling, reward models and evaluation use it."""
    return DIRECT.format(source=language_name(src_lang), target=language_name(tgt_lang), text=text)


def anchored_prompt(text: str, anchor: str, src_lang: str, tgt_lang: str, anchor_lang: str = "en") -> str:
    """The instruction to translate `text` with its version in `anchor_lang` as a help."""
    return ANCHORED.format(
        source=language_name(src_lang),
        target=language_name(tgt_lang),
        anchor=language_name(anchor_lang),
        text=text,
        anchor_text=anchor,
    )


def diverse_prompt(text: str, src_lang: str, tgt_lang: str, row_id: str, seed: int) -> str:
    """One of twenty instructions, chosen by `row_id` and `seed` alone, so that sharding does not move the choice."""
    template = DIVERSE[seed_of(seed, row_id) % len(DIVERSE)]
    return template.format(source=language_name(src_lang), target=language_name(tgt_lang), text=text)
