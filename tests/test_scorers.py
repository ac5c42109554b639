"""The registry of scorers: classes of other packages, the HTTP service, and what all scorers of preferences share."""

import json
import math
import os
import random
import sys
from importlib import metadata

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import test_gateway as base
from conftest import free_port
from pydantic import TypeAdapter
from test_client import Server
from test_evaluate_reward_model import kind, language_model, preferences  # noqa: F401
from test_served_kinds import serve

from jobs.evaluate_reward_model import EvaluateRewardModel
from rayrm import scoring
from rayrm.config import Config, build_config
from rayrm.errors import CheckpointError, ConfigError, SchemaError, ServiceError
from rayrm.evaluation.rewarding import RewardStage
from rayrm.evaluation.sets import prepare_sets
from rayrm.rows import Preference
from rayrm.runs import identity
from rayrm.scoring import (
    ScoreStage,
    check_preference_scoring,
    check_scoring,
    does_compare,
    load_preference_scorer,
    model_type_of,
    service,
)
from rayrm.scoring.base import Span
from rayrm.scoring.custom import CustomScoring
from rayrm.scoring.implicit import ImplicitScoring
from rayrm.scoring.length import LengthScorer, LengthScoring
from rayrm.scoring.pairwise import PairwiseScoring
from rayrm.scoring.reward_model import RewardModelScorer, RewardModelScoring
from rayrm.scoring.service import ServiceScoring
from rayrm.shards import read_table

replica = base.replica


class Holder(Config):
    scoring: scoring.PreferenceScoring


# The registry.


def test_every_scorer_of_preferences_has_a_class_and_a_check():
    tags = {variant.model_fields["type"].default for variant in scoring.PreferenceScoring.__args__[0].__args__}
    assert tags == set(scoring.PREFERENCE_SCORERS) == set(scoring.CHECKS)
    assert {type(scorer.model_type) for scorer in scoring.PREFERENCE_SCORERS.values()} == {str}


def test_an_unknown_type_is_named():
    with pytest.raises(ConfigError, match=r"'scoring\.type' is 'votes', and only .*'pairwise'.*'custom' exist"):
        build_config(Holder, {"scoring": {"type": "votes"}}, "a test")


def test_kinds_of_models_have_the_names_of_results():
    assert model_type_of(ImplicitScoring(model="a", ref_model="b")) == "DPO"
    assert model_type_of(ImplicitScoring(model="a")) == "DPO Ref. Free"
    assert model_type_of(PairwiseScoring(model="a", format="slic")) == "Custom Classifier"


@pytest.mark.parametrize("kind", ["last_token", "comparison"], indirect=True)
def test_reward_models_tell_whether_they_compare(kind):  # noqa: F811
    config = RewardModelScoring(model=kind)
    compares = kind.endswith("comparison")
    assert does_compare(config) == load_preference_scorer(config).compares == compares
    assert model_type_of(config) == ("Custom Classifier" if compares else "Seq. Classifier")
    check_preference_scoring(config)


def test_checks_are_those_of_the_type(tmp_path):
    for config in (
        RewardModelScoring(model=str(tmp_path / "no")),
        ImplicitScoring(model=str(tmp_path / "no")),
        PairwiseScoring(model=str(tmp_path / "no"), format="slic"),
    ):
        with pytest.raises(CheckpointError, match="There is no model at"):
            check_preference_scoring(config)


# Classes of other packages.

CODE = """
class Brevity:
    needs = ("anchor",)

    def __init__(self, config):
        self.longest = config.options["longest"]

    def score(self, rows):
        assert all(row["anchor"] for row in rows)
        return [[(float(self.longest - len(text)), "ok") for text in row["candidates"]] for row in rows]


class OnTopic:
    needs = ("topic",)

    def __init__(self, config):
        pass

    def score(self, rows):
        return [[(float(row["topic"] in text), "ok") for text in row["candidates"]] for row in rows]


class Handy:
    def __init__(self, config):
        pass

    def score(self, rows):
        return [[(float(len(row["tools"])), "ok") for _ in row["candidates"]] for row in rows]


class Longer:
    compares = True
    model_type = "Ruler"

    def __init__(self, config):
        pass

    def compare(self, pairs):
        return [tuple((-1.0 if size(a) > size(b) else -2.0, "ok") for a, b in (pair, pair[::-1])) for pair in pairs]


def size(row):
    return len(row["candidates"][0])


class Lazy:
    def __init__(self, config):
        pass

    def score(self, rows):
        return [[] for _ in rows]


class Marker(Lazy):
    def __init__(self, config):
        self.told = config.options["spans"]

    def spans(self, rows):
        return self.told


class Mute:
    pass


def function(config):
    return Brevity(config)
"""
POINTS = """[rayrm.scorers]
on_topic = my_scorers:OnTopic
brevity = my_scorers:Brevity
longer = my_scorers:Longer
handy = my_scorers:Handy
lazy = my_scorers:Lazy
mute = my_scorers:Mute
marker = my_scorers:Marker
function = my_scorers:function
lost = my_scorers:Lost
broken = not_there.scorers:Lost
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A folder with a package of scorers, installed in this process and in those that it starts."""
    folder = tmp_path_factory.mktemp("package")
    (folder / "my_scorers.py").write_text(CODE)
    info = folder / "my_scorers-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-scorers\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(POINTS)
    sys.path.insert(0, str(folder))
    yield str(folder)
    sys.path.remove(str(folder))


def reward(config, rows):
    return RewardStage(config, None)(Preference.conform(pa.Table.from_pylist(rows))).to_pylist()


def test_a_class_is_found_by_its_entry_point(package):
    assert "brevity" in metadata.entry_points(group="rayrm.scorers").names
    config = TypeAdapter(scoring.PreferenceScoring).validate_python(
        {"type": "custom", "name": "mine", "scorer": "brevity", "options": {"longest": 80}}
    )
    assert not does_compare(config) and model_type_of(config) == "Custom Classifier"
    rows = preferences(3, anchor="number")
    rewarded = reward(config, rows)
    for row in rewarded:
        assert row["chosen_reward"] == 80 - len(row["chosen"][0]["content"])
        assert row["rejected_reward"] == 80 - len(row["rejected"][0]["content"])
        assert row["status"] == {"mine": ["ok", "ok"]}
    # What it is told decides what comes out; where it runs does not.
    assert identity(config) == {"type": "custom", "name": "mine", "scorer": "brevity", "options": {"longest": 80}}


def test_a_class_that_compares_sees_both_sides(package):
    config = CustomScoring(scorer="longer")
    assert does_compare(config) and model_type_of(config) == "Ruler"
    rows = preferences(3)
    for row, rewarded in zip(rows, reward(config, rows), strict=True):
        is_longer = len(row["chosen"][0]["content"]) > len(row["rejected"][0]["content"])
        assert rewarded["chosen_reward"] == (-1.0 if is_longer else -2.0)


def test_an_unknown_name_lists_the_known_ones(package):
    known = "brevity, broken, function, handy, lazy, longer, lost, marker, mute, on_topic"
    with pytest.raises(ConfigError, match=rf"'shortness', and .* group 'rayrm.scorers' \(they have {known}\)"):
        check_preference_scoring(CustomScoring(scorer="shortness"))
    sys.path.remove(package)
    try:
        with pytest.raises(ConfigError, match=r"\(they have none\); install the package"):
            check_preference_scoring(CustomScoring(scorer="brevity"))
    finally:
        sys.path.insert(0, package)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("mute", r"\(my_scorers:Mute\) is no class with a method score\(rows\)"),
        ("function", r"is no class with a method score\(rows\), which a scorer with compares=False has"),
        ("lost", "does not load: AttributeError"),
        ("broken", "does not load: ModuleNotFoundError"),
    ],
)
def test_a_class_that_cannot_score_is_refused(package, name, told):
    with pytest.raises(ConfigError, match=told):
        check_preference_scoring(CustomScoring(scorer=name))


def test_a_class_that_gives_too_little_is_named(package):
    with pytest.raises(ConfigError, match=r"'lazy' gave \[0, 0\] scores for rows with \[2, 2\] candidates"):
        reward(CustomScoring(scorer="lazy"), preferences(2))


def candidates(**more):
    row = preferences(1)[0]
    return [{**row, "source": "s", "reference": "r", "anchor": "a", "candidates": ["abc", "d"], **more}]


def test_a_class_may_mark_parts_of_texts(package):
    rows = candidates()
    config = CustomScoring(scorer="marker", options={"spans": [[[[0, 2, -1.0]], None]]})
    assert load_preference_scorer(config).spans(rows) == [[[Span(0, 2, -1.0)], None]]
    for spans, told in [
        ([[[]]], r"'marker' gave spans of \[1\] texts for rows with \[2\] candidates"),
        ([[[[0, 4, -1.0]], []]], r"marks Span\(start=0, end=4, score=-1.0\) in a text of 3 characters"),
        ([[[], [[1, 0, -1.0]]]], "let start and end lie within it"),
        ([[[[0, 1, math.nan]], []]], "give a finite score"),
    ]:
        with pytest.raises(ConfigError, match=told):
            load_preference_scorer(config.model_copy(update={"options": {"spans": spans}})).spans(rows)
    with pytest.raises(ConfigError, match=r"'lazy' has no method spans\(rows\), and marks no parts"):
        load_preference_scorer(CustomScoring(scorer="lazy")).spans(rows)


def test_the_errors_of_a_grammar_are_marked_where_they_are():
    from rayrm.scoring.grammar import GrammarScorer, GrammarScoring, mark_errors

    def marked(candidate, reference):
        return [(start, end) for start, end, _ in mark_errors(candidate, reference)]

    assert marked("Das ist Haus gut.", "Das ist gut.") == [(8, 12)]
    assert marked("Die ist GUT.", "Das ist gut.") == [(0, 3)]
    assert marked("Das gut.", "Das ist sehr gut.") == [(3, 3), (3, 3)]
    assert marked("ist gut", "Das ist gut.") == [(0, 3), (7, 7)]
    assert marked("gut ist das", "das gut ist") == [(8, 11)]
    # A wrong word stands for a missing one, and only what is beyond is missing.
    assert marked("Das war.", "Das ist gut.") == [(4, 7), (7, 7)]
    scorer = GrammarScorer(GrammarScoring())
    words = ["a", "b", "c", "d", "e", "."]
    rng = random.Random(0)
    texts = [" ".join(rng.choices(words, k=rng.randint(1, 8))) for _ in range(300)]
    rows = [{"candidates": texts, "reference": "a b c a d ."}, {"candidates": ["", "a"], "reference": None}]
    (spans, none), (outcomes, _) = scorer.spans(rows), scorer.score(rows)
    for text, marks, (score, _) in zip(texts, spans, outcomes, strict=True):
        assert sum(mark.score for mark in marks) == score
        assert all(0 <= mark.start <= mark.end <= len(text) for mark in marks) and marks == sorted(marks)
    assert none == [None, None]


def test_candidates_are_scored_and_their_columns_checked(package, tmp_path):
    config = CustomScoring(scorer="brevity", options={"longest": 10})
    table = pa.Table.from_pylist(candidates())
    pq.write_table(table, tmp_path / "rows.parquet")
    check_scoring(str(tmp_path / "rows.parquet"), config)
    assert ScoreStage(config)(table)["scores"].to_pylist() == [{"custom": [7.0, 9.0]}]
    # What a scorer needs beside the columns of all, and the tools of a row, reach it too.
    (scores,) = ScoreStage(CustomScoring(scorer="on_topic"))(pa.Table.from_pylist(candidates(topic="b")))["scores"]
    assert scores.as_py() == {"custom": [1.0, 0.0]}
    (scores,) = ScoreStage(CustomScoring(scorer="handy"))(pa.Table.from_pylist(candidates(tools="[]")))["scores"]
    assert scores.as_py() == {"custom": [2.0, 2.0]}
    pq.write_table(table.drop_columns("anchor"), tmp_path / "bare.parquet")
    with pytest.raises(SchemaError, match="no column anchor"):
        check_scoring(str(tmp_path / "bare.parquet"), config)
    with pytest.raises(SchemaError, match="no column anchor, which the scorer 'brevity' needs"):
        check_preference_scoring(config, [str(tmp_path / "bare.parquet")])
    with pytest.raises(ConfigError, match="'custom' of the type 'custom' compares two completions"):
        check_scoring(str(tmp_path / "rows.parquet"), CustomScoring(scorer="longer"))


def test_evaluations_keep_the_columns_that_a_class_needs(package, tmp_path):
    row = {"prompt": "Why?", "chosen": "A dog.", "rejected": "A cat.", "topic": "dog", "note": "n"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    sets = [{"input": str(tmp_path / "rows.jsonl")}]
    scoring = CustomScoring(scorer="on_topic")
    config = EvaluateRewardModel(reward_models=[scoring], sets=sets, output=str(tmp_path / "out"))
    (prepared,) = prepare_sets(config.prepared)
    check_preference_scoring(scoring, [prepared.path])
    table = RewardStage(scoring, None)(read_table(prepared.path))
    assert (table["chosen_reward"].to_pylist(), table["rejected_reward"].to_pylist()) == ([1.0], [0.0])
    assert json.loads(table["metadata"].to_pylist()[0]) == {"note": "n"}


@pytest.mark.ray
def test_actors_find_the_class_where_it_is_installed(package, ray_cluster):
    import ray

    paths = os.pathsep.join([package, os.environ["PYTHONPATH"]])
    host = ray.remote(num_cpus=1, runtime_env={"env_vars": {"PYTHONPATH": paths}})(RewardStage)
    actor = host.remote(CustomScoring(scorer="brevity", options={"longest": 10}), None)
    rows = preferences(1, anchor="a")
    (row,) = ray.get(actor.__call__.remote(Preference.conform(pa.Table.from_pylist(rows)))).to_pylist()
    assert row["chosen_reward"] == 10 - len(rows[0]["chosen"][0]["content"])


# The HTTP service.


@pytest.fixture(scope="module")
def server(replica):
    found = Server(base.make_client(replica, {"s3cret": "me"}).http._transport.app)
    yield found
    found.stop()


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("RAYRM_API_KEY", "s3cret")


def conversations():
    rows = preferences(6)
    rows[1]["chosen"] = [*rows[1]["chosen"], {"role": "user", "content": "und"}, {"role": "assistant", "content": "ja"}]
    rows[2]["rejected"] = [{"role": "assistant", "content": " "}]
    rows[3]["rejected"] = [{"role": "assistant", "content": "Hund " * 200}]
    rows[4]["prompt"] = [{"role": "user", "content": "the cat " * 100}]
    return rows


def test_the_service_gives_what_the_model_gives_in_process(server, served_model):
    rows = conversations()
    here = reward(RewardModelScoring(model=served_model, name="service"), rows)
    there = reward(ServiceScoring(endpoint=server.url, model="tiny", batch_size=4), rows)
    for one, other in zip(here, there, strict=True):
        assert one["status"] == other["status"]
        for side in ("chosen_reward", "rejected_reward"):
            assert other[side] == (None if one[side] is None else pytest.approx(one[side], abs=1e-4))
    statuses = [word for row in there for word in row["status"]["service"]]
    assert set(statuses) == {"ok", "empty", "overlength", "truncated"}


def test_candidates_are_scored_by_the_service(server, served_model, tmp_path):
    table = pa.Table.from_pylist(candidates(candidates=["ein Hund", "", "Hund"]))
    pq.write_table(table, tmp_path / "rows.parquet")
    config = ServiceScoring(endpoint=server.url)
    check_scoring(str(tmp_path / "rows.parquet"), config)
    (scores,) = ScoreStage(config)(table)["scores"].to_pylist()
    (expected,) = RewardModelScorer(RewardModelScoring(model=served_model)).score(table.to_pylist())
    assert scores["service"] == [None if r is None else pytest.approx(r, abs=1e-4) for r, _ in expected]


def test_rewards_of_the_service_may_be_calibrated(server, served_model, tmp_path):
    rows = [
        {**candidates(candidates=["ein Hund", "", "Hund"])[0], "src_lang": None, "tgt_lang": None, "lang": lang}
        for lang in ("de", "fr")
    ]
    for unit in ("none", "overall", "language"):
        config = ServiceScoring(endpoint=server.url, calibration=unit)
        there = service.ServiceScorer(config).score(rows)
        here = RewardModelScorer(RewardModelScoring(model=served_model, calibration=unit)).score(rows)
        for one, other in zip(here, there, strict=True):
            assert [status for _, status in one] == [status for _, status in other]
            assert [r for r, _ in other] == [None if r is None else pytest.approx(r, abs=1e-4) for r, _ in one]
    assert [status for _, status in there[0]] == ["ok", "empty", "ok"]
    assert there[1] == [(None, "error")] * 3
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    with pytest.raises(ConfigError, match="has rows of fr, and 'small' at '.*' is calibrated for de; calibrate it on"):
        check_scoring(str(tmp_path / "rows.parquet"), config)
    pq.write_table(pa.Table.from_pylist(rows[:1]), tmp_path / "rows.parquet")
    check_scoring(str(tmp_path / "rows.parquet"), config)


def test_a_calibration_that_the_service_lacks_is_found_before_the_start(server, monkeypatch):
    tell(monkeypatch, calibration=None)
    with pytest.raises(ConfigError, match=r"'overall', and 'small' at '.*' tells of none; run calibrate_reward_model"):
        check_preference_scoring(ServiceScoring(endpoint=server.url, calibration="overall"))
    check_preference_scoring(ServiceScoring(endpoint=server.url))


def tell(monkeypatch, **facts):
    """Let the service tell other facts of its models."""
    models = service.AsyncRewardClient.models

    async def changed(self):
        return [{**model, **facts} for model in await models(self)]

    monkeypatch.setattr(service.AsyncRewardClient, "models", changed)


def test_rewards_of_two_revisions_are_not_mixed(server, replica, monkeypatch):
    rows = candidates()
    scorer = service.ServiceScorer(ServiceScoring(endpoint=server.url))
    assert scorer.revision == "d1"
    before = scorer.score(rows)
    with monkeypatch.context() as asleep:
        tell(asleep, revision=None)
        late = service.ServiceScorer(ServiceScoring(endpoint=server.url))
        assert late.revision is None and late.score(rows) == before and late.revision == "d1"
    monkeypatch.setattr(replica, "revision", "d2")
    told = r"'small' at '.*' was revision d1 when this run began and is d2 now, and rewards of two models must not"
    for each in (scorer, late):
        with pytest.raises(ServiceError, match=told):
            each.score(rows)
        with pytest.raises(ServiceError, match=told):
            each.compare([(rows[0], rows[0])])
    # A run that begins now takes the second one.
    assert service.ServiceScorer(ServiceScoring(endpoint=server.url)).score(rows) == before


def test_an_actor_takes_replies_of_the_revision_that_its_run_began_with_alone(server, replica, monkeypatch):
    from rayrm.training.ppo.scorers import ScorerActor, ScorerPool

    config = ServiceScoring(endpoint=server.url)
    with monkeypatch.context() as asleep:
        tell(asleep, revision=None)
        actor = ScorerActor(config, "d0")
    with pytest.raises(ServiceError, match="was revision d0 when this run began and is d1 now"):
        actor.call("score", candidates())
    with pytest.raises(ServiceError, match="'service' runs revision d1 of its model, and this run began with d0"):
        ScorerActor(config, "d0")
    assert ScorerPool([config], 1).pin({}) == {"service": "d1"}
    table = pa.Table.from_pylist(candidates())
    assert ScoreStage(config, "d1")(table)["status"].to_pylist() == [{"service": ["ok", "ok"]}]
    with pytest.raises(ServiceError, match="was revision d0 when this run began and is d1 now"):
        ScoreStage(config, "d0")(table)


def test_tools_are_sent_and_rows_whose_tools_cannot_be_fail_alone(server, monkeypatch):
    sent = []

    class Spy(service.AsyncRewardClient):
        async def _post(self, path, body, end):
            sent.append(body["items"])
            return await super()._post(path, body, end)

    monkeypatch.setattr(service, "AsyncRewardClient", Spy)
    rows = preferences(3)
    for row, tools in zip(rows, ['[{"name": "search"}]', None, "no JSON"], strict=True):
        row["tools"] = tools
    found = reward(ServiceScoring(endpoint=server.url), rows)
    assert [item["tools"] for items in sent for item in items] == [[{"name": "search"}], None]
    assert [item["lang"] for items in sent for item in items] == ["en-de", "de-en"]
    assert [row["status"]["service"] for row in found] == [["ok", "ok"], ["ok", "ok"], ["error", "error"]]


def test_a_service_that_is_not_there_is_found_out_before_the_start(server, monkeypatch):
    nowhere = ServiceScoring(endpoint=f"http://127.0.0.1:{free_port()}", timeout_s=0.5)
    with pytest.raises(ServiceError, match=r"has not answered /v1/models within 0\.5 s"):
        check_preference_scoring(nowhere)
    with pytest.raises(ConfigError, match="has no model 'other'; it has small"):
        check_preference_scoring(ServiceScoring(endpoint=server.url, model="other"))
    monkeypatch.setenv("RAYRM_API_KEY", "wrong")
    with pytest.raises(ServiceError, match=r"refuses /v1/models \(401\)"):
        check_preference_scoring(ServiceScoring(endpoint=server.url))


def test_what_is_no_reward_model_is_refused(monkeypatch):
    async def models(self):
        return [{"id": "judge", "readout": "judge"}, {"id": "asleep", "aliases": ["a"], "readout": None}]

    monkeypatch.setattr(service.AsyncRewardClient, "models", models)
    with pytest.raises(ConfigError, match="'judge' at 'http://x' is no reward model but of the kind 'judge'"):
        check_preference_scoring(ServiceScoring(endpoint="http://x"))
    config = ServiceScoring(endpoint="http://x", model="a")
    assert service.find_served(config) == ("asleep", None, None, None) and model_type_of(config) == "Seq. Classifier"


@pytest.mark.parametrize("kind", ["comparison"], indirect=True)
def test_a_model_that_compares_does_so_through_the_service(kind):  # noqa: F811
    rows = preferences(4)
    rows[1]["rejected"] = [{"role": "assistant", "content": ""}]
    rows[2]["chosen"] = [*rows[2]["chosen"], *rows[2]["prompt"], *rows[2]["chosen"]]
    here = reward(RewardModelScoring(model=kind, name="service"), rows)
    server = Server(serve(kind).http._transport.app)
    try:
        config = ServiceScoring(endpoint=server.url)
        assert does_compare(config) and model_type_of(config) == "Custom Classifier"
        there = reward(config, rows)
        with pytest.raises(ConfigError, match="of the type 'service' compares two completions"):
            check_scoring(write_rows_of(kind, candidates()), config)
    finally:
        server.stop()
    # Reports are written when the service may be gone.
    assert does_compare(config) and model_type_of(config) == "Custom Classifier"
    assert [row["status"] for row in there] == [row["status"] for row in here]
    assert [row["status"]["service"][0] for row in there] == ["ok", "empty", "error", "ok"]
    for one, other in zip(here, there, strict=True):
        for side in ("chosen_reward", "rejected_reward"):
            assert other[side] == (None if one[side] is None else pytest.approx(one[side], abs=1e-4))


def write_rows_of(folder, rows):
    path = f"{folder}/rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_chances_near_one_stay_finite():
    from rayrm.scoring.service import _sides

    (sure, _), (unsure, _) = _sides(1.0, "ok")
    assert sure == 0.0 and unsure == pytest.approx(-53 * math.log(2))
    assert _sides(0.25, "ok") == ((pytest.approx(math.log(0.25)), "ok"), (pytest.approx(math.log(0.75)), "ok"))
    assert _sides(None, "empty") == ((None, "empty"), (None, "empty"))


def test_an_endpoint_is_an_address():
    with pytest.raises(ConfigError, match=r"endpoint' is 'localhost'"):
        build_config(Holder, {"scoring": {"type": "service", "endpoint": "localhost"}}, "a test")


def test_length_is_scored_by_what_the_source_lets_expect():
    scorer = LengthScorer(build_config(LengthScoring, {"ratios": {"en-de": 1.5}}, "the test"))
    row = {
        "source": "four",
        "src_lang": "en",
        "tgt_lang": "de",
        "candidates": ["123456", " 123 ", "123456789012", " ", None],
    }
    outcomes = scorer.score([row, {**row, "tgt_lang": "fr", "candidates": ["1234"]}, {**row, "source": None}])
    assert [score for score, _ in outcomes[0][:3]] == pytest.approx([0, -math.log(2), -math.log(2)])
    assert outcomes[0][3:] == [(None, "empty"), (None, "empty")] and outcomes[1] == [(pytest.approx(0), "ok")]
    assert outcomes[2][0] == (None, "error")
