"""Fixtures that all tests share: one Ray cluster, small models, rows."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Ray workers import the test modules whose classes the tests send them.
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]).rstrip(":")

SHARED = Path(__file__).resolve().parents[1].parent / "shared"


@pytest.fixture(scope="session")
def shared_data():
    """The folder with real data that stands beside a checkout."""
    if not (SHARED / "data").is_dir():
        pytest.skip("there is no ../shared/data beside this checkout")
    return SHARED / "data"


@pytest.fixture(scope="session")
def ray_cluster():
    """One local Ray with more logical CPUs than cores, for the whole session; gives its dashboard's address."""
    import ray

    from rayrm import cluster

    context = ray.init(
        address="local", num_cpus=6, include_dashboard=True, dashboard_port=free_port(), log_to_driver=False
    )
    cluster.connect()
    yield f"http://{context.dashboard_url}"
    ray.shutdown()


def free_port():
    """A TCP port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="session")
def process_group(tmp_path_factory):
    """A process group of one; DeepSpeed keeps the first one that it sees, so there is one for the session."""
    import torch.distributed as dist

    from rayrm.training.launch import prepare_worker

    prepare_worker(1, use_gpu=False)
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()
