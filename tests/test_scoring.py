"""Candidates → Scored, with a tiny BLEURT model and with scorers made up here."""

import json
import math
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from jobs.score_candidates import ScoreCandidates, main
from rayrm import scoring
from rayrm.config import build_config
from rayrm.errors import CheckpointError, ConfigError, EvaluationError, SchemaError
from rayrm.rows import Candidates, Scored
from rayrm.runs import transform_rows
from rayrm.scoring import ScoreStage, check_scoring
from rayrm.scoring.bleurt import BleurtScorer, BleurtScoring
from rayrm.shards import read_table

WORDS = ["ein", "das", "haus", "hund", "katze", "rot", "blau", "läuft", "steht", "am", "see"]
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]


@pytest.fixture(scope="module")
def bleurt_path(tmp_path_factory):
    from rayrm.models.bleurt import new_bleurt, save_bleurt

    path = str(tmp_path_factory.mktemp("scorer"))
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = new_bleurt(vocab_size=len(VOCAB), max_position_embeddings=24, initializer_range=0.4, **sizes)
    save_bleurt(model, VOCAB, path)
    return path


@pytest.fixture(scope="module")
def scorer(bleurt_path):
    return BleurtScorer(BleurtScoring(model=bleurt_path))


def row(candidates, reference="das haus steht am see", name="r"):
    return {
        "id": name,
        "group": name,
        "prompt": [{"role": "user", "content": "Translate"}],
        "source": "the house",
        "reference": reference,
        "lang": "de",
        "candidates": candidates,
    }


def candidates_table(rows):
    return Candidates.conform(pa.Table.from_pylist(rows))


def write_candidates(path, num_rows, per_row=3):
    rows = []
    for i in range(num_rows):
        texts = [
            " ".join(WORDS[(i * 5 + j * 3 + k) % len(WORDS)] for k in range(2 + (i + j) % 5)) for j in range(per_row)
        ]
        rows.append(row(texts, " ".join(WORDS[(i + k) % len(WORDS)] for k in range(4)), f"r{i:03d}"))
    path.mkdir()
    pq.write_table(candidates_table(rows), path / "rows.parquet")
    return rows


# --- the scorer -----------------------------------------------------------------------------------------------------


def test_one_score_for_each_candidate(scorer):
    texts = ["das haus", "rot", "das haus"]
    ((first, second, third),) = scorer.score([row(texts)])
    assert first == third
    assert first[0] != second[0]
    assert [first[1], second[1]] == ["ok", "ok"]
    assert scorer.score([row([])]) == [[]]
    assert scorer.score([row(None)]) == [[]]


def test_equal_pairs_are_scored_once(scorer):
    seen = []
    hook = scorer.model.register_forward_pre_hook(
        lambda _, __, inputs: seen.append(len(inputs["input_ids"])), with_kwargs=True
    )
    scorer.score([row(["rot", "blau", "rot"]), row(["blau"]), row(["blau"], reference="ein hund")])
    hook.remove()
    # (das haus …, rot), (das haus …, blau), (ein hund, blau)
    assert sum(seen) == 3


def test_scores_do_not_hang_on_the_company(scorer):
    alone = [scorer.score([row([text])])[0][0] for text in ("das haus", "rot blau rot blau rot")]
    (together,) = scorer.score([row(["das haus", "rot blau rot blau rot", *WORDS])])
    for one, other in zip(alone, together, strict=False):
        assert one[0] == pytest.approx(other[0], abs=1e-5)


def test_what_cannot_be_scored_is_null_with_its_status(scorer):
    assert scorer.score([row(["", None, " \n"])]) == [[(None, "empty")] * 3]
    assert scorer.score([row(["rot"], reference=None), row(["rot", ""], reference=" ")]) == [
        [(None, "error")],
        [(None, "error"), (None, "empty")],
    ]


def test_a_pair_over_the_bound_is_truncated_but_scored(bleurt_path):
    short = BleurtScorer(BleurtScoring(model=bleurt_path, max_length=8))
    ((fits, cut),) = short.score([row(["rot", "rot blau"], reference="das haus am see")])  # 3 + 4 + 1 and 3 + 4 + 2
    assert [fits[1], cut[1]] == ["ok", "truncated"]
    # The reference is the longer side and loses its last word.
    ((expected,),) = short.score([row(["rot blau"], reference="das haus am")])
    assert cut[0] == pytest.approx(expected[0], abs=1e-6)


def test_a_score_that_is_no_number_is_null(bleurt_path):
    broken = BleurtScorer(BleurtScoring(model=bleurt_path))
    broken.model.classifier.bias.data.fill_(math.nan)
    assert broken.score([row(["rot"])]) == [[(None, "nan")]]


def test_max_length_beyond_the_model_is_an_error(bleurt_path):
    with pytest.raises(ConfigError, match="only 24 positions"):
        BleurtScorer(BleurtScoring(model=bleurt_path, max_length=25))


# --- the stage ------------------------------------------------------------------------------------------------------


class Lengths:
    """Scores a candidate by its number of letters."""

    def __init__(self, config):
        pass

    def score(self, rows):
        return [[(float(len(text)), "ok") for text in row["candidates"] or []] for row in rows]


class Lazy(Lengths):
    def score(self, rows):
        return [[] for _ in rows]


def make_stage(monkeypatch, cls, name):
    monkeypatch.setitem(scoring.SCORERS, "bleurt", cls)
    return ScoreStage(BleurtScoring(model="none", name=name))


def test_stage_adds_scores_and_keeps_those_of_others(monkeypatch):
    table = candidates_table([row(["a", "bcd"], name="x"), row([], name="y")])
    once = make_stage(monkeypatch, Lengths, "one")(table)
    twice = make_stage(monkeypatch, Lengths, "two")(once.drop_columns(["_shard", "_kept", "_dropped"]))
    assert once["scores"].to_pylist() == [{"one": [1.0, 3.0]}, {"one": []}]
    assert twice["scores"].to_pylist() == [{"one": [1.0, 3.0], "two": [1.0, 3.0]}, {"one": [], "two": []}]
    assert twice["status"].to_pylist()[0] == {"one": ["ok", "ok"], "two": ["ok", "ok"]}


def test_stage_leaves_dropped_rows_alone_and_types_an_empty_table(monkeypatch):
    table = candidates_table([row(["a"], name="x"), row(["bb"], name="y"), row(["ccc"], name="z")])
    table = table.append_column("_kept", pa.array([True, False, True]))
    stage = make_stage(monkeypatch, Lengths, "n")
    assert stage(table)["scores"].to_pylist() == [{"n": [1.0]}, {"n": None}, {"n": [3.0]}]
    assert stage(table.slice(0, 0)).schema.field("scores").type == pa.struct([("n", pa.list_(pa.float64()))])


def test_stage_refuses_lists_of_another_length(monkeypatch):
    with pytest.raises(RuntimeError, match="0 scores for 1 texts"):
        make_stage(monkeypatch, Lazy, "n")(candidates_table([row(["a"])]))


# --- checks before the start ----------------------------------------------------------------------------------------


def test_unknown_scorer_is_named():
    with pytest.raises(ConfigError, match=r"'scoring\.type' is 'comet', and only .*'bleurt'.*'reward_model'.* exist"):
        build_config(ScoreCandidates, {"input": "a", "output": "b", "scoring": {"type": "comet"}}, "a test")


def test_every_scorer_of_the_union_has_a_class():
    tags = {variant.model_fields["type"].default for variant in scoring.Scoring.__args__[0].__args__}
    assert tags == set(scoring.SCORERS)


def test_missing_model_reference_and_taken_name(tmp_path, bleurt_path):
    write_candidates(tmp_path / "in", 2)
    path = str(tmp_path / "in")
    with pytest.raises(CheckpointError, match="There is no model at"):
        check_scoring(path, BleurtScoring(model=str(tmp_path / "nothing")))
    with pytest.raises(CheckpointError, match=r"holds no model, for it has no config\.json"):
        check_scoring(path, BleurtScoring(model=path))
    with pytest.raises(CheckpointError, match="neither a folder 'no/where' nor a model of that name on the hub"):
        check_scoring(path, BleurtScoring(model="no/where"))

    table = pq.read_table(tmp_path / "in" / "rows.parquet")
    (tmp_path / "bare").mkdir()
    pq.write_table(table.drop_columns("reference"), tmp_path / "bare" / "rows.parquet")
    with pytest.raises(SchemaError, match="no column reference"):
        check_scoring(str(tmp_path / "bare"), BleurtScoring(model=bleurt_path))

    (tmp_path / "scored").mkdir()
    scored = table.append_column("scores", pa.array([{"bleurt": [0.5] * 3}] * 2))
    pq.write_table(scored, tmp_path / "scored" / "rows.parquet")
    with pytest.raises(ConfigError, match="scores named 'bleurt' already"):
        check_scoring(str(tmp_path / "scored"), BleurtScoring(model=bleurt_path))
    check_scoring(str(tmp_path / "scored"), BleurtScoring(model=bleurt_path, name="second"))


# --- the job --------------------------------------------------------------------------------------------------------


@pytest.mark.ray
def test_job_scores_every_row_once(tmp_path, bleurt_path, scorer, ray_cluster):
    rows = write_candidates(tmp_path / "in", 10)
    rows[4]["candidates"][1] = ""
    pq.write_table(candidates_table(rows), tmp_path / "in" / "rows.parquet")
    words = [f"input={tmp_path / 'in'}", f"output={tmp_path / 'out'}", "shard_rows=4"]
    words += ["scoring.type=bleurt", f"scoring.model={bleurt_path}"]
    main(words)
    written = {r["id"]: r for r in read_table(str(tmp_path / "out")).to_pylist()}
    assert sorted(written) == [r["id"] for r in rows]
    for r, outcomes in zip(rows, scorer.score(rows), strict=True):
        found = written[r["id"]]
        assert found["candidates"] == r["candidates"]
        assert found["status"]["bleurt"] == [status for _, status in outcomes]
        assert found["scores"]["bleurt"] == pytest.approx([score for score, _ in outcomes], abs=1e-5)
    mark = json.loads((tmp_path / "out" / "run.json").read_text())
    assert mark["counts"]["status"] == {"bleurt": {"empty": 1, "ok": 29}}
    assert mark["config"]["scoring"]["name"] == "bleurt"

    main([*words[:1], f"output={tmp_path / 'more'}", *words[2:], f"input={tmp_path / 'out'}", "scoring.name=again"])
    again = {r["id"]: r for r in read_table(str(tmp_path / "more")).to_pylist()}
    assert set(again["r000"]["scores"]) == {"bleurt", "again"}
    with pytest.raises(EvaluationError, match="1 of 30 scores"):
        main([*words[:1], f"output={tmp_path / 'strict'}", *words[2:], "max_failed_fraction=0.01"])


@pytest.mark.ray
def test_committed_shards_are_never_scored_again(tmp_path, bleurt_path, ray_cluster):
    """The model itself counts what it sees; the first run breaks in its third shard."""
    rows = write_candidates(tmp_path / "in", 16)
    config = ScoreCandidates(
        input=str(tmp_path / "in"),
        output=str(tmp_path / "out"),
        shard_rows=4,
        scoring=BleurtScoring(model=bleurt_path, workers={"num_cpus": 0.5}),
    )

    class Counting(ScoreStage):
        def __init__(self, config, log, breaks_at):
            super().__init__(config)
            self.log, self.breaks_at, self.calls = log, breaks_at, 0
            self.scorer.model.register_forward_pre_hook(self.count, with_kwargs=True)

        def count(self, _model, _args, inputs):
            self.calls += 1
            if self.calls == self.breaks_at:
                raise RuntimeError("the machine broke")
            with open(self.log, "a") as handle:
                handle.write(f"{len(inputs['input_ids'])}\n")

    def run(log, breaks_at):
        def stage(dataset):
            args = (config.scoring, str(log), breaks_at)
            pool = config.scoring.workers.pool()
            return dataset.map_batches(
                Counting, fn_constructor_args=args, batch_format="pyarrow", batch_size=None, **pool
            )

        return transform_rows(config, Candidates, Scored, stage)

    with pytest.raises(Exception, match="the machine broke"):
        run(tmp_path / "first.log", breaks_at=3)
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("shard-*.parquet")}
    assert 0 < len(done) < 4
    mark = run(tmp_path / "second.log", breaks_at=None)

    def pairs_seen(log):
        return sum(int(line) for line in log.read_text().splitlines())

    kept = sum(pq.read_metadata(path).num_rows for path in done)
    # The actor may take the fourth shard before the run ends.
    assert pairs_seen(tmp_path / "first.log") in (2 * 4 * 3, 3 * 4 * 3)
    assert pairs_seen(tmp_path / "second.log") == (16 - kept) * 3
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert mark["counts"]["written"] == 16
    assert sorted(read_table(str(tmp_path / "out"))["id"].to_pylist()) == [r["id"] for r in rows]

    calls = partial(run, tmp_path / "third.log", None)
    calls()
    assert not (tmp_path / "third.log").exists()
