"""What the cluster can never give is said at once."""

import time
from pathlib import Path

import pytest

from rayrm import cluster
from rayrm.errors import ResourceError

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.ray
def test_more_than_the_cluster_can_place_is_refused_within_seconds(ray_cluster):
    started = time.monotonic()
    with pytest.raises(ResourceError, match=r"scoring asks for 1 × \(1 CPUs, 8 GPUs\).*at the most.*0 GPUs"):
        cluster.require(1, 1, 8, "scoring")
    with pytest.raises(ResourceError, match="can place 6 of them at the most"):
        cluster.require(7, 1, 0, "scoring")
    assert time.monotonic() - started < 10
    cluster.require(6, 1, 0, "scoring")


@pytest.mark.ray
def test_nodes_that_the_autoscaler_may_add_count(ray_cluster, monkeypatch):
    from ray._private.state import state
    from ray.core.generated.autoscaler_pb2 import ClusterConfig, NodeGroupConfig

    group = NodeGroupConfig(name="spot", resources={"CPU": 48, "GPU": 4}, max_count=2)
    monkeypatch.setattr(state, "get_cluster_config", lambda: ClusterConfig(node_group_configs=[group]))
    cluster.require(2, 1, 4, "training")
    with pytest.raises(ResourceError, match="can place 8 of them at the most"):
        cluster.require(9, 1, 1, "training")


@pytest.mark.ray
def test_node_types_of_ray_up_count(ray_cluster, monkeypatch):
    """`ray up` leaves its config on the head; a fresh cluster has a head without CPUs and nothing else."""
    monkeypatch.setattr(cluster, "BOOTSTRAP", str(ROOT / "cluster.yaml"))
    cluster.require(32, 1, 1, "training")
    with pytest.raises(ResourceError, match="can place 32 of them at the most"):
        cluster.require(33, 1, 1, "training")
