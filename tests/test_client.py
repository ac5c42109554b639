"""The client against a real server on a port, with the whole application behind it."""

import asyncio
import json
import math
import pickle
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

    def __init__(self, app, port=None):
        self.app = self.inner = app
        self.failures, self.requests = [], 0
        self.port = port or free_port()
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

        async def _post(self, path, body, end):
            found = await super()._post(path, body, end)
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
        pytest.raises(ServiceError, match=r"\(401\): The request has no") as told,
    ):
        client.models()
    # Errors of actors come to the driver as bytes.
    sent = pickle.loads(pickle.dumps(told.value))
    assert type(sent) is type(told.value) and (str(sent), sent.code) == (str(told.value), 401)
    with RewardClient(server.url, key="s3cret", model="x") as client, pytest.raises(ServiceError, match="no model 'x'"):
        client.rewards([Query(PROMPT, TEXTS)])
    nowhere = f"http://127.0.0.1:{free_port()}"
    with RewardClient(nowhere, timeout_s=0.5) as client, pytest.raises(ServiceError, match="has not answered .* 0.5 s"):
        client.models()
    server.failures = [(503, [(b"retry-after", b"30")])]
    with RewardClient(server.url, key="s3cret", timeout_s=2) as client, pytest.raises(ServiceError, match="not now"):
        client.models()


def test_an_item_that_is_refused_costs_no_other_its_reward(client, server, expected, caplog):
    bad = [Query([{"role": "critic", "content": "x"}], ["a", "b"]), Query(PROMPT, TEXTS[:1], "d" * 40)]
    queries = [Query(PROMPT, [text]) for text in TEXTS]
    before = server.requests
    found = client.rewards([*queries[:2], bad[0], queries[2], bad[1], queries[3]])
    whole, first, second = [found[0], found[1], found[3], found[5]], found[2], found[4]
    assert [each[0].reward for each in whole] == pytest.approx(expected, abs=1e-5)
    assert [(each.reward, each.status) for each in (*first, *second)] == [(None, "error")] * 3
    assert all(each.detail.startswith("items.0.prompt") for each in first)
    assert second[0].detail == "items.0.lang: String should have at most 35 characters."
    assert server.requests - before < 16
    assert f"{server.url} refuses /v1/rewards (400): items.0.lang: String should" in caplog.text


def test_pairs_that_are_refused_and_completions_beyond_the_limit_cost_no_others(replica, expected):
    limited = Server(base.make_client(replica, max_items=2, max_body_bytes=2000).http._transport.app)
    try:
        with RewardClient(limited.url) as client:
            (found,) = client.rewards([Query(PROMPT, [*TEXTS, "x" * 3000])])
            good = Pair(PROMPT, TEXTS[0], TEXTS[1])
            first, bad, last = client.compare([good, Pair([{"role": "x", "content": ""}], "a", "b"), good])
            assert client.rewards([Query(PROMPT, []), Query(PROMPT, TEXTS)])[1][3].status == "ok"
    finally:
        limited.stop()
    assert [each.reward for each in found[:4]] == pytest.approx(expected, abs=1e-5)
    assert found[4].reward is None and "more than 2,000 bytes" in found[4].detail
    assert first == last and first.status == "ok" and (bad.probability, bad.status) == (None, "error")


def answering(server, monkeypatch, *replies):
    """Let the server answer in turn with what is given: bytes as they are, functions of its own reply, the last one on
    and on."""
    left = list(replies)

    async def changed(scope, receive, send):
        told = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(told, bytes):
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/html")]})
            await send({"type": "http.response.body", "body": told})
            return
        parts = []

        async def collect(message):
            parts.append(message)

        await server.inner(scope, receive, collect)
        body = json.loads(b"".join(part.get("body", b"") for part in parts))
        await send({"type": "http.response.start", "status": parts[0]["status"], "headers": []})
        await send({"type": "http.response.body", "body": json.dumps(told(body)).encode()})

    monkeypatch.setattr(server, "app", changed)


def first(**values):
    """A reply whose first reward has other values; those that are None are left out."""

    def change(body):
        rewards = body["items"][0]["completions"]
        rewards[0] = {name: value for name, value in (rewards[0] | values).items() if value is not ...}
        return body

    return change


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        (b"<html>\n<h1>Welcome</h1>", r"no JSON but text/html, '<html> <h1>Welcome</h1>'"),
        (b"", "no JSON but text/html, ''"),
        (b"null", "it: Input should be a valid dictionary"),
        (b"[" * 100_000, "no JSON"),
        (lambda body: [body], "it: Input should be a valid dictionary"),
        (lambda body: {"rewards": [1.0, 2.0]}, "model: Field required"),
        (lambda body: body | {"items": body["items"][:1]}, "answers to 1 questions, and 2 were asked"),
        (lambda body: body | {"items": body["items"] * 2}, "answers to 4 questions, and 2 were asked"),
        (
            lambda body: body | {"items": [{"completions": []}, body["items"][1]]},
            "0 answers to question 0, which has 4 items",
        ),
        (first(reward=math.nan), r"items\.0\.completions\.0\.reward: Input should be a finite number, not nan"),
        (first(reward=math.inf), "finite number, not inf"),
        (first(reward="2.5"), "valid number, not '2.5'"),
        (first(reward=True), "valid number, not True"),
        (first(reward=...), r"items\.0\.completions\.0\.reward: Field required\)"),
        (first(status=...), r"status: Field required\)"),
        (first(reward=None), "the status is 'ok', and the number None"),
        (first(status="error"), "the status is 'error', and the number -?[0-9.]+"),
        (first(calibrated=math.nan), "finite number, not nan"),
    ],
)
def test_what_is_no_reply_is_an_error_and_no_reward(server, client, monkeypatch, reply, told):
    answering(server, monkeypatch, reply)
    where = f"'/v1/rewards' at '{server.url}' was answered with what is no reply of a rayrm service"
    with pytest.raises(ServiceError, match=f"{where} .*{told}"):
        client.rewards([Query(PROMPT, TEXTS), Query(PROMPT, TEXTS[:1])])


def test_pairs_and_models_must_be_what_they_are_too(server, client, monkeypatch):
    def change(**values):
        return lambda body: body | {"pairs": [body["pairs"][0] | values]}

    for values, told in [
        ({"better": "third"}, "pairs.0.better"),
        ({"probability": 1.5}, "less than or equal to 1"),
        ({"probability": None}, "the status is 'ok', and the number None"),
    ]:
        answering(server, monkeypatch, change(**values))
        with pytest.raises(ServiceError, match=f"what is no reply of a rayrm service .*{told}"):
            client.compare([Pair(PROMPT, *TEXTS[:2])])
    for reply in (b"<html>", b'{"data": {}}', b'{"data": [{"name": "x"}]}', b"{}"):
        answering(server, monkeypatch, reply)
        with pytest.raises(ServiceError, match=r"'/v1/models' at '.*' was answered with what is no reply"):
            client.models()


def test_a_server_that_is_swapped_between_two_replies_is_found_out(server, client, monkeypatch, expected):
    assert client.rewards([Query(PROMPT, TEXTS[:1])])[0][0].status == "ok"
    told = (
        r"'small' at '.*' was revision d1 when this run began and is {} now, and rewards of two models must not be mi"
    )
    for revision, found in (("d2", "d2"), (None, "one that it does not tell")):
        answering(server, monkeypatch, lambda body, revision=revision: body | {"revision": revision})
        with pytest.raises(ServiceError, match=told.format(found)):
            client.rewards([Query(PROMPT, TEXTS)])
        with pytest.raises(ServiceError, match=told.format(found)):
            client.compare([Pair(PROMPT, *TEXTS[:2])])
    # A reply without a number comes from no model that could be another one.
    answering(server, monkeypatch, lambda body: first(reward=None, status="nan")(body) | {"revision": None})
    assert client.rewards([Query(PROMPT, TEXTS[:1])])[0][0].status == "nan"
    # Within one call, too.
    answering(server, monkeypatch, lambda body: body, lambda body: body | {"revision": "d2"})
    with (
        RewardClient(server.url, key="s3cret", batch_size=1, max_in_flight=1) as client,
        pytest.raises(ServiceError, match=told.format("d2")),
    ):
        client.rewards([Query(PROMPT, [text]) for text in TEXTS])


def test_all_tries_of_a_request_share_one_deadline(server):
    with RewardClient(server.url, key="s3cret", timeout_s=2) as client:
        for failures, told in (
            ([(503, [(b"retry-after", b"1")])] * 9, "not now"),
            ([(500, [])] * 99, "not now"),
            ([(429, [(b"retry-after", b"30")])], "not now"),
        ):
            server.failures, began = list(failures), time.monotonic()
            with pytest.raises(ServiceError, match=f"has not answered /v1/rewards within 2 s .{told}"):
                client.rewards([Query(PROMPT, TEXTS)])
            assert time.monotonic() - began < 3
            server.failures = []


def test_the_server_is_told_how_long_an_answer_is_of_use(server):
    with RewardClient(server.url, key="s3cret", timeout_s=4) as client:
        http, told = client._client._sender._http, []
        ask = http.request

        async def spy(method, path, content):
            told.append(json.loads(content)["deadline_s"])
            return await ask(method, path, content=content)

        http.request = spy
        server.failures = [(503, [(b"retry-after", b"1")])]
        assert client.rewards([Query(PROMPT, TEXTS[:1])])[0][0].status == "ok"
    assert 3 < told[0] <= 3.6 and told[1] <= told[0] - 0.9


def test_a_server_that_never_answers_or_drips_is_given_up_in_time(server, monkeypatch):
    async def dripping(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(40):
            await asyncio.sleep(0.1)
            await send({"type": "http.response.body", "body": b" ", "more_body": True})

    monkeypatch.setattr(server, "app", dripping)
    with RewardClient(server.url, key="s3cret", timeout_s=1) as client:
        began = time.monotonic()
        with pytest.raises(ServiceError, match=r"has not answered /v1/rewards within 1 s \(it was still at work\)"):
            client.rewards([Query(PROMPT, TEXTS)])
        assert time.monotonic() - began < 2


def test_items_that_there_is_no_time_for_until_the_end_say_so_and_others_are_kept(server, monkeypatch, expected):
    answering(server, monkeypatch, first(reward=None, status="overloaded"))
    with RewardClient(server.url, key="s3cret", timeout_s=1.5) as client:
        began = time.monotonic()
        found = client.rewards([Query(PROMPT, TEXTS[:1]), Query(PROMPT, TEXTS[1:2])])
    assert time.monotonic() - began < 2.5 and [each[0].status for each in found] == ["overloaded", "ok"]
    assert found[1][0].reward == pytest.approx(expected[1], abs=1e-5)


def test_a_server_that_is_not_there_yet_is_waited_for(server, expected):
    port = free_port()
    started = []
    timer = threading.Timer(1.0, lambda: started.append(Server(server.app, port)))
    timer.start()
    with RewardClient(f"http://127.0.0.1:{port}", key="s3cret", timeout_s=20) as client:
        assert client.rewards([Query(PROMPT, TEXTS)])[0][0].reward == pytest.approx(expected[0], abs=1e-5)
    timer.join()
    started[0].stop()


def test_what_is_no_address_is_told_at_once():
    with RewardClient("127.0.0.1:8000") as client, pytest.raises(ServiceError, match="cannot be asked for at '127"):
        client.models()
    with pytest.raises(ServiceError, match="'http://a:b' is no address of a service: Invalid port: 'b'"):
        AsyncRewardClient("http://a:b")


def test_the_key_may_come_from_the_environment(server, monkeypatch):
    monkeypatch.setenv("RAYRM_API_KEY", "s3cret")
    with RewardClient(server.url) as client:
        assert client.models()
