"""The scorers of a run, each in Ray actors of its own that are started again when they die."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from rayrm import cluster
from rayrm.composing import with_constants
from rayrm.config import find_told
from rayrm.errors import ConfigError, RayRMError, ServiceError
from rayrm.scoring import SCORERS, Scoring, check_scoring
from rayrm.scoring.custom import CustomClass, CustomScoring
from rayrm.scoring.identity import check_calibrations
from rayrm.scoring.service import ServiceScoring, find_revision
from rayrm.training.launch import TrainingWorkers
from rayrm.training.ppo.settings import PolicyGradient

log = logging.getLogger("rayrm")
METHODS = {"text": "score", "sentences": "score", "spans": "spans"}
"""What a scorer is asked for, by the unit of a part."""


class Share(NamedTuple):
    """The rows of one actor."""

    number: int
    """Which of the scorer's actors."""
    actor: Any
    rows: list[dict[str, Any]]
    answer: Any
    """Reference of what the actor gives."""


class Ticket(NamedTuple):
    """Rows that a scorer works on."""

    name: str
    method: str
    shares: list[Share]


class ScorerPool:
    """Started with the first rows. Raises what a scorer raises where it is made."""

    def __init__(self, scorers: Sequence[Scoring], max_failures: int) -> None:
        self.configs = {config.name: config for config in scorers}
        self.max_failures = max_failures
        self.failures_left = max_failures
        """Deaths that are got over before the next answer."""
        self.actors: dict[str, list[Any]] = {}
        self.is_closed = False
        self.busy_s = 0.0
        self.revisions: dict[str, str | None] = {}
        """What the services among them must run, by the scorer's name, once `pin` has been called."""

    def pin(self, known: dict[str, str | None]) -> dict[str, str | None]:
        """Hold services to the revisions of `known`, or where it has none to those of now; gives them.

        Raises ServiceError when a service runs another one.
        """
        services = [config for config in self.configs.values() if isinstance(config, ServiceScoring)]
        found = {config.name: find_revision(config) for config in services}
        self.revisions = found | {name: revision for name, revision in known.items() if revision is not None}
        for name, revision in found.items():
            check_revision(name, revision, self.revisions[name])
        return self.revisions

    def submit(self, name: str, unit: str, rows: Sequence[dict[str, Any]]) -> Ticket:
        """Have rows with `candidates` scored; the answer is that of `result`."""
        if name not in self.actors:
            num = self.configs[name].workers.num_workers
            self.actors[name] = [self._start(name) for _ in range(num)]
        num = min(len(self.actors[name]), len(rows))
        shares = [self._ask(name, index, METHODS[unit], list(rows[index::num])) for index in range(num)]
        return Ticket(name, METHODS[unit], shares)

    def result(self, ticket: Ticket) -> list[Any]:
        """For each row what the scorer gives its candidates.

        Raises what the scorer raises, and RayRMError when actors have died more than `max_failures` times meanwhile.
        """
        import ray
        from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, RayError

        answers: list[list[Any]] = []
        for share in ticket.shares:
            while True:
                try:
                    answer, seconds = ray.get(share.answer)
                    answers.append(answer)
                    self.busy_s += seconds
                    break
                except RayError as error:
                    if told := find_told(error):
                        raise told from None
                    if self.is_closed or not isinstance(error, RayActorError | ObjectLostError | OutOfMemoryError):
                        raise
                    share = self._replace(ticket, share)
        self.failures_left = self.max_failures
        found: list[Any] = [None] * sum(len(share.rows) for share in ticket.shares)
        for place, answer in enumerate(answers):
            found[place :: len(answers)] = answer
        return found

    def take_busy(self) -> float:
        """Seconds for which an actor was at work since the last call, on average over all of them."""
        busy, self.busy_s = self.busy_s, 0.0
        return busy / max(1, sum(map(len, self.actors.values())))

    def close(self) -> None:
        """End all actors; who waits for their answers gets an error of Ray's."""
        import ray

        self.is_closed = True
        for actor in [actor for actors in list(self.actors.values()) for actor in actors]:
            ray.kill(actor)

    def _replace(self, ticket: Ticket, share: Share) -> Share:
        """The rows, asked once more of a new actor; of one that another ticket has started already, where there is."""
        if self.actors[ticket.name][share.number] is not share.actor:
            return self._ask(ticket.name, share.number, ticket.method, share.rows)
        if not self.failures_left:
            raise RayRMError(
                f"Actors of the scorer '{ticket.name}' keep dying; see Ray's logs for the reason, and give them more "
                "memory or start fewer."
            )
        self.failures_left -= 1
        log.warning("an actor of the scorer '%s' died; its rows go to a new one", ticket.name)
        self.actors[ticket.name][share.number] = self._start(ticket.name)
        return self._ask(ticket.name, share.number, ticket.method, share.rows)

    def _ask(self, name: str, index: int, method: str, rows: list[dict[str, Any]]) -> Share:
        actor = self.actors[name][index]
        return Share(index, actor, rows, actor.call.remote(method, rows))

    def _start(self, name: str) -> Any:
        import ray

        config = self.configs[name]
        workers = config.workers
        options = {"num_cpus": workers.num_cpus, "num_gpus": workers.num_gpus, "scheduling_strategy": "DEFAULT"}
        actor = ray.remote(ScorerActor).options(**options).remote(config, self.revisions.get(name))
        # Closed by another thread meanwhile.
        if self.is_closed:
            ray.kill(actor)
        return actor


class ScorerActor:
    """A loaded scorer; a service must run `revision`. Raises what the scorer raises, and ServiceError."""

    def __init__(self, config: Scoring, revision: str | None) -> None:
        self.scorer: Any = SCORERS[config.type](config)
        if isinstance(config, ServiceScoring):
            check_revision(config.name, self.scorer.revision, revision)
            # From here on each reply is held to it.
            self.scorer.revision = revision or self.scorer.revision

    def call(self, method: str, rows: list[dict[str, Any]]) -> tuple[list[Any], float]:
        """What `method` of the scorer gives for the rows, and the seconds that it took."""
        began = time.monotonic()
        return list(getattr(self.scorer, method)(rows)), time.monotonic() - began


def check_revision(name: str, found: str | None, wanted: str | None) -> None:
    """Raise ServiceError when a service runs another revision of its model than the run began with."""
    if None not in (found, wanted) and found != wanted:
        raise ServiceError(
            f"The service of the scorer '{name}' runs revision {found} of its model, and this run began with {wanted}; "
            "rewards of two models must not be mixed: serve that one again, or start in another output."
        )


def check_rewarded(training: PolicyGradient, rows: str, workers: TrainingWorkers) -> None:
    """Find out, before anything starts, whether completions of the prompts at `rows` can be drawn and scored.

    Raises what `check_scoring`, `with_constants` and `check_calibrations` raise, ConfigError for a scorer that is asked
    for spans and marks none, and ResourceError when all actors of a run can never be there at the same time.
    """
    with_constants(training.rewarding)
    asked = {part.key for part in training.rewarding.parts}
    groups: list[Any] = [workers, training.rollouts.workers, *(config.workers for config in training.scorers)]
    for what, kind in (("CPU", "num_cpus"), ("GPU", "num_gpus")):
        total = sum(group.num_workers * getattr(group, kind) for group in groups)
        cluster.require_total(total, what, "Learner, samplers and scorers together")
    sampling = training.rollouts.workers
    cluster.require(sampling.num_workers, sampling.num_cpus, sampling.num_gpus, "Rollouts")
    for config in training.scorers:
        own = config.workers
        cluster.require(own.num_workers, own.num_cpus, own.num_gpus, f"The scorer '{config.name}'")
        check_scoring(rows, config)
        made_of = CustomClass(config.scorer).make if isinstance(config, CustomScoring) else SCORERS[config.type]
        if (config.name, "spans") in asked and not hasattr(made_of, "spans"):
            raise ConfigError(f"rewarding asks the scorer '{config.name}' for spans, and '{config.type}' marks none.")
    check_calibrations(training.rewarding, training.scorers)
