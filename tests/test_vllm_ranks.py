"""No process of an engine outlives the one that made it."""

import os
import subprocess
import sys
import time

import psutil
import pytest
from test_rollouts import make_policy

pytestmark = [pytest.mark.slow, pytest.mark.vllm]

ENGINE = """
import sys, time
from rayrm.models.vllm import Engine, EngineConfig

def stuck(worker):
    while True:
        time.sleep(0.01)

engine = Engine(sys.argv[1], EngineConfig(tensor_parallel_size=2, kv_cache_gib=0.1))
print("ready", flush=True)
engine.llm.collective_rpc(stuck)
"""
"""An engine whose ranks listen to nobody, as when each waits for another."""


def test_ranks_end_with_a_parent_that_is_killed(tmp_path):
    cores = sorted(os.sched_getaffinity(0))
    # Ranks are started as in a Ray actor, on a core each.
    own = {"VLLM_WORKER_MULTIPROC_METHOD": "spawn", "VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}"}
    command = [sys.executable, "-c", ENGINE, make_policy(tmp_path / "model", 0)]
    process = subprocess.Popen(command, env=os.environ | own, stdout=subprocess.PIPE, text=True)
    children = []
    try:
        assert "ready\n" in iter(process.stdout.readline, ""), "the engine does not start"
        children = psutil.Process(process.pid).children(recursive=True)
        assert sum("VLLM::Worker" in " ".join(child.cmdline()) for child in children) == 2
        time.sleep(1)
        process.kill()
        assert psutil.wait_procs(children, timeout=20)[1] == []
    finally:
        process.kill()
        process.wait()
        for child in children:
            if child.is_running():
                child.kill()
