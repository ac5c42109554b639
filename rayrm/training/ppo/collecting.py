"""A step's samples: drawn, looked at, scored and rewarded, on the worker of rank 0."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from rayrm.composing import Key, Unit, UnitKind, Unscored, asked_units, compose, with_constants
from rayrm.errors import RayRMError
from rayrm.models.vllm import Drawn
from rayrm.placing import place, token_ends
from rayrm.scoring.reward_model import language_of
from rayrm.seeds import seed_of
from rayrm.training.ppo.experience import RULES, Sample, lone_samples
from rayrm.training.ppo.rollouts import Request, RolloutPool
from rayrm.training.ppo.scorers import ScorerPool, Ticket
from rayrm.training.ppo.settings import CriticFree, LengthRule, RewardedTraining

MIN_JUDGED = 64
"""Fewest completions that `Faults` looks back on, as far as there were as many."""


class PromptRow(NamedTuple):
    """A row that completions are drawn for."""

    values: dict[str, Any]
    """Its columns, as scorers read them."""
    prompt_ids: list[int]


class Collected(NamedTuple):
    """The samples of a step, and the seconds of `draw`, of `score` behind that, and in which `scorers` were at work."""

    samples: list[Sample]
    seconds: dict[str, float]


class Faults:
    """The last completions of a run, as far as they were left out: is enough left to learn from?"""

    def __init__(self, max_unscored_fraction: float, num: int) -> None:
        self.max_unscored_fraction = max_unscored_fraction
        self.last: deque[str | None] = deque(maxlen=max(num, MIN_JUDGED))

    def take(self, samples: Sequence[Sample]) -> None:
        """Judge by these samples too. Raises RayRMError where too many have no score, or nothing is left."""
        self.last.extend(sample.fault for sample in samples)
        faults = [fault for fault in self.last if fault is not None]
        unscored = [fault.partition("/")[2] for fault in faults if fault.startswith("unscored")]
        if len(unscored) > self.max_unscored_fraction * len(self.last):
            raise RayRMError(
                f"{len(unscored)} of the last {len(self.last)} completions have no reward "
                f"({', '.join(sorted(set(unscored)))}), more than max_unscored_fraction {self.max_unscored_fraction:g}; "
                "look at the scorers, or raise it."
            )
        if len(faults) == len(self.last):
            raise RayRMError(
                f"All of the last {len(self.last)} completions were left out ({', '.join(sorted(set(faults)))}); look at "
                "the rules of length and at the scorers."
            )


class Collector:
    """Draws and rewards completions; a thread may run it while the learner learns."""

    def __init__(self, training: RewardedTraining, tokenizer: Any, rollouts: RolloutPool, scorers: ScorerPool) -> None:
        self.training = training
        # Two steps, so that one which is lost is no end yet.
        num = 2 * training.global_batch_size * training.sampling.num_candidates
        self.faults = Faults(training.max_unscored_fraction, num)
        self.composition = with_constants(training.rewarding)
        self.tokenizer = tokenizer
        self.rollouts = rollouts
        self.scorers = scorers
        self.special = set(tokenizer.all_special_ids)

    def collect_step(self, rows: Sequence[tuple[int, PromptRow]], visit: str) -> Collected:
        """As `collect`, for a step of training: without critic, what has nothing to be compared with is left out.

        Raises RayRMError as `Faults.take` does.
        """
        collected = self.collect(rows, visit)
        lone = lone_samples(collected.samples) if isinstance(self.training, CriticFree) else ()
        for sample in collected.samples:
            if sample.id in lone:
                sample.fault = "alone"
        self.faults.take(collected.samples)
        return collected

    def collect(self, rows: Sequence[tuple[int, PromptRow]], visit: str) -> Collected:
        """All completions of numbered rows; draws hang on the row, the seed and `visit` alone.

        Raises what rollouts and scorers raise.
        """
        began = time.monotonic()
        numbered = {}
        requests = []
        for index, row in rows:
            name = f"{row.values['id']}/{row.values['lang']}/{visit}"
            numbered[name] = (index, row)
            requests.append(Request(name, row.prompt_ids, seed_of(self.training.seed, name)))
        waiting: list[tuple[list[Sample], dict[Key, Ticket]]] = []
        place_of = {request.id: number for number, request in enumerate(requests)}
        for drawn_for, drawn, _ in self.rollouts.draw(requests):
            samples = [
                self._sample(request.id, number, *numbered[request.id], found)
                for request, candidates in zip(drawn_for, drawn, strict=True)
                for number, found in enumerate(candidates)
            ]
            waiting.append((samples, self._submit(samples, dict(numbered.values()))))
        drawn_s = time.monotonic() - began
        for samples, tickets in waiting:
            self._reward(samples, tickets)
        found = [sample for samples, _ in waiting for sample in samples]
        found.sort(key=lambda sample: (place_of[sample.id.rpartition("/")[0]], int(sample.id.rpartition("/")[2])))
        seconds = {"draw": drawn_s, "score": time.monotonic() - began - drawn_s, "scorers": self.scorers.take_busy()}
        return Collected(found, seconds)

    def _sample(self, name: str, number: int, index: int, row: PromptRow, drawn: Drawn) -> Sample:
        """A drawn completion, and what the rules of length say of it."""
        body = _body(drawn.ids, drawn.is_finished)
        text = self._decode(body)
        lang, last_turn = language_of(row.values), row.values["prompt"][-1]["content"]
        own = (drawn.ids, drawn.logprobs, drawn.is_finished, text)
        sample = Sample(f"{name}/{number}", index, lang, last_turn, row.prompt_ids, *own)
        num_tokens = sum(token not in self.special for token in body)
        # Nobody can score white space.
        held = (num_tokens < self.training.min_length or not text.strip(), not drawn.is_finished)
        for holds, what in zip(held, RULES, strict=True):
            rule: LengthRule = getattr(self.training, what)
            if not holds or rule.then == "keep":
                continue
            if rule.then == "drop" or not drawn.ids:
                sample.fault = what
            else:
                sample.reward = rule.reward
                sample.token_rewards = [0.0] * (len(drawn.ids) - 1) + [float(rule.reward or 0.0)]
                sample.parts = {what: float(rule.reward or 0.0)}
            break
        return sample

    def _submit(self, samples: Sequence[Sample], rows: dict[int, PromptRow]) -> dict[Key, Ticket]:
        """Have the samples scored that are neither left out nor rewarded by a rule; one row for each prompt."""
        groups = _open_groups(samples)
        if not groups:
            return {}
        tickets = {}
        for name, unit in (part.key for part in self.composition.parts):
            asked = [
                {**rows[row].values, "candidates": [text for sample in group for text in _pieces(sample, unit)]}
                for row, group in groups.items()
            ]
            tickets[name, unit] = self.scorers.submit(name, unit, asked)
        return tickets

    def _reward(self, samples: Sequence[Sample], tickets: dict[Key, Ticket]) -> None:
        """Compose what the scorers gave, and place it on the tokens."""
        found: dict[str, dict[Key, list[Unit] | None]] = {sample.id: {} for sample in samples}
        groups = list(_open_groups(samples).values())
        for key, ticket in tickets.items():
            for group, answer in zip(groups, self.scorers.result(ticket), strict=True):
                told = iter(answer)
                for sample in group:
                    own = [next(told) for _ in _pieces(sample, key[1])]
                    found[sample.id][key] = _found_units(sample.text.strip(), key[1], own)
        for sample in (sample for group in groups for sample in group):
            text = sample.text.strip()
            composed = compose(text, found[sample.id], self.composition)
            if isinstance(composed, Unscored):
                sample.fault = f"unscored/{composed.part}/{composed.status}"
                continue
            ends = token_ends(_body(sample.ids, sample.is_finished), self._decode)
            ends += [len(sample.text)] * (len(sample.ids) - len(ends))
            lead = len(sample.text) - len(sample.text.lstrip())
            # Scorers read the text without the white space around it.
            ends = [min(max(end - lead, 0), len(text)) for end in ends]
            sample.reward, sample.is_open = composed.total, composed.is_open
            sample.truncated = sorted({name for (name, _), units in found[sample.id].items() if _is_cut(units)})
            sample.parts = {name: value for name, value in composed.parts.items() if value is not None}
            sample.token_rewards = place(composed.points, ends).tolist()

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


def _body(ids: list[int], is_finished: bool) -> list[int]:
    """The tokens of a completion without the one that ends it, which may be none of the tokenizer's special ones."""
    return ids[:-1] if is_finished else ids


def _open_groups(samples: Sequence[Sample]) -> dict[int, list[Sample]]:
    """By the number of their row, the samples that are neither left out nor rewarded."""
    groups: dict[int, list[Sample]] = {}
    for sample in samples:
        if sample.fault is None and sample.reward is None:
            groups.setdefault(sample.row, []).append(sample)
    return groups


def _pieces(sample: Sample, unit: UnitKind) -> list[str]:
    text = sample.text.strip()
    return [text[start:end] for start, end in _units_of(text, unit)]


def _units_of(text: str, unit: UnitKind) -> list[tuple[int, int]]:
    """What a scorer is shown of a text; one that marks spans sees it whole."""
    return asked_units(text, "text" if unit == "spans" else unit)


def _is_cut(units: list[Unit] | None) -> bool:
    """Whether the scorer did not read all that it was shown."""
    return any(unit.status == "truncated" for unit in units or ())


def _found_units(text: str, unit: UnitKind, answer: Any) -> list[Unit] | None:
    """A scorer's answer for one text as units of it; None where nobody can tell its spans."""
    if unit == "spans":
        spans = answer[0] if answer else None
        return None if spans is None else [Unit(span.start, span.end, span.score) for span in spans]
    return [Unit(*where, *outcome) for where, outcome in zip(_units_of(text, unit), answer, strict=True)]
