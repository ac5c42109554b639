"""`cluster.yaml` is a config that Ray's own validation takes."""

from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]


def test_ray_accepts_cluster_yaml():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text()))
    validate_config(config)
    types = config["available_node_types"]
    assert types[config["head_node_type"]]["resources"].get("GPU", 0) == 0
    workers = {name: node for name, node in types.items() if name != config["head_node_type"]}
    assert all(node["min_workers"] == 0 for node in workers.values())
    spot = [n for n in workers.values() if n["node_config"].get("InstanceMarketOptions") == {"MarketType": "spot"}]
    assert spot and all(node["resources"]["GPU"] > 0 for node in spot)
    assert config["idle_timeout_minutes"] > 0
    assert all(
        "RAY_AUTH_MODE=token" in command[-1]
        for command in (config["head_start_ray_commands"], config["worker_start_ray_commands"])
    )
    assert any("requirements/" in command for command in config["setup_commands"])
