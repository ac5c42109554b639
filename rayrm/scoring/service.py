"""Score candidates through the HTTP service, by a model that runs there."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import Field

from rayrm.client import AsyncRewardClient, Comparison, Pair, Query, Reference, Reward
from rayrm.config import NOT_IDENTITY, Config, Workers
from rayrm.errors import ConfigError
from rayrm.rows import Message
from rayrm.scoring.base import REWARD_MODEL, Outcome
from rayrm.scoring.reward_model import language_of, list_languages

CHECK_S = 15.0
"""Seconds in which a service must tell of its models before a run starts."""
LEAST_CHANCE = 2.0**-53
"""What a chance of 0 stands for: the service tells chances, and those nearer to 0 or 1 are rounded."""


class ServiceScoring(Config):
    """The reward of each candidate, by a model of a running rayrm service; the same numbers as in process.

    A BLEURT model of the service compares each candidate with the row's reference, as the scorer `bleurt` does. The key
    comes from the environment variable RAYRM_API_KEY.
    """

    type: Literal["service"] = "service"
    name: str = Field("service", min_length=1)
    """Field of `scores` and `status` that holds the result."""
    endpoint: str = Field(pattern=r"^https?://")
    """Address of the service, without a path: http://localhost:8000."""
    model: str | None = None
    """Name or alias of the model there; null for the first one."""
    calibration: Literal["none", "overall", "language"] = "none"
    """Unit of the rewards: the model's own, or standard deviations from the mean that calibrate_reward_model found,
    over all rows or over those of the row's language. With overall the service is not told of languages."""
    timeout_s: float = Field(120.0, gt=0, json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Seconds for which a request is tried again while the service has no time or is away."""
    batch_size: int = Field(32, ge=1, json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Most rows of a request."""
    max_in_flight: int = Field(16, ge=1, json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Most requests of an actor at a time."""
    workers: Workers = Field(default_factory=Workers, json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Actors that ask; one keeps a service busy."""


class Served(NamedTuple):
    """A model of a service."""

    id: str
    readout: str | None
    """What it gives: `bleurt` compares with references, and all others are reward models; null for a reward model that
    does not run now and tells nothing."""
    revision: str | None = None
    """What stands for its weights; null where the model does not run now."""
    calibrated: tuple[str, ...] | None = None
    """Languages that it is calibrated for beside all together; null where it has no calibration, or does not run."""

    @property
    def compares(self) -> bool:
        """Whether it compares two completions and rewards none."""
        return self.readout == "comparison"

    @property
    def needs(self) -> tuple[str, ...]:
        """Columns without which no row can be scored."""
        return ("reference",) if self.readout == "bleurt" else ()


def connect(config: ServiceScoring, timeout_s: float | None = None, revision: str | None = None) -> AsyncRewardClient:
    """A client of the service, with its model, which must be `revision` where one is given."""
    client = AsyncRewardClient(
        config.endpoint,
        model=config.model,
        timeout_s=timeout_s or config.timeout_s,
        batch_size=config.batch_size,
        max_in_flight=config.max_in_flight,
    )
    client.revision = revision
    return client


_SERVED: dict[ServiceScoring, Served] = {}


def recall_served(config: ServiceScoring) -> Served:
    """What `find_served` gave in this process before: a report can be written when the service is gone."""
    return _SERVED[config] if config in _SERVED else find_served(config)


def find_served(config: ServiceScoring, timeout_s: float = CHECK_S) -> Served:
    """The model that the service is to be asked for, as it says within `timeout_s`, or the config's where that is less.

    Raises ServiceError when the service cannot be reached or refuses the key, and ConfigError when it has no such model
    or a judge.
    """

    async def ask() -> list[dict[str, Any]]:
        async with connect(config, min(config.timeout_s, timeout_s)) as client:
            return await client.models()

    known = asyncio.run(ask())
    wanted = [m for m in known if config.model is None or config.model in (m["id"], *m.get("aliases", ()))]
    if not wanted:
        names = ", ".join(model["id"] for model in known) or "none"
        raise ConfigError(f"'{config.endpoint}' has no model '{config.model}'; it has {names}.")
    found = wanted[0]
    if found.get("readout") == "judge":
        raise _no_reward_model(found["id"], config, "judge")
    calibration = found.get("calibration")
    _SERVED[config] = Served(
        found["id"],
        found.get("readout"),
        found.get("revision"),
        None if calibration is None else tuple(calibration["languages"]),
    )
    return _SERVED[config]


def find_revision(config: ServiceScoring) -> str | None:
    """What stands for the model's weights; a model that does not run now is woken up by a question.

    Null for a service that does not tell. Raises as `find_served`, and ServiceError when there is no answer in time.
    """
    served = find_served(config, config.timeout_s)

    async def ask() -> str | None:
        async with connect(config, revision=served.revision) as client:
            if served.needs:
                await client.bleurt([Reference("a", ["a"])])
            else:
                await client.rewards([Query("a", ["a"])])
            return client.revision

    return served.revision or asyncio.run(ask())


def check_likeness(config: ServiceScoring) -> None:
    """Raise ConfigError for a calibration of a BLEURT model, which has none."""
    if config.calibration != "none":
        raise ConfigError(
            f"calibration is '{config.calibration}', and the model at '{config.endpoint}' is BLEURT, which has none; set "
            "calibration=none."
        )


def check_service(config: ServiceScoring, paths: Sequence[str] = ()) -> None:
    """Find out, before any actor starts, whether the service answers and has the reward model, with its calibration.

    `paths` hold the rows that are to be rewarded. Raises as `find_served`, and ConfigError for a BLEURT model, and for a
    calibration that the model has not, or not for a language of those rows.
    """
    served = find_served(config)
    if served.needs:
        raise _no_reward_model(served.id, config, "bleurt")
    if config.calibration == "none":
        return
    if served.calibrated is None:
        raise ConfigError(
            f"calibration is '{config.calibration}', and '{served.id}' at '{config.endpoint}' tells of none; run "
            "calibrate_reward_model on this model and start the service again, or set calibration=none."
        )
    for path in paths if config.calibration == "language" else ():
        if unknown := sorted(list_languages(path) - set(served.calibrated)):
            raise ConfigError(
                f"calibration is 'language', '{path}' has rows of {', '.join(unknown)}, and '{served.id}' at "
                f"'{config.endpoint}' is calibrated for {', '.join(served.calibrated) or 'no language'}; calibrate it "
                "on rows of these languages too, or set calibration=overall."
            )


class ServiceScorer:
    """A model of a running service. Raises ServiceError and ConfigError as `find_served`."""

    model_type: ClassVar[str] = REWARD_MODEL
    """What RewardBench calls such models, where they do not compare."""

    def __init__(self, config: ServiceScoring) -> None:
        self.config = config
        self.served = find_served(config, config.timeout_s)
        self.compares = self.served.compares
        self.needs = self.served.needs
        """Columns without which no row can be scored."""
        self.revision = self.served.revision
        """What all replies must come from; of a model that did not run, that of the first reply."""

    def score(self, rows: list[dict[str, Any]]) -> list[list[Outcome]]:
        """One (reward, status) for each of a row's `candidates`, as the service tells them.

        Of a row whose tools are no JSON list of objects it is `error`, and so it is where a calibration is wanted and
        the row's language has none. Raises ServiceError when the service refuses a request, has not answered within
        `timeout_s`, or answers with another revision of the model than when this scorer was made.
        """
        if self.served.readout == "bleurt":
            return self._liken(rows)
        queries = [_query(row) if self._has_unit(row) else None for row in rows]
        is_raw = self.config.calibration == "none"
        if self.config.calibration == "overall":
            queries = [query and query._replace(lang=None) for query in queries]
        asked = [query for query in queries if query is not None]
        found = iter(self._ask(lambda client: client.rewards(asked, outputs=() if is_raw else ("calibrated",))))
        return [
            [(None, "error") for _ in row["candidates"] or []]
            if query is None
            else [(each.reward, each.status) if is_raw else _calibrated(each) for each in next(found)]
            for row, query in zip(rows, queries, strict=True)
        ]

    def compare(self, pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> list[tuple[Outcome, Outcome]]:
        """(log p, status) of each of two rows with one candidate, as `PreferenceScorer.compare` says.

        Tools are not shown. Raises ServiceError as `score` does.
        """
        places = [index for index, (first, second) in enumerate(pairs) if first["prompt"] == second["prompt"]]
        asked = [
            Pair(_turns(first["prompt"]), first["candidates"][0] or "", second["candidates"][0] or "")
            for first, second in (pairs[index] for index in places)
        ]
        found: list[tuple[Outcome, Outcome]] = [((None, "error"), (None, "error"))] * len(pairs)
        answers: list[Comparison] = self._ask(lambda client: client.compare(asked))
        for index, told in zip(places, answers, strict=True):
            found[index] = _sides(told.probability, told.status)
        return found

    def _liken(self, rows: list[dict[str, Any]]) -> list[list[Outcome]]:
        """As `score`, against the reference of each row; without one it is `error`."""
        asked = [
            Reference(row.get("reference") or "", [text or "" for text in row["candidates"] or []], _lang(row))
            for row in rows
        ]
        found: list[list[Reward]] = self._ask(lambda client: client.bleurt(asked))
        return [[(each.reward, each.status) for each in answers] for answers in found]

    def _ask(self, question: Callable[[AsyncRewardClient], Awaitable[Any]]) -> Any:
        async def ask() -> Any:
            async with connect(self.config, revision=self.revision) as client:
                found = await question(client)
                self.revision = client.revision
                return found

        return asyncio.run(ask())

    def _has_unit(self, row: dict[str, Any]) -> bool:
        return self.config.calibration != "language" or language_of(row) in (self.served.calibrated or ())


def _calibrated(reward: Reward) -> Outcome:
    # A model that was not there when the run was checked may have no calibration.
    is_lacking = reward.reward is not None and reward.calibrated is None
    return reward.calibrated, "error" if is_lacking else reward.status


def _sides(probability: float | None, status: str) -> tuple[Outcome, Outcome]:
    if probability is None:
        return ((None, status),) * 2
    first, second = (math.log(max(chance, LEAST_CHANCE)) for chance in (probability, 1 - probability))
    return (first, status), (second, status)


def _turns(prompt: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": turn["role"], "content": turn["content"]} for turn in prompt]


def _query(row: dict[str, Any]) -> Query | None:
    """What is asked of a row; None where its tools cannot be sent."""
    tools = None
    if row.get("tools") is not None:
        try:
            tools = json.loads(row["tools"])
        except ValueError:
            return None
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            return None
    return Query(_turns(row["prompt"]), [text or "" for text in row["candidates"] or []], _lang(row), tools)


def _lang(row: dict[str, Any]) -> str | None:
    return language_of(row) if row.get("lang") else None


def _no_reward_model(name: str, config: ServiceScoring, kind: str) -> ConfigError:
    return ConfigError(
        f"'{name}' at '{config.endpoint}' is no reward model but of the kind '{kind}'; name a reward model."
    )
