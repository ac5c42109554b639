"""BLEURT behind the gateway."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import test_gateway as base
import test_scoring
from test_client import Server
from test_gateway import Client

from rayrm import files
from rayrm.client import Reference, RewardClient
from rayrm.config import build_config
from rayrm.errors import ConfigError, SchemaError, ServiceError
from rayrm.scoring import ScoreStage, check_preference_scoring, check_scoring
from rayrm.scoring.service import ServiceScorer, ServiceScoring, find_revision
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


# As a scorer over HTTP.


@pytest.fixture(scope="module")
def server(client):
    found = Server(client.http._transport.app)
    yield found
    found.stop()


def rows_of(tmp_path, *references):
    base = {"id": "1", "group": "g", "anchor": None, "src_lang": "en", "tgt_lang": "de", "lang": "de", "subset": "s"}
    prompt = [{"role": "user", "content": "p"}]
    rows = [
        {**base, "prompt": prompt, "source": "s", "reference": text, "candidates": CANDIDATES} for text in references
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    return pq.read_table(tmp_path / "rows.parquet")


def test_a_served_bleurt_scores_as_the_one_in_process(server, scorer, bleurt_path, tmp_path):
    table = rows_of(tmp_path, REFERENCE, "am see", None)
    expected = scorer.score(table.to_pylist())
    config = ServiceScoring(endpoint=server.url, model="b", name="b", batch_size=2)
    check_scoring(str(tmp_path / "rows.parquet"), config)
    scored = ScoreStage(config)(table)
    for scores, status, outcomes in zip(
        scored["scores"].to_pylist(), scored["status"].to_pylist(), expected, strict=True
    ):
        assert scores["b"] == [None if score is None else pytest.approx(score, abs=1e-5) for score, _ in outcomes]
        assert status["b"] == [word for _, word in outcomes]
    assert status["b"] == ["error", "error", "empty", "error"]
    assert find_revision(config) == files.fingerprint(bleurt_path).partition(":")[2]


def test_a_served_bleurt_needs_references_and_rewards_no_preferences(server, tmp_path):
    config = ServiceScoring(endpoint=server.url, model="bleurt")
    table = rows_of(tmp_path, REFERENCE)
    pq.write_table(table.drop_columns("reference"), tmp_path / "bare.parquet")
    with pytest.raises(SchemaError, match="has no column reference, which the scorer 'service' compares with"):
        check_scoring(str(tmp_path / "bare.parquet"), config)
    with pytest.raises(ConfigError, match="'bleurt' at '.*' is no reward model but of the kind 'bleurt'"):
        check_preference_scoring(config)
    overall = ServiceScoring(endpoint=server.url, model="bleurt", calibration="overall")
    with pytest.raises(ConfigError, match="calibration is 'overall', and the model at '.*' is BLEURT, which has none"):
        check_scoring(str(tmp_path / "rows.parquet"), overall)


def test_a_bleurt_that_is_asleep_is_known_and_woken_up(replica, bleurt_path, tmp_path, monkeypatch):
    bleurt = ServedBleurt(name="bleurt", model=bleurt_path, token_budget=40, replicas={"min_replicas": 0})
    config = build_config(RewardService, {"bleurt": [bleurt.model_dump()], "gateway": {"auth": "none"}}, "the test")
    awake = BleurtReplica(bleurt.model_dump(mode="json"))
    asleep = Server(make_app(Service(config.directory(), {"bleurt": awake}, Metrics()), {}))
    try:
        scoring = ServiceScoring(endpoint=asleep.url)
        rows_of(tmp_path, REFERENCE)
        check_scoring(str(tmp_path / "rows.parquet"), scoring)
        found = ServiceScorer(scoring)
        assert (found.revision, found.needs) == (None, ("reference",))
        assert find_revision(scoring) == awake.revision
        row = {"reference": REFERENCE, "candidates": ["das haus"], "lang": "de"}
        assert found.score([row])[0][0][1] == "ok" and found.revision == awake.revision
        monkeypatch.setattr(awake, "revision", "next")
        with pytest.raises(ServiceError, match="'bleurt' at '.*' was revision .* when this run began and is next now"):
            found.score([row])
        with RewardClient(asleep.url) as client:
            ((only,),) = client.bleurt([Reference(REFERENCE, ["das haus"])])
            assert only.status == "ok" and client._client.revision == "next"
    finally:
        asleep.stop()
