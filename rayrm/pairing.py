"""Pair the best and the worst candidate of each prompt."""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from rayrm.config import Config
from rayrm.rows import MESSAGES, TEXTS, set_column, with_hidden
from rayrm.seeds import seed_of

if TYPE_CHECKING:
    from ray.data import Dataset


class PairingConfig(Config):
    """Which two candidates of a prompt become a preference."""

    min_margin: float = Field(0.0, ge=0)
    """Smallest reward gap between chosen and rejected, in the reward's own unit; a gap of 0 is never a pair."""
    valid_score_range: tuple[float | None, float | None] = (None, None)
    """Candidates with a reward outside these two bounds (both included) are left out; null is no bound."""
    min_chosen_reward: float | None = None
    """Smallest reward of a chosen candidate; the rejected one may lie below."""
    max_candidates: int | None = Field(None, ge=2)
    """Only the first so many candidates of a prompt take part."""
    max_pairs_per_lang_pair: int | None = Field(None, ge=1)
    """Most pairs that a language pair may give."""
    pick: Literal["largest_margin", "sample"] = "largest_margin"
    """Which pairs stay under `max_pairs_per_lang_pair`: the widest margins, or a seeded sample."""
    seed: int = 0
    """Seed of `pick: sample`; the draw hangs on a row's id alone."""

    @model_validator(mode="after")
    def _check_range(self) -> PairingConfig:
        low, high = self.valid_score_range
        if low is not None and high is not None and low > high:
            raise ValueError("valid_score_range must be [lowest, highest]")
        return self


class Pair(NamedTuple):
    """Positions of the two candidates of a pair in the candidate list."""

    chosen: int
    rejected: int


Rank = tuple[float, str]
"""Minus the margin, or a number drawn from the id; then the id. Lower ranks stay."""
RANKS = pa.schema([("lang_pair", pa.string()), ("rank", pa.float64()), ("id", pa.string())])


def pair_candidates(rewarded: Dataset, config: PairingConfig, limits: Mapping[str, Rank] | None = None) -> Dataset:
    """One Preference for each prompt with a wide enough gap; other prompts are dropped and counted.

    Reads prompt, candidates, rewards. Adds chosen, rejected, margin, chosen_reward, rejected_reward; drops
    candidates, rewards. `limits` are those that `find_limits` found over all rows, where `rewarded` is only a part
    of them; left out, they are found first if `max_pairs_per_lang_pair` asks for them.
    """
    if limits is None and config.max_pairs_per_lang_pair is not None:
        limits = find_limits(rewarded, config)
    kwargs = {"config": config, "limits": limits or {}}
    return rewarded.map_batches(pair_table, fn_kwargs=kwargs, batch_format="pyarrow", batch_size=None)


def find_limits(rewarded: Dataset, config: PairingConfig) -> dict[str, Rank]:
    """The last rank that stays in each language pair, empty without `max_pairs_per_lang_pair`.

    Runs the Dataset; holds at most a few times that many ranks a language pair, however many rows there are.
    """
    if config.max_pairs_per_lang_pair is None:
        return {}
    ranks = rewarded.map_batches(rank_table, fn_kwargs={"config": config}, batch_format="pyarrow", batch_size=None)
    return merge_ranks(ranks.iter_batches(batch_format="pyarrow", batch_size=None), config.max_pairs_per_lang_pair)


def pair_row(rewards: Sequence[float | None], config: PairingConfig) -> tuple[Pair | None, list[str]]:
    """The best and the worst of a row's candidates by their rewards, and why candidates or the row were left out.

    First `max_candidates` cuts, then null, NaN (`no_reward`) and `valid_score_range` (`out_of_range`) leave
    candidates out. The lowest of the rest is rejected, the highest that reaches `min_chosen_reward` is chosen; the
    first of equals. No pair: `few_candidates` (fewer than two left), `low_rewards` (none reaches the minimum), `tie`
    (no gap) or `narrow_margin`.
    """
    low, high = config.valid_score_range
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    left: list[tuple[float, int]] = []
    reasons = []
    for position, reward in enumerate(rewards[: config.max_candidates]):
        if reward is None or math.isnan(reward):
            reasons.append("no_reward")
        elif low <= reward <= high:
            left.append((reward, position))
        else:
            reasons.append("out_of_range")
    if len(left) < 2:
        return None, [*reasons, "few_candidates"]
    lowest, rejected = min(left)
    highest = max(left, key=_reward)
    if config.min_chosen_reward is not None and highest[0] < config.min_chosen_reward:
        return None, [*reasons, "low_rewards"]
    if highest[0] == lowest:
        return None, [*reasons, "tie"]
    if highest[0] - lowest < config.min_margin:
        return None, [*reasons, "narrow_margin"]
    return Pair(highest[1], rejected), reasons


def _reward(scored: tuple[float, int]) -> float:
    return scored[0]


def pair_table(table: pa.Table, config: PairingConfig, limits: Mapping[str, Rank]) -> pa.Table:
    """`pair_candidates` for one table of Rewarded rows.

    Only rewards pass through Python; texts are taken in Arrow. A candidate that is null has no reward, two equal texts
    with different rewards are no pair (`equal_texts`), and a pair behind its limit is dropped as `over_limit`. Another
    number of rewards than of candidates drops the row as `unequal_lengths`.
    """
    table = with_hidden(table)
    kept, dropped = table["_kept"].to_pylist(), table["_dropped"].to_pylist()
    texts = pc.list_flatten(table["candidates"]).combine_chunks()
    no_text = set(np.flatnonzero(texts.is_null()).tolist())
    sizes = pc.fill_null(pc.list_value_length(table["candidates"]), 0).to_pylist()
    picks: list[tuple[int, int, float, float] | None] = [None] * table.num_rows
    start = 0
    for index, (size, rewards) in enumerate(zip(sizes, table["rewards"].to_pylist(), strict=True)):
        if kept[index]:
            rewards = rewards or []
            if no_text:
                rewards = [None if start + i in no_text else value for i, value in enumerate(rewards)]
            pair, reasons = pair_row(rewards, config) if len(rewards) == size else (None, ["unequal_lengths"])
            if reasons:
                dropped[index] = dropped[index] + reasons
            if pair is None:
                kept[index] = False
            else:
                values = rewards[pair.chosen], rewards[pair.rejected]
                picks[index] = (start + pair.chosen, start + pair.rejected, *values)
        start += size
    table = _with_pairs(table, texts, picks)
    equal = pc.fill_null(pc.equal(table["chosen"], table["rejected"]), False)
    for index in np.flatnonzero(equal).tolist():
        kept[index], dropped[index] = False, [*dropped[index], "equal_texts"]
    if limits:
        for index, (lang_pair, rank) in enumerate(_ranks(table, config)):
            if kept[index] and lang_pair in limits and rank > limits[lang_pair]:
                kept[index], dropped[index] = False, [*dropped[index], "over_limit"]
    table = _as_answers(table)
    table = set_column(table, "_kept", pa.array(kept, pa.bool_()))
    return set_column(table, "_dropped", pa.array(dropped, TEXTS))


def _with_pairs(table: pa.Table, texts: pa.Array, picks: list[tuple[int, int, float, float] | None]) -> pa.Table:
    columns = list(zip(*[pick or (None,) * 4 for pick in picks], strict=True)) or [()] * 4
    chosen, rejected = (pc.take(texts, pa.array(column, pa.int64())) for column in columns[:2])
    rewards = [pa.array(column, pa.float64()) for column in columns[2:]]
    table = table.drop_columns(["candidates", "rewards"])
    table = set_column(set_column(table, "chosen", chosen), "rejected", rejected)
    table = set_column(table, "margin", pc.subtract(*rewards))
    return set_column(set_column(table, "chosen_reward", rewards[0]), "rejected_reward", rewards[1])


def _as_answers(table: pa.Table) -> pa.Table:
    for name in ("chosen", "rejected"):
        texts = table[name].combine_chunks()
        roles = pa.DictionaryArray.from_arrays(pa.array(np.zeros(len(texts), np.int8)), ["assistant"]).cast(pa.string())
        turns = pa.StructArray.from_arrays([roles, texts], fields=list(MESSAGES.value_type))
        table = set_column(table, name, pa.ListArray.from_arrays(np.arange(len(texts) + 1, dtype=np.int32), turns))
    return table


def rank_table(table: pa.Table, config: PairingConfig) -> pa.Table:
    """`lang_pair`, `rank` and `id` of the pairs of one table that may stay, judged by this table alone."""
    pairs = pair_table(table, config, {})
    pairs = pairs.filter(pairs["_kept"])
    best: dict[str, list[Rank]] = defaultdict(list)
    for lang_pair, rank in _ranks(pairs, config):
        best[lang_pair].append(rank)
    rows = [
        {"lang_pair": name, "rank": rank, "id": row_id}
        for name, ranks in best.items()
        for rank, row_id in heapq.nsmallest(config.max_pairs_per_lang_pair or len(ranks), ranks)
    ]
    return pa.Table.from_pylist(rows, RANKS)


def merge_ranks(tables: Iterable[pa.Table], max_pairs: int) -> dict[str, Rank]:
    """The `max_pairs`-th rank of each language pair over tables of `rank_table`; a pair with fewer has its last."""
    best: dict[str, list[Rank]] = defaultdict(list)
    for table in tables:
        for row in table.to_pylist():
            ranks = best[row["lang_pair"]]
            ranks.append((row["rank"], row["id"]))
            if len(ranks) > 2 * max_pairs + 1000:
                best[row["lang_pair"]] = heapq.nsmallest(max_pairs, ranks)
    return {name: heapq.nsmallest(max_pairs, ranks)[-1] for name, ranks in best.items()}


def _ranks(table: pa.Table, config: PairingConfig) -> list[tuple[str, Rank]]:
    both = pc.and_(pc.is_valid(table["src_lang"]), pc.is_valid(table["tgt_lang"]))
    joined = pc.binary_join_element_wise(table["src_lang"], table["tgt_lang"], "-")
    names = pc.if_else(both, joined, table["lang"]).to_pylist()
    ids = table["id"].to_pylist()
    if config.pick == "sample":
        firsts = [float(seed_of(config.seed, row_id)) for row_id in ids]
    else:
        firsts = pc.negate(table["margin"]).to_pylist()
    return [(name, (first, row_id)) for name, first, row_id in zip(names, firsts, ids, strict=True)]
