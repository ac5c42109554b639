"""BLEURT behind the gateway."""

import pytest
import test_gateway as base
import test_scoring
from test_gateway import Client

from rayrm.config import build_config
from rayrm.serving.bleurt import BleurtReplica
from rayrm.serving.config import RewardService, ServedBleurt
from rayrm.serving.gateway import make_app
from rayrm.serving.metrics import Metrics
from rayrm.serving.service import Service

replica, bleurt_path, scorer = base.replica, test_scoring.bleurt_path, test_scoring.scorer
REFERENCE, CANDIDATES = "das haus steht am see", ["das haus", "der see steht", "", "am see das haus steht das haus"]


@pytest.fixture(scope="module")
def client(replica, bleurt_path):
    bleurt = ServedBleurt(name="bleurt", aliases=("b",), model=bleurt_path, token_budget=40)
    values = {"models": [{"name": "small", "model": "unused"}], "bleurt": [bleurt.model_dump()]}
    config = build_config(RewardService, {**values, "gateway": {"auth": "none"}}, "the test")
    backends = {"small": replica, "bleurt": BleurtReplica(bleurt.model_dump(mode="json"))}
    return Client(make_app(Service(config.directory(), backends, Metrics()), {}))


def test_scores_are_those_of_the_offline_path(client, scorer):
    (expected,) = scorer.score([test_scoring.row(CANDIDATES, REFERENCE)])
    for name in (None, "bleurt", "b"):
        body = {"model": name, "items": [{"reference": REFERENCE, "candidates": CANDIDATES}]}
        reply = client.post("/v1/bleurt", body).json()
        (found,) = reply["items"]
        assert [each["status"] for each in found] == [status for _, status in expected] and reply["model"] == "bleurt"
        for each, (score, _) in zip(found, expected, strict=True):
            assert each["score"] == (None if score is None else pytest.approx(score, abs=1e-5))
    assert found[2]["detail"] == "there is no text"


def test_what_cannot_be_compared_is_told(client):
    body = {"items": [{"reference": " ", "candidates": ["das haus"]}, {"reference": "am see", "candidates": []}]}
    (found,), nothing = client.post("/v1/bleurt", body).json()["items"]
    assert (found["score"], found["status"], found["detail"]) == (None, "error", "the reference has no text")
    assert nothing == []
    half = client.post("/v1/bleurt", {"items": [{"reference": "am see", "candidates": ["\ud800", "see"]}]}).json()
    assert [each["status"] for each in half["items"][0]] == ["error", "ok"]


def test_each_kind_of_model_refuses_the_others_questions(client):
    reply = client.post("/v1/rewards", {"model": "bleurt", "items": [{"prompt": "a", "completions": ["b"]}]}).json()
    assert reply["items"][0]["completions"][0]["status"] == "error"
    assert "/v1/bleurt" in reply["items"][0]["completions"][0]["detail"]
    asked = {"model": "bleurt", "items": [{"prompt": "a", "completions": ["b", "c"]}], "outputs": ["tokens"]}
    told = client.post("/v1/rewards", asked).json()["items"][0]["completions"]
    assert [(each["reward"], each["tokens"]) for each in told] == [(None, [])] * 2
    body = {"model": "small", "items": [{"reference": "a", "candidates": ["b"]}]}
    (found,) = client.post("/v1/bleurt", body).json()["items"][0]
    assert (found["score"], found["status"]) == (None, "error") and "no candidates with references" in found["detail"]
    kinds = {model["id"]: model["readout"] for model in client.get("/v1/models").json()["data"]}
    assert kinds == {"small": "last_token", "bleurt": "bleurt"}
