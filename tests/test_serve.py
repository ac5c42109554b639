"""The service on real Ray Serve: deploy, kill, swap."""

import asyncio
import shutil

import httpx
import pytest
from conftest import free_port
from safetensors.torch import load_file, save_file

from rayrm.config import build_config
from rayrm.models.rewarder import load_rewarder
from rayrm.serving.config import RewardService

pytestmark = pytest.mark.ray
IN_FLIGHT = 200


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
