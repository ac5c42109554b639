"""Mean and spread of scores by hand, and compositions that read them."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.calibrate_scores import main
from rayrm import files
from rayrm.composing import read_constants, with_constants
from rayrm.errors import EvaluationError, OutputExistsError, SchemaError
from rayrm.evaluation.scores import measure_scores
from rayrm.rewarding import RewardingConfig
from rayrm.scoring.reward_model import Spread


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
