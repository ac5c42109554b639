"""The client against a real server on a port, with the whole application behind it."""

import asyncio
import threading
import time

import pandas as pd
import pytest
import test_gateway as base
import uvicorn
from conftest import free_port
from test_gateway import PROMPT, TEXTS

from rayrm.client import AsyncRewardClient, Comparison, Pair, Query, RewardClient
from rayrm.errors import ServiceError

replica, expected = base.replica, base.expected


class Server:
    """An ASGI application on a port, that can be told to fail first."""

    def __init__(self, app):
        self.app, self.failures, self.requests = app, [], 0
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = uvicorn.Server(uvicorn.Config(self, host="127.0.0.1", port=self.port, log_level="error"))
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    async def __call__(self, scope, receive, send):
        if scope["type"] == "http":
            self.requests += 1
            if self.failures:
                code, headers = self.failures.pop(0)
                await send({"type": "http.response.start", "status": code, "headers": headers})
                await send({"type": "http.response.body", "body": b"not now"})
                return
        await self.app(scope, receive, send)

    def stop(self):
        self.server.should_exit = True
        self.thread.join()


@pytest.fixture(scope="module")
def server(replica):
    found = Server(base.make_client(replica, {"s3cret": "me"}).http._transport.app)
    yield found
    found.stop()


@pytest.fixture
def client(server):
    with RewardClient(server.url, key="s3cret", timeout_s=20) as client:
        yield client


def test_rewards_come_typed_and_in_order(client, server, expected):
    queries = [Query(PROMPT, TEXTS), Query([{"role": "user", "content": PROMPT}], ["\ud800", TEXTS[1]], "de")]
    first, second = client.rewards(queries, outputs=["calibrated"])
    assert [found.reward for found in first] == pytest.approx(expected, abs=1e-5)
    assert (second[0].reward, second[0].status) == (None, "error") and second[1].num_tokens > 5
    assert second[1].calibrated == pytest.approx((expected[1] - 3) / 4, abs=1e-5)
    assert client.models()[0]["id"] == "small" and client.rewards([]) == []


def test_batches_are_of_the_size_that_was_asked_for(server, expected):
    before = server.requests
    with RewardClient(server.url, key="s3cret", batch_size=3) as client:
        found = client.rewards([Query(PROMPT, [text]) for text in TEXTS * 2])
    assert [each[0].reward for each in found] == pytest.approx(expected * 2, abs=1e-5)
    assert server.requests - before == 3


def test_pairs(client, expected):
    better = "first" if expected[0] > expected[1] else "second"
    found, empty = client.compare([Pair(PROMPT, TEXTS[0], TEXTS[1]), Pair(PROMPT, "", "x")])
    assert found.better == better and (found.probability > 0.5) == (better == "first")
    assert empty == Comparison(None, None, "empty", "there is no text")


def test_frames(client, expected):
    frame = pd.DataFrame({"prompt": [PROMPT] * 5, "completion": [*TEXTS, ""], "kept": range(5)}, index=list("abcde"))
    found = client.reward_frame(frame)
    assert list(found.columns) == ["prompt", "completion", "kept", "reward", "status", "detail"]
    assert found["reward"][:4].tolist() == pytest.approx(expected, abs=1e-5) and list(found.index) == list("abcde")
    assert pd.isna(found["reward"]["e"]) and found["status"]["e"] == "empty"
    with pytest.raises(ValueError, match="no column 'answer'; it has prompt, completion, kept"):
        client.reward_frame(frame, completion="answer")


def test_what_fails_for_a_while_is_sent_again_when_the_server_says(client, server, expected):
    server.failures = [(503, [(b"retry-after", b"1")]), (500, [])]
    began, before = time.monotonic(), server.requests
    assert client.rewards([Query(PROMPT, TEXTS[:1])])[0][0].reward == pytest.approx(expected[0], abs=1e-5)
    assert server.requests - before == 3 and time.monotonic() - began > 1.0


def test_single_items_that_there_was_no_time_for_are_sent_again(server, expected):
    class Late(AsyncRewardClient):
        posts = []

        async def _post(self, path, body):
            found = await super()._post(path, body)
            self.posts.append(len(body["items"]))
            if len(self.posts) == 1:
                found["items"][1]["completions"][0] |= {"reward": None, "status": "overloaded"}
            return found

    async def run():
        async with Late(server.url, key="s3cret", timeout_s=10) as client:
            return await client.rewards([Query(PROMPT, [text]) for text in TEXTS])

    assert [each[0].reward for each in asyncio.run(run())] == pytest.approx(expected, abs=1e-5)
    assert Late.posts == [4, 1]


def test_refusals_and_silence_are_errors_that_tell(server):
    with (
        RewardClient(server.url, key="wrong") as client,
        pytest.raises(ServiceError, match=r"\(401\): The request has no"),
    ):
        client.models()
    with RewardClient(server.url, key="s3cret", model="x") as client, pytest.raises(ServiceError, match="no model 'x'"):
        client.rewards([Query(PROMPT, TEXTS)])
    nowhere = f"http://127.0.0.1:{free_port()}"
    with RewardClient(nowhere, timeout_s=0.5) as client, pytest.raises(ServiceError, match="has not answered .* 0.5 s"):
        client.models()
    server.failures = [(503, [(b"retry-after", b"30")])]
    with RewardClient(server.url, key="s3cret", timeout_s=2) as client, pytest.raises(ServiceError, match="not now"):
        client.models()


def test_the_key_may_come_from_the_environment(server, monkeypatch):
    monkeypatch.setenv("RAYRM_API_KEY", "s3cret")
    with RewardClient(server.url) as client:
        assert client.models()
