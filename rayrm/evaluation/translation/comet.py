"""COMET over translations, in an environment of its own: it needs older transformers and numpy than everything else.

Ray makes the environment from a list of packages. A task in it loads the model once and goes through the shards of
candidates that have no scores yet; each is committed whole, as by any other stage.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from rayrm import cluster, files
from rayrm.config import NOT_IDENTITY, Config
from rayrm.counts import check_failures
from rayrm.errors import ConfigError
from rayrm.rows import NUMBERS, TEXTS
from rayrm.runs import INPUT, finish_run, start_run
from rayrm.shards import list_files, read_table

COLUMNS = ["set", "id", "lang", "source", "reference", "candidates"]


class CometConfig(Config):
    """A COMET model with references; most scores lie from 0 to 1."""

    model: str = Field("Unbabel/wmt22-comet-da", json_schema_extra=INPUT)  # type: ignore[arg-type]
    """Hub id of a model, or the path of a `.ckpt` file that every node reads."""
    pip: list[str] = Field(["unbabel-comet==2.2.7", "transformers<5", "numpy<2"], min_length=1)
    """Packages of its environment, as pip takes them."""
    batch_size: int = Field(32, ge=1, json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Texts scored at a time."""
    num_cpus: float = Field(1, ge=0, json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Logical CPUs that its task reserves."""
    num_gpus: int = Field(0, ge=0, le=1, json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """GPUs that its task reserves."""


class CometJob(Config):
    """Candidates rows → their COMET scores."""

    input: str = Field(json_schema_extra=INPUT)  # type: ignore[arg-type]
    """Folder of Candidates rows."""
    output: str = Field(json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Folder of the scores, a file for each of the input's."""
    comet: CometConfig
    """The model."""


def check_comet(config: CometConfig) -> None:
    """Make COMET's environment, which Ray keeps. Raises ConfigError when that fails, or COMET does not import there."""
    fault = _run(config, _find_fault)
    if fault:
        raise ConfigError(f"COMET does not import in its environment ({_told(config)}): {fault}; correct comet.pip.")


def score_comet(config: CometConfig, candidates: str, output: str, max_failed_fraction: float) -> str:
    """Score Candidates rows; give the folder with rows of set, id, lang, `scores.comet` and `status.comet`.

    What is done is kept. Raises ConfigError when the environment cannot be made, and EvaluationError when more than
    `max_failed_fraction` of the texts have no score.
    """
    job = CometJob(input=candidates, output=output, comet=config)
    if start_run(job):
        paths = {path: files.join(output, path.rpartition("/")[2]) for path in list_files(candidates)}
        missing = [(source, target) for source, target in paths.items() if not files.exists(target)]
        if missing:
            _run(config, _score_files, missing, config.model, config.batch_size, config.num_gpus)
        statuses = read_table(output, ["status"])["status"].to_pylist()
        words = Counter(word for row in statuses for word in row["comet"])
        counts = {"read": len(statuses), "written": len(statuses), "dropped": {}, "status": {"comet": dict(words)}}
        check_failures(counts, "comet", max_failed_fraction, output)
        finish_run(job, {"counts": counts})
    return output


def _run(config: CometConfig, function: Any, *arguments: Any) -> Any:
    """What `function` gives in COMET's environment."""
    cluster.require(1, config.num_cpus, config.num_gpus, "COMET")
    import ray
    from ray.exceptions import RuntimeEnvSetupError

    options = {"num_cpus": config.num_cpus, "num_gpus": config.num_gpus, "runtime_env": {"pip": config.pip}}
    try:
        return ray.get(ray.remote(function).options(**options).remote(*arguments))
    except RuntimeEnvSetupError as error:
        # Ray's message is a trace that ends in what pip printed.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        told = [line for line in lines if line.startswith("ERROR:")] or lines
        raise ConfigError(
            f"COMET's environment ({_told(config)}) cannot be made: {told[-1].rstrip('.')}; give packages that pip can "
            "install on the nodes by comet.pip, or leave comet out."
        ) from error


def _told(config: CometConfig) -> str:
    return f"pip: {', '.join(config.pip)}"


def _find_fault() -> str | None:
    try:
        import comet  # noqa: F401
    except Exception as error:  # Whatever an import raises is what the user must hear.
        return f"{type(error).__name__}: {error}"
    return None


def _score_files(paths: list[tuple[str, str]], model: str, batch_size: int, num_gpus: int) -> None:
    from comet import download_model, load_from_checkpoint

    network = load_from_checkpoint(model if model.endswith(".ckpt") else download_model(model))

    def predict(texts: list[dict[str, str]]) -> list[float]:
        found = network.predict(texts, batch_size=batch_size, gpus=num_gpus, progress_bar=False, num_workers=1)
        return [float(score) for score in found.scores]

    for source, target in paths:
        score_file(source, target, predict)


def score_file(source: str, target: str, predict: Any) -> None:
    """Score the candidates of a file of rows with `predict` (texts with src, mt and ref → scores) into another file.

    A text of nothing is scored like any other; a score that is not finite is null, and its status `nan`.
    """
    fs, inner = files.filesystem(source)
    with fs.open(inner, "rb") as handle:
        rows = pq.read_table(handle, columns=COLUMNS)
    texts = [
        {
            "src": " ".join(row["source"].split()),
            "mt": " ".join(text.split()),
            "ref": " ".join(row["reference"].split()),
        }
        for row in rows.to_pylist()
        for text in row["candidates"]
    ]
    scores = [score if math.isfinite(score) else None for score in predict(texts)]
    kept = rows.select(["set", "id", "lang"])
    words = ["nan" if score is None else "ok" for score in scores]
    for column, values, kind in (("scores", scores, NUMBERS), ("status", words, TEXTS)):
        flat = iter(values)
        lists = [[next(flat) for _ in own] for own in rows["candidates"].to_pylist()]
        kept = kept.append_column(column, pa.StructArray.from_arrays([pa.array(lists, kind)], ["comet"]))
    with files.atomic_file(target) as handle:
        pq.write_table(kept, handle)
