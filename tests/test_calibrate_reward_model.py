"""Mean and spread of rewards by hand, in a checkpoint's mark, and rewards told in them."""

import shutil

import pyarrow as pa
import pytest
import test_evaluate_reward_model as base

from jobs import evaluate_reward_model, score_candidates
from jobs.calibrate_reward_model import main
from rayrm import files
from rayrm.errors import CheckpointError, ConfigError, EvaluationError, OutputExistsError
from rayrm.evaluation.calibration import measure_calibration, store_calibration
from rayrm.models.readouts import Comparison
from rayrm.scoring.reward_model import (
    Calibration,
    RewardModelScorer,
    RewardModelScoring,
    Spread,
    check_reward_model,
    list_languages,
)
from rayrm.shards import read_table

reward_model = base.reward_model
message = base.message


def judged(*rows):
    """A table of (source language, target language, reward of the chosen side, reward of the rejected one)."""
    names = ("src_lang", "tgt_lang", "lang", "chosen_reward", "rejected_reward")
    rows = [dict(zip(names, (src, tgt if src else None, tgt, *rewards), strict=True)) for src, tgt, *rewards in rows]
    return pa.Table.from_pylist(rows)


def test_mean_and_spread_by_hand():
    tables = [judged(("en", "de", 1.0, 3.0), (None, "de", 5.0, None)), judged(("en", "fr", 2.0, 2.0))]
    found, num_unscored = measure_calibration(tables, "rows")
    # 1, 3, 5, 2, 2: the mean of their squares is 8.6, and 8.6 − 2.6² = 1.84.
    assert (found.mean, found.std, found.num) == pytest.approx((2.6, 1.84**0.5, 5))
    assert found.languages == {"en-de": Spread(mean=2.0, std=1.0, num=2)}
    assert found.rows == "rows" and num_unscored == 1


@pytest.mark.parametrize(
    "rows", [[], [("en", "de", None, None)], [("en", "de", 2.0, None)], [("en", "de", 0.1, 0.1)] * 9]
)
def test_rewards_without_spread_are_refused(rows):
    with pytest.raises(EvaluationError, match="no two that differ"):
        measure_calibration([judged(*rows)] if rows else [], "rows")


CALIBRATION = Calibration(mean=1.0, std=4.0, num=9, languages={"en-de": Spread(mean=-1.0, std=0.5, num=5)}, rows="x")


@pytest.fixture
def model(reward_model, tmp_path):
    """A checkpoint with a completion mark, as training saves it."""
    from rayrm.models.rewarder import Rendering, load_rewarder

    folder = str(tmp_path / "model")
    shutil.copytree(reward_model, folder)
    fingerprint = load_rewarder(folder, Rendering("none", 256)).renderer.fingerprint()
    rendering = {"chat_template": "none", "max_length": 256, "fingerprint": fingerprint}
    mark = {"digest": "0123456789abcdef", "rendering": rendering, "readout": {"type": "last_token"}}
    files.write_json(f"{folder}/rayrm.json", mark)
    return folder


def change_mark(model, **changes):
    mark = files.read_json(f"{model}/rayrm.json") | changes
    files.write_json(f"{model}/rayrm.json", {name: value for name, value in mark.items() if value is not None})


def test_a_calibration_leaves_the_rest_of_the_mark_and_the_models_identity(model):
    mark, identity = files.read_json(f"{model}/rayrm.json"), files.fingerprint(model)
    store_calibration(model, CALIBRATION)
    stored = files.read_json(f"{model}/rayrm.json")
    assert stored.pop("calibration") == {
        "mean": 1.0,
        "std": 4.0,
        "num": 9,
        "languages": {"en-de": {"mean": -1.0, "std": 0.5, "num": 5}},
        "rows": "x",
    }
    assert stored == mark and files.fingerprint(model) == identity


ROWS = [
    {
        "prompt": message("eins", "user"),
        "src_lang": src,
        "tgt_lang": tgt,
        "lang": tgt,
        "candidates": ["Hund", "", "Katze"],
    }
    for src, tgt in (("en", "de"), (None, "de"))
]


def test_rewards_are_told_in_standard_deviations_from_the_mean(model):
    store_calibration(model, CALIBRATION)
    raw, overall, by_language = (
        RewardModelScorer(RewardModelScoring(model=model, calibration=unit)).score(ROWS)
        for unit in ("none", "overall", "language")
    )
    assert raw[0] == raw[1] and raw[0][1] == (None, "empty")
    for index in (0, 2):
        reward = raw[0][index][0]
        assert overall[0][index] == overall[1][index] == (pytest.approx((reward - 1.0) / 4.0), "ok")
        assert by_language[0][index] == (pytest.approx((reward + 1.0) / 0.5), "ok")
    assert overall[0][1] == by_language[0][1] == (None, "empty")
    assert by_language[1] == [(None, "error")] * 3


def test_what_a_calibration_lacks_is_found_before_the_start(model, tmp_path):
    path = base.write_preferences(tmp_path / "in.parquet", base.preferences(4))
    assert list_languages(path) == {"en-de", "de-en"}
    by_language = RewardModelScoring(model=model, calibration="language")
    with pytest.raises(ConfigError, match=r"calibration is 'language', and '.*rayrm.json' holds none; run calibrate"):
        check_reward_model(by_language, [path])
    store_calibration(model, CALIBRATION)
    with pytest.raises(ConfigError, match="has rows of de-en, and '.*' is calibrated for en-de; calibrate it on rows"):
        check_reward_model(by_language, [path])
    check_reward_model(RewardModelScoring(model=model, calibration="overall"), [path])
    check_reward_model(by_language, [base.write_preferences(tmp_path / "de.parquet", base.preferences(1))])
    change_mark(model, calibration={"mean": 1.0, "std": 0.0, "num": 2, "languages": {}, "rows": "x"})
    with pytest.raises(ConfigError, match="'std' is 0.0"):
        check_reward_model(RewardModelScoring(model=model, calibration="overall"))
    change_mark(model, calibration=None, readout=Comparison().model_dump())
    with pytest.raises(CheckpointError, match="compares two completions"):
        check_reward_model(by_language)


def words(model, path, output, *more):
    return [f"input={path}", f"output={output}", f"reward_model.model={model}", "shard_rows=5", *more]


def test_models_that_cannot_hold_a_calibration_are_refused(model, reward_model, tmp_path):
    path = base.write_preferences(tmp_path / "in.parquet", base.preferences(4))
    given = words(model, path, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"has no completion mark rayrm.json, which holds a calibration"):
        main(words(reward_model, path, tmp_path / "out", "reward_model.chat_template=none"))
    with pytest.raises(ConfigError, match="a calibration is made of raw rewards; leave it out"):
        main([*given, "reward_model.calibration=overall"])
    with pytest.raises(ConfigError, match="names no held-out share"):
        main([*given, "split=held_out"])
    change_mark(model, readout=Comparison().model_dump())
    with pytest.raises(CheckpointError, match="compares two completions and gives a single one no reward"):
        main(given)
    assert not (tmp_path / "out").exists()


@pytest.mark.ray
def test_job_calibrates_a_checkpoint_once(model, tmp_path, ray_cluster, capsys):
    rows = base.preferences(12)
    rows[3]["rejected"] = message(" ")
    path = base.write_preferences(tmp_path / "in.parquet", rows)
    given = words(model, path, tmp_path / "out")
    main(given)
    rewarded = read_table(f"{tmp_path}/out/rows").to_pylist()
    scorer = RewardModelScorer(RewardModelScoring(model=model))
    values = {"en-de": [], "de-en": []}
    for row, result in zip(rows, rewarded, strict=True):
        sides = [{**row, "candidates": [row[side][0]["content"]]} for side in ("chosen", "rejected")]
        expected = [outcome[0][0] for outcome in scorer.score(sides)]
        assert [result["chosen_reward"], result["rejected_reward"]] == pytest.approx(expected, abs=1e-5)
        values[f"{row['src_lang']}-{row['tgt_lang']}"] += [reward for reward in expected if reward is not None]
    stored = files.read_json(f"{model}/rayrm.json")["calibration"]
    parts = {"all": stored, **stored["languages"]}
    assert parts.keys() == {"all", *values}
    for name, rewards in {"all": values["en-de"] + values["de-en"], **values}.items():
        found = parts[name]
        mean = sum(rewards) / len(rewards)
        std = (sum((reward - mean) ** 2 for reward in rewards) / len(rewards)) ** 0.5
        assert (found["mean"], found["std"]) == pytest.approx((mean, std), abs=1e-5) and found["num"] == len(rewards)
    assert stored["num"] == 23 and stored["rows"] == files.fingerprint(path)
    done = files.read_json(f"{tmp_path}/out/run.json")
    assert done["calibration"] == stored and done["num_unscored"] == 1

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.*")}
    mark = (tmp_path / "model" / "rayrm.json").stat().st_mtime_ns
    capsys.readouterr()
    main(given)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.*")} == before
    assert (tmp_path / "model" / "rayrm.json").stat().st_mtime_ns == mark
    assert "en-de" in capsys.readouterr().out
    # A run that was killed before it wrote the mark of the model.
    change_mark(model, calibration=None)
    main(given)
    assert files.read_json(f"{model}/rayrm.json")["calibration"] == stored

    with pytest.raises(EvaluationError, match=r"1 of 24 scores .* max_failed_fraction"):
        main([*given, f"output={tmp_path}/strict", "max_failed_fraction=0.01"])
    assert not (tmp_path / "strict" / "run.json").exists()


@pytest.mark.ray
def test_another_calibration_is_another_run(model, tmp_path, ray_cluster):
    store_calibration(model, CALIBRATION)
    rows = [{key: value for key, value in row.items() if key != "rejected"} for row in base.preferences(2)]
    rows = [{**row, "candidates": ["Hund", "Katze"], "lang": "de", "src_lang": "en", "tgt_lang": "de"} for row in rows]
    path = base.write_preferences(tmp_path / "in.parquet", rows)
    scoring = ["scoring.type=reward_model", f"scoring.model={model}"]
    given = [f"input={path}", f"output={tmp_path}/scored", *scoring, "scoring.calibration=language"]
    score_candidates.main(given)
    raw = RewardModelScorer(RewardModelScoring(model=model)).score(rows)
    for row, outcomes in zip(read_table(f"{tmp_path}/scored").to_pylist(), raw, strict=True):
        expected = [(reward + 1.0) / 0.5 for reward, _ in outcomes]
        assert row["scores"]["reward_model"] == pytest.approx(expected, abs=1e-4)
    score_candidates.main(given)
    store_calibration(model, CALIBRATION.model_copy(update={"mean": 2.0}))
    with pytest.raises(OutputExistsError, match=r"inputs.scoring.calibration: 'content:"):
        score_candidates.main(given)
    with pytest.raises(OutputExistsError, match=r"scoring.calibration: 'language' there, 'overall' here"):
        score_candidates.main([*given[:-1], "scoring.calibration=overall"])


def test_evaluation_and_scoring_check_the_languages_of_their_rows(model, tmp_path):
    store_calibration(model, CALIBRATION)
    path = base.write_preferences(tmp_path / "in.parquet", base.preferences(2))
    given = ["type=reward_model", f"model={model}", "calibration=language"]
    given = [f"reward_models.0.{word}" for word in given]
    with pytest.raises(ConfigError, match="has rows of de-en"):
        evaluate_reward_model.main([f"sets.0.input={path}", f"output={tmp_path}/evaluation", *given])
    assert not list((tmp_path / "evaluation").iterdir())
    candidates = [{**row, "candidates": ["Hund"]} for row in base.preferences(2)]
    path = base.write_preferences(tmp_path / "candidates.parquet", candidates)
    scoring = ["scoring.type=reward_model", f"scoring.model={model}", "scoring.calibration=language"]
    with pytest.raises(ConfigError, match="has rows of de-en"):
        score_candidates.main([f"input={path}", f"output={tmp_path}/out", *scoring])
    assert not (tmp_path / "out").exists()
