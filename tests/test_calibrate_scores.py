"""Mean and spread of scores by hand, and compositions that read them."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import test_gateway as base
from test_client import Server

from jobs.calibrate_scores import main
from jobs.score_candidates import main as score_candidates
from rayrm import files
from rayrm.composing import Composition, read_constants, with_constants
from rayrm.errors import ConfigError, EvaluationError, OutputExistsError, SchemaError
from rayrm.evaluation.scores import measure_scores
from rayrm.rewarding import RewardingConfig
from rayrm.scoring.bleurt import BleurtScoring
from rayrm.scoring.custom import CustomScoring
from rayrm.scoring.grammar import GrammarScoring
from rayrm.scoring.identity import check_calibrations, check_calibrations_of_rows, identify
from rayrm.scoring.length import LengthScoring
from rayrm.scoring.reward_model import RewardModelScoring, Spread
from rayrm.scoring.service import ServiceScoring

replica = base.replica


def scored(*rows):
    """A table of (source language, language, candidates, scores by scorer)."""
    base = {"group": "g", "prompt": [{"role": "user", "content": "p"}], "status": None}
    return pa.Table.from_pylist(
        [
            {
                **base,
                "id": str(i),
                "src_lang": src,
                "tgt_lang": src and lang,
                "lang": lang,
                "candidates": c,
                "scores": s,
            }
            for i, (src, lang, c, s) in enumerate(rows)
        ]
    )


ROWS = [
    ("en", "de", ["a", "abc"], {"h": [1.0, 3.0], "g": [0.0, -2.0]}),
    ("en", "fr", ["ab", "ab"], {"h": [2.0, 2.0], "g": [-1.0, None]}),
    (None, "de", ["abcdefg"], {"h": [float("nan")], "g": [-1.0]}),
]


def test_mean_and_spread_by_hand():
    found = measure_scores([scored(*ROWS[:1]), scored(*ROWS[1:])], "rows")
    h, g = found.scores["h"], found.scores["g"]
    assert (h.mean, h.std, h.num) == (2.0, pytest.approx(0.5**0.5), 4)
    assert h.languages == {"en-de": Spread(mean=2.0, std=1.0, num=2)}
    assert (g.mean, g.std, g.num) == (-1.0, pytest.approx(0.5**0.5), 4)
    assert found.num_unscored == {"h": 1, "g": 1}


@pytest.mark.parametrize("scores", [[None, None], [1.0, None], [0.1, 0.1]])
def test_scores_without_spread_are_refused(scores):
    num = sum(score is not None for score in scores)
    rows = scored(("en", "de", ["a", "bc"], {"h": scores, "g": [1.0, 2.0]}))
    with pytest.raises(
        EvaluationError, match=rf"{num} scores of 'h' \({2 - num} more are null\) and no two that differ"
    ):
        measure_scores([rows], "rows")


def test_no_rows_are_no_calibration():
    with pytest.raises(EvaluationError, match="There are no scores to measure"):
        measure_scores([], "rows")


@pytest.fixture
def path(tmp_path):
    pq.write_table(scored(*ROWS), tmp_path / "rows.parquet")
    return str(tmp_path / "rows.parquet")


def test_job_writes_what_compositions_read(path, tmp_path, capsys):
    given = [f"input={path}", f"output={tmp_path}/calibration"]
    main(given)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["h", "all", "4", "2.0000", "0.7071"] in lines and ["g", "en-de", "2", "-1.0000", "1.0000"] in lines
    done = files.read_json(f"{tmp_path}/calibration/run.json")
    assert done["num_unscored"] == {"h": 1, "g": 1}
    assert done["scores"]["h"]["rows"] == done["inputs"]["input"] == files.fingerprint(path)
    assert read_constants(f"{tmp_path}/calibration", "g") == (-1.0, pytest.approx(0.5**0.5))
    part = {"scorer": "h", "calibration": f"{tmp_path}/calibration"}
    config = RewardingConfig.model_validate({"composition": {"holistic": part}})
    found = with_constants(config.composition).holistic
    assert (found.mean, found.std) == (2.0, pytest.approx(0.5**0.5))
    # Once more it tells the same and measures nothing; other rows are another run.
    before = (tmp_path / "calibration" / "run.json").stat().st_mtime_ns
    main(given)
    assert (tmp_path / "calibration" / "run.json").stat().st_mtime_ns == before
    assert ["h", "all", "4", "2.0000", "0.7071"] in [line.split() for line in capsys.readouterr().out.splitlines()]
    pq.write_table(scored(*ROWS[:2]), path)
    with pytest.raises(OutputExistsError, match="inputs.input"):
        main(given)


def test_rows_without_scores_are_refused(tmp_path):
    def run(table):
        pq.write_table(table, tmp_path / "in.parquet")
        main([f"input={tmp_path}/in.parquet", f"output={tmp_path}/out"])

    table = scored(*ROWS)
    with pytest.raises(SchemaError, match="it lacks scores"):
        run(table.drop_columns("scores"))
    with pytest.raises(SchemaError, match="is double, and scores are a struct"):
        run(table.set_column(table.column_names.index("scores"), "scores", pa.array([1.0, 2.0, 3.0])))
    with pytest.raises(SchemaError, match="The scores 'h' of '.*' are list<.*string>"):
        run(scored(("en", "de", ["a"], {"h": ["good"]})))
    assert not (tmp_path / "out").exists()


# Whose scores they are.


def composition(calibration, *names):
    parts = [{"scorer": name, "calibration": calibration} for name in names]
    return Composition.model_validate({"type": "aspect_only", "aspects": parts})


def calibrate(folder, **scorers):
    known = {name: {"mean": 0.0, "std": 1.0, "num": 9, "languages": {}, "rows": "x"} for name in scorers}
    files.write_json(f"{folder}/run.json", {"scores": known, "scorers": scorers})
    return str(folder)


def test_a_calibration_of_another_scorer_is_refused(tmp_path):
    for name in ("one", "same", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "weights").write_text("other" if name == "other" else "one")
    made = {name: BleurtScoring(name="h", model=str(tmp_path / name)) for name in ("one", "same", "other")}
    path = calibrate(tmp_path / "made", h=identify(made["one"]), g=identify(GrammarScoring(name="g")))
    # The same weights at another place are the same scorer, and where it runs does not matter.
    moved = made["same"].model_copy(update={"token_budget": 1, "name": "h"})
    check_calibrations(composition(path, "h", "g"), [moved, GrammarScoring(name="g")])
    told = r"The calibration of 'h' in '.*made' was measured with another scorer \({}\); score the samples with this sc"
    for scorer, differing in [
        (made["other"], r"inputs\.model: '[0-9a-f]+' there, '[0-9a-f]+' here"),
        (made["one"].model_copy(update={"max_length": 64}), "max_length: None there, 64 here"),
        (GrammarScoring(name="h"), "type: 'bleurt' there, 'grammar' here"),
        (CustomScoring(name="h", scorer="x"), "type: 'bleurt' there, 'custom' here"),
    ]:
        with pytest.raises(ConfigError, match=told.format(differing)):
            check_calibrations(composition(path, "h"), [scorer])
    numbers = {"type": "aspect_only", "aspects": [{"scorer": "h", "mean": 1.0, "std": 2.0}]}
    check_calibrations(Composition.model_validate(numbers), [made["other"]])


def test_a_run_with_another_scorer_does_not_start(tmp_path, path, monkeypatch):
    from rayrm.training.launch import TrainingWorkers
    from rayrm.training.ppo import scorers
    from rayrm.training.ppo.settings import PPO

    monkeypatch.setattr(scorers.cluster, "require_total", lambda *asked: None)
    table = pq.read_table(path).drop_columns(["scores", "status", "candidates"])
    pq.write_table(table.append_column("source", pa.array(["x"] * 3)), path)
    made = calibrate(tmp_path / "made", h=identify(LengthScoring(name="h")))
    for ratios in ({}, {"en-de": 2.0}):
        training = PPO.model_validate(
            {
                "model": "x",
                "scorers": [{"type": "length", "name": "h", "ratios": ratios}],
                "rewarding": {"holistic": {"scorer": "h", "calibration": made}},
            }
        )
        if not ratios:
            scorers.check_rewarded(training, path, TrainingWorkers())
            continue
        with pytest.raises(ConfigError, match=r"another scorer \(ratios: {} there, {'en-de': 2.0} here\)"):
            scorers.check_rewarded(training, path, TrainingWorkers())


def test_rows_of_another_scorer_than_the_calibration_are_refused(tmp_path):
    path = calibrate(tmp_path / "made", h=identify(LengthScoring(name="h")), g=identify(GrammarScoring(name="g")))
    files.write_json(f"{tmp_path}/rows/run.json", {"scorers": {"h": identify(GrammarScoring(name="h"))}})
    with pytest.raises(ConfigError, match=r"was measured with another scorer \(type: 'length' there, 'grammar' here\)"):
        check_calibrations_of_rows(composition(path, "h"), f"{tmp_path}/rows")
    check_calibrations_of_rows(composition(path, "g"), f"{tmp_path}/rows")
    check_calibrations_of_rows(composition(calibrate(tmp_path / "old"), "h"), f"{tmp_path}/rows")


def test_a_calibration_that_does_not_say_whose_it_is_is_refused(tmp_path):
    path = calibrate(tmp_path)
    with pytest.raises(ConfigError, match="does not say which scorer its calibration of 'g' was measured with"):
        check_calibrations(composition(path, "g"), [GrammarScoring(name="g")])


def test_a_served_model_has_the_calibration_that_was_measured_in_process(replica, served_model, tmp_path, monkeypatch):
    path = calibrate(tmp_path, h=identify(RewardModelScoring(name="h", model=served_model)))
    server = Server(base.make_client(replica).http._transport.app)
    try:
        service = ServiceScoring(name="h", endpoint=server.url)
        assert identify(service)["type"] == "reward_model" and identify(service)["inputs"] == {"model": "d1"}
        check_calibrations(composition(path, "h"), [service])
        other = calibrate(
            tmp_path / "other", h=identify(RewardModelScoring(name="h", model=served_model, prompt="from_anchor"))
        )
        with pytest.raises(ConfigError, match="prompt: 'from_anchor' there, 'as_is' here"):
            check_calibrations(composition(other, "h"), [service])
        with pytest.raises(ConfigError, match="calibration: 'none' there, 'overall' here"):
            check_calibrations(composition(path, "h"), [service.model_copy(update={"calibration": "overall"})])
        monkeypatch.setattr(replica, "revision", "d2")
        with pytest.raises(ConfigError, match=r"inputs\.model: 'd1' there, 'd2' here"):
            check_calibrations(composition(path, "h"), [service])
    finally:
        server.stop()


@pytest.mark.ray
def test_what_scored_is_told_from_job_to_job(path, tmp_path, ray_cluster, caplog):
    table = scored(*ROWS).drop_columns(["scores", "status"])
    pq.write_table(table.append_column("source", pa.array(["x"] * 3)), path)
    one, two = {"type": "length", "name": "l"}, {"type": "length", "name": "m", "ratios": {"en-de": 1.5}}
    before = path
    for index, scoring in enumerate((one, two)):
        values = [f"scoring.{key}={json.dumps(value)}" for key, value in scoring.items()]
        output = f"{tmp_path}/scored-{index}"
        score_candidates([f"input={before}", f"output={output}", "max_failed_fraction=1", *values])
        before = output
    main([f"input={before}", f"output={tmp_path}/calibration"])
    scorers = files.read_json(f"{tmp_path}/calibration/run.json")["scorers"]
    assert {name: (told["type"], told["ratios"]) for name, told in scorers.items()} == {
        "l": ("length", {}),
        "m": ("length", {"en-de": 1.5}),
    }
    check_calibrations(composition(f"{tmp_path}/calibration", "l"), [LengthScoring(name="l")])
    with pytest.raises(ConfigError, match=r"ratios.* there, .* here"):
        check_calibrations(composition(f"{tmp_path}/calibration", "m"), [LengthScoring(name="m")])
