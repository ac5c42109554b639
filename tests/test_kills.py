"""Drivers, workers and nodes that are killed in the middle: nothing is lost, and nothing is done twice."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from rayrm.rows import Candidates, Prompt
from rayrm.runs import RowsJob, transform_rows
from rayrm.sampling import SamplingConfig, sample_candidates
from rayrm.shards import read_table

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]
ROOT = Path(__file__).resolve().parents[1]
NUM_ROWS = 160


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Prompts, a random policy, and a random BLEURT in one folder, made by the project's own jobs."""
    from jobs import create_model, prepare_prompts, write_corpus

    folder = tmp_path_factory.mktemp("kills")
    write_corpus.main([f"output={folder}/corpus", "grammar.num_sentences=200"])
    prepare_prompts.main([f"input={folder}/corpus/corpus.parquet", f"output={folder}/all"])
    pq.write_table(read_table(f"{folder}/all").slice(0, NUM_ROWS), folder / "prompts.parquet")
    create_model.main(
        [f"input={folder}/prompts.parquet", f"output={folder}/policy", "model.hidden_size=64", "model.num_layers=2"]
    )
    return folder


def sampling_words(work, output):
    return [
        f"input={work}/prompts.parquet",
        f"output={output}",
        "shard_rows=8",
        f"sampling.model={work}/policy/model",
        "sampling.max_tokens=48",
        "sampling.engine.kv_cache_gib=0.25",
    ]


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


@pytest.fixture(scope="module")
def sampled(work):
    """Candidates of a run that nobody disturbs."""
    run_job("sample_candidates", sampling_words(work, work / "sampled"))
    return read_table(str(work / "sampled"))


def test_sampling_goes_on_after_its_driver_was_killed(work, sampled):
    words = sampling_words(work, work / "driver")
    process = start_job("sample_candidates", words)
    wait_for(lambda: len(shards(work / "driver")) >= 3, process)
    kill_group(process)
    before = shards(work / "driver")
    assert 3 <= len(before) < NUM_ROWS // 8 and not (work / "driver" / "run.json").exists()
    output = run_job("sample_candidates", words)
    assert "resuming" in output
    after = shards(work / "driver")
    assert len(after) == NUM_ROWS // 8 and all(after[name] == before[name] for name in before)
    assert read_table(str(work / "driver")).equals(sampled)


def test_sampling_survives_the_death_of_its_worker(work, sampled):
    process = start_job("sample_candidates", sampling_words(work, work / "worker"))
    wait_for(lambda: len(shards(work / "worker")) >= 3, process)
    before = shards(work / "worker")
    victims = descendants(process, "CandidateSampler")
    assert victims, "the sampling actor runs below the job"
    victims[0].kill()
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    after = shards(work / "worker")
    assert all(after[name] == before[name] for name in before)
    assert read_table(str(work / "worker")).equals(sampled)


def test_sampling_on_two_nodes_survives_the_death_of_one(work, sampled):
    import ray
    from ray.cluster_utils import Cluster

    if ray.is_initialized():
        pytest.skip("another cluster runs in this process; `make test-slow` starts this test without one")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False)
    output = work / "nodes"
    killed = []

    def kill_a_node():
        wait_for(lambda: len(shards(output)) >= 3)
        killed.append(len(shards(output)))
        cluster.remove_node(nodes[0], allow_graceful=False)
        cluster.add_node(num_cpus=1)

    try:
        config = SamplingConfig(
            model=f"{work}/policy/model",
            max_tokens=48,
            engine={"kv_cache_gib": 0.25},
            workers={"num_workers": 2},
        )
        killer = threading.Thread(target=kill_a_node)
        killer.start()
        transform_rows(
            RowsJob(input=str(work / "prompts.parquet"), output=str(output), shard_rows=8),
            Prompt,
            Candidates,
            lambda rows: sample_candidates(rows, config),
        )
        killer.join()
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert killed and killed[0] < NUM_ROWS // 8, "the node died in the middle"
    rows = read_table(str(output))
    assert Counter(rows["id"].to_pylist()) == Counter(sampled["id"].to_pylist())
    assert rows.equals(sampled)
