"""The judges' routes against an endpoint that speaks OpenAI's protocol, on a port, and fails when it is told to."""

import asyncio
import json
import math
import threading
import time

import pytest
import uvicorn
from conftest import free_port
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from test_gateway import Client

from rayrm.config import build_config
from rayrm.errors import ConfigError
from rayrm.scoring.endpoint import Endpoint
from rayrm.serving.config import RewardService
from rayrm.serving.gateway import make_app
from rayrm.serving.metrics import Metrics
from rayrm.serving.service import Service


class Stub:
    """Prefers the answer that has more of the letter x, and rates by their number."""

    def __init__(self):
        self.requests, self.failures, self.keys, self.running, self.most = [], [], [], 0, 0
        self.says = None
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/v1"
        app = Starlette(routes=[Route("/v1/chat/completions", self.chat, methods=["POST"])])
        self.server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=self.port, log_level="error"))
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    async def chat(self, request):
        body = await request.json()
        self.requests.append(body)
        self.keys.append(request.headers.get("authorization"))
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0.02)
        self.running -= 1
        if self.failures:
            code, headers, text = self.failures.pop(0)
            return Response(text, code, headers)
        return JSONResponse({"id": "x", "object": "chat.completion", "choices": [self.choice(body)]})

    def choice(self, body):
        asked = body["messages"][-1]["content"]
        counts = [part.count("x") for part in asked.split("[Begin of ")[1:]]
        letter = "ABCD"[counts.index(max(counts))]
        text = self.says or (f"I see. [[{counts[0]}]]" if len(counts) == 1 else f"I see. [[{letter}]]")
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        if body.get("logprobs"):
            top = [{"token": f" {letter}", "logprob": math.log(0.6)}, {"token": "B", "logprob": math.log(0.2)}]
            choice["message"]["content"] = letter
            choice["logprobs"] = {"content": [{"token": letter, "logprob": -0.5, "top_logprobs": top}]}
        if body.get("response_format"):
            allowed = body["response_format"]["json_schema"]["schema"]["properties"]["verdict"]["enum"]
            choice["message"]["content"] = self.says or json.dumps({"verdict": letter if letter in allowed else "?"})
        return choice

    def stop(self):
        self.server.should_exit = True
        self.thread.join()


@pytest.fixture(scope="module")
def server():
    found = Stub()
    yield found
    found.stop()


@pytest.fixture
def stub(server):
    server.requests, server.failures, server.keys, server.most, server.says = [], [], [], 0, None
    return server


def make_client(stub, **judge):
    judges = [{"name": "small", "aliases": ["j"], "url": stub.url, "model": "their-name", **judge}]
    config = build_config(RewardService, {"judges": judges, "gateway": {"auth": "none"}}, "the test")
    return Client(make_app(Service(config.directory(), {}, Metrics()), {}))


ITEM = {"prompt": "Which?", "answers": ["x", "xxx"], "id": "r1"}


def test_a_pair_has_a_winner_in_any_placing(stub):
    client = make_client(stub)
    items = [ITEM | {"id": f"r{n}"} for n in range(8)]
    found = client.post("/v1/judgements", {"items": items, "model": "j"}).json()
    assert [item["winner"] for item in found["items"]] == [1] * 8 and found["model"] == "small"
    orders = [tuple(item["judgements"][0]["order"]) for item in found["items"]]
    assert set(orders) == {(0, 1), (1, 0)}
    again = client.post("/v1/judgements", {"items": items}).json()
    assert [tuple(item["judgements"][0]["order"]) for item in again["items"]] == orders
    assert {body["model"] for body in stub.requests} == {"their-name"}
    assert found["items"][0]["judgements"][0]["text"].startswith("I see. [[")


def test_both_orders_tell_whether_the_judge_is_consistent(stub):
    client = make_client(stub)
    (fair,) = client.post("/v1/judgements", {"items": [ITEM], "orders": "both"}).json()["items"]
    assert (fair["winner"], fair["is_consistent"], len(fair["judgements"])) == (1, True, 2)
    stub.says = "[[A]]"
    (biased,) = client.post("/v1/judgements", {"items": [ITEM], "orders": "both"}).json()["items"]
    assert (biased["winner"], biased["is_consistent"], biased["status"]) == (None, False, "ok")


def test_labels_come_with_their_probabilities_and_mass(stub):
    item = ITEM | {"answers": ["xxx", "x"]}
    (found,) = (
        make_client(stub)
        .post("/v1/judgements", {"items": [item], "method": "labels", "orders": "both"})
        .json()["items"]
    )
    assert all(body["max_tokens"] == 1 and body["logprobs"] for body in stub.requests)
    assert found["winner"] == 0 and found["is_consistent"]
    masses = sorted(each["label_mass"] for each in found["judgements"])
    assert masses == pytest.approx([0.8, 0.8])
    # Placed first it gets 0.6 of 0.8; placed second 0.6 + 0.2 of 0.8.
    assert found["probabilities"] == pytest.approx([0.875, 0.125])


def test_a_constrained_judge_gets_a_schema(stub):
    client = make_client(stub)
    item = {"prompt": "Which?", "answers": ["x", "xxx", "xx", ""]}
    body = {"items": [item], "method": "constrained", "kind": "four_way"}
    (found,) = client.post("/v1/judgements", body).json()["items"]
    assert found["winner"] == 1
    schema = stub.requests[0]["response_format"]["json_schema"]["schema"]
    assert schema["properties"]["verdict"]["enum"] == ["A", "B", "C", "D"]
    stub.says = "<html>"
    (found,) = client.post("/v1/judgements", body).json()["items"]
    assert (found["winner"], found["status"], found["judgements"][0]["text"]) == (None, "parse_error", "<html>")


def test_ratings_are_given_one_by_one(stub):
    item = {"prompt": "Rate.", "answers": ["x", "xxxx", "xx"]}
    (found,) = make_client(stub).post("/v1/judgements", {"items": [item], "kind": "rating"}).json()["items"]
    assert (found["ratings"], found["winner"]) == ([1, 4, 2], 1) and len(stub.requests) == 3


def test_no_verdict_is_told_apart_from_no_answer(stub):
    client = make_client(stub)
    stub.says = "I cannot decide."
    (found,) = client.post("/v1/judgements", {"items": [ITEM]}).json()["items"]
    assert (found["winner"], found["status"]) == (None, "parse_error")
    stub.failures = [(400, {}, "no such model")]
    (found,) = client.post("/v1/judgements", {"items": [ITEM]}).json()["items"]
    assert (found["winner"], found["status"]) == (None, "error") and "no such model" in found["judgements"][0]["detail"]


def test_an_endpoint_that_is_busy_is_asked_again_when_it_says(stub):
    stub.failures = [(429, {"retry-after": "0.3"}, "slow down"), (503, {}, "")]
    began = time.monotonic()
    (found,) = make_client(stub).post("/v1/judgements", {"items": [ITEM]}).json()["items"]
    assert found["winner"] == 1 and len(stub.requests) == 3 and time.monotonic() - began > 0.3


def test_an_endpoint_that_is_gone_is_a_503(stub):
    client = make_client(stub, url=f"http://127.0.0.1:{free_port()}/v1")
    reply = client.post("/v1/judgements", {"items": [ITEM], "deadline_s": 0.5})
    assert reply.status_code == 503 and "cannot be had now" in reply.json()["error"]["message"]
    assert reply.headers["retry-after"]


def test_requests_to_an_endpoint_are_bounded(stub):
    client = make_client(stub, max_in_flight=3)
    found = client.post("/v1/judgements", {"items": [ITEM | {"id": str(n)} for n in range(20)]}).json()
    assert all(item["winner"] == 1 for item in found["items"]) and stub.most == 3


def test_the_judge_chats_under_its_own_name(stub):
    client = make_client(stub)
    turns = [{"role": "user", "content": "[Begin of x"}]
    found = client.post("/v1/chat/completions", {"model": "small", "messages": turns, "seed": 5, "n": 1}).json()
    assert found["model"] == "small" and found["choices"][0]["message"]["content"] == "I see. [[1]]"
    assert stub.requests[0] == {"model": "their-name", "messages": turns, "seed": 5, "n": 1}
    assert client.post("/v1/chat/completions", {"model": "other", "messages": turns}).status_code == 404
    assert client.post("/v1/chat/completions", {"messages": turns, "stream": True}).status_code == 400
    assert client.post("/v1/chat/completions", []).status_code == 400
    (described,) = client.get("/v1/models").json()["data"]
    assert (described["id"], described["readout"], described["root"]) == ("small", "judge", "their-name")
    assert client.get("/v1/models/j").json() == described


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        ({"items": [ITEM | {"answers": ["a", "b", "c"]}]}, 400, "a pair has 2 answers, and there are 3"),
        ({"items": [], "model": "none"}, 404, "There is no judge 'none'; there are j, small."),
        ({"items": [ITEM], "kind": "rating", "method": "labels"}, 400, "a rating of 10"),
        ({"items": [ITEM | {"answers": []}]}, 400, "answers"),
        ({"items": [ITEM], "template": "/etc/passwd"}, 400, "template"),
    ],
)
def test_bad_requests_are_told_what_is_wrong(stub, body, code, words):
    reply = make_client(stub).post("/v1/judgements", body)
    assert reply.status_code == code and words in reply.json()["error"]["message"] and not stub.requests


def test_without_reward_models_there_is_nothing_to_reward(stub):
    reply = make_client(stub).post("/v1/rewards", {"items": []})
    assert reply.status_code == 404 and "there are none" in reply.json()["error"]["message"]


def test_keys_of_endpoints_come_from_the_environment(stub, monkeypatch):
    monkeypatch.setenv("THEIR_KEY", "abc")
    make_client(stub, key_variable="THEIR_KEY").post("/v1/judgements", {"items": [ITEM]})
    assert stub.keys == ["Bearer abc"]
    monkeypatch.delenv("THEIR_KEY")
    config = build_config(
        RewardService,
        {"judges": [{"name": "a", "url": stub.url, "model": "m", "key_variable": "THEIR_KEY"}]},
        "the test",
    )
    with pytest.raises(ConfigError, match="the environment variable THEIR_KEY holds none"):
        Endpoint(config.judges[0], "judge outside")


@pytest.mark.parametrize(
    "said", ["[1, 2]", "null", b"\xff\xfe{", '{"choices": [{"message": {"content": [{"type": "text"}]}}]}']
)
@pytest.mark.parametrize("method", ["text", "constrained", "labels"])
def test_replies_that_are_no_completions_are_no_verdicts(stub, said, method):
    stub.failures = [(200, {}, said)] * 20
    body = {"items": [ITEM], "method": method, "deadline_s": 1.5}
    reply = make_client(stub).post("/v1/judgements", body)
    assert reply.status_code in (200, 503), reply.text
    if reply.status_code == 200:
        (item,) = reply.json()["items"]
        assert item["winner"] is None and item["status"] == "error"


@pytest.mark.parametrize("content", ["[" * 100_000, '{"messages": [], "temperature": NaN}', "[1]", "{"])
def test_bodies_that_are_no_json_are_refused(stub, content):
    client = make_client(stub)
    reply = client.run(
        client.http.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})
    )
    assert reply.status_code == 400 and reply.json()["error"]["message"]


def test_without_an_id_prompt_and_answers_draw_the_placing(stub):
    items = [{"prompt": f"Which, {number}?", "answers": ["x", "xxx"]} for number in range(12)]
    found = make_client(stub).post("/v1/judgements", {"items": items}).json()["items"]
    assert {tuple(item["judgements"][0]["order"]) for item in found} == {(0, 1), (1, 0)}
    assert {item["winner"] for item in found} == {1}
