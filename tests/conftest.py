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


@pytest.fixture(scope="session")
def served_model(tmp_path_factory):
    """A small reward model as training leaves it: marked, calibrated, with a head that tells texts apart."""
    import json

    from rayrm.models.creation import CreationConfig, create_model
    from rayrm.models.loading import load_padding_tokenizer
    from rayrm.models.reward_model import NewHead, load_reward_model
    from rayrm.models.rewarder import Rendering, load_rewarder

    folder = tmp_path_factory.mktemp("served")
    texts = ["the cat sat on the mat", "der Hund schläft im Haus", "translate this text", "good", "bad"]
    sizes = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_layers": 2, "num_heads": 2}
    create_model(texts, CreationConfig.model_validate({**sizes, "max_length": 128}), f"{folder}/policy")
    tokenizer = load_padding_tokenizer(f"{folder}/policy")
    network = load_reward_model(f"{folder}/policy", new_head=NewHead(3)).network
    network.score.weight.data *= 40
    network.config.pad_token_id = tokenizer.pad_token_id
    network.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    renderer = load_rewarder(f"{folder}/model", Rendering(max_length=96)).renderer
    rendering = {"chat_template": None, "max_length": 96, "fingerprint": renderer.fingerprint()}
    spread = {"mean": 1.0, "std": 2.0, "num": 10}
    calibration = {**spread, "languages": {"de": {"mean": 3.0, "std": 4.0, "num": 5}}, "rows": "rows"}
    mark = {"rendering": rendering, "readout": {"type": "last_token"}, "calibration": calibration, "digest": "d1"}
    (folder / "model/rayrm.json").write_text(json.dumps(mark))
    return str(folder / "model")
