"""Result files as RewardBench and M-RewardBench write them: names, keys, values."""

import json
from pathlib import Path

import fsspec
import pytest

from rayrm.errors import ConfigError
from rayrm.evaluation.benchmarks import BestOf
from rayrm.evaluation.exports import (
    Evaluated,
    Measured,
    ScoredPair,
    ScoredText,
    flat_name,
    path_of,
    write_best_of_scores,
    write_eval_set,
    write_eval_set_scores,
    write_pairs,
    write_texts,
    write_translated_pairs,
    write_translated_verdicts,
)

MODEL = Evaluated("org/model", chat_template="tokenizer")


def pair(number, chosen, rejected, **metadata):
    return ScoredPair(f"r{number}", "hep-go", f"P{number}", f"P{number} c", f"P{number} r", chosen, rejected, metadata)


PAIRS = [pair(0, 2.0, 1.0, chosen_model="a"), pair(1, 1.0, 1.0), pair(2, 0.5, -1.0), pair(3, None, 1.0)]


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def found(folder):
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}


@pytest.mark.parametrize("output", ["out", "out/"])
def test_preference_set(tmp_path, output):
    paths = write_pairs(f"{tmp_path}/{output}", MODEL, PAIRS, {"hep-go": 2 / 3})
    assert found(tmp_path) == {
        "out/org/model_outputs.jsonl",
        "out/org/model_all.jsonl",
        "out/org/model.json",
    }
    outputs, both, summary = paths
    assert lines(outputs)[0] == {
        "prompt": "P0",
        "results": 1,
        "scores_chosen": 2.0,
        "scores_rejected": 1.0,
        "text_chosen": "P0 c",
        "text_rejected": "P0 r",
        "chosen_model": "a",
    }
    assert [row["results"] for row in lines(outputs)] == [1, 0, 1, None]
    assert [row["scores_chosen"] for row in lines(outputs)] == [2.0, 1.0, 0.5, None]
    assert lines(both) == [
        {"chosen": [2.0], "rejected": [1.0]},
        {"chosen": [1.0], "rejected": [1.0]},
        {"chosen": [0.5], "rejected": [-1.0]},
        {"chosen": [None], "rejected": [1.0]},
    ]
    assert json.loads(Path(summary).read_text()) == {
        "accuracy": pytest.approx(2 / 3),
        "num_prompts": 3,
        "model": "org/model",
        "ref_model": None,
        "tokenizer": "org/model",
        "chat_template": "tokenizer",
        "extra_results": {"hep-go": pytest.approx(2 / 3)},
    }


def test_another_set_has_no_extra_results(tmp_path):
    evaluated = Evaluated("org/model", "DPO", ref_model="org/base", tokenizer="org/words")
    summary = json.loads(Path(write_pairs(str(tmp_path), evaluated, PAIRS[3:], None)[2]).read_text())
    assert (summary["ref_model"], summary["tokenizer"]) == ("org/base", "org/words")
    assert summary["extra_results"] is None
    assert (summary["accuracy"], summary["num_prompts"]) == (None, 0)


def test_metadata_stands_last_and_replaces_nothing(tmp_path):
    row = pair(0, 2.0, 1.0, results="mine", zeta="ž", at=Path("/x"))
    text = Path(write_pairs(str(tmp_path), MODEL, [row], None)[0]).read_text()
    own = ["prompt", "results", "scores_chosen", "scores_rejected", "text_chosen", "text_rejected"]
    assert list(json.loads(text)) == [*own, "zeta", "at"]
    assert json.loads(text)["results"] == 1
    assert json.loads(text)["zeta"] == "ž" and json.loads(text)["at"] == "/x"


def test_scores_that_are_not_finite_are_null(tmp_path):
    outputs, both, _ = write_pairs(str(tmp_path), MODEL, [pair(0, float("nan"), float("inf"))], None)
    assert (lines(outputs)[0]["scores_chosen"], lines(outputs)[0]["scores_rejected"]) == (None, None)
    assert lines(both) == [{"chosen": [None], "rejected": [None]}]


def test_instruction_set_has_rewards_as_results(tmp_path):
    texts = [ScoredText("P", "P A", -0.5, {"source": "s"}), ScoredText("Q", "Q B", None, {})]
    path = write_texts(str(tmp_path), MODEL, texts)
    assert found(tmp_path) == {"org/model_outputs.jsonl"}
    assert lines(path) == [
        {"prompt": "P", "results": -0.5, "text": "P A", "source": "s"},
        {"prompt": "Q", "results": None, "text": "Q B"},
    ]


def test_half_a_character_does_not_stop_a_file(tmp_path):
    path = write_texts(str(tmp_path), MODEL, [ScoredText("P", "\ud83d", 1.0, {})])
    assert lines(path)[0]["text"] == "\ud83d"


@pytest.mark.parametrize(("folder", "name"), [("eval-set", "hep-go"), ("pref-sets", "shp")])
def test_leaderboard_files(tmp_path, folder, name):
    path = write_eval_set(str(tmp_path), MODEL, {name: 0.5}, folder)
    write_eval_set_scores(str(tmp_path), MODEL, PAIRS, folder)
    assert found(tmp_path) == {f"{folder}/org/model.json", f"{folder}-scores/org/model.json"}
    text = Path(path).read_text()
    about = {"model": "org/model", "model_type": "Seq. Classifier", "chat_template": "tokenizer"}
    assert json.loads(text) == {**about, name: 0.5}
    assert text == json.dumps(json.loads(text), indent=4, sort_keys=True)
    assert json.loads((tmp_path / f"{folder}-scores" / "org" / "model.json").read_text()) == {
        **about,
        "text_chosen": ["P0 c", "P1 c", "P2 c", "P3 c"],
        "text_rejected": ["P0 r", "P1 r", "P2 r", "P3 r"],
        "results": [1, 0, 1, None],
        "subset": ["hep-go"] * 4,
        "id": ["r0", "r1", "r2", "r3"],
        "scores_chosen": [2.0, 1.0, 0.5, None],
        "scores_rejected": [1.0, 1.0, -1.0, 1.0],
    }


def test_dpo_files_name_the_reference(tmp_path):
    evaluated = Evaluated("org/policy", "DPO", ref_model="org/base", chat_template="tulu")
    assert json.loads(Path(write_eval_set(str(tmp_path), evaluated, {})).read_text()) == {
        "model": "org/policy",
        "model_type": "DPO",
        "chat_template": "tulu",
        "ref_model": "org/base",
    }
    free = write_eval_set(str(tmp_path), Evaluated("org/policy", "DPO Ref. Free"), {"Math": 1.0})
    assert json.loads(Path(free).read_text())["ref_model"] is None
    write_eval_set_scores(str(tmp_path), Evaluated("org/policy", "DPO Ref. Free"), PAIRS)
    assert found(tmp_path) == {
        "eval-set/org/policy.json",
        "eval-set/org/policy_ref_free.json",
        "eval-set-scores/org/policy_ref_free.json",
    }


def test_best_of_n_files_have_lists_and_the_revision(tmp_path):
    evaluated = Evaluated("org/model", chat_template="tokenizer", revision="step-9")
    rows = [
        BestOf("17", "Math", 1, [2.0, 2.0, 1.0, 0.0]),
        BestOf("18", "Math", 1, [2.0, None, 1.0, 0.0]),
        BestOf("tied:1", "Ties", 2, [2.0, 3.0, 1.0]),
    ]
    texts = [("P r", "P a", "P b", "P c"), ("Q r", "Q a", "Q b", "Q c"), ("T r", "T s", "T w")]
    path = write_best_of_scores(str(tmp_path), evaluated, rows, texts)
    write_eval_set(str(tmp_path), evaluated, {"Ties": 1.01})
    assert found(tmp_path) == {"eval-set-scores/org/model-step-9.json", "eval-set/org/model-step-9.json"}
    assert json.loads(Path(path).read_text()) == {
        "model": "org/model-step-9",
        "model_type": "Seq. Classifier",
        "chat_template": "tokenizer",
        "text": [list(answers) for answers in texts],
        "scores": [[2.0, 2.0, 1.0, 0.0], [2.0, None, 1.0, 0.0], [2.0, 3.0, 1.0]],
        "results": [0.5, None, None],
        "subset": ["Math", "Math", "Ties"],
        "id": ["17", "18", "tied:1"],
        "num_correct": [1, 1, 2],
    }
    with pytest.raises(ValueError, match="shorter"):
        write_best_of_scores(str(tmp_path), evaluated, rows, texts[:2])


@pytest.mark.parametrize(
    ("dataset", "is_benchmark"), [("C4AI-Community/multilingual-reward-bench", True), ("org/maple", False)]
)
def test_reward_model_on_a_translated_set(tmp_path, dataset, is_benchmark):
    measured = Measured(dataset, "deu_Latn", {"hep-go": 2 / 3}, {"Reasoning": 2 / 3})
    summary, both = write_translated_pairs(str(tmp_path), MODEL, measured, PAIRS)
    assert found(tmp_path) == {"org___model-deu_Latn.json", "org___model-deu_Latn-all.jsonl"}
    accuracies = {"hep-go": pytest.approx(2 / 3)}
    assert json.loads(Path(summary).read_text()) == {
        "accuracy": pytest.approx(2 / 3),
        "num_prompts": 3,
        "model": "org/model",
        "ref_model": None,
        "tokenizer": "org/model",
        "chat_template": "tokenizer",
        "extra_results": accuracies if is_benchmark else None,
        "subset_results": accuracies,
    }
    assert lines(both)[2] == {"chosen": [0.5], "rejected": [-1.0]}


def test_judge_on_a_translated_set(tmp_path):
    judge = Evaluated("openai/gpt", "Generative RM", chat_template="raw")
    sections = {"Chat": None, "Chat Hard": 0.25, "Safety": 0.0, "Reasoning": 0.5}
    measured = Measured("C4AI-Community/multilingual-reward-bench", "kor_Hang", {"hep-go": 0.5}, sections)
    path = write_translated_verdicts(str(tmp_path), judge, measured, [1.0, 0.0, 0.5, None])
    assert found(tmp_path) == {"openai___gpt-kor_Hang.json"}
    text = Path(path).read_text()
    assert json.loads(text) == {
        "dataset": "C4AI-Community/multilingual-reward-bench",
        "model": "openai/gpt",
        "chat_template": "raw",
        "scores": {"accuracy": 0.5, "num_correct": 1.5, "num_total": 3, "results": [1.0, 0.0, 0.5, None]},
        "leaderboard": {"Chat": 0, "Chat Hard": 0.25, "Safety": 0.0, "Reasoning": 0.5},
        "subset": {"model": "openai/gpt", "model_type": "Generative RM", "chat_template": "raw", "hep-go": 0.5},
    }
    assert text == json.dumps(json.loads(text), indent=4)


@pytest.mark.parametrize(
    ("model", "path"),
    [
        ("org/model", "org/model"),
        ("model", "model"),
        ("/data/runs/model/", "data/runs/model"),
        ("../runs/./a/../model", "runs/a/model"),
        ("s3://bucket/runs/model", "bucket/runs/model"),
    ],
)
def test_no_model_name_leads_out_of_the_output(tmp_path, model, path):
    assert path_of(model) == path
    assert flat_name(model, "deu_Latn") == f"{path.replace('/', '___')}-deu_Latn"
    output = tmp_path / "a" / "b"
    evaluated = Evaluated(model)
    write_pairs(str(output), evaluated, PAIRS, None)
    write_eval_set(str(output), evaluated, {})
    written = {f"{path}_outputs.jsonl", f"{path}_all.jsonl", f"{path}.json", f"eval-set/{path}.json"}
    assert found(output) == written
    assert len(found(tmp_path)) == len(written)
    assert json.loads((output / f"{path}.json").read_text())["model"] == model


@pytest.mark.parametrize("model", ["", "/", "../..", "s3://"])
def test_a_model_without_a_name_is_an_error(model):
    with pytest.raises(ConfigError, match="has no name to call a file by"):
        path_of(model)


def test_files_are_replaced_and_go_to_buckets():
    output = "memory://exports/results/"
    for pairs in (PAIRS, PAIRS[:1]):
        paths = write_pairs(output, MODEL, pairs, None)
    fs = fsspec.filesystem("memory")
    assert {path.removeprefix("/exports/results/") for path in fs.find("/exports/results")} == {
        "org/model_outputs.jsonl",
        "org/model_all.jsonl",
        "org/model.json",
    }
    assert paths[2] == "memory://exports/results/org/model.json"
    assert json.loads(fs.cat("/exports/results/org/model.json"))["num_prompts"] == 1
    assert len(fs.cat("/exports/results/org/model_outputs.jsonl").splitlines()) == 1
