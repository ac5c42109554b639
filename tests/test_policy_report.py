"""The page of a policy training with rewards, from the folder of a run that a formula made."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from rayrm.config import build_config, identity
from rayrm.errors import EvaluationError
from rayrm.evaluation import policy_sections
from rayrm.evaluation.policy_figures import Line, draw_changes, draw_stack, running_mean, thin
from rayrm.evaluation.policy_report import build_report, list_settings, write_policy_report
from rayrm.evaluation.policy_run import PolicyRun, Series, read_run
from rayrm.evaluation.policy_warnings import find_warnings
from rayrm.evaluation.report import render

LANGUAGES = ("en-de", "en-fr", "de-en", "en-uk")
TRAINING = {
    "type": "ppo",
    "model": "runs/sft/model",
    "held_out_fraction": 0.1,
    "scorers": [{"type": "bleurt", "model": "runs/bleurt/model"}, {"type": "grammar", "name": "grammar"}],
    "rewarding": {
        "type": "hierarchical",
        "holistic": {"scorer": "bleurt", "mean": 0.4, "std": 0.1, "shaping": "sigmoid"},
        "aspects": [{"scorer": "grammar", "weight": -0.25, "unit": "spans"}],
        "threshold": 0.5,
    },
    "kl": {"coefficient": 0.05, "target": 6.0},
}


def wave(step, turn=0.0):
    """Noise that a formula gives."""
    return math.sin(12.9898 * step + turn) * math.cos(4.1414 * step + 2 * turn)


def make_record(step, num_steps):
    x = step / num_steps
    reward = 0.3 + 0.5 * (1 - math.exp(-3 * x))
    record = {
        "step": step,
        "epoch": step / 40,
        "reward": reward + 0.05 * wave(step),
        "reward_std": 0.3,
        **{f"reward/{lang}": reward + 0.1 * i * x + 0.08 * wave(step, i) for i, lang in enumerate(LANGUAGES)},
        **{
            f"reward/length/{n}": reward + 0.1 * i + 0.04 * wave(step, i)
            for i, n in enumerate(("short", "middle", "long"))
        },
        "score/bleurt": reward + 0.1 + 0.03 * wave(step, 1),
        "score/grammar.spans": -0.1 + 0.05 * x,
        "gate_open_fraction": 0.2 + 0.5 * x + 0.03 * wave(step, 2),
        "kl": 8 * x + 0.3 * x * wave(step, 3),
        "kl_coefficient": 0.05 * (1 + 0.3 * x),
        "entropy": 2.0 - 0.8 * x + 0.02 * wave(step, 4),
        "drift": 1e-5 * (1.5 + 0.5 * wave(step, 5)),
        "drift/max": 4e-4 * (1.5 + 0.5 * wave(step, 6)),
        "drift/limit": 0.05,
        "policy_loss": -0.01,
        "value_loss": 0.3 * math.exp(-2 * x) + 0.02,
        "loss": 0.02,
        "clip_fraction": 0.05 + 0.02 * wave(step, 7),
        "value_clip_fraction": 0.1 * math.exp(-2 * x),
        "update_kl": 0.004 + 0.002 * wave(step, 8),
        "explained_variance": 0.7 * (1 - math.exp(-4 * x)) + 0.05 * wave(step, 9),
        "num_updates": 4,
        "left_out_fraction": 0.0,
        "unfinished_fraction": 0.04,
        "completion_length": 30 + 5 * x + wave(step, 10),
        "completion_length/max": 64,
        "distinct_1": 0.6 - 0.05 * x,
        "distinct_2": 0.9 - 0.1 * x,
        "lr": 1e-5,
        "num_samples": 250,
        "seconds/draw": 4.0,
        "seconds/score": 1.0,
        "seconds/scorers": 2.5,
        "seconds/wait": 5.5,
        "seconds/prepare": 1.0,
        "seconds/learn": 3.0,
        "seconds/push": 0.5,
        "step_s": 10.0,
    }
    faults = {"unscored/bleurt/overloaded": 0.02} if step % 3 == 0 else {}
    faults |= {"too_short": 0.03 if step % 2 else 0.01}
    return record | {f"left_out/{k}": v for k, v in faults.items()} | {"left_out_fraction": sum(faults.values())}


def make_evaluation(step, num_steps):
    x = step / num_steps
    found = {
        "reward": 0.25 + 0.5 * x,
        "num_samples": 128,
        "left_out_fraction": 0.0,
        "unfinished_fraction": 0.1 * (1 - x),
    }
    found |= {f"reward/{lang}": 0.25 + 0.1 * (i + 1) * x for i, lang in enumerate(LANGUAGES)}
    return {"step": step, "epoch": step / 40, **{f"eval_{name}": value for name, value in found.items()}}


def make_history(num_steps=60, every=20):
    history = [make_evaluation(0, num_steps)]
    for step in range(1, num_steps + 1):
        history.append(make_record(step, num_steps))
        if step % every == 0:
            history.append(make_evaluation(step, num_steps))
    return history


def make_sample(number, reward, text, fault=None, parts=None):
    return {
        "id": f"row-{number}/en-de/0/0",
        "lang": "en-de",
        "prompt": f"Translate sentence {number}.",
        "text": text,
        "num_tokens": len(text.split()) + 1,
        "is_finished": number != 3,
        "reward": reward,
        "parts": parts or {},
        "fault": fault,
    }


SAMPLES = [
    make_sample(0, 0.1, "ein schlechter Satz", parts={"bleurt": 0.2, "grammar.spans": -0.1}),
    make_sample(1, 0.9, "<script>alert('best')</script> & so", parts={"bleurt": 0.9}),
    make_sample(2, 0.5, "ein mittlerer Satz"),
    make_sample(3, None, "", "too_short"),
    make_sample(4, None, "ohne Wertung", "unscored/bleurt/overloaded"),
    make_sample(5, None, "ganz allein", "alone"),
]


@pytest.fixture(autouse=True)
def drawn(request, monkeypatch):
    """What would be drawn, by its label. Drawings take seconds, so they are made for those who ask for `really` only."""
    found = {}

    def draw_lines(lines, ylabel, limits=None, log=False, top=None):
        found.update({line.label: line.series for line in lines} | (limits or {}))
        return "<svg></svg>"

    def draw_stack(parts, ylabel, top=None, behind=None):
        found.update(parts)
        return "<svg></svg>"

    if "really" not in request.fixturenames:
        monkeypatch.setattr(policy_sections, "draw_lines", draw_lines)
        monkeypatch.setattr(policy_sections, "draw_stack", draw_stack)
        monkeypatch.setattr(policy_sections, "draw_changes", lambda names, *rest: f"<svg>{names}</svg>")
    return found


@pytest.fixture
def really():
    """Asked for by tests that look at real drawings."""


@pytest.fixture(scope="module")
def config():
    """What start_run writes of a real job's config."""
    from rayrm.training.ppo.settings import PPO

    return {"training": identity(build_config(PPO, TRAINING, "the test"))}


@pytest.fixture
def write(tmp_path, config):
    """Writes a run's folder and gives its path; `settings` are changes to what was set."""

    def write_run(history=None, samples=None, **settings):
        started = {
            "config": {**config, "training": {**config["training"], **settings}},
            "inputs": {"input": "run.json:0123", "training.model": "hub:someone/policy"},
        }
        (tmp_path / "started.json").write_text(json.dumps(started))
        history = make_history() if history is None else history
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in history))
        (tmp_path / "samples").mkdir(exist_ok=True)
        for step, found in (samples or {60: SAMPLES}).items():
            lines = "".join(json.dumps(sample) + "\n" for sample in found)
            (tmp_path / "samples" / f"step-{step:06d}.jsonl").write_text(lines)
        return str(tmp_path)

    return write_run


def changed(**values):
    """The history with some metrics of every training record replaced by `f(step / steps)`."""
    history = make_history()
    for record in history:
        if "reward" in record:
            record |= {name: f(record["step"] / 60) for name, f in values.items()}
    return history


def without(history, *prefixes):
    return [{k: v for k, v in record.items() if not k.startswith(prefixes)} for record in history]


def tiles_of(run):
    return {tile.label: tile for tile in build_report(run).tiles}


def titles_of(run):
    return [section.title for section in build_report(run).sections]


def tables_of(run):
    blocks = [block for section in build_report(run).sections for block in section.blocks]
    return {block.header[0]: block.rows for block in blocks if block.kind == "table"}


def test_tiles_hold_the_numbers_of_start_and_end(write):
    flat = {"kl": lambda x: 8 * x, "entropy": lambda x: 2 - x, "completion_length": lambda x: 30 + 12 * x}
    tiles = tiles_of(read_run(write(changed(**flat, drift=lambda x: 1e-5 if x < 1 else 3e-5))))
    # Means over the first and the last six of sixty records: 3.5 / 60 and 57.5 / 60.
    assert tiles["KL at the end"].value == f"{8 * 57.5 / 60:.3f}" == "7.667"
    assert (tiles["Entropy"].value, tiles["Entropy"].note) == ("1.042", "nats a token, 1.942 at the start")
    assert (tiles["Length"].value, tiles["Length"].note) == ("41.5", "tokens, 30.7 at the start")
    assert (tiles["Held-out reward"].value, tiles["Held-out reward"].note) == (
        "0.750",
        "+0.500 from 0.250 at the start",
    )
    assert (tiles["Worst drift"].value, tiles["Worst drift"].note) == ("3e-05", "nats a token, limit 0.05")
    # Two in hundred in every third step; one and three in turn.
    assert tiles["Left out"].value == f"{0.02 / 3 + 0.02:.1%}" == "2.7%"
    assert {tile.tone for tile in tiles.values()} == {"plain"}


def test_a_run_without_faults_has_no_warning(write):
    run = read_run(write())
    assert find_warnings(run) == {} and "What looks wrong" not in titles_of(run)


WRONG = {
    "distinct_2": ({"distinct_2": lambda x: 0.9 - 0.33 * x}, {"distinct_2": lambda x: 0.9 - 0.29 * x}),
    "completion_length": ({"completion_length": lambda x: 30 + 20 * x}, {"completion_length": lambda x: 30 + 14 * x}),
    "drift": ({"drift": lambda x: 0.026 if x == 0.5 else 1e-5}, {"drift": lambda x: 0.0249}),
    "entropy": ({"entropy": lambda x: 2 if x < 0.5 else 0.19}, {"entropy": lambda x: 2 if x < 0.5 else 0.21}),
    "left_out": ({"left_out_fraction": lambda x: 0.21 if x > 0.9 else 0}, {"left_out_fraction": lambda x: 0.19}),
    "truncated": ({"truncated/bleurt": lambda x: 0.03}, {"truncated/bleurt": lambda x: 0.03 if x < 0.5 else 0.01}),
    "kl": ({"kl": lambda x: -0.06 if x > 0.9 else 1}, {"kl": lambda x: -0.06 if round(60 * x) % 2 else 0.06}),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_warning_stands_where_its_condition_holds_and_only_there(write, name):
    wrong, right = WRONG[name]
    run = read_run(write(changed(**wrong)))
    assert list(find_warnings(run)) == [name]
    assert find_warnings(run)[name].replace("'", "&#39;") in render(build_report(run))
    assert find_warnings(read_run(write(changed(**right)))) == {}


def test_less_variety_and_other_lengths_are_no_warning_where_the_reward_does_not_rise(write):
    history = changed(distinct_2=lambda x: 0.9 - 0.8 * x, completion_length=lambda x: 30 + 60 * x)
    assert set(find_warnings(read_run(write(history)))) == {"distinct_2", "completion_length"}
    falling = [r | ({"eval_reward": 0.5 - r["step"] / 1000} if "eval_reward" in r else {}) for r in history]
    assert find_warnings(read_run(write(falling))) == {}


def test_completions_that_shrink_are_a_changed_length_too(write):
    found = find_warnings(read_run(write(changed(completion_length=lambda x: 30 - 15 * x))))
    assert "shorter texts as such" in found["completion_length"]


def test_filters_are_named_where_they_are_on(write, config):
    sampling = config["training"]["sampling"]
    run = read_run(write(sampling={**sampling, "top_k": 50, "top_p": 0.9, "min_tokens": 4}))
    assert run.filters == ["top_k=50", "top_p=0.9", "min_tokens=4"]
    assert (
        list(find_warnings(run)) == ["filters"] and "top_k=50, top_p=0.9, min_tokens=4" in find_warnings(run)["filters"]
    )
    assert list_settings(run)["filters that the learner does not model"] == "top_k=50, top_p=0.9, min_tokens=4"
    assert list_settings(read_run(write()))["filters that the learner does not model"] == "none"


def test_what_was_set_is_told_in_words(write):
    found = list_settings(read_run(write()))
    assert found["algorithm"] == "PPO" and found["scorers"] == "bleurt (bleurt), grammar (grammar)"
    expected = "hierarchical: 1 · sigmoid(bleurt) + -0.25 · grammar.spans; aspects count from bleurt ≥ 0.5 on"
    assert found["reward"] == expected
    assert found["divergence"] == "a nat costs 0.05, which seeks 6 nats a completion; k1, part of the reward"
    assert (found["input"], found["training.model"]) == ("run.json:0123", "hub:someone/policy")


def test_a_table_has_the_last_evaluation_by_language_against_the_first(write):
    rows = tables_of(read_run(write()))["language"]
    # The i-th language gains 0.1 · (i + 1) on 0.25.
    assert rows[0] == ["all", "0.250", "0.750", "+0.500"]
    assert rows[1] == ["de-en", "0.250", "0.550", "+0.300"] and len(rows) == 5
    history = [{k: v for k, v in r.items() if r["step"] or k != "eval_reward/de-en"} for r in make_history()]
    assert tables_of(read_run(write(history)))["language"][1] == ["de-en", "–", "0.550", "–"]


def test_limits_and_targets_are_drawn(write, drawn):
    build_report(read_run(write(max_update_kl=0.5)))
    assert (drawn["limit of the mean"], drawn["target"], drawn["updates end early"]) == (0.05, 6.0, 0.5)


def test_what_overlaps_is_not_stacked_twice(write, drawn):
    build_report(read_run(write()))
    stacked = {name: drawn.pop(name).mean for name in policy_sections.PHASES.values()}
    # 4 + 1 of the 5.5 seconds of waiting are drawing and scoring.
    assert list(stacked.values()) == [4.0, 1.0, 0.5, 1.0, 3.0, 0.5]
    build_report(read_run(write(overlap=True)))
    assert "drawing" not in drawn and drawn["waiting"].mean == 5.5


def test_seconds_of_a_step_are_told_once_and_who_waits(write):
    tables = tables_of(read_run(write()))
    rows = tables["part of a step"]
    assert [row[2] for row in rows] == ["40.0%", "10.0%", "5.0%", "10.0%", "30.0%", "5.0%", "100.0%"]
    assert rows[0] == ["drawing", "4.00", "40.0%"] and rows[2] == ["waiting", "0.50", "5.0%"]
    assert tables["who"] == [["learner", "55.0%"], ["samplers", "60.0%"], ["scorers", "75.0%"]]


def test_reasons_that_a_step_does_not_name_count_as_none(write):
    rows = tables_of(read_run(write()))["reason"]
    assert rows == [["too_short", "2.0%", "2.0%"], ["unscored/bleurt/overloaded", "0.7%", "0.7%"]]


def test_parts_that_were_not_measured_are_left_out_of_the_page(write):
    parts = {
        "Critic": ("explained_variance", "value_"),
        "Held-out reward by language": ("eval_",),
        "What was left out": ("left_out",),
        "Where the time goes": ("seconds/push",),
        "Drift between sampler and learner": ("drift",),
    }
    assert set(parts) <= set(titles_of(read_run(write())))
    for title, prefixes in parts.items():
        history = [r for r in without(make_history(), *prefixes) if len(r) > 2]
        run = read_run(write(history))
        if title != "What was left out":
            assert title not in titles_of(run)
        assert "<svg" in render(build_report(run))
    run = read_run(write(without(make_history(), "gate_")))
    assert "Open gates" not in render(build_report(run))
    assert "Reward in training" in tiles_of(read_run(write([r for r in make_history() if "reward" in r])))


@pytest.mark.parametrize("history", [[make_record(1, 60)], [make_evaluation(0, 60)], make_history(1, 1)])
def test_a_run_that_has_just_begun_has_a_page(write, really, history):
    path = write_policy_report(write(history, {1: SAMPLES[:1]}))
    page = Path(path).read_text(encoding="utf-8")
    assert path.endswith("/report.html") and "No model is saved yet" in page and "nan" not in page.lower().split()


def test_a_bare_folder_and_one_without_settings(tmp_path):
    with pytest.raises(EvaluationError, match=r"metrics.jsonl' has no records"):
        write_policy_report(str(tmp_path))
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 10, "reward": 0.5, "kl": float("nan"), "lr": None}))
    run = read_run(str(tmp_path))
    assert tiles_of(run).keys() == {"Reward in training"} and run.filters == []
    assert "Training with rewards, 10 steps." in build_report(run).lead


def test_a_finished_run_is_told_from_one_that_goes_on(write, tmp_path):
    folder = write()
    assert build_report(read_run(folder)).lead.startswith(
        "PPO with rewards from bleurt, grammar, 60 steps (1.50 epochs)."
    )
    assert "No model is saved yet" in build_report(read_run(folder)).lead
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "rayrm.json").write_text("{}")
    assert "No model is saved yet" not in build_report(read_run(folder)).lead


def test_examples_are_those_of_the_last_step_and_escaped(write, tmp_path):
    folder = write(samples={40: [make_sample(7, 5.0, "früher")], 60: SAMPLES})
    (tmp_path / "samples" / ".step-000080.jsonl.ab12.tmp").write_text("{")
    report = build_report(read_run(folder))
    cards = report.sections[-1].blocks[0].cards
    assert report.sections[-1].title == "Completions of step 60"
    assert [card.title.partition(" ·")[0] for card in cards] == ["best", "median", "worst", "too short", "unscored"]
    assert [card.texts[1][3] for card in cards] == [
        "0.900",
        "0.500",
        "0.100",
        "too_short",
        "unscored/bleurt/overloaded",
    ]
    assert cards[2].texts[2][1] == "bleurt +0.200 · grammar.spans -0.100"
    assert cards[3].texts[1][1] == "(no text)" and cards[3].title.endswith("unfinished")
    page = render(report)
    assert "<script" not in page and "&lt;script&gt;" in page and "früher" not in page


def test_many_languages_are_drawn_by_their_start_and_end(write):
    few = render(build_report(read_run(write())))
    many = [r | {f"reward/en-{i:02d}": 0.1 * i for i in range(20)} if "reward" in r else r for r in make_history()]
    page = render(build_report(read_run(write(many))))
    assert "en-07" in page and "means over the first and the last tenth" in page
    assert "means over the first and the last tenth" not in few


def test_every_figure_has_ids_of_its_own(write, really):
    ids = re.findall(r'id="([^"]+)"', render(build_report(read_run(write()))))
    assert len(ids) == len(set(ids)) > 100


def test_figures_name_what_they_draw():
    changes = draw_changes(["en-de", "en-xh"], np.array([0.1, 0.2]), np.array([0.3, 0.1]), ("before", "after"))
    assert all(word in changes for word in ("en-de", "en-xh", "before", "after"))
    series = Series(np.array([10.0, 20.0]), np.array([1.0, 2.0]))
    stack = draw_stack({"learning": series, "waiting": series}, "seconds", 5.0, Line("meanwhile", series))
    assert all(word in stack for word in ("learning", "waiting", "meanwhile", "seconds", "currentColor"))


def test_start_and_end_of_a_series_are_means_of_tenths():
    series = Series(np.arange(20.0), np.arange(20.0))
    assert (series.start, series.end, series.mean, series.last) == (0.5, 18.5, 9.5, 19.0)
    short = Series(np.arange(3.0), np.array([4.0, 5.0, 9.0]))
    assert (short.start, short.end) == (4.0, 9.0)
    none = Series(np.array([]), np.array([]))
    assert (none.start, none.end, none.mean, none.last) == (None,) * 4


def test_long_lines_are_thinned_and_smoothed():
    series = thin(Series(np.arange(8.0), np.array([1.0, 3, 5, 7, 2, 4, 6, 8])), 4)
    assert series.steps.tolist() == [0.5, 2.5, 4.5, 6.5] and series.values.tolist() == [2, 6, 3, 7]
    assert running_mean(np.array([0.0, 3, 6, 0]), 3).tolist() == [1.5, 3, 3, 3]


def test_metrics_that_are_no_numbers_are_left_out():
    records = [{"step": 1, "kl": float("nan")}, {"step": 2, "kl": None}, {"step": 3, "kl": 0.5}]
    run = PolicyRun({}, {}, records, [], [], 0, False)
    assert run.series("kl").steps.tolist() == [3] and run.num_steps == 3
