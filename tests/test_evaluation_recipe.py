"""Translation, reward models, a judge and the analysis as one recipe, sent to a cluster by `ray job submit`."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from test_evaluate_reward_model import reward_model  # noqa: F401
from test_judge_preferences import Stub
from test_nllb import save_model
from test_translate_preferences import WIDE

from rayrm import files
from rayrm.evaluation.results import read_results

pytestmark = pytest.mark.ray
ROOT = Path(__file__).resolve().parents[1]
ROWS = [
    {"id": str(n), "prompt": f"Why is it {n}?", "chosen": "So it is" + " so" * n, "rejected": "No", "lang": "en"}
    for n in range(6)
]


@pytest.fixture(scope="module")
def stub():
    found = Stub()
    found.says["judge"] = "Because. [[A]]"
    yield found
    found.stop()


def recipe(folder, reward_model, translator, url):  # noqa: F811
    scoring = {"type": "reward_model", "model": reward_model, "chat_template": "none"}
    sets = [{"name": "small", "input": f"{folder}/run/translated"}]
    bootstrap = {"num_resamples": 20}
    columns = {"source": {"input": f"{folder}/pairs.jsonl"}}
    # Random weights translate all answers alike, so these stay as they are.
    translation = {"model": translator, "languages": ["en", "de"], "checks": WIDE, "retry": None, "keep_answers": ["*"]}
    judge = {"type": "endpoint", "name": "judge", "url": url, "model": "judge"}
    steps = {
        "prepare_preferences": {"output": f"{folder}/run/english", "sources": [columns["source"]]},
        "translate_preferences": {
            "input": f"{folder}/run/english",
            "output": f"{folder}/run/translated",
            "translation": translation,
            "max_failed_fraction": 1,
        },
        "evaluate_reward_model": {
            "output": f"{folder}/run/models",
            "sets": sets,
            "reward_models": [{**scoring, "name": "one"}, {**scoring, "name": "two", "max_length": 60}],
            "bootstrap": bootstrap,
        },
        "judge_preferences": {
            "output": f"{folder}/run/judges",
            "sets": sets,
            "judges": [judge],
            "tell_languages": True,
        },
        "analyse_evaluation": {
            "inputs": [f"{folder}/run/models", f"{folder}/run/judges"],
            "output": f"{folder}/run/analysis",
            "bootstrap": bootstrap,
        },
    }
    jobs = [{"job": name, "config": config} for name, config in steps.items()]
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"run": f"{folder}/run", "jobs": jobs}))
    return str(folder / "recipe.yaml")


def submit(address, *words):
    ray = str(Path(sys.executable).with_name("ray"))
    command = [ray, "job", "submit", "--address", address, "--working-dir", ".", "--", sys.executable, "-m", *words]
    environment = {**os.environ, "RAY_AUTH_MODE": "token"}
    for _ in range(20):
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, check=False
        )
        if "No available agent" not in done.stderr:
            break
        time.sleep(5)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_whole_line_runs_by_ray_job_submit(ray_cluster, tmp_path, reward_model, stub):  # noqa: F811
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "nllb").mkdir()
    save_model(tmp_path / "nllb", forced_eos_token_id=2)
    path = recipe(tmp_path, reward_model, str(tmp_path / "nllb"), stub.url)
    submit(ray_cluster, "jobs.run_recipe", path)
    results = [row for part in ("models", "judges") for row in read_results(str(tmp_path / "run" / part)).to_pylist()]
    english = {(row["model"], row["id"]) for row in results if row["lang"] == "en"}
    assert english == {(model, row["id"]) for model in ("one", "two", "judge") for row in ROWS}
    assert {row["lang"] for row in results} == {"en", "de"}
    judged = [row for row in results if row["model"] == "judge"]
    asked = len(stub.asked)
    # A judge that always takes the first place is right where chosen stands there.
    assert asked == len(judged) and 0 < sum(row["credit"] for row in judged) < len(judged)
    assert any("in German" in body["messages"][0]["content"] for body in stub.asked)
    metrics = files.read_json(str(tmp_path / "run" / "analysis" / "metrics.json"))
    assert set(metrics) == {"small"}
    page = (tmp_path / "run" / "analysis" / "report.html").read_text()
    assert all(name in page for name in ("one", "two", "judge"))
    # Everything is there, and nothing is asked again.
    printed = submit(ray_cluster, "jobs.run_recipe", path)
    assert printed.count("complete already") >= 5 and len(stub.asked) == asked
