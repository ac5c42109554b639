"""Run the jobs of a recipe one after the other; what is complete already is skipped by the jobs themselves.

All jobs run in this process and share one Ray. `run=/tmp/x` moves a recipe to another folder, `only=[a,b]` runs some
of its steps, and `set.<step>.<field>=value` changes a field of one step.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import yaml
from pydantic import Field

from rayrm import cluster, files
from rayrm.config import Config, build_config, find_told, parse_args, run_job
from rayrm.errors import ConfigError
from rayrm.evaluation.report import Table, format_table
from rayrm.serving.running import prepare_keys, running
from rayrm.training.launch import MARK


class Step(Config):
    """One job of a recipe."""

    job: str = Field(pattern=r"^[a-z0-9_]+$")
    """The job's module below `jobs`."""
    name: str | None = Field(None, min_length=1)
    """What the step is called; null for the job's name."""
    config: dict[str, Any] = Field({})
    """Fields of the job's config; `${run}` in a text stands for the recipe's folder."""


class RunRecipe(Config):
    """A list of jobs, run in order."""

    run: str
    """Folder that `${run}` stands for."""
    jobs: list[Step] = Field(min_length=1)
    """The steps."""
    num_cpus: int | None = Field(None, ge=1)
    """Logical CPUs of a Ray that is started for the recipe, so that actors that wait for one another can share cores;
    null for the number of cores. A cluster that runs keeps its own."""
    serve: str | None = None
    """A Serve config file whose applications are up while the steps run; null for none."""
    only: list[str] | None = None
    """Names of the steps that run, in the recipe's order; null for all."""
    set: dict[str, dict[str, Any]] = Field({})
    """Step name to fields that replace those of its config."""


class LoadedStep(NamedTuple):
    """A step whose config has been validated."""

    name: str
    module: Any
    config: Config
    words: list[str]
    """The config as the words that the job's `main` reads."""


def main(argv: Sequence[str] | None = None) -> None:
    """Validate every step, then run them. A failing step ends the recipe with an error that names it."""
    recipe = parse_args(RunRecipe, argv)
    steps = load_steps(recipe)
    if recipe.num_cpus is not None:
        prepare_keys()
        cluster.connect(recipe.num_cpus)
    with running(recipe.serve, f"{recipe.run}/serve.log") if recipe.serve is not None else nullcontext():
        run_steps(steps)


def run_steps(steps: Sequence[LoadedStep]) -> None:
    """Run steps one after the other, and print what became of each."""
    done: list[list[str]] = []
    try:
        for number, step in enumerate(steps, start=1):
            job = step.module.__name__.removeprefix("jobs.")
            print(f"\n=== {number}/{len(steps)} {step.name} ({job}), {time.strftime('%H:%M:%S')}", flush=True)
            done.append([step.name, job, "failed", ""])
            started = time.monotonic()
            done[-1][2] = run_step(step)
            done[-1][3] = f"{time.monotonic() - started:.1f}"
    finally:
        print(f"\n{format_table(Table(['step', 'job', 'outcome', 'seconds'], done, num_labels=3))}", flush=True)


def load_steps(recipe: RunRecipe) -> list[LoadedStep]:
    """The steps that are to run, their configs built and validated.

    Raises ConfigError for a job that does not exist, a name that comes twice, an unknown name in `only` or `set`,
    and a config that its job refuses.
    """
    names = [step.name or step.job for step in recipe.jobs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"The recipe has several steps named {', '.join(twice)}; give each a name of its own.")
    for field, given in (("only", recipe.only or []), ("set", recipe.set)):
        unknown = [name for name in given if name not in names]
        if unknown:
            raise ConfigError(f"'{field}' names {', '.join(unknown)}, and the steps are {', '.join(names)}.")
    loaded = [load_step(name, step, recipe) for name, step in zip(names, recipe.jobs, strict=True)]
    return [step for step in loaded if recipe.only is None or step.name in recipe.only]


def load_step(name: str, step: Step, recipe: RunRecipe) -> LoadedStep:
    """One step with its config. Raises ConfigError as `load_steps` does."""
    if importlib.util.find_spec(f"jobs.{step.job}") is None:
        raise ConfigError(f"Step '{name}' asks for job '{step.job}', and there is no jobs/{step.job}.py.")
    module = importlib.import_module(f"jobs.{step.job}")
    values = expand(merge(step.config, recipe.set.get(name, {})), recipe.run, name)
    config = build_config(config_class(module, step.job), values, where=f"step '{name}' of the recipe")
    words = [f"{field}={yaml.safe_dump(value, default_flow_style=True)}" for field, value in values.items()]
    return LoadedStep(name, module, config, words)


def config_class(module: Any, job: str) -> type[Config]:
    """The config of a job: the class of its module with the job's name."""
    found: type[Config] = getattr(module, "".join(part.capitalize() for part in job.split("_")))
    return found


def merge(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`values` with `changes` put over them, mapping by mapping."""
    merged = dict(values)
    for name, value in changes.items():
        there = merged.get(name)
        merged[name] = merge(there, value) if isinstance(there, dict) and isinstance(value, dict) else value
    return merged


def expand(value: Any, run: str, step: str) -> Any:
    """`value` with `${run}` replaced in all its texts. Raises ConfigError for any other `${…}`."""
    if isinstance(value, dict):
        return {name: expand(item, run, step) for name, item in value.items()}
    if isinstance(value, list):
        return [expand(item, run, step) for item in value]
    if not isinstance(value, str):
        return value
    text = value.replace("${run}", run.rstrip("/"))
    unknown = re.search(r"\$\{[^}]*\}", text)
    if unknown:
        raise ConfigError(f"Step '{step}' holds '{unknown[0]}', and only ${{run}} stands for something.")
    return text


def run_step(step: LoadedStep) -> str:
    """Run a job; `complete already` when it had nothing to do, else `done`. Errors name the step."""
    output = getattr(step.config, "output", None)
    marks = [files.join(output, mark) for mark in (files.RUN_MARK, MARK)] if output else []
    was_complete = any(files.exists(mark) for mark in marks)
    try:
        step.module.main(step.words)
    except Exception as error:
        if told := find_told(error):
            raise type(told)(f"Step '{step.name}': {told}") from error
        error.add_note(f"This happened in step '{step.name}' of the recipe.")
        raise
    return "complete already" if was_complete else "done"


if __name__ == "__main__":
    run_job(main)
