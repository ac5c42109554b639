"""Models of every kind of readout behind the gateway give what the offline path gives."""

import pytest
from test_evaluate_reward_model import kind, language_model  # noqa: F401
from test_gateway import make_client

from rayrm.models.rewarder import load_rewarder
from rayrm.serving.config import ServedModel
from rayrm.serving.replica import RewardReplica

PROMPT, TEXTS = "Which one is it?", ["the first one", "another one, which is longer", "it"]


def serve(path):
    served = ServedModel.model_validate({"name": "small", "model": path, "dtype": "float32"})
    return make_client(RewardReplica(served.model_dump(mode="json")))


@pytest.mark.parametrize("kind", ["ratings", "steps", "gated"], indirect=True)
def test_rewards_and_their_parts(kind):  # noqa: F811
    client, rewarder = serve(kind), load_rewarder(kind)
    expected = [r for r, _ in rewarder.rewards([([{"role": "user", "content": PROMPT}], text) for text in TEXTS])]
    body = {"items": [{"prompt": PROMPT, "completions": TEXTS}], "outputs": ["ratings", "raw"]}
    found = client.post("/v1/rewards", body).json()["items"][0]["completions"]
    assert [each["reward"] for each in found] == pytest.approx(expected, abs=1e-5)
    assert all(each["status"] == "ok" and each["raw"] for each in found)
    if kind.endswith("ratings"):
        assert set(found[0]["ratings"]) == set(rewarder.readout.names)
    rendered = client.post("/get_reward", {"query": [PROMPT]})
    assert rendered.status_code == (422 if kind.endswith("gated") else 200)


@pytest.mark.parametrize("kind", ["comparison"], indirect=True)
def test_a_model_that_compares_answers_pairs_and_rewards_nothing(kind):  # noqa: F811
    client, rewarder = serve(kind), load_rewarder(kind)
    prompt = [{"role": "user", "content": PROMPT}]
    ((gap, _),) = rewarder.compare([(prompt, TEXTS[0], TEXTS[1])])
    pairs = [
        {"prompt": PROMPT, "first": a, "second": b} for a, b in [TEXTS[:2], TEXTS[1::-1], ["a", "\ud800"], ["a", ""]]
    ]
    first, turned, half, empty = client.post("/v1/rewards/pairs", {"pairs": pairs}).json()["pairs"]
    assert first["probability"] == pytest.approx(1 / (1 + 2.718281828459045**-gap), abs=1e-5)
    assert first["probability"] + turned["probability"] == pytest.approx(1, abs=1e-5)
    assert (half["better"], half["status"]) == (None, "error") and "surrogate" in half["detail"]
    assert (empty["better"], empty["status"]) == (None, "empty")
    body = {"items": [{"prompt": PROMPT, "completions": TEXTS[:1]}]}
    (refused,) = client.post("/v1/rewards", body).json()["items"][0]["completions"]
    assert refused["reward"] is None and "ask for pairs" in refused["detail"]
