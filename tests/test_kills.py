"""Drivers, workers and nodes that are killed in the middle: nothing is lost, and nothing is done twice."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from rayrm.shards import read_table

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]
ROOT = Path(__file__).resolve().parents[1]
NUM_ROWS = 160
STAGES = ["sample_candidates", "score_candidates"]
ACTORS = {"sample_candidates": "CandidateSampler", "score_candidates": "ScoreStage"}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Prompts, a random policy, a hardly trained BLEURT and candidates, made by the project's own jobs."""
    from jobs import create_model, prepare_prompts, write_corpus

    folder = tmp_path_factory.mktemp("kills")
    write_corpus.main([f"output={folder}/corpus", "grammar.num_sentences=200"])
    prepare_prompts.main([f"input={folder}/corpus/corpus.parquet", f"output={folder}/all"])
    pq.write_table(read_table(f"{folder}/all").slice(0, NUM_ROWS), folder / "prompts.parquet")
    create_model.main(
        [f"input={folder}/prompts.parquet", f"output={folder}/policy", "model.hidden_size=128", "model.num_layers=2"]
    )
    run_job("train_bleurt", [f"input={folder}/prompts.parquet", f"output={folder}/bleurt", "training.max_steps=2"])
    run_job("sample_candidates", words("sample_candidates", folder, folder / "undisturbed-sample_candidates"))
    run_job("score_candidates", words("score_candidates", folder, folder / "undisturbed-score_candidates"))
    return folder


def words(job, work, output, *more):
    """How a stage is called; its work is cut finely enough to be killed in the middle."""
    sampling = [
        f"input={work}/prompts.parquet",
        "shard_rows=8",
        f"sampling.model={work}/policy/model",
        "sampling.max_tokens=48",
        "sampling.engine.kv_cache_gib=0.25",
    ]
    scoring = [
        f"input={work}/undisturbed-sample_candidates",
        "shard_rows=1",
        "scoring.type=bleurt",
        f"scoring.model={work}/bleurt/model",
    ]
    return [f"output={output}", *(sampling if job == "sample_candidates" else scoring), *more]


def start_job(name, words):
    """A job in a process group of its own, as from a shell."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return subprocess.Popen(
        [sys.executable, "-m", f"jobs.{name}", *words],
        cwd=ROOT,
        env=env,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_job(name, words):
    process = start_job(name, words)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


def wait_for(condition, process=None, limit_s=300):
    """Poll until `condition()` gives something true, and return it."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if found := condition():
            return found
        if process is not None and process.poll() is not None:
            raise AssertionError(f"the job ended first: {process.communicate()[0]}")
        time.sleep(0.02)
    raise AssertionError("waited in vain")


def shards(output):
    return {p.name: p.stat().st_mtime_ns for p in Path(output).glob("shard-*")}


def kill_group(process):
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def descendants(process, title):
    """Processes below `process`, Ray's own included, whose title holds `title`."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if title in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return found


@pytest.mark.parametrize("job", STAGES)
def test_a_stage_goes_on_after_its_driver_was_killed(job, work, tmp_path):
    process = start_job(job, words(job, work, tmp_path))
    wait_for(lambda: len(shards(tmp_path)) >= 3, process)
    kill_group(process)
    before = shards(tmp_path)
    expected = shards(work / f"undisturbed-{job}")
    assert 3 <= len(before) < len(expected) and not (tmp_path / "run.json").exists()
    assert "resuming" in run_job(job, words(job, work, tmp_path))
    assert_same_rows(job, work, tmp_path, before)


@pytest.mark.parametrize("job", STAGES)
def test_a_stage_survives_the_death_of_its_worker(job, work, tmp_path):
    process = start_job(job, words(job, work, tmp_path))
    wait_for(lambda: len(shards(tmp_path)) >= 3, process)
    victims = descendants(process, ACTORS[job])
    before = shards(tmp_path)
    assert victims and len(before) < len(shards(work / f"undisturbed-{job}")), "there is an actor in the middle of it"
    victims[0].kill()
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert_same_rows(job, work, tmp_path, before)


@pytest.mark.parametrize("job", STAGES)
def test_a_stage_on_two_nodes_survives_the_death_of_one(job, work, tmp_path):
    workers = "sampling.workers" if job == "sample_candidates" else "scoring.workers"
    run_on_two_nodes(f"{tmp_path}/shard-*", 3, job, words(job, work, tmp_path, f"{workers}.num_workers=2"))
    assert_same_rows(job, work, tmp_path, {})


def assert_same_rows(job, work, output, before):
    """Every id once, the same rows as without a kill, and no shard of `before` written again."""
    expected = work / f"undisturbed-{job}"
    after = shards(output)
    assert after.keys() == shards(expected).keys()
    assert all(after[name] == before[name] for name in before)
    found, wanted = read_table(str(output)), read_table(str(expected))
    keys = zip(found["id"].to_pylist(), found["lang"].to_pylist(), strict=True)
    assert set(Counter(keys).values()) == {1}
    assert found.equals(wanted)


def run_on_two_nodes(pattern, count, job, words):
    """Run a job on two nodes of one machine, one of which dies when `pattern` matches `count` files."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    script = Path(__file__).with_name("two_nodes.py")
    # Where Ray notes which cluster is this machine's; other jobs must not join this one.
    env["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="ray")
    done = subprocess.run(
        [sys.executable, str(script), pattern, str(count), job, *words],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
