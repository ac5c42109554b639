"""Preference rows → token ids, rendered once on the cluster before training and kept beside the run."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rayrm import cluster, files
from rayrm.errors import CheckpointError, ConfigError, SchemaError
from rayrm.models.reward_model import Pair, Rendering, load_padding_tokenizer
from rayrm.rows import Message
from rayrm.shards import Shard, list_shards, read_shard
from rayrm.splits import is_held_out
from rayrm.training.launch import fetch
from rayrm.training.objectives import Targets

if TYPE_CHECKING:
    from rayrm.models.rendering import Renderer
    from rayrm.training.reward_model import RewardTraining

log = logging.getLogger("rayrm")
RENDERED = "rendered.parquet"
TASK_ROWS = 4096
NUM_PROBES = 16

_IDS = pa.large_list(pa.int32())
_SCHEMA = pa.schema(
    {
        "language": pa.string(),
        "subset": pa.string(),
        "is_held_out": pa.bool_(),
        **dict.fromkeys(Targets._fields, pa.float32()),
        "chosen": _IDS,
        "rejected": _IDS,
    }
)
_ALLOWED = {
    "margin": (-math.inf, math.inf, "margin_not_finite"),
    "label": (0.0, 1.0, "label_not_in_0_to_1"),
    "weight": (0.0, math.inf, "weight_not_0_or_more"),
}
"""Least and greatest finite number that a row may give, and the reason to drop a pair with any other value."""


class RenderedPairs:
    """The rendered pairs of a run, numbered in the order of the input."""

    def __init__(self, table: pa.Table) -> None:
        self.languages, self.subsets = (np.array(table[name].to_pylist(), str) for name in ("language", "subset"))
        self.targets: NDArray[np.float32] = np.stack([table[name].to_numpy() for name in Targets._fields])
        """The numbers of `Targets`, fp32 [fields, pairs]."""
        held_out = table["is_held_out"].to_numpy()
        self.train: list[int] = np.flatnonzero(~held_out).tolist()
        self.held_out: list[int] = np.flatnonzero(held_out).tolist()
        self.chosen, self.rejected = _Ids(table["chosen"]), _Ids(table["rejected"])
        self.lengths: list[int] = np.maximum(self.chosen.lengths, self.rejected.lengths).tolist()
        """Tokens of the longer side of each pair."""
        self.extra_lengths: NDArray[np.int64] = self.chosen.lengths - self.rejected.lengths


class _Ids:
    """A column of token ids, read without copying."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        array = column.combine_chunks()
        self.values = array.values.to_numpy()
        self.offsets = array.offsets.to_numpy()
        self.lengths = np.diff(self.offsets)

    def __getitem__(self, index: int) -> NDArray[np.int32]:
        ids: NDArray[np.int32] = self.values[self.offsets[index] : self.offsets[index + 1]]
        return ids


def render_preferences(path: str, output: str, training: RewardTraining) -> dict[str, Any]:
    """Render the Preference rows at `path` to `<output>/rendered.parquet`, unless they are there, in parallel.

    Returns `counts` (read, written, train, held_out, and dropped by reason), `probe`, up to 16 rows that were kept,
    held-out ones if there are any, and the renderer's `fingerprint`. Raises SchemaError when nothing is left to train
    on, or when a pair is too long and `on_overlength` is `error`, and ConfigError when a held-out share holds out nothing.
    """
    target = files.join(output, RENDERED)
    if not files.exists(target):
        cluster.connect()
        import ray

        task = ray.remote(num_cpus=1)(render_shard)
        parts = fetch([task.remote(shard, training) for shard in list_shards(path, TASK_ROWS)], "rendering")
        table = pa.concat_tables([part[0] for part in parts])
        facts = _facts(table, [part[1] for part in parts], [probe for part in parts for probe in part[2]])
        _check(facts["counts"], path, training)
        renderer = make_renderer(training.model, training.chat_template, training.max_length)
        facts["fingerprint"] = renderer.fingerprint()
        with files.atomic_file(target) as handle:
            pq.write_table(table.replace_schema_metadata({"rayrm": json.dumps(facts)}), handle)
    fs, inner = files.filesystem(target)
    with fs.open(inner, "rb") as handle:
        found: dict[str, Any] = json.loads(pq.read_schema(handle).metadata[b"rayrm"])
    return found


def read_rendered(output: str) -> RenderedPairs:
    """What `render_preferences` wrote."""
    fs, inner = files.filesystem(files.join(output, RENDERED))
    with fs.open(inner, "rb") as handle:
        return RenderedPairs(pq.read_table(handle))


def _facts(table: pa.Table, counters: Sequence[Counter[str]], probes: list[dict[str, Any]]) -> dict[str, Any]:
    dropped = sum(counters, Counter())
    held_out = table["is_held_out"].to_pylist().count(True)
    counts = {
        "read": table.num_rows + dropped.total(),
        "written": table.num_rows,
        "train": table.num_rows - held_out,
        "held_out": held_out,
        "dropped": dict(sorted(dropped.items())),
        "status": {},
    }
    first = [probe for probe in probes if probe["is_held_out"]] or probes
    return {"counts": counts, "probe": first[:NUM_PROBES]}


def _check(counts: dict[str, Any], path: str, training: RewardTraining) -> None:
    reasons = ", ".join(f"{num:,} {reason}" for reason, num in counts["dropped"].items()) or "the split took all"
    too_long = counts["dropped"].get("overlength", 0)
    if training.on_overlength == "error" and too_long:
        raise SchemaError(
            f"{too_long:,} of {counts['read']:,} pairs of '{path}' are longer than {training.max_length} tokens; raise "
            "max_length, or set on_overlength to drop or truncate_prompt_left."
        )
    if not counts["train"]:
        raise SchemaError(f"None of the {counts['read']:,} rows of '{path}' is left to train on ({reasons}).")
    if training.held_out_fraction and not counts["held_out"]:
        raise ConfigError(
            f"held_out_fraction {training.held_out_fraction:g} holds out none of the groups of the {counts['train']:,} "
            f"rows of '{path}'; raise it, or set it to 0."
        )


def render_shard(shard: Shard, training: RewardTraining) -> tuple[pa.Table, Counter[str], list[dict[str, Any]]]:
    """Rendered rows of a shard, why others were dropped, and rows that may serve as probes."""
    renderer = make_renderer(training.model, training.chat_template, training.max_length)
    dropped, probes = Counter[str](), list[dict[str, Any]]()
    rendered: list[dict[str, Any]] = []
    for row in read_shard(shard).to_pylist():
        new, reason = render_row(row, renderer, training)
        if new is None:
            dropped[reason] += 1
            continue
        new["is_held_out"] = is_held_out(row["group"], training.held_out_fraction, training.seed)
        rendered.append(new)
        if sum(probe["is_held_out"] == new["is_held_out"] for probe in probes) < NUM_PROBES:
            probes.append({name: row[name] for name in ("id", "prompt", "chosen", "rejected")})
            probes[-1]["is_held_out"] = new["is_held_out"]
    return pa.Table.from_pylist(rendered, schema=_SCHEMA), dropped, probes


@cache
def make_renderer(model: str, chat_template: str | None, max_length: int) -> Renderer:
    """The renderer that trains a reward model from `model`, and that its checkpoint describes."""
    return Rendering(chat_template, max_length).renderer(load_padding_tokenizer(model), model)


def check_renderer(training: RewardTraining) -> None:
    """Render a pair of one word each. Raises CheckpointError or ConfigError when the template cannot be scored."""
    from jinja2 import TemplateError

    renderer = make_renderer(training.model, training.chat_template, training.max_length)
    try:
        renderer.completion_text([{"role": "user", "content": "a"}], "b")
    except TemplateError as error:
        raise CheckpointError(
            f"The chat template for '{training.model}' does not render a question and its answer: "
            f"{str(error).rstrip('.')}; set chat_template to another one, or to 'none'."
        ) from error


def render_row(
    row: Mapping[str, Any], renderer: Renderer, training: RewardTraining
) -> tuple[dict[str, Any] | None, str]:
    """The ids of both sides with language and targets, or None and the reason why the pair is no use.

    Reasons: missing_field, not_ending_in_assistant, empty_content, identical_responses, margin_not_finite,
    label_not_in_0_to_1, weight_not_0_or_more, overlength.
    """
    if any(row[name] is None for name in ("id", "group", "prompt", "chosen", "rejected")):
        return None, "missing_field"
    sides = [split_side(row["prompt"], row[name]) for name in ("chosen", "rejected")]
    if None in sides:
        return None, "not_ending_in_assistant"
    chosen, rejected = (side for side in sides if side is not None)
    if not chosen[1].strip() or not rejected[1].strip():
        return None, "empty_content"
    if chosen == rejected:
        return None, "identical_responses"
    targets = {"margin": 0.0, "label": 1.0, "weight": 1.0}
    for name in targets:
        if getattr(training.objective, f"use_{name}"):
            least, greatest, reason = _ALLOWED[name]
            found = row.get(name)
            if not isinstance(found, int | float) or not math.isfinite(found) or not least <= found <= greatest:
                return None, reason
            targets[name] = found
    ids = [renderer.pair_ids(*side) for side in (chosen, rejected)]
    allowed = ("ok", "truncated") if training.on_overlength == "truncate_prompt_left" else ("ok",)
    if any(side.status not in allowed for side in ids):
        return None, "overlength"
    pair = f"{row['src_lang']}-{row['tgt_lang']}" if row.get("src_lang") and row.get("tgt_lang") else row["lang"]
    return {
        "language": pair,
        "subset": row.get("subset") or "",
        **targets,
        "chosen": ids[0].ids,
        "rejected": ids[1].ids,
    }, ""


def split_side(prompt: Sequence[Message], turns: Sequence[Message]) -> Pair | None:
    """All turns but the last as the prompt, and the last one's text; None unless it is the assistant's."""
    if not turns or turns[-1]["role"] != "assistant":
        return None
    return [*prompt, *turns[:-1]], turns[-1]["content"] or ""
