"""What judges answered, one line of JSON an answer, written as it comes: nothing that was paid for is asked again."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from types import TracebackType
from typing import IO, Any, Literal, NamedTuple

from rayrm import files
from rayrm.errors import ConfigError

log = logging.getLogger("rayrm")
KEPT = ("model", "choices", "usage")
"""Fields of a reply that are kept."""
AnswerStatus = Literal["ok", "timeout", "overloaded", "error"]


class Answer(NamedTuple):
    """What came of one question to a judge."""

    key: str
    """What `key_of` makes of the question."""
    status: AnswerStatus
    """ok: there is a reply, whatever it says; any other word: the call failed for good."""
    reply: dict[str, Any] | None
    """The endpoint's reply as it came; null for a call that failed."""
    detail: str | None
    """Why a call failed."""
    attempts: int
    """Requests that it took."""
    latency_s: float
    """Seconds of the last one of them."""


class Ledger(NamedTuple):
    """What all calls to a judge took, those of earlier runs included."""

    num_calls: int
    """Questions that have an answer, or that failed."""
    num_failures: int
    """Those that failed."""
    num_retries: int
    """Requests beyond the first one of each call."""
    prompt_tokens: int
    completion_tokens: int
    num_unmetered: int
    """Answers whose endpoint tells no tokens."""
    cost: float | None
    """In the currency of the prices; null without prices, and where answers are unmetered."""


class Prices(NamedTuple):
    """What a million tokens cost."""

    prompt: float | None
    completion: float | None


def key_of(model: str, body: Mapping[str, Any]) -> str:
    """What stands for a question: the same words to the same model have one key."""
    return files.digest([model, body])


class AnswerStore:
    """The answers of one judge, in a file that lines are added to.

    A context manager: within it the file is this process's own. Of a key that failed and was asked again the last line
    counts; a last line that was cut by a kill is taken away.
    """

    def __init__(self, path: str, prices: Prices) -> None:
        """Raises ConfigError when `path` is on a store that cannot append to files."""
        fs, self._path = files.filesystem(path)
        if "file" not in fs.protocol:
            raise ConfigError(
                f"'{path}' would have to grow with every answer, and {fs.protocol!r} cannot append to files; "
                "give a local or mounted folder as output."
            )
        self._prices = prices
        self._lines: dict[str, Answer] = {}
        self._num_retries = self._prompt_tokens = self._completion_tokens = self._num_unmetered = 0
        self._handle: IO[bytes] | None = None

    def __enter__(self) -> AnswerStore:
        """Read what is there. Raises ConfigError when another process writes to the file."""
        import fcntl

        os.makedirs(os.path.dirname(self._path), exist_ok=True)
        handle = open(self._path, "a+b")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.close()
            raise ConfigError(
                f"Another run writes to '{self._path}'; wait until it ends, or choose another output."
            ) from None
        self._handle = handle
        self._read(handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle is not None:
            self._handle.close()

    def find(self, key: str) -> Answer | None:
        """The answer, or the failure, that is stored for a key."""
        return self._lines.get(key)

    def is_answered(self, key: str) -> bool:
        """Whether there is an answer; one that cannot be read as a verdict is one too."""
        found = self._lines.get(key)
        return found is not None and found.status == "ok"

    def add(self, answer: Answer) -> None:
        """Store an answer; it is out of this process's hands when this returns."""
        if self._handle is None:
            raise RuntimeError("the file is not open")
        if answer.reply is not None:
            answer = answer._replace(reply={name: answer.reply[name] for name in KEPT if name in answer.reply})
        self._handle.write(json.dumps(answer._asdict(), ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
        self._handle.flush()
        self._count(answer)

    def ledger(self) -> Ledger:
        """What all calls took so far."""
        failures = sum(answer.status != "ok" for answer in self._lines.values())
        tokens = (self._prompt_tokens, self._completion_tokens)
        return Ledger(len(self._lines), failures, self._num_retries, *tokens, self._num_unmetered, self.cost)

    @property
    def cost(self) -> float | None:
        """That of the ledger."""
        if self._prices.prompt is None or self._prices.completion is None or self._num_unmetered:
            return None
        return (self._prompt_tokens * self._prices.prompt + self._completion_tokens * self._prices.completion) / 1e6

    def _read(self, handle: IO[bytes]) -> None:
        handle.seek(0)
        whole = num_broken = 0
        for line in handle:
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            try:
                answer = Answer(**json.loads(line))
            except (ValueError, TypeError):
                num_broken += 1
                continue
            self._count(answer)
        handle.truncate(whole)
        if num_broken:
            log.warning("%d lines of %s cannot be read; their questions are asked again", num_broken, self._path)

    def _count(self, answer: Answer) -> None:
        before = self._lines.get(answer.key)
        self._lines[answer.key] = answer
        self._num_retries += answer.attempts - (before is None)
        if answer.reply is None:
            return
        usage = answer.reply.get("usage")
        counts = [
            usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens")
        ]
        if not all(isinstance(count, int) for count in counts):
            self._num_unmetered += 1
            return
        self._prompt_tokens += counts[0] or 0
        self._completion_tokens += counts[1] or 0
