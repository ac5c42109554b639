"""Fixtures that all tests share: one Ray cluster, small models, rows."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SHARED = Path(__file__).resolve().parents[1].parent / "shared"


@pytest.fixture(scope="session")
def shared_data():
    """The folder with real data that stands beside a checkout."""
    if not (SHARED / "data").is_dir():
        pytest.skip("there is no ../shared/data beside this checkout")
    return SHARED / "data"


@pytest.fixture(scope="session")
def ray_cluster():
    """One local Ray with more logical CPUs than cores, for the whole session."""
    import ray

    from rayrm import cluster

    ray.init(num_cpus=6, include_dashboard=False, log_to_driver=False)
    cluster.connect()
    yield
    ray.shutdown()
