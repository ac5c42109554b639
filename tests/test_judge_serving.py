"""Judges that are brought up for a run: what stands on the cluster before, while and after they are asked.

In vLLM's place stands an application that says the same to everything.
"""

import contextlib

import httpx
import pytest
from conftest import free_port
from fastapi import FastAPI
from ray import serve

from rayrm.errors import CheckpointError, ResourceError
from rayrm.evaluation import judges

pytestmark = pytest.mark.ray
app = FastAPI()


@serve.deployment(ray_actor_options={"num_cpus": 0})
@serve.ingress(app)
class SaysA:
    def __init__(self, name):
        if name == "broken":
            raise ValueError("no such architecture")
        self.name = name

    @app.post("/v1/chat/completions")
    async def chat(self, body: dict) -> dict:
        return {"choices": [{"message": {"content": "[[A]]"}}], "model": [self.name, body["model"]]}


@pytest.fixture
def local(ray_cluster, monkeypatch):
    def build(arguments):
        return SaysA.bind(arguments["llm_configs"][0]["model_loading_config"]["model_id"])

    monkeypatch.setattr("ray.serve.llm.build_openai_app", build)
    yield judges.LocalJudge(name="small", model="owner/name")
    serve.shutdown()


def ask(endpoint):
    reply = httpx.post(f"{endpoint.url}/chat/completions", json={"model": endpoint.model}, timeout=30)
    return reply.json()["model"]


def test_a_judge_brings_its_own_serve_and_takes_it_away(local):
    with local.serve("/runs/out") as endpoint:
        assert ask(endpoint) == ["small", "small"] and len(serve.status().applications) == 1
    assert not serve.status().applications and not serve.status().proxies


def test_a_judge_joins_a_serve_that_runs_and_leaves_it_standing_when_the_run_fails(local):
    serve.start(http_options={"host": "127.0.0.1", "port": free_port()})
    serve.run(SaysA.bind("other"), name="other", route_prefix="/other")
    with contextlib.suppress(KeyError), local.serve("/runs/out") as endpoint:
        assert ask(endpoint) == ["small", "small"]
        other = endpoint.url.rsplit("/", 2)[0] + "/other/v1"
        assert ask(endpoint.model_copy(update={"url": other})) == ["other", "small"]
        raise KeyError
    assert list(serve.status().applications) == ["other"]
    assert ask(endpoint.model_copy(update={"url": other})) == ["other", "small"]


def test_a_judge_that_cannot_start_is_one_sentence_and_leaves_nothing(local):
    broken = local.model_copy(update={"name": "broken"})
    with (
        pytest.raises(CheckpointError, match="judge 'broken' from 'owner/name': .*no such architecture"),
        broken.serve("/runs/out"),
    ):
        pass
    assert not serve.status().applications and not serve.status().proxies
    many = local.model_copy(update={"num_replicas": 1000})
    with pytest.raises(ResourceError, match="Judge 'small' asks for 1000"), many.serve("/runs/out"):
        pass
