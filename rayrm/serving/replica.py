"""A reward model in a Serve replica: texts in, answers out, in batches across requests."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from rayrm import files
from rayrm.config import build_config
from rayrm.models.folders import check_safetensors, read_mark
from rayrm.models.packing import common_length
from rayrm.models.readouts import Comparison, Encoded, Gated
from rayrm.scoring.reward_model import Calibration, check_reward_model
from rayrm.serving.autoscaling import WAIT
from rayrm.serving.batching import Item, Outcome
from rayrm.serving.config import ServedModel
from rayrm.serving.lanes import make_batcher
from rayrm.serving.questions import Answer, Completions, Question, Reference, Text, Verdict
from rayrm.serving.statuses import REASONS, is_unicode, told, why

WARM_TOKENS = 256
"""Tokens of the pass that warms the model up and measures its speed before the first request."""


class RewardReplica:
    """One loaded reward model, its queue, and what it knows of itself."""

    def __init__(self, values: dict[str, Any]) -> None:
        import torch

        from rayrm.models.rewarder import Rendering, load_rewarder

        config = ServedModel.model_validate(values)
        check_safetensors(config.model)
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
        self.revision = files.fingerprint(config.model).partition(":")[2]
        length = min(WARM_TOKENS, renderer.max_length or WARM_TOKENS)
        warm = Item(None, [self.rewarder.blank(length)], length)
        self.batcher = make_batcher(config, self._run, warm, is_padded=not self.rewarder.is_packed)
        # Tokenizers are not to be used by two threads at once.
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

    def _run(self, trees: list[list[Encoded]]) -> Sequence[Any]:
        """The model's outputs of each tree; in halves where a batch does not fit into memory."""
        import torch

        try:
            return self.rewarder.read_trees(trees)
        except torch.OutOfMemoryError:
            if len(trees) == len(trees[0]) == 1:
                raise
        if len(trees) == 1:
            half = len(trees[0]) // 2
            return [[*self._run([trees[0][:half]])[0], *self._run([trees[0][half:]])[0]]]
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
            [
                self._calibrate(answer, getattr(question, "lang", None))._replace(revision=self.revision)
                for answer in answers
            ]
            for question, answers in zip(questions, found, strict=True)
        ]

    async def compare(self, questions: list[Completions], deadline_s: float) -> list[Verdict]:
        """Which of the two completions of each question is better."""
        readout, renderer = self.rewarder.readout, self.rewarder.renderer
        if not isinstance(readout, Comparison):
            found = [_by_rewards(*answers) for answers in await self.answer(list(questions), deadline_s)]
            return [verdict._replace(revision=self.revision) for verdict in found]

        def both(question: Completions) -> Sequence[Encoded]:
            texts = [turn["content"] for turn in question.prompt]
            if not all(map(is_unicode, [*texts, *question.completions])):
                return [Encoded([], [], "no_unicode")]
            try:
                return readout.encode_both(renderer, question.prompt, *question.completions)
            except Exception:
                # As in `_completion`.
                return [Encoded([], [], "error")]

        encoded = await self._encode(lambda: list(map(both, questions)))
        verdicts = await asyncio.gather(*(self._compare(rows, deadline_s) for rows in encoded))
        return [verdict._replace(revision=self.revision) for verdict in verdicts]

    async def tokenize(self, question: Question) -> list[list[int]]:
        """The token ids that the model would read of each completion or conversation; of a prompt without completions,
        those before its answer."""
        renderer = self.rewarder.renderer

        def ids() -> list[list[int]]:
            if isinstance(question, Completions) and not question.completions:
                try:
                    return [renderer.encode(renderer.prompt_text(question.prompt))]
                except Exception:
                    # As in `_completion`.
                    return [[]]
            if isinstance(question, Text) and is_unicode(question.text):
                return [renderer.encode(question.text)]
            return [row.ids for row in self._question(question)]

        found: list[list[int]] = await self._encode(ids)
        return found

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
        if isinstance(question, Text) and not question.text.strip():
            return [Encoded([], [], "empty")]
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
        trees = self._trees(list(distinct.values()))
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

    def _trees(self, rows: list[Encoded]) -> list[list[Encoded]]:
        """Rows that begin alike, in trees that the token budget holds; each alone where rows are not packed."""
        if not self.rewarder.is_packed:
            return [[row] for row in rows]
        shared = common_length([np.asarray(row.ids, np.int64) for row in rows])
        trees: list[list[Encoded]] = []
        room = 0
        for row in rows:
            own = len(row.ids) - shared
            if own > room:
                trees.append([])
                room = self.config.token_budget - shared
            trees[-1].append(row)
            room -= own
        return trees

    async def _answer(self, rows: Sequence[Encoded], deadline_s: float) -> list[Answer]:
        readable = [index for index, row in enumerate(rows) if row.ids]
        outcomes: list[Outcome | Exception] = []
        if readable:
            outcomes = await self._read([rows[index] for index in readable], deadline_s)
        found = dict(zip(readable, outcomes, strict=True))
        return [self._make_answer(row, found.get(index)) for index, row in enumerate(rows)]

    def _make_answer(self, row: Encoded, outcome: Outcome | Exception | None) -> Answer:
        if outcome is None:
            return Answer(None, told(row.status), REASONS[row.status])
        if isinstance(outcome, Exception):
            status, detail, retry_after_s = why(outcome)
            return Answer(None, status, detail, num_tokens=len(row.ids), retry_after_s=retry_after_s)
        readout: Any = self.rewarder.readout
        facts: dict[str, Any] = {
            "num_tokens": len(row.ids),
            "queue_s": outcome.queue_s,
            "run_s": outcome.run_s,
            "batch_tokens": outcome.batch_tokens,
            "padded_tokens": outcome.padded_tokens,
        }
        if not np.isfinite(outcome.value).all():
            return Answer(None, "nan", REASONS["nan"], **facts)
        if isinstance(readout, Comparison):
            # Rendered text is read at its end, as that of others.
            reward, ratings = outcome.value[0][0] - outcome.value[0][1], None
        else:
            reward = readout.reward(outcome.value)
            ratings = readout.ratings(outcome.value) if hasattr(readout, "ratings") else None
        if not np.isfinite(reward):
            return Answer(None, "nan", REASONS["nan"], **facts)
        return Answer(reward, row.status, outputs=outcome.value, ratings=ratings, **facts)

    def _calibrate(self, answer: Answer, lang: str | None) -> Answer:
        if answer.reward is None or self.calibration is None:
            return answer
        spread = self.calibration.languages.get(lang or "", self.calibration)
        return answer._replace(calibrated=(answer.reward - spread.mean) / spread.std)

    async def _compare(self, rows: Sequence[Encoded], deadline_s: float) -> Verdict:
        if not all(row.ids for row in rows):
            return Verdict(None, told(rows[0].status), REASONS[rows[0].status])
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


def _by_rewards(first: Answer, second: Answer) -> Verdict:
    """By Bradley and Terry's model, the log-odds are the gap of both rewards."""
    num_tokens = first.num_tokens + second.num_tokens
    for answer in (first, second):
        if answer.reward is None:
            return Verdict(None, answer.status, answer.detail, None, num_tokens, answer.retry_after_s)
    assert first.reward is not None and second.reward is not None
    rewards, status = (first.reward, second.reward), "truncated" if "truncated" in (first[1], second[1]) else "ok"
    return Verdict(rewards[0] - rewards[1], status, None, rewards, num_tokens)


def _key(tree: Sequence[Encoded]) -> bytes:
    content = hashlib.blake2b(digest_size=16)
    for row in tree:
        content.update(np.array([len(row.ids), *row.ids, *row.reads], np.int64).tobytes())
    return content.digest()
