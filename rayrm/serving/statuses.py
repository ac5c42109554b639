"""Why an item has no reward: the words for it, and the errors that become them."""

from __future__ import annotations

import logging

from rayrm.serving.batching import OverloadedError

log = logging.getLogger("rayrm")
STATUSES = ("empty", "overlength", "error")
"""Those of rows that are not read, as answers tell them; others are `error` with a detail of their own."""
REASONS = {
    "empty": "there is no text",
    "overlength": "it has more tokens than the model takes",
    "error": "the chat template refuses it",
    "nan": "the model gave a number that is not finite",
    "timeout": "the deadline passed",
    "compares": "this model compares two completions and rewards no single one; ask for pairs",
    "gated": "this model needs to know where the prompt ends; send prompt and completion",
    "no_bleurt": "this model rewards answers to prompts, and compares no candidates with references",
    "no_unicode": "it holds half of a surrogate pair, which is no character",
    "unknown_ids": "a token id is not in the model's vocabulary",
}


def told(status: str) -> str:
    """The status that answers tell, of a row that is not read."""
    return status if status in STATUSES else "error"


def why(error: Exception) -> tuple[str, str, float]:
    """Status, detail, and seconds after which to ask again, of what the batcher raised."""
    if isinstance(error, OverloadedError):
        return "overloaded", str(error), error.retry_after_s
    if isinstance(error, TimeoutError):
        return "timeout", REASONS["timeout"], 1.0
    log.error("A forward pass failed.", exc_info=error)
    return "error", f"the model failed with {type(error).__name__}", 0.0


def is_unicode(text: str) -> bool:
    """Whether no half of a surrogate pair is in the text; JSON may bring some, and no tokenizer takes them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
