"""The service on real Ray Serve: deploy, kill, swap."""

import asyncio
import json
import random
import shutil
import socket
import time
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from conftest import free_port
from safetensors.torch import load_file, save_file
from test_train_reward_model import data, make_job  # noqa: F401

from jobs import evaluate_reward_model
from rayrm.config import build_config
from rayrm.evaluation.results import read_results
from rayrm.models.folders import read_mark
from rayrm.models.rewarder import load_rewarder
from rayrm.serving.config import RewardService
from rayrm.training.reward_model import train_reward_model

pytestmark = pytest.mark.ray
IN_FLIGHT = 200
SIDES = ("chosen", "rejected")


def service(model, num_replicas=1):
    replicas = {"min_replicas": num_replicas, "max_replicas": num_replicas}
    models = [{"name": "small", "model": model, "dtype": "float32", "replicas": replicas}]
    return build_config(RewardService, {"models": models, "gateway": {"auth": "none"}}, "the test")


@pytest.fixture(scope="module")
def serve(ray_cluster):
    """Serve on a free port of the session's cluster; gives the address."""
    from ray import serve

    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


def deploy(model, num_replicas=1):
    from ray import serve

    from rayrm.serving.reward import build_app

    serve.run(build_app(service(model, num_replicas)), name="rayrm", route_prefix="/")


def texts_of(number):
    return [f"good {number} {'bad ' * (number % 9)}"]


def body_of(number):
    return {"items": [{"prompt": "the cat", "completions": texts_of(number)}]}


async def under_load(address, total, meanwhile):
    """Replies to requests, IN_FLIGHT at a time, while something happens after a quarter of them."""
    limit, replies, event = asyncio.Semaphore(IN_FLIGHT), {}, asyncio.Event()
    limits = httpx.Limits(max_connections=IN_FLIGHT + 10)

    async with httpx.AsyncClient(base_url=address, timeout=120, limits=limits) as client:

        async def ask(number):
            async with limit:
                replies[number] = await client.post("/v1/rewards", json=body_of(number))
                if len(replies) == total // 4:
                    event.set()

        async def happen():
            await event.wait()
            await asyncio.to_thread(meanwhile)

        await asyncio.gather(happen(), *(ask(number) for number in range(total)))
    return [replies[number] for number in range(total)]


def reward_of(reply):
    assert reply.status_code == 200, reply.text
    (found,) = reply.json()["items"][0]["completions"]
    assert found["status"] == "ok", found
    return found["reward"]


def rewards_by(model, total):
    rewarder = load_rewarder(model)
    prompt = [{"role": "user", "content": "the cat"}]
    return [reward for reward, _ in rewarder.rewards([(prompt, texts_of(n)[0]) for n in range(total)])]


def kill_one_replica():
    import ray
    from ray.util import list_named_actors

    named = [each for each in list_named_actors(all_namespaces=True) if "SERVE_REPLICA" in each["name"]]
    victims = [each for each in named if "#small#" in each["name"]]
    assert len(victims) == 2
    ray.kill(ray.get_actor(victims[0]["name"], namespace=victims[0]["namespace"]))


def test_a_killed_replica_loses_no_request(serve, served_model):
    deploy(served_model, num_replicas=2)
    replies = asyncio.run(under_load(serve, 800, kill_one_replica))
    assert [reward_of(reply) for reply in replies] == pytest.approx(rewards_by(served_model, 800), abs=1e-4)


def test_a_new_version_drops_no_request(serve, served_model, tmp_path):
    other = shutil.copytree(served_model, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["score.weight"] = -weights["score.weight"]
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    deploy(served_model)
    replies = asyncio.run(under_load(serve, 800, lambda: deploy(str(other))))
    old, new = rewards_by(served_model, 800), rewards_by(str(other), 800)
    kinds = set()
    for reply, first, second in zip(replies, old, new, strict=True):
        found = reward_of(reply)
        assert min(abs(found - first), abs(found - second)) < 1e-4
        kinds.add(abs(found - second) < 1e-4)
    assert kinds == {True, False}
    assert reward_of(httpx.post(f"{serve}/v1/rewards", json=body_of(3))) == pytest.approx(new[3], abs=1e-4)


def test_probe_rows_get_the_rewards_that_training_saw_in_any_company(serve, data, tmp_path):  # noqa: F811
    train_reward_model(make_job(data, tmp_path / "run"))
    model = str(tmp_path / "run" / "model")
    rows = read_mark(model)["probe"]
    items = [{"prompt": row["prompt"], "completions": [row[side][0]["content"] for side in SIDES]} for row in rows]
    seen = [np.ravel(row["outputs"]).tolist() for row in rows]
    assert len(rows) > 4 and np.std(seen) > 0.01
    deploy(model)

    def ask(items):
        reply = httpx.post(f"{serve}/v1/rewards", json={"items": items}, timeout=120)
        return [[found["reward"] for found in item["completions"]] for item in reply.json()["items"]]

    assert [ask([item])[0] for item in items] == [pytest.approx(each, abs=1e-4) for each in seen]
    assert ask(items) == [pytest.approx(each, abs=1e-4) for each in seen]
    strangers = [{"prompt": "one " * (n % 40), "completions": ["good " * (n % 17 + 1)]} for n in range(60)]
    asked = [*enumerate(items), *((None, stranger) for stranger in strangers)]
    random.Random(0).shuffle(asked)

    async def all_at_once():
        async with httpx.AsyncClient(base_url=serve, timeout=120) as client:
            return await asyncio.gather(*(client.post("/v1/rewards", json={"items": [item]}) for _, item in asked))

    for (number, _), reply in zip(asked, asyncio.run(all_at_once()), strict=True):
        if number is not None:
            found = [each["reward"] for each in reply.json()["items"][0]["completions"]]
            assert found == pytest.approx(seen[number], abs=1e-4)


def test_clients_that_leave_or_dawdle_hurt_nobody(serve, served_model):
    deploy(served_model)
    address = urlsplit(serve)
    body = json.dumps(body_of(5)).encode()
    head = (
        f"POST /v1/rewards HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    whole = head.encode() + body

    def connect():
        return socket.create_connection((address.hostname, address.port), timeout=60)

    for given in [head.encode()[:30], head.encode(), whole[:-3], whole] * 5:
        with connect() as gone:
            gone.sendall(given)
    with connect() as slow:
        for start in range(0, len(whole), 20):
            slow.sendall(whole[start : start + 20])
            time.sleep(0.02)
        found = b""
        while b'"status":' not in found and (part := slow.recv(65536)):
            found += part
    assert found.startswith(b"HTTP/1.1 200") and b'"status":"ok"' in found
    began = time.monotonic()
    assert reward_of(httpx.post(f"{serve}/v1/rewards", json=body_of(6), timeout=60)) is not None
    assert time.monotonic() - began < 10


def test_evaluations_in_process_by_actors_and_by_http_agree(serve, served_model, tmp_path):
    deploy(served_model)
    rows = []
    for number in range(40):
        sides = {"chosen": f"good {number} " * (number % 7 + 1), "rejected": "bad " * (number % 5 + 1)}
        rows.append({"id": str(number), "prompt": f"the cat {number}", "lang": ["de", "en"][number % 2], **sides})
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "output": str(tmp_path / "out"),
        "sets": [{"input": str(tmp_path / "pairs.jsonl")}],
        "shard_rows": 16,
        "bootstrap": {"num_resamples": 20},
        "reward_models": [
            {"type": "reward_model", "name": "actors", "model": served_model, "workers": {"num_workers": 2}},
            {"type": "service", "name": "http", "endpoint": serve, "model": "small", "workers": {"num_cpus": 0.5}},
        ],
    }
    evaluate_reward_model.main([f"{name}={json.dumps(value)}" for name, value in config.items()])
    found = {(r["model"], r["id"]): r for r in read_results(str(tmp_path / "out")).to_pylist()}
    rewarder = load_rewarder(served_model)
    for row in rows:
        prompt = [{"role": "user", "content": row["prompt"]}]
        own = [reward for reward, _ in rewarder.rewards([(prompt, row[side]) for side in SIDES])]
        actors, http = found["actors", row["id"]], found["http", row["id"]]
        assert actors["rewards"] == pytest.approx(own, abs=1e-4) and http["rewards"] == pytest.approx(own, abs=1e-4)
        if abs(own[0] - own[1]) > 1e-4:
            assert actors["credit"] == http["credit"] == float(own[0] > own[1])
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["actors"]["preferences"]["score/de"] == metrics["http"]["preferences"]["score/de"]
