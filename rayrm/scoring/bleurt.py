"""Score candidates against the reference of their row with BLEURT."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

from pydantic import Field

from rayrm.config import NOT_IDENTITY, Config, Workers
from rayrm.errors import ConfigError
from rayrm.runs import INPUT

Outcome = tuple[float | None, str]


class BleurtScoring(Config):
    """How like its reference each candidate is, by a BLEURT checkpoint; most scores lie from 0 to 1."""

    type: Literal["bleurt"] = "bleurt"
    name: str = Field("bleurt", min_length=1)
    """Field of `scores` and `status` that holds the result."""
    model: str = Field(json_schema_extra=INPUT)  # type: ignore[arg-type]
    """Folder or hub id of a bleurt-pytorch checkpoint, with a WordPiece or a SentencePiece tokenizer."""
    max_length: int | None = Field(None, ge=8)
    """Most tokens of a pair, special ones included; null for all positions of the model."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the encoder; auto is bfloat16 on a GPU and float32 on a CPU."""
    token_budget: int = Field(8192, ge=1, json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Most tokens of a batch, padding included."""
    workers: Workers = Field(default_factory=Workers, json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Actors that score."""


class BleurtScorer:
    """A loaded BLEURT model. Raises CheckpointError, and ConfigError for a `max_length` beyond the model's."""

    needs: ClassVar[tuple[str, ...]] = ("reference",)
    """Columns without which no row can be scored."""

    def __init__(self, config: BleurtScoring) -> None:
        import torch

        from rayrm.models.bleurt import load_bleurt

        if not config.workers.num_gpus:
            torch.set_num_threads(max(1, int(config.workers.num_cpus)))
        dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
        device = "cuda" if config.workers.num_gpus else "cpu"
        self.config = config
        self.model, self.tokenizer = load_bleurt(config.model, device, dtype)
        positions = self.model.config.max_position_embeddings
        if config.max_length is not None and config.max_length > positions:
            raise ConfigError(
                f"max_length is {config.max_length}, and '{config.model}' has only {positions} positions."
            )
        self.max_length = config.max_length or positions

    def score(self, rows: list[dict[str, Any]]) -> list[list[Outcome]]:
        """One (score, status) for each of a row's `candidates`; equal pairs are scored once a call.

        Not across calls: a score's last digits hang on its batch, and a resumed run must give the same ones.

        A candidate without text is `empty`, and one of a row without a reference is `error`: there is nothing to
        compare. A pair that was cut to `max_length` is `truncated`; a score that is not finite is `nan`. A score is
        null in all of these cases but `truncated`.
        """
        pairs = [(row["reference"], text) for row in rows for text in row["candidates"] or []]
        outcomes = self._score_pairs(list(dict.fromkeys(pair for pair in pairs if find_fault(*pair) is None)))
        return [
            [
                outcomes[row["reference"], text]
                if (fault := find_fault(row["reference"], text)) is None
                else (None, fault)
                for text in row["candidates"] or []
            ]
            for row in rows
        ]

    def _score_pairs(self, pairs: list[tuple[str, str]]) -> dict[tuple[str, str], Outcome]:
        from rayrm.models.bleurt import encode_pairs, score_encoded

        encoded = encode_pairs(self.tokenizer, pairs, self.max_length)
        scores = score_encoded(self.model, encoded, self.config.token_budget, self.tokenizer.pad_id)
        return {
            pair: (score, "truncated" if ids.is_truncated else "ok") if math.isfinite(score) else (None, "nan")
            for pair, ids, score in zip(pairs, encoded, scores, strict=True)
        }


def find_fault(reference: str | None, candidate: str | None) -> str | None:
    """`empty` for a candidate without text, `error` for a reference without; None where both have some."""
    if not (candidate or "").strip():
        return "empty"
    return None if (reference or "").strip() else "error"
