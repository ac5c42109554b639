"""A BLEURT model in a Serve replica: references and candidates in, scores out, in batches across requests."""

from __future__ import annotations

import asyncio
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rayrm import files
from rayrm.models.folders import check_safetensors
from rayrm.scoring.bleurt import BleurtScorer, find_fault
from rayrm.serving.autoscaling import WAIT
from rayrm.serving.batching import Item
from rayrm.serving.config import ServedBleurt
from rayrm.serving.lanes import make_batcher
from rayrm.serving.questions import Answer, Completions, Question, Reference, Verdict
from rayrm.serving.statuses import REASONS, is_unicode, why

NO_REFERENCE = "this model compares a candidate with a reference; ask /v1/bleurt"
WARM_WORDS = 100


class BleurtReplica:
    """One loaded BLEURT model and its queue."""

    def __init__(self, values: dict[str, Any]) -> None:
        import torch

        from rayrm.models.bleurt import encode_pairs

        # This thread only loads; see TokenBatcher for what its helpers would do.
        torch.set_num_threads(1)
        self.config = ServedBleurt.model_validate(values)
        check_safetensors(self.config.model)
        self.scorer = BleurtScorer(self.config.scoring())
        self.revision = files.fingerprint(self.config.model).partition(":")[2]
        (warm,) = encode_pairs(self.scorer.tokenizer, [("word " * WARM_WORDS, "word")], self.scorer.max_length)
        self.batcher = make_batcher(self.config, self._run, Item(None, warm, len(warm.ids)), is_padded=True)
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

    def _run(self, pairs: list[Any]) -> list[float]:
        from rayrm.models.bleurt import score_encoded

        return score_encoded(self.scorer.model, pairs, self.config.token_budget, self.scorer.tokenizer.pad_id)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What the autoscaling policy sees."""
        return {WAIT: self.batcher.wait_s()}

    async def facts(self) -> dict[str, Any]:
        """What the gateway tells of the model; also the proof that it is ready."""
        return {
            "revision": self.revision,
            "readout": "bleurt",
            "max_length": self.scorer.max_length,
            "wait_s": self.batcher.wait_s(),
        }

    async def answer(self, questions: list[Question], deadline_s: float) -> list[list[Answer]]:
        """An answer for each candidate of each Reference, within `deadline_s` seconds; other questions are errors."""
        found = await asyncio.gather(*(self._answer(question, deadline_s) for question in questions))
        return [[answer._replace(revision=self.revision) for answer in answers] for answers in found]

    async def compare(self, questions: list[Completions], deadline_s: float) -> list[Verdict]:
        """Nothing but errors."""
        return [Verdict(None, "error", NO_REFERENCE) for _ in questions]

    async def tokenize(self, question: Question) -> list[list[int]]:
        """Nothing: a pair's tokens hang on its reference."""
        return [[]] * question.num_items

    async def _answer(self, question: Question, deadline_s: float) -> list[Answer]:
        from rayrm.models.bleurt import encode_pairs

        if not isinstance(question, Reference):
            return [Answer(None, "error", NO_REFERENCE)] * question.num_items
        is_reference = is_unicode(question.reference)
        faults = [
            find_fault(question.reference, text) if is_reference and is_unicode(text) else "no_unicode"
            for text in question.candidates
        ]
        pairs = [(question.reference, t) for t, fault in zip(question.candidates, faults, strict=True) if fault is None]
        encoded = await asyncio.get_running_loop().run_in_executor(
            self._encoder, encode_pairs, self.scorer.tokenizer, pairs, self.scorer.max_length
        )
        found = iter(await asyncio.gather(*(self._score(pair, deadline_s) for pair in encoded)))
        return [
            next(found) if fault is None else Answer(None, "empty" if fault == "empty" else "error", FAULTS[fault])
            for fault in faults
        ]

    async def _score(self, pair: Any, deadline_s: float) -> Answer:
        key = (*pair.ids, -1, pair.num_first)
        try:
            outcome = await self.batcher.submit(Item(key, pair, len(pair.ids)), deadline_s)
        except Exception as error:
            status, detail, retry_after_s = why(error)
            return Answer(None, status, detail, num_tokens=len(pair.ids), retry_after_s=retry_after_s)
        told: dict[str, Any] = {
            "num_tokens": len(pair.ids),
            "queue_s": outcome.queue_s,
            "run_s": outcome.run_s,
            "batch_tokens": outcome.batch_tokens,
            "padded_tokens": outcome.padded_tokens,
        }
        if not math.isfinite(outcome.value):
            return Answer(None, "nan", REASONS["nan"], **told)
        return Answer(outcome.value, "truncated" if pair.is_truncated else "ok", **told)


FAULTS = {**REASONS, "error": "the reference has no text"}
