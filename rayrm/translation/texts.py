"""Texts into another language: sentence by sentence, looked at, and tried again where something is wrong."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from pydantic import Field

from rayrm.config import Config
from rayrm.errors import ConfigError
from rayrm.models.nllb import Decoding, Translator, count_tokens, translate_sentences
from rayrm.translation.checks import TranslationChecks, find_faults
from rayrm.translation.text import SplitText, join_text, split_text

if TYPE_CHECKING:
    from sacrebleu.metrics.chrf import CHRF


class TextsConfig(Config):
    """How texts are cut, translated and looked at."""

    compat: bool = False
    """Whether lines are joined by spaces, and lists and code lost, as in M-RewardBench; where a sentence ends is found by
    our own rules, and checks are made all the same."""
    max_length: int | None = Field(None, ge=8)
    """Most tokens of a sentence, special ones included; a longer one is cut. Null for all positions of the model, and
    512 at the most, as NLLB was trained."""
    decoding: Decoding = Decoding()
    """How a translation is searched."""
    retry: Decoding | None = Decoding(num_beams=4)
    """How a text whose translation has faults is translated again, by 4 beams where nothing is said; null for never."""
    checks: TranslationChecks = TranslationChecks()
    """Bounds beyond which a translation has a fault."""
    min_round_trip_chrf: float | None = Field(None, ge=0, le=100)
    """Smallest chrF of a text that was translated and back again; null to translate nothing back."""


class Outcome(NamedTuple):
    """A text in another language."""

    text: str
    faults: tuple[str, ...] = ()
    """Reasons of `find_faults`; `unfinished`, when the model did not end a sentence; `round_trip`."""
    is_retried: bool = False
    chrf: float | None = None
    """From 0 to 100, of the translation's translation; None when there was none."""


def split_texts(translator: Translator, texts: Iterable[str], config: TextsConfig) -> dict[str, SplitText]:
    """The sentences of each distinct text, none with more tokens than the model takes.

    Raises ConfigError for a `max_length` beyond that.
    """
    longest = config.max_length or translator.max_tokens
    if longest > translator.max_tokens:
        raise ConfigError(
            f"max_length is {longest}, and the model takes at most {translator.max_tokens} tokens; set it to null or less."
        )
    measure = partial(count_tokens, translator)
    return {text: split_text(text, longest, measure, config.compat) for text in texts}


def translate_texts(
    translator: Translator, splits: Mapping[str, SplitText], src_lang: str, tgt_lang: str, config: TextsConfig
) -> dict[str, Outcome]:
    """The better of one or two translations of each text: the one with fewer faults, then of the higher chrF.

    A text without a sentence stays as it is. Raises ConfigError for a language that the model has not, and when chrF
    is asked for and sacrebleu is not there.
    """
    pair = _Pair(translator, src_lang, tgt_lang)
    outcomes = _translate(pair, splits, config.decoding, config)
    faulty = {text: splits[text] for text, outcome in outcomes.items() if outcome.faults}
    if config.retry is not None and faulty:
        for text, outcome in _translate(pair, faulty, config.retry, config).items():
            outcomes[text] = min(outcomes[text], outcome, key=_badness)._replace(is_retried=True)
    return outcomes


class _Pair(NamedTuple):
    translator: Translator
    src_lang: str
    tgt_lang: str

    def translate(self, sentences: Iterable[str], decoding: Decoding) -> dict[str, tuple[str, bool]]:
        """Each distinct sentence with its translation and whether that is finished."""
        distinct = list(dict.fromkeys(sentences))
        found = translate_sentences(self.translator, distinct, self.src_lang, self.tgt_lang, decoding)
        return dict(zip(distinct, found, strict=True))


def _badness(outcome: Outcome) -> tuple[int, float]:
    return len(outcome.faults), -(outcome.chrf or 0.0)


def _translate(
    pair: _Pair, splits: Mapping[str, SplitText], decoding: Decoding, config: TextsConfig
) -> dict[str, Outcome]:
    found = pair.translate((sentence for split in splits.values() for sentence in split.sentences), decoding)
    scorer, back = None, {}
    if config.min_round_trip_chrf is not None:
        scorer = load_chrf()
        turned = pair._replace(src_lang=pair.tgt_lang, tgt_lang=pair.src_lang)
        back = turned.translate((text for text, _ in found.values()), config.decoding)
    outcomes = {}
    for text, split in splits.items():
        if not split.sentences:
            outcomes[text] = Outcome(text)
            continue
        parts = [found[sentence] for sentence in split.sentences]
        translations = [part for part, _ in parts]
        # Sentences alone: what stands between them, such as code, is the same on both sides.
        faults = find_faults(" ".join(split.sentences), " ".join(translations), pair.tgt_lang, config.checks)
        if not all(is_finished for _, is_finished in parts):
            faults.append("unfinished")
        chrf = None
        if scorer is not None:
            returned = " ".join(back[part][0] for part in translations)
            chrf = scorer.sentence_score(returned, [" ".join(split.sentences)]).score
            if chrf < (config.min_round_trip_chrf or 0):
                faults.append("round_trip")
        outcomes[text] = Outcome(join_text(split, translations), tuple(faults), chrf=chrf)
    return outcomes


def load_chrf() -> CHRF:
    """What measures chrF. Raises ConfigError when sacrebleu is not there."""
    try:
        from sacrebleu.metrics.chrf import CHRF
    except ImportError as error:
        raise ConfigError(
            "min_round_trip_chrf needs sacrebleu; run `pip install sacrebleu` or set it to null."
        ) from error
    return CHRF()
