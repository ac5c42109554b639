"""`serve run` on the files of serve_configs/, with small models in the places of theirs, on a Ray of its own."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import yaml
from conftest import free_port
from test_scoring import bleurt_path  # noqa: F401

from rayrm.models.creation import CreationConfig, create_model

pytestmark = pytest.mark.slow
CONFIGS = Path(__file__).resolve().parents[1] / "serve_configs"
JUDGE_SIZES = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_layers": 2, "num_heads": 2}
ITEM = {"prompt": "Which city is the capital of France?", "answers": ["Paris.", "Rome."], "id": "a"}


@pytest.fixture(scope="module")
def judge_model(tmp_path_factory):
    """A chat model that says anything."""
    folder = tmp_path_factory.mktemp("judge")
    settings = CreationConfig.model_validate({**JUDGE_SIZES, "max_length": 4096})
    create_model(
        ["which answer is better, A or B? say why", "Paris and Rome are cities"], settings, str(folder / "model")
    )
    return str(folder / "model")


@contextmanager
def serving(name, folder, models):
    """The address of `serve run` on a file, on a port of its own, with the paths of some models replaced."""
    port = free_port()
    text = (CONFIGS / name).read_text().replace("127.0.0.1:8000", f"127.0.0.1:{port}")
    for path, replacement in models.items():
        assert path in text
        text = text.replace(path, replacement)
    values = yaml.safe_load(text)
    values["http_options"]["port"] = port
    (folder / name).write_text(yaml.safe_dump(values))
    temporary = Path("/tmp") / f"rayrm-{port}"
    environment = os.environ | {"RAY_ADDRESS": "local", "RAY_TMPDIR": str(temporary), "RAYRM_API_KEYS": "me=secret"}
    temporary.mkdir()
    with open(folder / "log", "wb") as log:
        command = [str(Path(sys.executable).parent / "serve"), "run", str(folder / name)]
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        address = f"http://127.0.0.1:{port}"
        wait_until_ready(address, server, folder / "log")
        yield address
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
        shutil.rmtree(temporary, ignore_errors=True)


def wait_until_ready(address, server, log, seconds=300):
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        try:
            if httpx.get(f"{address}/ready", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(1)
    pytest.fail(f"no answer from {address}: {log.read_text()[-3000:]}")


def post(address, path, body, is_there=lambda reply: True, seconds=300):
    """An answer, however long what gives it takes to start: until then there are 503s, or items without a verdict."""
    end = time.monotonic() + seconds
    while True:
        reply = httpx.post(f"{address}{path}", json=body, headers={"authorization": "Bearer secret"}, timeout=120)
        if reply.status_code == 200 and is_there(reply.json()):
            return reply.json()
        if reply.status_code not in (200, 503) or time.monotonic() > end:
            pytest.fail(reply.text)
        time.sleep(1)


def judge(address, body):
    return post(address, "/v1/judgements", body, lambda found: found["items"][0]["status"] not in ("timeout", "error"))


def test_the_judge_gives_constrained_verdicts_and_probabilities(tmp_path, judge_model):
    with serving("judge.yaml", tmp_path, {"Qwen/Qwen2.5-0.5B-Instruct": judge_model}) as address:
        body = {"items": [ITEM], "orders": "both", "method": "constrained"}
        (item,) = judge(address, body)["items"]
        assert item["status"] == "ok" and [placed["verdict"] in (0, 1) for placed in item["judgements"]] == [True, True]
        assert sorted(placed["order"] for placed in item["judgements"]) == [[0, 1], [1, 0]]
        (item,) = post(address, "/v1/judgements", {"items": [ITEM], "method": "labels"})["items"]
        (placed,) = item["judgements"]
        # A model that says anything may put nothing on the verdicts, and then there is none.
        if placed["status"] == "ok":
            assert sum(placed["probabilities"]) == pytest.approx(1) and 0 < placed["label_mass"] <= 1
        else:
            assert placed["verdict"] is None and placed["label_mass"] in (0.0, None)
        chat = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
        assert post(address, "/v1/chat/completions", chat)["model"] == "judge"


def test_all_models_stand_behind_one_gateway(tmp_path, judge_model, bleurt_path, served_model):  # noqa: F811
    models = {
        "Qwen/Qwen2.5-0.5B-Instruct": judge_model,
        "runs/demo/reward_model/model": served_model,
        "runs/demo/bleurt/model": bleurt_path,
    }
    with serving("full.yaml", tmp_path, models) as address:
        item = {"prompt": "the cat", "completions": ["good", "bad"]}
        first = post(address, "/v1/rewards", {"items": [item]})["items"][0]["completions"]
        # It has no replica until it is asked.
        second = post(address, "/v1/rewards", {"items": [item], "model": "second"})["items"][0]["completions"]
        rewards = [each["reward"] for each in first]
        assert None not in rewards and [each["reward"] for each in second] == pytest.approx(rewards, abs=1e-5)
        (scores,) = post(address, "/v1/bleurt", {"items": [{"reference": "a cat", "candidates": ["a cat", "a dog"]}]})[
            "items"
        ]
        assert all(score["status"] == "ok" and score["score"] is not None for score in scores)
        body = {"items": [ITEM], "method": "constrained"}
        assert judge(address, body)["items"][0]["judgements"][0]["verdict"] in (0, 1)
