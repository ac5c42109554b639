"""A stage by `ray job submit`, with the same words as on the command line."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayrm import files
from rayrm.shards import read_table

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.ray
def test_build_preferences_by_ray_job_submit(ray_cluster, tmp_path):
    rows = pa.table(
        {
            "id": ["a", "b"],
            "group": ["a", "b"],
            "prompt": [[{"role": "user", "content": "say"}]] * 2,
            "lang": ["de", "de"],
            "candidates": [["gut", "schlecht"], ["eins", "zwei"]],
            "scores": [{"bleurt": [0.9, 0.1]}, {"bleurt": [0.5, 0.5]}],
            "status": [{"bleurt": ["ok", "ok"]}] * 2,
        }
    )
    pq.write_table(rows, tmp_path / "scored.parquet")
    ray = str(Path(sys.executable).with_name("ray"))
    words = [f"input={tmp_path}/scored.parquet", f"output={tmp_path}/pairs", "pairing.min_margin=0.5"]
    command = [ray, "job", "submit", "--address", ray_cluster, "--working-dir", ".", "--"]
    command += [sys.executable, "-m", "jobs.build_preferences", *words]
    environment = {**os.environ, "RAY_AUTH_MODE": "token"}
    for _ in range(20):
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        # A busy machine may take a minute until the node's agent has told the dashboard that it is there.
        if "No available agent" not in done.stderr:
            break
        time.sleep(5)
    assert done.returncode == 0, done.stdout + done.stderr
    pairs = read_table(str(tmp_path / "pairs")).to_pylist()
    assert [(p["id"], p["chosen"], p["rejected"], p["margin"]) for p in pairs] == [
        ("a", [{"role": "assistant", "content": "gut"}], [{"role": "assistant", "content": "schlecht"}], 0.8)
    ]
    assert files.read_json(str(tmp_path / "pairs" / "run.json"))["counts"]["dropped"] == {"tie": 1}
