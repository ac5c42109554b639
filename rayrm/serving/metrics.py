"""What a gateway counts, for Prometheus."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric

from rayrm.serving.questions import Answer, Verdict

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
REWARDS = (-20, -10, -5, -3, -2, -1, -0.5, 0, 0.5, 1, 2, 3, 5, 10, 20)
TOKENS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
OTHER = "other"
"""Language of what names none, or one that is no plain code: a label must not grow without bound."""
MAX_LANGUAGES = 256


class Metrics:
    """One registry for each gateway, so that several in a process do not meet."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        self.requests = Counter(
            "rayrm_requests", "Requests by path and status code.", ("path", "code"), registry=self.registry
        )
        self.request_s = Histogram(
            "rayrm_request_seconds", "Seconds of a request.", ("path",), registry=self.registry, buckets=SECONDS
        )
        self.in_flight = Gauge("rayrm_requests_in_flight", "Requests in work.", registry=self.registry)
        self.statuses = Counter(
            "rayrm_answers", "Answers by model and status.", ("model", "status"), registry=self.registry
        )
        self.tokens = Counter("rayrm_tokens", "Tokens of answers.", ("model",), registry=self.registry)
        self.queue_s = Histogram(
            "rayrm_queue_seconds", "Seconds in a replica's queue.", ("model",), registry=self.registry, buckets=SECONDS
        )
        self.batch_tokens = Histogram(
            "rayrm_batch_tokens",
            "Tokens of the batch that an answer was in.",
            ("model",),
            registry=self.registry,
            buckets=TOKENS,
        )
        self.padding = Histogram(
            "rayrm_batch_padding_share",
            "Share of padding in the batch that an answer was in.",
            ("model",),
            registry=self.registry,
            buckets=SHARES,
        )
        self.rewards = Histogram(
            "rayrm_reward", "Raw rewards.", ("model", "lang"), registry=self.registry, buckets=REWARDS
        )
        self._languages: set[str] = set()
        self._gateway = uuid.uuid4().hex[:8]

    def count_answers(self, model: str, lang: str | None, answers: Sequence[Answer]) -> None:
        """Count the answers to a question."""
        language = self._language(lang)
        for answer in answers:
            self.statuses.labels(model, answer.status).inc()
            self.tokens.labels(model).inc(answer.num_tokens)
            if answer.reward is not None:
                self.rewards.labels(model, language).observe(answer.reward)
            if answer.padded_tokens:
                self.queue_s.labels(model).observe(answer.queue_s)
                self.batch_tokens.labels(model).observe(answer.batch_tokens)
                self.padding.labels(model).observe(1 - answer.batch_tokens / answer.padded_tokens)

    def count_verdicts(self, model: str, verdicts: Sequence[Verdict]) -> None:
        """Count the answers to questions about pairs."""
        for verdict in verdicts:
            self.statuses.labels(model, verdict.status).inc()
            self.tokens.labels(model).inc(verdict.num_tokens)

    def _language(self, lang: str | None) -> str:
        if lang is None or (lang not in self._languages and len(self._languages) >= MAX_LANGUAGES):
            return OTHER
        self._languages.add(lang)
        return lang

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self)  # type: ignore[arg-type]

    def collect(self) -> Iterator[Metric]:
        """All families, with the gateway's own id on each sample: several behind one address answer in turn."""
        for family in self.registry.collect():
            family.samples = [
                sample._replace(labels={**sample.labels, "gateway": self._gateway}) for sample in family.samples
            ]
            yield family
