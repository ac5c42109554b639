"""Ray, as a job finds it: a cluster that runs, or one that the job starts for itself."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import yaml

from rayrm.errors import ResourceError

log = logging.getLogger("rayrm")
BOOTSTRAP = "~/ray_bootstrap_config.yaml"


def connect(num_cpus: int | None = None) -> None:
    """Join the cluster of `RAY_ADDRESS` or of this machine, or start a local one that ends with this process.

    One that is started has `num_cpus` logical CPUs, or as many as there are cores.
    """
    import ray
    from ray.data import DataContext

    if not ray.is_initialized():
        # Ray refuses a number of CPUs for a cluster that runs already.
        own = {} if num_cpus is None or "RAY_ADDRESS" in os.environ else {"num_cpus": num_cpus}
        ray.init(log_to_driver=True, logging_level=logging.WARNING, **own)
    # Jobs show their own progress, by committed rows.
    DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)


def require(num_workers: int, num_cpus: float, num_gpus: float, what: str) -> None:
    """Raise ResourceError when the cluster, as it may grow, can never place `num_workers` such bundles.

    On a cluster that autoscales, the node types that the autoscaler may add count beside the nodes that are there.
    """
    connect()
    import ray

    live = [(node["Resources"], 1) for node in ray.nodes() if node["Alive"]]
    grown = _autoscaler_nodes()
    nodes = live + grown
    # Nodes that the autoscaler has added already are counted in both.
    places = max(sum(count * _fits(node, num_cpus, num_gpus) for node, count in group) for group in (live, grown))
    if places >= num_workers:
        return
    largest = [f"{r.get('CPU', 0):g} CPUs and {r.get('GPU', 0):g} GPUs" for r, _ in nodes]
    raise ResourceError(
        f"{what} asks for {num_workers} × ({num_cpus:g} CPUs, {num_gpus:g} GPUs), and the cluster can place "
        f"{places:g} of them at the most (nodes: {', '.join(largest)}); ask for less, or add nodes."
    )


def require_total(total: float, kind: str, what: str) -> None:
    """Raise ResourceError when the cluster, as it may grow, never has `total` of a resource, `CPU` or `GPU`.

    What must run at the same time would wait for ever otherwise.
    """
    connect()
    import ray

    live = sum(node["Resources"].get(kind, 0) for node in ray.nodes() if node["Alive"])
    grown = sum(node.get(kind, 0) * count for node, count in _autoscaler_nodes())
    most = max(live, grown)
    if total > most:
        raise ResourceError(
            f"{what} ask for {total:g} {kind}s at the same time, and the cluster has {most:g} at the most; ask for less "
            "(num_cpus may be a part of one), or add nodes."
        )


def _fits(resources: dict[str, Any], num_cpus: float, num_gpus: float) -> int:
    wanted = {"CPU": num_cpus, "GPU": num_gpus}
    return min((int(resources.get(kind, 0) // num) for kind, num in wanted.items() if num), default=1 << 30)


def _autoscaler_nodes() -> list[tuple[dict[str, Any], int]]:
    """Resources of the node types that the cluster may have, and how many of each, as far as they are known here."""
    from ray._private.state import state

    config = state.get_cluster_config()
    if config is not None:
        # A count of -1 is no limit.
        groups = config.node_group_configs
        return [(dict(group.resources), group.max_count if group.max_count >= 0 else 1 << 30) for group in groups]
    # `ray up` leaves its config on the head, where submitted jobs run.
    path = Path(BOOTSTRAP).expanduser()
    if not path.exists():
        return []
    types = yaml.safe_load(path.read_text()).get("available_node_types", {})
    return [(node.get("resources", {}), node.get("max_workers", 0)) for node in types.values()]
