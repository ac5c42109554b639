"""A reward model in a Serve replica: texts in, answers out, in batches across requests."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from rayrm.config import build_config
from rayrm.errors import CheckpointError
from rayrm.models.folders import local_folder, read_mark
from rayrm.models.readouts import Comparison, Encoded, Gated
from rayrm.scoring.reward_model import Calibration, check_reward_model
from rayrm.serving.autoscaling import WAIT
from rayrm.serving.batching import Item, Outcome, OverloadedError, TokenBatcher
from rayrm.serving.config import HostedModel, ServedModel
from rayrm.serving.questions import Answer, Completions, Question, Reference, Text, Verdict

log = logging.getLogger("rayrm")
WARM_TOKENS = 256
"""Tokens of the pass that warms the model up and measures its speed before the first request."""
LONGEST_LANE_S = 2.0
"""Seconds that a full batch may take on one thread for a replica to run one on each."""


class RewardReplica:
    """One loaded reward model, its queue, and what it knows of itself."""

    def __init__(self, values: dict[str, Any]) -> None:
        import torch

        from rayrm.models.rewarder import Rendering, load_rewarder

        config = ServedModel.model_validate(values)
        _check_safetensors(config.model)
        scoring = config.scoring()
        check_reward_model(scoring)
        # This thread only loads; see TokenBatcher for what its helpers would do.
        torch.set_num_threads(1)
        mark = read_mark(config.model)
        self.config = config
        self.rewarder = load_rewarder(
            config.model,
            Rendering(config.chat_template, config.max_length),
            device="cuda" if config.replicas.num_gpus else "cpu",
            dtype=None if config.dtype == "auto" else getattr(torch, config.dtype),
        )
        self.rewarder.pack()
        renderer = self.rewarder.renderer
        self.num_ids = self.rewarder.model.network.get_input_embeddings().num_embeddings
        stored = mark.get("calibration")
        self.calibration = None if stored is None else build_config(Calibration, stored, config.model)
        self.is_verified = "digest" in mark
        self.revision = mark.get("digest") or hashlib.blake2b(config.model.encode(), digest_size=8).hexdigest()
        token, length = renderer.tokenizer.eos_token_id or 0, min(WARM_TOKENS, renderer.max_length or WARM_TOKENS)
        warm = Item(None, [Encoded([token] * length, [length - 1], "ok")], length)
        self.batcher = make_batcher(config, self._run, warm, is_padded=not self.rewarder.is_packed)
        # Tokenizers are not to be used by two threads at once.
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

    def _run(self, trees: list[list[Encoded]]) -> Sequence[Any]:
        """The model's outputs of each tree; in halves where a batch does not fit into memory."""
        import torch

        try:
            return self.rewarder.read_trees(trees)
        except torch.OutOfMemoryError:
            if len(trees) == 1:
                raise
        half = len(trees) // 2
        return [*self._run(trees[:half]), *self._run(trees[half:])]

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What the autoscaling policy sees."""
        return {WAIT: self.batcher.wait_s()}

    async def facts(self) -> dict[str, Any]:
        """What the gateway tells of the model; also the proof that it is ready."""
        renderer, calibration = self.rewarder.renderer, self.calibration
        return {
            "revision": self.revision,
            "verified": self.is_verified,
            "readout": self.rewarder.readout.type,
            "max_length": renderer.max_length,
            "calibration": None
            if calibration is None
            else {
                "overall": [calibration.mean, calibration.std],
                "languages": {name: [found.mean, found.std] for name, found in calibration.languages.items()},
            },
            "wait_s": self.batcher.wait_s(),
        }

    async def answer(self, questions: list[Question], deadline_s: float) -> list[list[Answer]]:
        """An answer for each completion or conversation of each question, within `deadline_s` seconds.

        What cannot be had is null with its status.
        """
        encoded = await self._encode(lambda: [self._question(question) for question in questions])
        found = await asyncio.gather(*(self._answer(rows, deadline_s) for rows in encoded))
        return [
            [self._calibrate(answer, getattr(question, "lang", None)) for answer in answers]
            for question, answers in zip(questions, found, strict=True)
        ]

    async def compare(self, questions: list[Completions], deadline_s: float) -> list[Verdict]:
        """Which of the two completions of each question is better."""
        readout, renderer = self.rewarder.readout, self.rewarder.renderer
        if not isinstance(readout, Comparison):
            return [_by_rewards(*answers) for answers in await self.answer(list(questions), deadline_s)]
        encode = readout.encode_both
        encoded = await self._encode(lambda: [encode(renderer, q.prompt, *q.completions) for q in questions])
        return await asyncio.gather(*(self._compare(rows, deadline_s) for rows in encoded))

    async def tokenize(self, question: Question) -> list[list[int]]:
        """The token ids that the model would read of each completion or conversation."""
        encoded = await self._encode(lambda: self._question(question))
        return [row.ids for row in encoded]

    async def _encode(self, work: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._encoder, work)

    def _question(self, question: Question) -> list[Encoded]:
        renderer, readout = self.rewarder.renderer, self.rewarder.readout
        if isinstance(question, Completions):
            if isinstance(readout, Comparison):
                return [Encoded([], [], "compares")] * len(question.completions)
            prompt_is_text = all(is_unicode(f"{turn['role']}{turn['content']}") for turn in question.prompt)
            return [
                self._completion(question, text)
                if prompt_is_text and is_unicode(text)
                else Encoded([], [], "no_unicode")
                for text in question.completions
            ]
        if isinstance(question, Reference):
            return [Encoded([], [], "no_bleurt")] * question.num_items
        if isinstance(question, Text) and not is_unicode(question.text):
            return [Encoded([], [], "no_unicode")]
        ids = renderer.encode(question.text) if isinstance(question, Text) else question.ids
        if isinstance(readout, Gated):
            return [Encoded([], [], "gated")]
        if not ids:
            return [Encoded([], [], "empty")]
        if renderer.max_length is not None and len(ids) > renderer.max_length:
            return [Encoded([], [], "overlength")]
        if min(ids) < 0 or max(ids) >= self.num_ids:
            return [Encoded([], [], "unknown_ids")]
        return [Encoded(ids, [len(ids) - 1], "ok")]

    def _completion(self, question: Completions, text: str) -> Encoded:
        readout: Any = self.rewarder.readout
        try:
            encoded: Encoded = readout.encode(self.rewarder.renderer.with_tools(question.tools), question.prompt, text)
        except Exception:
            # Templates are programs of others: they refuse roles, take no empty conversation, divide by zero.
            return Encoded([], [], "error")
        return encoded

    async def _read(self, rows: Sequence[Encoded], deadline_s: float) -> list[Outcome | Exception]:
        """Outcome or error of each row that has ids; equal ones are read once, and those that begin alike together."""
        keys = [(*row.ids, -1, *row.reads) for row in rows]
        distinct = dict(zip(keys, rows, strict=True))
        trees = [list(distinct.values())] if self.rewarder.is_packed else [[row] for row in distinct.values()]
        items = [Item(_key(tree), tree, self.rewarder.num_tokens(tree)) for tree in trees]
        outcomes = await asyncio.gather(
            *(self.batcher.submit(item, deadline_s) for item in items), return_exceptions=True
        )
        found: list[Outcome | Exception] = []
        for tree, outcome in zip(trees, outcomes, strict=True):
            if isinstance(outcome, Outcome):
                found += [outcome._replace(value=value) for value in outcome.value]
            elif isinstance(outcome, Exception):
                found += [outcome] * len(tree)
            else:
                raise outcome
        by_key = dict(zip(distinct, found, strict=True))
        return [by_key[key] for key in keys]

    async def _answer(self, rows: Sequence[Encoded], deadline_s: float) -> list[Answer]:
        readable = [index for index, row in enumerate(rows) if row.ids]
        outcomes: list[Outcome | Exception] = []
        if readable:
            outcomes = await self._read([rows[index] for index in readable], deadline_s)
        found = dict(zip(readable, outcomes, strict=True))
        return [self._make_answer(row, found.get(index)) for index, row in enumerate(rows)]

    def _make_answer(self, row: Encoded, outcome: Outcome | Exception | None) -> Answer:
        if outcome is None:
            return Answer(None, row.status if row.status in STATUSES else "error", REASONS[row.status])
        if isinstance(outcome, Exception):
            status, detail, retry_after_s = why(outcome)
            return Answer(None, status, detail, num_tokens=len(row.ids), retry_after_s=retry_after_s)
        readout: Any = self.rewarder.readout
        told: dict[str, Any] = {
            "num_tokens": len(row.ids),
            "queue_s": outcome.queue_s,
            "run_s": outcome.run_s,
            "batch_tokens": outcome.batch_tokens,
            "padded_tokens": outcome.padded_tokens,
        }
        if not np.isfinite(outcome.value).all():
            return Answer(None, "nan", REASONS["nan"], **told)
        if isinstance(readout, Comparison):
            # Rendered text is read at its end, as that of others.
            reward, ratings = outcome.value[0][0] - outcome.value[0][1], None
        else:
            reward = readout.reward(outcome.value)
            ratings = readout.ratings(outcome.value) if hasattr(readout, "ratings") else None
        if not np.isfinite(reward):
            return Answer(None, "nan", REASONS["nan"], **told)
        return Answer(reward, row.status, outputs=outcome.value, ratings=ratings, **told)

    def _calibrate(self, answer: Answer, lang: str | None) -> Answer:
        if answer.reward is None or self.calibration is None:
            return answer
        spread = self.calibration.languages.get(lang or "", self.calibration)
        return answer._replace(calibrated=(answer.reward - spread.mean) / spread.std)

    async def _compare(self, rows: Sequence[Encoded], deadline_s: float) -> Verdict:
        if not all(row.ids for row in rows):
            return Verdict(None, rows[0].status, REASONS[rows[0].status])
        num_tokens = sum(len(row.ids) for row in rows)
        values = []
        for outcome in await self._read(rows, deadline_s):
            if isinstance(outcome, Exception):
                status, detail, retry_after_s = why(outcome)
                return Verdict(None, status, detail, num_tokens=num_tokens, retry_after_s=retry_after_s)
            values.append(outcome.value)
        readout: Any = self.rewarder.readout
        gap = readout.gap(*values)
        if not np.isfinite(gap):
            return Verdict(None, "nan", REASONS["nan"], num_tokens=num_tokens)
        return Verdict(gap, rows[0].status, num_tokens=num_tokens)


def make_batcher(
    config: HostedModel, run: Callable[[list[Any]], Sequence[Any]], warm: Item, is_padded: bool
) -> TokenBatcher:
    """The queue before a model, after two runs of `warm`, the second of which tells the speed.

    On CPUs, many short batches with a thread each give more than one after another with all threads.
    """
    import torch

    num_threads = max(1, int(config.replicas.num_cpus))

    def tokens_a_second() -> float:
        torch.set_num_threads(num_threads)
        run([warm.payload])
        began = time.monotonic()
        run([warm.payload])
        return warm.num_tokens / max(time.monotonic() - began, 1e-6)

    # In a thread that ends, since its helpers end with it.
    with ThreadPoolExecutor(1) as thread:
        tokens_s = thread.submit(tokens_a_second).result()
    batch_s = config.token_budget * num_threads / tokens_s
    num_lanes = 1 if config.replicas.num_gpus or batch_s > LONGEST_LANE_S else num_threads

    def run_lane(payloads: list[Any], share: int) -> Sequence[Any]:
        # Each thread has a number of its own.
        torch.set_num_threads(share * num_threads // num_lanes)
        return run(payloads)

    return TokenBatcher(run_lane, config.token_budget, tokens_s / num_lanes, is_padded, config.cache_size, num_lanes)


def _check_safetensors(model: str) -> None:
    """Raise CheckpointError for a model of pickled files, which may run programs of their own when they are read."""
    folder = Path(local_folder(model))
    if folder.is_dir() and any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"'{model}' holds pickled weights and no safetensors files, and a server reads no others; save it again with "
            "transformers."
        )


def _by_rewards(first: Answer, second: Answer) -> Verdict:
    """By Bradley and Terry's model, the log-odds are the gap of both rewards."""
    num_tokens = first.num_tokens + second.num_tokens
    for answer in (first, second):
        if answer.reward is None:
            return Verdict(None, answer.status, answer.detail, None, num_tokens, answer.retry_after_s)
    assert first.reward is not None and second.reward is not None
    rewards, status = (first.reward, second.reward), "truncated" if "truncated" in (first[1], second[1]) else "ok"
    return Verdict(rewards[0] - rewards[1], status, None, rewards, num_tokens)


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


def _key(tree: Sequence[Encoded]) -> bytes:
    content = hashlib.blake2b(digest_size=16)
    for row in tree:
        content.update(np.array([len(row.ids), *row.ids, *row.reads], np.int64).tobytes())
    return content.digest()
