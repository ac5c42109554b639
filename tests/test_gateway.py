"""The whole HTTP application over a real model, in this process: what Serve adds is in test_serve.py."""

import asyncio
import json
import math
import re
import threading

import httpx
import numpy as np
import pytest

from rayrm.config import build_config
from rayrm.errors import CheckpointError, ConfigError
from rayrm.models.rewarder import load_rewarder
from rayrm.serving.config import Gateway, RewardService, ServedModel
from rayrm.serving.gateway import make_app
from rayrm.serving.guard import read_keys
from rayrm.serving.metrics import Metrics
from rayrm.serving.replica import RewardReplica
from rayrm.serving.service import Service

PROMPT = "the cat"
TEXTS = ["sat on the mat", "schläft im Haus", "good", "bad bad bad"]


class Client:
    """Requests to an ASGI application, all on one event loop, as in a server."""

    def __init__(self, app):
        self.loop = asyncio.new_event_loop()
        self.http = httpx.AsyncClient(
            transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://t"
        )

    def run(self, coroutine):
        return self.loop.run_until_complete(coroutine)

    def post(self, path, body, headers=None):
        # With escapes, unlike httpx, so that halves of characters get through.
        headers = {"content-type": "application/json", **(headers or {})}
        return self.run(self.http.post(path, content=json.dumps(body), headers=headers))

    def get(self, path, **options):
        return self.run(self.http.get(path, **options))


@pytest.fixture(scope="module")
def replica(served_model):
    model = {"name": "small", "aliases": ["tiny"], "model": served_model, "dtype": "float32"}
    return RewardReplica(ServedModel.model_validate(model).model_dump(mode="json"))


def make_client(replica, keys=None, **gateway):
    models = [{"name": "small", "aliases": ["tiny"], "model": "unused"}]
    config = build_config(RewardService, {"models": models, "gateway": {"auth": "none", **gateway}}, "the test")
    return Client(make_app(Service(config.directory(), {"small": replica}, Metrics()), keys or {}))


@pytest.fixture(scope="module")
def client(replica):
    return make_client(replica)


@pytest.fixture(scope="module")
def expected(served_model):
    """Rewards by the offline path, one at a time."""
    rewarder = load_rewarder(served_model)
    prompt = [{"role": "user", "content": PROMPT}]
    return [rewarder.rewards([(prompt, text)])[0][0] for text in TEXTS]


# Rewards.


def test_rewards_are_those_of_the_offline_path_in_any_company(client, replica, expected):
    assert np.std(expected) > 0.05
    together = client.post("/v1/rewards", {"items": [{"prompt": PROMPT, "completions": TEXTS}]}).json()
    assert [found["reward"] for found in together["items"][0]["completions"]] == pytest.approx(expected, abs=1e-5)
    assert together["model"] == "small" and together["usage"]["total_tokens"] > 40
    assert together["revision"] == replica.revision == "d1"

    async def alone(text):
        body = {"items": [{"prompt": [{"role": "user", "content": PROMPT}], "completions": [text]}], "model": "tiny"}
        return (await client.http.post("/v1/rewards", json=body)).json()["items"][0]["completions"][0]

    async def all_at_once():
        return await asyncio.gather(*(alone(text) for text in TEXTS * 8))

    found = client.run(all_at_once())
    assert [each["reward"] for each in found] == pytest.approx(expected * 8, abs=1e-5)
    assert {each["status"] for each in found} == {"ok"}


def test_answers_of_two_revisions_are_no_reply(replica, monkeypatch):
    answers = []

    class Both:
        """Every second question goes to a replica that holds the next revision."""

        async def answer(self, questions, deadline_s):
            found = await replica.answer(questions, deadline_s)
            answers.append([[answer._replace(revision=f"d{len(answers)}") for answer in each] for each in found])
            return answers[-1]

    item = {"prompt": PROMPT, "completions": ["x"]}
    reply = make_client(Both()).post("/v1/rewards", {"items": [item] * 65})
    assert reply.status_code == 503 and reply.headers["retry-after"] == "1" and len(answers) == 2
    assert "being replaced, and revisions d0 and d1 answered; ask again" in reply.json()["error"]["message"]
    assert make_client(Both()).post("/v1/rewards", {"items": [item]}).json()["revision"] == "d2"


def test_wanted_outputs_are_told_and_others_are_null(client, expected):
    item = {"prompt": PROMPT, "completions": TEXTS[:1]}
    plain = client.post("/v1/rewards", {"items": [item]}).json()["items"][0]["completions"][0]
    assert {plain[name] for name in ("raw", "calibrated", "ratings", "tokens")} == {None}
    body = {"items": [item, item | {"lang": "de"}, item | {"lang": "fr"}], "outputs": ["raw", "calibrated", "tokens"]}
    overall, german, french = (each["completions"][0] for each in client.post("/v1/rewards", body).json()["items"])
    assert overall["raw"] == [[pytest.approx(expected[0], abs=1e-5)]]
    assert overall["calibrated"] == french["calibrated"] == pytest.approx((expected[0] - 1) / 2, abs=1e-5)
    assert german["calibrated"] == pytest.approx((expected[0] - 3) / 4, abs=1e-5)
    assert len(overall["tokens"]) == overall["num_tokens"] == plain["num_tokens"]


def test_what_has_no_reward_has_a_status_and_costs_the_others_nothing(client, expected):
    body = {
        "items": [{"prompt": PROMPT, "completions": ["", TEXTS[0], "good " * 200]}, {"prompt": [], "completions": []}]
    }
    reply = client.post("/v1/rewards", body)
    empty, good, long = reply.json()["items"][0]["completions"]
    assert reply.status_code == 200 and reply.json()["items"][1]["completions"] == []
    assert good["reward"] == pytest.approx(expected[0], abs=1e-5)
    assert (empty["reward"], empty["status"], empty["detail"]) == (None, "empty", "there is no text")
    assert (long["reward"], long["status"]) == (None, "overlength")
    half = client.post("/v1/rewards", {"items": [{"prompt": "a", "completions": ["b", "\ud800"]}]}).json()
    half = half["items"][0]["completions"]
    assert half[0]["status"] == "ok" and (half[1]["reward"], half[1]["status"]) == (None, "error")
    assert "surrogate" in half[1]["detail"]
    cut = client.post("/v1/rewards", {"items": [{"prompt": "the cat " * 100, "completions": ["good"]}]}).json()
    assert cut["items"][0]["completions"][0]["status"] == "truncated"


def test_pairs_are_compared_by_the_gap_of_their_rewards(client, expected):
    body = {
        "pairs": [
            {"prompt": PROMPT, "first": a, "second": b} for a, b in [TEXTS[:2], TEXTS[1::-1], ["x", "x"], ["x", ""]]
        ]
    }
    first, turned, tie, empty = client.post("/v1/rewards/pairs", body).json()["pairs"]
    gap = expected[0] - expected[1]
    assert first["probability"] == pytest.approx(1 / (1 + math.exp(-gap)), abs=1e-5)
    assert first["probability"] + turned["probability"] == pytest.approx(1, abs=1e-6)
    assert first["better"] == ("first" if gap > 0 else "second") != turned["better"]
    assert (tie["better"], tie["probability"]) == ("tie", 0.5)
    assert (empty["better"], empty["probability"], empty["status"]) == (None, None, "empty")


def test_the_best_of_n_come_first_and_the_unscored_apart(client, expected):
    body = {"prompt": PROMPT, "completions": [*TEXTS, ""], "n": 2}
    found = client.post("/v1/best_of_n", body).json()
    order = sorted(range(4), key=lambda index: -expected[index])
    assert [best["index"] for best in found["best"]] == order[:2]
    assert [best["completion"] for best in found["best"]] == [TEXTS[index] for index in order[:2]]
    assert found["unscored"] == [{"index": 4, "status": "empty", "detail": "there is no text"}]


def test_numbers_that_are_not_finite_are_no_rewards(replica, monkeypatch):
    weight = replica.rewarder.model.network.score.weight
    stored = weight.data.clone()
    try:
        weight.data[:] = math.nan
        found = make_client(replica).post("/v1/rewards", {"items": [{"prompt": PROMPT, "completions": ["x y"]}]}).json()
        refused = make_client(replica).post("/get_reward", {"query": ["x y z"]})
    finally:
        weight.data[:] = stored
    assert (found["items"][0]["completions"][0]["reward"], found["items"][0]["completions"][0]["status"]) == (
        None,
        "nan",
    )
    assert refused.status_code == 422 and "not finite" in refused.json()["error"]["message"]


# Requests that are no good.


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (b"{", 400, "JSON"),
        (b"", 400, "required"),
        (b"[]", 400, "dictionary"),
        (b'{"items": 5}', 400, "items"),
        (b'{"items": [{"prompt": "a"}]}', 400, "items.0.completions"),
        (b'{"items": [], "model": "\\ud800"}', 404, "There is no model '?'"),
        (b'{"items": [], "misspelt": 1}', 400, "misspelt"),
        (b'{"items": [], "model": "none"}', 404, "There is no model 'none'; there are small, tiny."),
        (b'{"items": [{"prompt": "a", "completions": ["b"]}], "deadline_s": NaN}', 400, "deadline_s"),
        (b"\xff\xfe", 400, ""),
    ],
)
def test_bad_requests_are_told_what_is_wrong(client, content, code, words):
    reply = client.run(client.http.post("/v1/rewards", content=content, headers={"content-type": "application/json"}))
    assert reply.status_code == code and words in reply.json()["error"]["message"]
    assert reply.json()["error"]["code"] == code


def test_nothing_asked_is_nothing_answered(client):
    assert client.post("/v1/rewards", {"items": []}).json()["items"] == []
    assert client.post("/v1/rewards/pairs", {"pairs": []}).json()["pairs"] == []
    assert client.post("/v1/best_of_n", {"prompt": "a", "completions": []}).json()["best"] == []


def test_too_many_items_and_too_long_a_body_are_refused(replica):
    client = make_client(replica, max_items=10, max_body_bytes=2000)
    many = client.post("/v1/rewards", {"items": [{"prompt": "a", "completions": ["b"] * 11}]})
    assert many.status_code == 413 and "11 items, and the most are 10" in many.json()["error"]["message"]
    long = client.post("/v1/rewards", {"items": [{"prompt": "a" * 3000, "completions": ["b"]}]})
    assert long.status_code == 413 and "2,000 bytes" in long.json()["error"]["message"]
    assert client.get("/nowhere").status_code == 404 and client.get("/v1/rewards").status_code == 405


# Keys.


def test_everything_but_health_needs_a_key(replica):
    client = make_client(replica, {"s3cret": "alice"})
    for path in ("/v1/models", "/metrics", "/load", "/version", "/openapi.json"):
        assert client.get(path).status_code == 401
        assert client.get(path, headers={"authorization": "Bearer s3cret"}).status_code == 200
    assert client.post("/get_reward", {"query": []}).status_code == 401
    assert client.post("/get_reward", {"query": []}, headers={"authorization": "Bearer s3cre"}).status_code == 401
    assert client.post("/key/s3cret/get_reward", {"query": []}).json()["rewards"] == []
    assert client.post("/key/wrong/get_reward", {"query": []}).status_code == 401
    assert client.get("/health").status_code == client.get("/ready").status_code == client.get("/").status_code == 200


def test_a_key_over_its_quota_waits(replica):
    client = make_client(replica, {"a": "alice", "b": "bob"}, quotas={"alice": 2})
    codes = [client.get("/version", headers={"authorization": "Bearer a"}).status_code for _ in range(3)]
    last = client.get("/version", headers={"authorization": "Bearer a"})
    assert codes == [200, 200, 429] and 0 < int(last.headers["retry-after"]) <= 60
    assert client.get("/version", headers={"authorization": "Bearer b"}).status_code == 200


def test_keys_come_from_the_environment():
    assert read_keys(Gateway(), {"RAYRM_API_KEYS": "alice=x, y"}) == {"x": "alice", "y": "default"}
    assert read_keys(Gateway(auth="none"), {}) == {}
    with pytest.raises(ConfigError, match="RAYRM_API_KEYS holds none"):
        read_keys(Gateway(), {})
    with pytest.raises(ConfigError, match="quotas names bob"):
        read_keys(Gateway(quotas={"bob": 1}), {"RAYRM_API_KEYS": "alice=x"})


# Overload.


def test_a_queue_that_is_too_long_is_a_503_that_says_when(replica, monkeypatch):
    client, may_run = make_client(replica), threading.Event()
    run = replica.batcher._run
    monkeypatch.setattr(replica.batcher, "_run", lambda trees, share: may_run.wait(10) and run(trees, share))
    monkeypatch.setattr(replica.batcher, "tokens_s", 10.0)

    def ask(text, deadline_s):
        body = {"items": [{"prompt": PROMPT, "completions": [text]}], "deadline_s": deadline_s}
        return client.http.post("/v1/rewards", json=body)

    async def crowd():
        waiting = [asyncio.create_task(ask(f"good {index}", 50.0)) for index in range(4)]
        await asyncio.sleep(0.3)
        refused = await ask("late", 2.0)
        slime = await client.http.post("/get_reward", json={"query": []})
        may_run.set()
        return refused, slime, await asyncio.gather(*waiting)

    refused, empty, accepted = client.run(crowd())
    assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
    assert "overloaded" in refused.json()["error"]["message"] and empty.status_code == 200
    assert [reply.status_code for reply in accepted] == [200] * 4
    assert all(reply.json()["items"][0]["completions"][0]["reward"] is not None for reply in accepted)


# Operations.


def test_models_are_described(client):
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["aliases"], model["max_model_len"]) == ("small", ["tiny"], 96)
    assert model["verified"] and model["revision"] == "d1" and model["calibration"]["overall"] == [1.0, 2.0]
    assert client.get("/v1/models/tiny").json() == model and client.get("/v1/models/x").status_code == 404


def test_token_ids_are_those_that_are_read(client):
    messages = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": TEXTS[0]}]
    found = client.post("/tokenize", {"messages": messages}).json()
    body = {"items": [{"prompt": PROMPT, "completions": TEXTS[:1]}], "outputs": ["tokens"]}
    assert found["tokens"] == client.post("/v1/rewards", body).json()["items"][0]["completions"][0]["tokens"]
    assert found["count"] == len(found["tokens"]) and found["max_model_len"] == 96


def test_metrics_count_what_was_answered(replica):
    client = make_client(replica)
    body = {"items": [{"prompt": PROMPT, "completions": ["good", ""], "lang": "de"}]}
    client.post("/v1/rewards", body)
    client.post("/v1/rewards/pairs", {"pairs": [{"prompt": PROMPT, "first": "good", "second": ""}]})
    client.get("/nowhere")
    text = client.get("/metrics").text
    ids = set(re.findall('gateway="([0-9a-f]+)"', text))
    assert len(ids) == 1 and re.findall('gateway="([0-9a-f]+)"', make_client(replica).get("/metrics").text) != ids
    text = re.sub('gateway="[0-9a-f]+",?', "", text)
    assert 'rayrm_answers_total{model="small",status="ok"} 1.0' in text
    assert 'rayrm_answers_total{model="small",status="empty"} 2.0' in text
    assert 'rayrm_reward_count{lang="de",model="small"} 1.0' in text
    assert 'rayrm_requests_total{code="200",path="/v1/rewards"} 1.0' in text
    assert 'rayrm_requests_total{code="404",path="other"} 1.0' in text
    assert 'rayrm_queue_seconds_count{model="small"} 1.0' in text


def test_requests_keep_their_id_and_the_log_has_no_text(client, caplog):
    caplog.set_level("INFO", logger="rayrm.requests")
    body = {"items": [{"prompt": "secret words", "completions": ["good"]}]}
    reply = client.post("/v1/rewards", body, headers={"x-request-id": "my-id"})
    assert reply.headers["x-request-id"] == reply.json()["id"] == "my-id"
    line = json.loads(caplog.messages[-1])
    assert (line["id"], line["path"], line["code"]) == ("my-id", "/v1/rewards", 200) and "secret" not in caplog.text
    assert client.get("/load").json() == {"server_load": 0} and client.get("/version").json()["version"]


# Models.


def test_a_checkpoint_of_another_rendering_is_not_served(served_model, tmp_path):
    import shutil

    copy = shutil.copytree(served_model, tmp_path / "model")
    mark = json.loads((copy / "rayrm.json").read_text())
    mark["rendering"]["fingerprint"]["template"] = "another"
    (copy / "rayrm.json").write_text(json.dumps(mark))
    config = {"name": "a", "model": str(copy)}
    with pytest.raises(CheckpointError, match="rendered in another way"):
        RewardReplica(config)
    (copy / "rayrm.json").unlink()
    replica = RewardReplica(config)
    assert not asyncio.run(replica.facts())["verified"]


def test_pickled_weights_are_not_served(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="no safetensors files, and a server reads no others"):
        RewardReplica({"name": "a", "model": str(tmp_path)})


def test_names_of_models_are_told_apart():
    models = [{"name": "a", "model": "x"}, {"name": "b", "aliases": ["a"], "model": "y"}]
    with pytest.raises(ConfigError, match="several models are called a"):
        build_config(RewardService, {"models": models}, "the test")


def test_requests_are_traced_below_those_of_their_clients(replica, monkeypatch):
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from rayrm.serving import guard, tracing

    assert tracing.find_tracer() is None
    exporter = InMemorySpanExporter()
    tracer = tracing.find_tracer(exporter)
    monkeypatch.setattr(guard, "find_tracer", lambda: tracer)
    client = make_client(replica)
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    client.post("/get_reward", {"query": ["good"]}, headers={"traceparent": parent, "x-request-id": "mine"})
    tracer.span_processor.force_flush()
    (span,) = exporter.get_finished_spans()
    assert (span.name, span.attributes["http.response.status_code"]) == ("/get_reward", 200)
    assert format(span.context.trace_id, "032x") in parent and format(span.parent.span_id, "016x") in parent
    assert span.attributes["rayrm.request_id"] == "mine"


def test_many_completions_of_a_prompt_are_read_in_batches_that_the_budget_holds(served_model):
    model = ServedModel.model_validate(
        {"name": "small", "model": served_model, "dtype": "float32", "token_budget": 100}
    )
    replica = RewardReplica(model.model_dump(mode="json"))
    client, sizes = make_client(replica), []
    read = replica.rewarder.read_trees
    replica.rewarder.read_trees = lambda trees: (
        sizes.append(sum(map(replica.rewarder.num_tokens, trees))) or read(trees)
    )
    texts = [f"good {number} bad" for number in range(60)]
    found = client.post("/v1/rewards", {"items": [{"prompt": PROMPT, "completions": texts}]}).json()
    rewards = load_rewarder(served_model).rewards([([{"role": "user", "content": PROMPT}], text) for text in texts])
    got = [each["reward"] for each in found["items"][0]["completions"]]
    assert got == pytest.approx([reward for reward, _ in rewards], abs=1e-5)
    assert len(sizes) > 3 and max(sizes) <= 100


def test_a_tree_that_does_not_fit_into_memory_is_read_in_halves(served_model):
    import torch

    model = ServedModel.model_validate({"name": "small", "model": served_model, "dtype": "float32"})
    replica = RewardReplica(model.model_dump(mode="json"))
    read = replica.rewarder.read_trees

    def tight(trees):
        if sum(map(len, trees)) > 2:
            raise torch.OutOfMemoryError("full")
        return read(trees)

    replica.rewarder.read_trees = tight
    body = {"items": [{"prompt": PROMPT, "completions": [*TEXTS, "one more"]}]}
    found = make_client(replica).post("/v1/rewards", body).json()["items"][0]["completions"]
    assert [each["status"] for each in found] == ["ok"] * 5


def test_conversations_are_tokenized_with_and_without_an_answer(client):
    def ids(messages):
        return client.post("/tokenize", {"messages": messages}).json()["tokens"]

    user = {"role": "user", "content": PROMPT}
    prompt, whole = ids([user]), ids([user, {"role": "assistant", "content": "good"}])
    assert whole[: len(prompt)] == prompt and len(whole) > len(prompt) > 3
    long = client.post("/tokenize", {"prompt": "good " * 200}).json()
    assert long["count"] > long["max_model_len"]
    assert client.post("/tokenize", {"messages": [user, {"role": "assistant", "content": ""}]}).status_code == 422


def test_pickled_heads_are_refused_too(served_model, tmp_path):
    import shutil

    from rayrm.models.folders import check_safetensors

    copy = shutil.copytree(served_model, tmp_path / "model")
    check_safetensors(str(copy))
    (copy / "training_args.bin").touch()
    check_safetensors(str(copy))
    (copy / "value_head.bin").touch()
    with pytest.raises(CheckpointError, match="value_head.bin"):
        check_safetensors(str(copy))
    (copy / "value_head.safetensors").touch()
    check_safetensors(str(copy))
