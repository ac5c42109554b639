"""Contracts with the clients of others: requests as they send them, replies as they read them."""

import math

import pytest
import test_gateway as base
from test_gateway import PROMPT, TEXTS

from rayrm.models.rewarder import load_rewarder

replica, client, expected = base.replica, base.client, base.expected


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


@pytest.fixture(scope="module")
def rendered(served_model):
    """The conversations as their clients render them: text with its special tokens."""
    renderer = load_rewarder(served_model).renderer
    prompt = [{"role": "user", "content": PROMPT}]
    return [renderer.prompt_text(prompt) + renderer.completion_text(prompt, text) for text in TEXTS]


@pytest.fixture(scope="module")
def ids(served_model):
    renderer = load_rewarder(served_model).renderer
    return [renderer.pair_ids([{"role": "user", "content": PROMPT}], text).ids for text in TEXTS]


def close(values):
    return pytest.approx(values, abs=1e-5)


def test_openrlhf(client, rendered, expected):
    body = {"query": rendered, "prompts": [PROMPT] * 4, "labels": [None, "42", "", "x"]}
    found = client.post("/get_reward", body).json()
    assert found["rewards"] == close(expected) and isinstance(found["extra_logs"], dict)
    # The scores are the chance that a reward is above the mean one, which filters samples; the mean is 1, the std 2.
    assert found["scores"] == close([sigmoid((reward - 1) / 2) for reward in expected])
    # A client with more servers than queries sends empty lists, and a client before 0.6 sends no labels.
    assert client.post("/get_reward", {"query": []}).json() == {"rewards": [], "scores": [], "extra_logs": {}}
    assert client.post("/get_reward", {"query": rendered[:1]}).json()["rewards"] == close(expected[:1])


@pytest.mark.parametrize(
    ("flag", "told"),
    [
        ({}, sigmoid),
        ({"use_activation": None}, sigmoid),
        ({"use_activation": True}, sigmoid),
        ({"use_activation": False}, lambda reward: reward),
        ({"activation": False}, lambda reward: reward),
    ],
)
def test_vllm_classify_as_verl_asks(client, rendered, expected, flag, told):
    body = {"model": "small", "input": rendered[0], "user": "verl", "priority": 0, **flag}
    found = client.post("/classify", body).json()
    assert found["data"][-1]["probs"][-1] == close(told(expected[0]))
    assert (found["object"], found["data"][0]["num_classes"], found["data"][0]["label"]) == ("list", 1, "LABEL_0")
    assert found["usage"]["prompt_tokens"] == found["usage"]["total_tokens"] > 10


def test_vllm_takes_lists_ids_and_messages(client, rendered, ids, expected):
    for given in (rendered, ids):
        found = client.post("/classify", {"input": given, "use_activation": False}).json()["data"]
        assert [each["probs"][0] for each in found] == close(expected)
        assert [each["index"] for each in found] == [0, 1, 2, 3]
    one = client.post("/classify", {"input": ids[1], "use_activation": False}).json()["data"]
    assert [each["probs"] for each in one] == [[close(expected[1])]]
    turns = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": TEXTS[2]}]
    found = client.post("/classify", {"messages": turns, "use_activation": False}).json()["data"]
    assert found[0]["probs"] == [close(expected[2])]
    assert client.post("/classify", {"input": []}).json()["data"] == []
    assert client.post("/classify", {"messages": turns[:1]}).status_code == 400
    assert client.post("/classify", {}).status_code == 400
    assert client.post("/classify", {"input": [5, 10**6]}).status_code == 422


def test_vllm_pooling(client, rendered, expected):
    found = client.post("/pooling", {"input": rendered, "task": "classify", "use_activation": False}).json()
    assert [each["data"] for each in found["data"]] == [[close(reward)] for reward in expected]
    assert found["data"][0]["object"] == "pooling"
    assert client.post("/pooling", {"input": rendered, "task": "token_classify"}).status_code == 400


@pytest.mark.parametrize(
    ("first", "second"), [("queries", "documents"), ("queries", "items"), ("data_1", "data_2"), ("text_1", "text_2")]
)
@pytest.mark.parametrize("path", ["/score", "/v1/score"])
def test_vllm_score(client, expected, path, first, second):
    for prompts in (PROMPT, [PROMPT], [PROMPT] * 4):
        found = client.post(path, {first: prompts, second: TEXTS, "use_activation": False}).json()["data"]
        assert [each["score"] for each in found] == close(expected)
    assert client.post(path, {first: PROMPT, second: TEXTS[0]}).json()["data"][0]["score"] == close(
        sigmoid(expected[0])
    )
    assert client.post(path, {first: [PROMPT] * 3, second: TEXTS}).status_code == 400


def test_sglang_classify_shares_its_path_with_vllm(client, rendered, ids, expected):
    for key, given in (("text", rendered), ("input_ids", ids)):
        found = client.post("/classify", {key: given, "rid": "a"}).json()
        assert [each["embedding"] for each in found] == [[close(reward)] for reward in expected]
        one = client.post("/classify", {key: given[0]}).json()
        assert one["embedding"] == [close(expected[0])] and one["meta_info"]["prompt_tokens"] == len(ids[0])


def test_embeddings_as_verl_asks_sglang(client, rendered, expected):
    found = client.post("/v1/embeddings", {"model": "small", "input": rendered[0]}).json()
    assert found["data"][-1]["embedding"][-1] == close(expected[0]) and found["object"] == "list"
    body = {"input": rendered, "encoding_format": "base64"}
    import base64
    import struct

    coded = [each["embedding"] for each in client.post("/v1/embeddings", body).json()["data"]]
    assert [struct.unpack("<f", base64.b64decode(each))[0] for each in coded] == close(expected)


def test_llama_factory(client, rendered, expected):
    found = client.post("/v1/score/evaluation", {"model": "model", "messages": rendered, "max_length": 96}).json()
    assert found["scores"] == close(expected) and found["object"] == "score.evaluation" and found["model"] == "model"


def test_slime(client, expected):
    turns = [{"role": "user", "content": PROMPT}]
    for prompt in (PROMPT, turns):
        body = {"prompt": prompt, "response": TEXTS[0], "label": {"any": 1}}
        assert client.post("/rm/slime", body).json() == {"score": close(expected[0]), "reward": close(expected[0])}
        assert client.post("/rm/slime?format=scalar", body).json() == close(expected[0])


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_rerank(client, expected, path):
    order = sorted(range(4), key=lambda index: -expected[index])
    found = client.post(path, {"model": "small", "query": PROMPT, "documents": TEXTS, "max_tokens_per_doc": 10}).json()
    assert [each["index"] for each in found["results"]] == order
    assert [each["relevance_score"] for each in found["results"]] == close([sigmoid(expected[i]) for i in order])
    documents = [{"text": text} for text in TEXTS]
    body = {"query": PROMPT, "documents": documents, "top_n": 1, "return_documents": True}
    (best,) = client.post(path, body).json()["results"]
    assert best["document"] == {"text": TEXTS[order[0]]}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/get_reward", {"query": ["fine", ""]}),
        ("/classify", {"input": ["fine", "good " * 200]}),
        ("/classify", {"text": ["fine", ""]}),
        ("/pooling", {"input": [""]}),
        ("/classify", {"input": ""}),
        ("/classify", {"text": [" "]}),
        ("/score", {"queries": PROMPT, "documents": ["fine", " "]}),
        ("/v1/embeddings", {"input": ""}),
        ("/v1/score/evaluation", {"messages": [""]}),
        ("/rm/slime", {"prompt": PROMPT, "response": ""}),
        ("/rerank", {"query": PROMPT, "documents": ["fine", ""]}),
    ],
)
def test_where_a_dialect_cannot_say_unscored_there_is_an_error_and_no_number(client, path, body):
    reply = client.post(path, body)
    assert reply.status_code == 422 and "has no reward" in reply.json()["error"]["message"]
    assert "retry-after" not in reply.headers


def test_a_bos_is_added_to_rendered_text_only_where_it_lacks_one(served_model, tmp_path):
    import asyncio
    import json
    import shutil

    from rayrm.serving.questions import Text
    from rayrm.serving.replica import RewardReplica

    copy = shutil.copytree(served_model, tmp_path / "model")
    (copy / "rayrm.json").unlink()
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    replica = RewardReplica({"name": "a", "model": str(copy), "chat_template": "none"})
    renderer = replica.rewarder.renderer
    assert settings and renderer.bos is None
    renderer.bos = renderer.tokenizer.bos_token_id
    given = [asyncio.run(replica.tokenize(Text(text)))[0] for text in ("good", f"{renderer.tokenizer.bos_token}good")]
    assert given[0] == given[1] and given[0].count(renderer.bos) == 1 and given[0][0] == renderer.bos
    # A BOS alone is no text.
    ((empty,),) = asyncio.run(replica.answer([Text("")], 10.0))
    assert (empty.reward, empty.status) == (None, "empty")


@pytest.mark.parametrize(("flag", "told"), [("truncate_prompt_tokens", "send it shorter"), ("normalize", "is gone")])
def test_flags_of_vllm_that_would_change_the_number_are_refused(client, rendered, flag, told):
    reply = client.post("/classify", {"input": rendered[0], flag: 5})
    assert reply.status_code == 400 and told in reply.json()["error"]["message"]
    assert client.post("/classify", {"input": rendered[0], flag: None}).status_code == 200


def test_sglang_may_put_what_it_posts(client, rendered, expected):
    found = client.run(client.http.put("/classify", json={"text": rendered[0]})).json()
    assert found["embedding"] == close([expected[0]])
