"""Rules about the whole repository, kept by reading it."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rayrm.config import Config, load_config

ROOT = Path(__file__).resolve().parents[1]
LAYERS = [
    [
        "errors",
        "config",
        "languages",
        "files",
        "seeds",
        "splits",
        "batching",
        "cluster",
        "matrix",
        "counts",
        "retrying",
        "help",
        "placing",
        "sentences",
    ],
    ["shards", "rows", "quarantine"],
    ["runs"],
    ["prompts", "models", "client", "composing"],
    ["sources", "translation", "sampling", "cleaning", "scoring", "rewarding", "pairing", "instructing"],
    ["training", "evaluation", "serving"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
STAGES = set(LAYERS[4])
HEAVY = {"models", "training", "serving"}


def modules():
    for path in sorted((ROOT / "rayrm").rglob("*.py")):
        parts = path.relative_to(ROOT / "rayrm").with_suffix("").parts
        if parts != ("__init__",):
            yield path, parts


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "rayrm":
            rest = node.module.split(".")[1:]
            yield from [rest[0]] if rest else [alias.name for alias in node.names]


def test_imports_point_one_way():
    wrong = []
    for path, parts in modules():
        for target in imports(path):
            if target.startswith("__"):
                continue
            if LEVEL[target] > LEVEL[parts[0]]:
                wrong.append(f"{path.name} imports {target}, which lies above it")
            if target != parts[0] and target in STAGES and parts[0] in STAGES:
                wrong.append(f"{path.name} imports {target}: stages are composed by jobs")
    assert wrong == []


def test_light_modules_import_without_engines():
    names = [".".join(("rayrm", *parts)).removesuffix(".__init__") for _, parts in modules() if parts[0] not in HEAVY]
    code = (
        f"import importlib, sys\nfor name in {names!r}: importlib.import_module(name)\n"
        "print([m for m in ('torch', 'vllm', 'ray', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def job_modules():
    return sorted(p.stem for p in (ROOT / "jobs").glob("*.py") if p.stem != "__init__")


def config_class(name):
    return getattr(importlib.import_module(f"jobs.{name}"), "".join(part.title() for part in name.split("_")))


@pytest.mark.parametrize("name", job_modules())
def test_example_config_of_job_parses(name):
    assert isinstance(load_config(config_class(name), ROOT / "jobs" / f"{name}.yaml"), Config)


@pytest.mark.parametrize("path", sorted((ROOT / "jobs" / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_steps_of_recipe_parse(path):
    from jobs.run_recipe import RunRecipe, load_steps

    steps = load_steps(load_config(RunRecipe, path))
    assert steps and all(isinstance(step.config, Config) for step in steps)


def test_help_of_every_job_needs_no_engine():
    code = (
        "import importlib, sys\n"
        f"for name in {job_modules()!r}: importlib.import_module('jobs.' + name)\n"
        "print([m for m in ('torch', 'vllm', 'ray', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
    shown = subprocess.run(
        [sys.executable, "-m", "jobs.build_preferences", "--help"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert "pairing.min_margin: float  [default 0.0]  Smallest reward gap" in shown.stdout


def test_yaml_files_are_yaml():
    found = [ROOT / "cluster.yaml", *(ROOT / "jobs").rglob("*.yaml"), *(ROOT / "serve_configs").rglob("*.yaml")]
    assert all(isinstance(yaml.safe_load(path.read_text()), dict) for path in found)
