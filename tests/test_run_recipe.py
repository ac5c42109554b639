"""Recipes: what is checked before the first job, what runs, what is skipped, and what a failure says."""

import importlib
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml

from jobs.run_recipe import RunRecipe, config_class, expand, load_steps, main, merge
from rayrm import files
from rayrm.config import Config, load_config, parse_args
from rayrm.errors import ConfigError, EvaluationError
from rayrm.runs import finish_run, start_run

ROOT = Path(__file__).resolve().parents[1]


class CountLetters(Config):
    """A cheap job's config."""

    text: str
    output: str
    num_times: int = 1
    lr: float = 0.0
    sizes: dict[str, int] = {}


@pytest.fixture
def calls(monkeypatch):
    """A job module `jobs.count_letters` that writes nothing but its mark; the configs it was run with."""
    ran = []
    module = types.ModuleType("jobs.count_letters")
    module.__spec__ = types.SimpleNamespace(name="jobs.count_letters")
    module.CountLetters = CountLetters

    def run(argv):
        config = parse_args(CountLetters, argv)
        if config.text == "bad":
            raise EvaluationError("The text is bad.")
        if config.text == "worse":
            raise RuntimeError("boom")
        if start_run(config):
            ran.append(config)
            finish_run(config, {"num_letters": len(config.text)})

    module.main = run
    monkeypatch.setitem(sys.modules, "jobs.count_letters", module)
    return ran


def step(name, text="abc", **more):
    config = {"text": text, "output": f"${{run}}/{name}", **more}
    return {"job": "count_letters", "name": name, "config": config}


def write_recipe(tmp_path, *steps):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"run": str(tmp_path / "run"), "jobs": list(steps)}))
    return str(path)


def test_steps_run_in_order_and_complete_ones_are_skipped(tmp_path, calls, capsys):
    path = write_recipe(tmp_path, step("one"), step("two", "a=b: ${run}", lr=1e-5, sizes={"x": 3}))
    main([path])
    assert [(c.text, c.lr, c.sizes) for c in calls] == [("abc", 0.0, {}), (f"a=b: {tmp_path}/run", 1e-5, {"x": 3})]
    assert files.read_json(str(tmp_path / "run" / "one" / "run.json"))["num_letters"] == 3
    printed = capsys.readouterr().out
    assert "=== 1/2 one (count_letters)" in printed
    lines = [line.split() for line in printed.splitlines()]
    assert ["one", "count_letters", "done"] in [line[:3] for line in lines]
    main([path])
    assert len(calls) == 2
    assert capsys.readouterr().out.count("complete already") == 2


def test_run_only_and_set_change_a_recipe(tmp_path, calls):
    path = write_recipe(tmp_path, step("one"), step("two", sizes={"x": 1, "y": 2}), step("three"))
    main([path, f"run={tmp_path}/other/", "only=[two]", "set.two.num_times=4", "set.two.sizes.y=5"])
    assert [(c.output, c.num_times, c.sizes) for c in calls] == [(f"{tmp_path}/other/two", 4, {"x": 1, "y": 5})]


def test_every_config_is_checked_before_the_first_job(tmp_path, calls):
    with pytest.raises(ConfigError, match=r"step 'two' of the recipe: 'num_times' is 'many'"):
        main([write_recipe(tmp_path, step("one"), step("two", num_times="many"))])
    with pytest.raises(ConfigError, match=r"'colour' is not a field"):
        main([write_recipe(tmp_path, step("one")), "set.one.colour=red"])
    with pytest.raises(
        ConfigError, match=r"Step 'one' asks for job 'no_such_job', and there is no jobs/no_such_job.py"
    ):
        main([write_recipe(tmp_path, {**step("one"), "job": "no_such_job"})])
    with pytest.raises(ConfigError, match=r"several steps named one"):
        main([write_recipe(tmp_path, step("one"), step("one"))])
    with pytest.raises(ConfigError, match=r"'only' names three, and the steps are one, two"):
        main([write_recipe(tmp_path, step("one"), step("two")), "only=[three]"])
    with pytest.raises(ConfigError, match=r"'set' names three"):
        main([write_recipe(tmp_path, step("one")), "set.three.text=x"])
    with pytest.raises(ConfigError, match=r"Step 'one' holds '\$\{home\}'"):
        main([write_recipe(tmp_path, step("one", "${home}/x"))])
    assert calls == []


def test_a_failing_step_is_named_and_ends_the_recipe(tmp_path, calls, capsys):
    path = write_recipe(tmp_path, step("one"), step("two", "bad"), step("three"))
    with pytest.raises(EvaluationError, match=r"^Step 'two': The text is bad\.$"):
        main([path])
    assert len(calls) == 1
    outcomes = [line.split()[:3] for line in capsys.readouterr().out.splitlines()]
    assert ["two", "count_letters", "failed"] in outcomes
    with pytest.raises(RuntimeError) as caught:
        main([path, "only=[two]", "set.two.text=worse"])
    assert caught.value.__notes__ == ["This happened in step 'two' of the recipe."]


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_example_beside_a_job_is_a_config_of_it(path):
    job = config_class(importlib.import_module(f"jobs.{path.stem}"), path.stem)
    assert isinstance(load_config(job, path), job)


RECIPES = [ROOT / "jobs/run_recipe.yaml", *sorted((ROOT / "jobs/recipes").glob("*.yaml"))]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_step_of_a_recipe_is_a_config_of_its_job(path):
    assert load_steps(load_config(RunRecipe, path))


def test_merge_and_expand():
    assert merge({"a": {"b": 1, "c": 2}, "d": [1]}, {"a": {"c": 3}, "d": [2]}) == {"a": {"b": 1, "c": 3}, "d": [2]}
    assert expand({"a": ["${run}/x", 3, None]}, "runs/r/", "s") == {"a": ["runs/r/x", 3, None]}


def test_a_failure_is_one_sentence_and_exit_code_1(tmp_path):
    job = {"job": "evaluate_reward_model", "name": "evaluation", "config": {}}
    model = {"type": "reward_model", "model": "${run}/no/model"}
    config = {"sets": [{"input": "${run}/none"}], "output": "${run}/out", "reward_models": [model]}
    path = write_recipe(tmp_path, {**job, "config": config})
    done = subprocess.run(
        [sys.executable, "-m", "jobs.run_recipe", path],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("CheckpointError: Step 'evaluation': There is no model at")
    assert "Traceback" not in done.stderr
