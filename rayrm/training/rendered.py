"""Rows → token ids, rendered once on the cluster before training and kept beside the run."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from json import JSONDecodeError
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jinja2 import TemplateError
from numpy.typing import NDArray

from rayrm import cluster, files
from rayrm.errors import CheckpointError, ConfigError, SchemaError
from rayrm.models.loading import load_padding_tokenizer
from rayrm.models.readouts import Comparison, check_header
from rayrm.models.rewarder import Rendering
from rayrm.shards import Shard, list_shards, read_shard
from rayrm.sources.validation import is_in_order
from rayrm.splits import is_held_out
from rayrm.training.launch import fetch

if TYPE_CHECKING:
    from rayrm.models.rendering import Renderer
    from rayrm.training.reward_model import RewardTraining

log = logging.getLogger("rayrm")
RENDERED = "rendered.parquet"
TASK_ROWS = 4096
NUM_PROBES = 16
ANSWERS = ("chosen", "rejected", "completion")
"""Columns that hold the messages of an answer."""

_LISTS = pa.large_list(pa.large_list(pa.int32()))
_SCHEMA = pa.schema(
    {
        "language": pa.string(),
        "subset": pa.string(),
        "is_held_out": pa.bool_(),
        "is_truncated": pa.bool_(),
        "weight": pa.float32(),
        "targets": pa.large_list(pa.float32()),
        "sides": _LISTS,
        "reads": _LISTS,
    }
)


class RenderedRows:
    """The rendered rows of a run, numbered in the order of the input."""

    def __init__(self, table: pa.Table, num_sides: int) -> None:
        self.languages, self.subsets = (np.array(table[name].to_pylist(), str) for name in ("language", "subset"))
        self.weights: NDArray[np.float32] = table["weight"].to_numpy()
        self.targets = _padded(table["targets"])
        """fp32 [rows, most targets of a row]; NaN behind the last target of a row."""
        held_out = table["is_held_out"].to_numpy()
        self.train: list[int] = np.flatnonzero(~held_out).tolist()
        self.held_out: list[int] = np.flatnonzero(held_out).tolist()
        self.sides = [_Lists(table["sides"], num_sides, side) for side in range(num_sides)]
        """The token ids of each side, by row."""
        self.reads = [_Lists(table["reads"], num_sides, side) for side in range(num_sides)]
        """Where each side is read, by row."""
        self.side_lengths: NDArray[np.int64] = np.stack([side.lengths for side in self.sides])
        """Tokens, [sides, rows]."""
        self.lengths: list[int] = self.side_lengths.max(0).tolist()
        """Tokens of the longest side of each row."""
        self.most_reads = max(int(reads.lengths.max()) for reads in self.reads)
        """Reads of the side that has most of them."""


class _Lists:
    """One side of a column of lists, read without copying."""

    def __init__(self, column: pa.ChunkedArray, num_sides: int, side: int) -> None:
        inner = column.combine_chunks().values
        self.values = inner.values.to_numpy()
        offsets = inner.offsets.to_numpy()
        self.starts, self.stops = offsets[side:-1:num_sides], offsets[side + 1 :: num_sides]
        self.lengths = self.stops - self.starts

    def __getitem__(self, index: int) -> NDArray[np.int32]:
        ids: NDArray[np.int32] = self.values[self.starts[index] : self.stops[index]]
        return ids


def _padded(column: pa.ChunkedArray) -> NDArray[np.float32]:
    lists = column.combine_chunks()
    offsets = lists.offsets.to_numpy()
    lengths = np.diff(offsets)
    found = np.full((len(lengths), lengths.max(initial=0)), np.nan, np.float32)
    found[np.arange(found.shape[1]) < lengths[:, None]] = lists.values.to_numpy()[offsets[0] : offsets[-1]]
    return found


def render_rows(path: str, output: str, training: RewardTraining, name: str = RENDERED) -> dict[str, Any]:
    """Render the rows at `path` to `<output>/<name>`, unless they are there, in parallel.

    Returns `counts` (read, written, train, held_out, truncated, and dropped by reason), `probe`, up to 16 rows that were
    kept, held-out ones if there are any, the renderer's `fingerprint`, and the `readout` of the model that will be trained.
    Raises SchemaError when nothing is left to train on, or when a row is too long and `on_overlength` is `error`, and
    ConfigError when a held-out share holds out nothing.
    """
    target = files.join(output, name)
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
        targets = _padded(table.filter(pc.invert(table["is_held_out"]))["targets"]).astype(float)
        facts["readout"] = training.objective.readout(targets).model_dump()
        with files.atomic_file(target) as handle:
            pq.write_table(table.replace_schema_metadata({"rayrm": json.dumps(facts)}), handle)
    fs, inner = files.filesystem(target)
    with fs.open(inner, "rb") as handle:
        found: dict[str, Any] = json.loads(pq.read_schema(handle).metadata[b"rayrm"])
    return found


def read_rendered(output: str, num_sides: int, name: str = RENDERED) -> tuple[RenderedRows, dict[str, Any]]:
    """What `render_rows` wrote, and returned."""
    fs, inner = files.filesystem(files.join(output, name))
    with fs.open(inner, "rb") as handle:
        table = pq.read_table(handle)
    return RenderedRows(table, num_sides), json.loads(table.schema.metadata[b"rayrm"])


def _facts(table: pa.Table, counters: Sequence[Counter[str]], probes: list[dict[str, Any]]) -> dict[str, Any]:
    dropped = sum(counters, Counter())
    held_out = table["is_held_out"].to_pylist().count(True)
    counts = {
        "read": table.num_rows + dropped.total(),
        "written": table.num_rows,
        "train": table.num_rows - held_out,
        "held_out": held_out,
        "dropped": dict(sorted(dropped.items())),
        "truncated": table["is_truncated"].to_pylist().count(True),
        "status": {},
    }
    first = [probe for probe in probes if probe["is_held_out"]] or probes
    return {"counts": counts, "probe": first[:NUM_PROBES]}


def _check(counts: dict[str, Any], path: str, training: RewardTraining) -> None:
    reasons = ", ".join(f"{num:,} {reason}" for reason, num in counts["dropped"].items()) or "the split took all"
    too_long = counts["dropped"].get("overlength", 0)
    if training.on_overlength == "error" and too_long:
        raise SchemaError(
            f"{too_long:,} of {counts['read']:,} rows of '{path}' are longer than {training.max_length} tokens; raise "
            "max_length, or set on_overlength to drop or truncate_prompt_left."
        )
    if not counts["train"]:
        raise SchemaError(f"None of the {counts['read']:,} rows of '{path}' is left to train on ({reasons}).")
    if counts["written"] < training.min_kept_fraction * counts["read"]:
        raise SchemaError(
            f"{counts['written']:,} of the {counts['read']:,} rows of '{path}' are left ({reasons}), and "
            f"min_kept_fraction asks for {training.min_kept_fraction:g} of them; mend the rows, or lower it."
        )
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
        new = render_row(row, renderer, training)
        if isinstance(new, str):
            dropped[new] += 1
            continue
        new["is_held_out"] = is_held_out(row["group"], training.held_out_fraction, training.seed)
        rendered.append(new)
        if sum(probe["is_held_out"] == new["is_held_out"] for probe in probes) < NUM_PROBES:
            probes.append({name: row[name] for name in ("id", *training.objective.columns, "tools") if name in row})
            probes[-1]["is_held_out"] = new["is_held_out"]
    return pa.Table.from_pylist(rendered, schema=_SCHEMA), dropped, probes


@cache
def make_renderer(model: str, chat_template: str | None, max_length: int) -> Renderer:
    """The renderer that trains a reward model from `model`, and that its checkpoint describes."""
    return Rendering(chat_template, max_length).renderer(load_padding_tokenizer(model), model)


def check_renderer(training: RewardTraining) -> None:
    """Render a pair of one word each. Raises CheckpointError or ConfigError when the template cannot be scored."""
    renderer = make_renderer(training.model, training.chat_template, training.max_length)
    try:
        renderer.completion_text([{"role": "user", "content": "a"}], "b")
        renderer.check()
    except TemplateError as error:
        raise CheckpointError(
            f"The chat template for '{training.model}' does not render a question and its answer: "
            f"{str(error).rstrip('.')}; set chat_template to another one, or to 'none'."
        ) from error
    if training.objective.type == "comparison":
        check_header(renderer)
        Comparison(words=training.objective.words).tokens(renderer.tokenizer)


def render_row(row: Mapping[str, Any], renderer: Renderer, training: RewardTraining) -> dict[str, Any] | str:
    """The ids of all sides with language and targets, or the reason why the row is no use.

    Reasons: missing_field, bad_role_order, empty_content, weight_not_0_or_more, overlength, tools_not_json,
    not_rendered (the template refuses it, such as a system turn that it does not know), and those of the objective's
    `encode`.
    """
    objective = training.objective
    if any(row[name] is None for name in ("id", "group", *objective.columns)):
        return "missing_field"
    weight = row.get("weight") if objective.use_weight else None
    weight = 1.0 if weight is None else weight
    if not isinstance(weight, int | float) or not 0 <= weight < math.inf:
        return "weight_not_0_or_more"
    try:
        example = objective.encode(row, renderer.with_tools(row.get("tools")))
    except TemplateError:
        return "not_rendered"
    except JSONDecodeError:
        return "tools_not_json"
    if isinstance(example, str):
        return example
    answers = [row[name] for name in ANSWERS if name in objective.columns] or [[]]
    if not all(is_in_order([*row["prompt"], *answer]) for answer in answers):
        return "bad_role_order"
    if not all((turn["content"] or "").strip() for turn in row["prompt"]):
        return "empty_content"
    allowed = ("ok", "truncated") if training.on_overlength == "truncate_prompt_left" else ("ok",)
    if any(side.status not in allowed for side in example.sides):
        return "overlength"
    pair = f"{row['src_lang']}-{row['tgt_lang']}" if row.get("src_lang") and row.get("tgt_lang") else row["lang"]
    return {
        "language": pair,
        "subset": row.get("subset") or "",
        "is_truncated": any(side.status == "truncated" for side in example.sides),
        "weight": weight,
        "targets": example.targets,
        "sides": [side.ids for side in example.sides],
        "reads": [side.reads for side in example.sides],
    }
