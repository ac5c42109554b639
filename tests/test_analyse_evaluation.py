"""The job that compares models over languages: its files, its page in a browser, and its second run."""

import csv
import re
import shutil
import subprocess

import numpy as np
import pytest

from jobs.analyse_evaluation import folder_name, main
from rayrm import files
from rayrm.errors import ConfigError, OutputExistsError, SchemaError
from rayrm.evaluation.results import JUDGE, write_results
from rayrm.scoring.base import IMPLICIT, REWARD_MODEL

LANGUAGES = ("en", "de", "uk", "zh")
MODELS = {"demo/reward-model": REWARD_MODEL, "demo/implicit-model": IMPLICIT, "demo/judge": JUDGE}
SUBSETS = ("alpacaeval-easy", "mt-bench-hard", "donotanswer", "hep-go")


def make_results(models=MODELS, num=40):
    """Rows of three models in four languages, whose rewards are random with a fixed seed."""
    rng = np.random.default_rng(0)
    rows = []
    for model, kind in models.items():
        for lang in LANGUAGES:
            for number in range(num):
                gap = float(rng.normal(1.0 if lang == "en" else 0.5))
                rows.append(
                    {
                        "model": model,
                        "model_type": kind,
                        "benchmark": "m_reward_bench",
                        "set": "m_reward_bench",
                        "id": f"row-{number}",
                        "group": f"group-{number}",
                        "lang": lang,
                        "subset": SUBSETS[number % len(SUBSETS)],
                        "num_correct": 1,
                        "rewards": None if kind == JUDGE else [gap, 0.0],
                        "lengths": [100 + number % 3, 101],
                        "credit": float(gap > 0),
                        "status": "ok",
                    }
                )
    return rows


def words(folder, *more):
    inputs = f"inputs=[{folder}/reward_models, {folder}/judges]"
    return [inputs, f"output={folder}/analysis", "bootstrap.num_resamples=50", *more]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    rows = make_results()
    write_results(str(folder / "reward_models"), [row for row in rows if row["model_type"] != JUDGE])
    write_results(str(folder / "judges"), [row for row in rows if row["model_type"] == JUDGE])
    main(words(folder, "ensembles=[[demo/reward-model, demo/implicit-model]]"))
    return folder


@pytest.fixture(scope="module")
def html(folder):
    return (folder / "analysis" / "report.html").read_text(encoding="utf-8")


def read_csv(path):
    with path.open(encoding="utf-8-sig", newline="") as handle:
        return list(csv.DictReader(handle))


def test_leaderboards_stand_in_csv_files(folder):
    lines = read_csv(folder / "analysis" / "m_reward_bench" / "leaderboard.csv")
    assert [line["model"] for line in lines] == ["demo/implicit-model", "demo/judge", "demo/reward-model"]
    scores = [float(lines[0][code]) for code in LANGUAGES[1:]]
    assert float(lines[0]["avg"]) == pytest.approx(np.mean(scores))
    assert float(lines[0]["std"]) == pytest.approx(np.std(scores, ddof=1))
    for name in ("chat", "chat-hard", "safety", "reasoning", "drops", "consistency", "ensembles", "significance"):
        assert read_csv(folder / "analysis" / "m_reward_bench" / f"{name}.csv"), name


def test_figures_are_png_and_svg_files(folder):
    names = {path.stem.removeprefix("m_reward_bench-") for path in (folder / "analysis" / "figures").iterdir()}
    assert {"heatmap", "english-drop", "resource-class", "family", "script", "kappa", "model-agreement"} <= names
    assert {"rewards", "calibration", "length-bias"} <= names
    for path in (folder / "analysis" / "figures").iterdir():
        head = path.read_bytes()[:300]
        assert head.startswith(b"\x89PNG") if path.suffix == ".png" else b"<svg" in path.read_bytes()[:600]
    svg = (folder / "analysis" / "figures" / "m_reward_bench-heatmap.svg").read_text()
    assert "http://www.w3.org/2000/svg" in svg and "currentColor" not in svg


def test_metrics_name_the_inputs_and_the_numbers(folder):
    mark = files.read_json(str(folder / "analysis" / files.RUN_MARK))
    metrics = files.read_json(str(folder / "analysis" / "metrics.json"))
    assert set(mark["inputs"]) == {"inputs.0", "inputs.1"} and mark["metrics"] == metrics
    found = metrics["m_reward_bench"]
    assert set(found["models"]) == set(MODELS)
    assert set(found["models"]["demo/reward-model"]["scores"]) == set(LANGUAGES)
    assert found["models"]["demo/judge"]["probability"] is None
    assert [item["method"] for item in found["ensembles"]] == ["mean", "worst", "uncertainty"]


def test_page_is_whole_in_itself_and_takes_its_colours(html):
    assert not re.search(r"https?://|@import|url\((?!#)|<script", html)
    assert "#010203" not in html and "currentColor" in html
    for title in ("Leaderboard", "Languages", "Agreement", "Consistency", "Length", "Ensembles", "Significance"):
        assert f"<h2>{title}" in html
    assert html.count("<svg") == 10


def test_page_in_a_browser(html, tmp_path):
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no chromium on this machine")
    path = tmp_path / "report.html"
    script = (
        "const seen = [...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect());"
        "const out = seen.filter(r => r.left < 0 || r.right > innerWidth || !r.width).length;"
        "document.title = 'width ' + document.documentElement.scrollWidth + ' texts ' + seen.length + ' out ' + out"
    )
    path.write_text(f"{html}<script>{script}</script>", encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --window-size=600,900 --dump-dom"
    command = [chromium, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", path.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    width, texts, out = map(int, re.search(r"<title>width (\d+) texts (\d+) out (\d+)</title>", dom).groups())
    assert width <= 600, "the page scrolls sideways"
    assert texts > 100 and out == 0, "labels of figures are cut off"


def test_a_second_run_does_nothing_and_other_work_is_refused(folder, caplog):
    more = "ensembles=[[demo/reward-model, demo/implicit-model]]"
    before = (folder / "analysis" / files.RUN_MARK).stat().st_mtime_ns
    main(words(folder, more))
    assert (folder / "analysis" / files.RUN_MARK).stat().st_mtime_ns == before
    with pytest.raises(OutputExistsError, match="num_top"):
        main(words(folder, more, "num_top=1"))


def test_a_run_that_was_killed_is_done_again_with_the_same_outcome(folder, tmp_path):
    copy = tmp_path / "evaluation"
    shutil.copytree(folder, copy)
    lost = [copy / "analysis" / name for name in (files.RUN_MARK, "metrics.json", "figures/m_reward_bench-kappa.svg")]
    expected = [path.read_bytes() for path in lost]
    for path in lost:
        path.unlink()
    main(words(copy, "ensembles=[[demo/reward-model, demo/implicit-model]]"))
    assert [path.read_bytes() for path in lost] == expected


def test_faults_are_told_before_a_run_is_claimed(folder, tmp_path):
    with pytest.raises(ConfigError, match="'ensembles' names 'demo/judge'"):
        main([*words(folder)[:1], f"output={tmp_path}/out", "ensembles=[[demo/judge, demo/reward-model]]"])
    with pytest.raises(SchemaError, match="holds no results.parquet"):
        main([f"inputs=[{tmp_path}]", f"output={tmp_path}/out"])
    with pytest.raises(ConfigError, match="'sets' names 'other', and the inputs hold m_reward_bench"):
        main([*words(folder)[:1], f"output={tmp_path}/out", "sets=[other]"])
    assert not (tmp_path / "out").exists()


def test_names_of_sets_make_names_of_folders():
    assert folder_name("C4AI-Community/multilingual-reward-bench") == "C4AI-Community-multilingual-reward-bench"
    assert folder_name("/") == "set"
