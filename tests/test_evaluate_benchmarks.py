"""The evaluation job on copies of the benchmarks: scores recomputed by hand from the rewards, files as leaderboards read."""

import json
import math

import pytest
from test_evaluate_reward_model import reward_model  # noqa: F401
from test_evaluation_sets import PAIR, answer, copy_reward_bench, core_row, user, write

from jobs.evaluate_reward_model import main
from rayrm.errors import ConfigError, EvaluationError
from rayrm.evaluation.exporting import make_render
from rayrm.evaluation.exports import path_of
from rayrm.evaluation.results import Result, read_results, score_results, write_results
from rayrm.evaluation.sets import EvaluationSet, PreparedSets, prepare_sets
from rayrm.scoring.reward_model import RewardModelScoring
from rayrm.shards import read_table

pytestmark = pytest.mark.ray


def words(model, output, *more):
    fixed = ["reward_models.0.type=reward_model", "reward_models.0.chat_template=none", "bootstrap.num_resamples=20"]
    return [f"reward_models.0.model={model}", f"output={output}", *fixed, *more]


def read(path):
    return json.loads(path.read_text())


def pairs(num, **fields):
    rows = []
    for index in range(num):
        sides = {"chosen": "so " * (index % 3 + 1) + "on", "rejected": "no " * (index % 4 + 1) + "way"}
        rows.append({"prompt": f"Why {index}?", **sides, "id": index, **fields})
    return rows


def accuracy(rows):
    return sum(row["chosen_reward"] > row["rejected_reward"] for row in rows) / len(rows)


def test_reward_bench_is_scored_by_sections_and_prior_sets(ray_cluster, tmp_path, reward_model):  # noqa: F811
    copy = tmp_path / "copy"
    copy_reward_bench(copy)
    subsets = ("alpacaeval-easy", "mt-bench-med", "mt-bench-hard", "donotanswer", "math-prm", "hep-go")
    models = {"chosen_model": "human", "rejected_model": "machine"}
    core = [row for number, subset in enumerate(subsets) for row in pairs(7 + number, subset=subset, **models)]
    write(copy / "reward-bench" / "data" / "filtered-00000-of-00001.parquet", core)
    for number, name in enumerate(("anthropic_helpful", "shp")):
        rows = [{**row, "prompt": user(row["prompt"])} for row in pairs(5 + number, subset="none of it")]
        write(copy / "pref-test-sets" / "data" / f"{name}-00000-of-00001.parquet", rows)
    main(words(reward_model, tmp_path / "out", "benchmark=reward_bench", f"benchmark_copy={copy}"))
    rows = read_table(str(tmp_path / "out" / "rows" / "reward_model" / "preference")).to_pylist()
    assert len(rows) == len(core) + 5 + 6 + 2
    found = {row["subset"]: accuracy([r for r in rows if r["subset"] == row["subset"]]) for row in rows}
    chat = (100 * found["alpacaeval-easy"] + 40 * found["mt-bench-med"]) / 140
    reasoning = (984 * found["math-prm"] + 164 * found["hep-go"]) / 1148
    prior = sum(found[name] for name in ("anthropic_helpful", "anthropic_hhh", "shp", "summarize")) / 4
    expected = (chat + found["mt-bench-hard"] + found["donotanswer"] + reasoning + 0.5 * prior) / 4.5
    metrics = read(tmp_path / "out" / "metrics.json")["reward_model"]["reward_bench"]
    assert metrics["score"] == pytest.approx(expected)
    assert metrics["score/section/Chat"] == pytest.approx(chat)
    assert metrics["score/prior_sets"] == pytest.approx(prior)
    assert "alpacaeval-hard" in metrics["missing_subsets"]
    exports, name = tmp_path / "out" / "exports", path_of(reward_model)
    flat = read(exports / "eval-set" / f"{name}.json")
    assert flat["model"] == reward_model and flat["model_type"] == "Seq. Classifier"
    assert flat["hep-go"] == pytest.approx(found["hep-go"]) and "shp" not in flat
    assert read(exports / "pref-sets" / f"{name}.json")["shp"] == pytest.approx(found["shp"])
    scores = read(exports / "eval-set-scores" / f"{name}.json")
    # The subsets' ids are the same ones, and the files have them as they came.
    assert scores["id"][:8] == [0, 1, 2, 3, 4, 5, 6, 0]
    assert read(exports / "pref-sets-scores" / f"{name}.json")["id"][:6] == [0, 1, 2, 3, 4, 1]
    assert scores["text_chosen"][0] == "Why 0? so on</s>" and len(scores["results"]) == len(core)


def test_a_translated_benchmark_is_scored_by_language(ray_cluster, tmp_path, reward_model):  # noqa: F811
    subsets = ("alpacaeval-easy", "mt-bench-hard", "donotanswer", "hep-go")
    for number, code in enumerate(("deu_Latn", "ell_Grek")):
        rows = [row for subset in subsets for row in pairs(6 + number, subset=subset, language=code)]
        write(tmp_path / "copy" / "multilingual-reward-bench" / code / "test-00000-of-00001.parquet", rows)
    given = ["benchmark=m_reward_bench", f"benchmark_copy={tmp_path / 'copy'}", "languages=[de,el]"]
    main(words(reward_model, tmp_path / "out", *given))
    rows = read_table(str(tmp_path / "out" / "rows" / "reward_model" / "preference")).to_pylist()
    metrics = read(tmp_path / "out" / "metrics.json")["reward_model"]["m_reward_bench"]
    for lang, code, num in (("de", "deu_Latn", 6), ("el", "ell_Grek", 7)):
        own = [row for row in rows if row["lang"] == lang]
        found = [accuracy([row for row in own if row["subset"] == subset]) for subset in subsets]
        # Each section has one subset here, so its weight says nothing, and the overall score is the plain mean.
        assert metrics[f"score/{lang}"] == pytest.approx(sum(found) / 4)
        name = path_of(reward_model).replace("/", "___")
        exported = read(tmp_path / "out" / "exports" / code / f"{name}-{code}.json")
        assert exported["num_prompts"] == 4 * num
        assert exported["subset_results"] == pytest.approx(dict(zip(subsets, found, strict=True)))
        lines = (tmp_path / "out" / "exports" / code / f"{name}-{code}-all.jsonl").read_text().splitlines()
        assert json.loads(lines[0]) == {"chosen": [own[0]["chosen_reward"]], "rejected": [own[0]["rejected_reward"]]}


def test_best_of_four_and_ties(ray_cluster, tmp_path, reward_model):  # noqa: F811
    rows = [
        {"id": str(n), "prompt": f"Why {n}?", "chosen": [f"so {n}"], "rejected": ["a", "b" * n, "c"], "subset": "Math"}
        for n in range(1, 7)
    ]
    # Equal answers share the highest reward or none of them has it.
    rows.append({"id": "9", "prompt": "Why?", "chosen": ["a"], "rejected": ["a", "a", "a"], "subset": "Math"})
    for n in range(3):
        for kind, right in (("ref", ["red"]), ("tied", ["red", "blue", "green"])):
            wrong = ["cat " * (n + 1), "dog"]
            row = {"id": f"{kind}:{n}", "prompt": f"A colour {n}?", "chosen": right, "rejected": wrong}
            rows.append({**row, "subset": "Ties"})
    write(tmp_path / "copy" / "reward-bench-2" / "data" / "test-00000-of-00001.parquet", rows)
    given = ["benchmark=reward_bench_2", f"benchmark_copy={tmp_path / 'copy'}"]
    main(words(reward_model, tmp_path / "out", *given))
    scored = read_table(str(tmp_path / "out" / "rows" / "reward_model" / "best_of")).to_pylist()
    rewards = {row["id"]: row["scores"]["reward_model"] for row in scored}
    hits = [rewards[str(n)][0] == max(rewards[str(n)]) for n in range(1, 7)]
    math_score = (sum(hits) + 0.25) / 7
    results = {row["id"]: row for row in read_results(str(tmp_path / "out")).to_pylist()}
    assert results["9"]["credit"] == 0.25 and results["ref:0"]["credit"] is None
    ref = [rewards[f"ref:{n}"][0] - max(rewards[f"ref:{n}"][1:]) for n in range(3)]
    tied = [min(rewards[f"tied:{n}"][:3]) - max(rewards[f"tied:{n}"][3:]) for n in range(3)]
    spread = [max(rewards[f"tied:{n}"][:3]) - min(rewards[f"tied:{n}"][:3]) for n in range(3)]
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    both = [min(pair) for pair in zip(ref, tied, strict=True)]
    ties = 0.3 * mean([gap > 0 for gap in tied]) + 0.3 * mean([gap > 0 for gap in ref])
    ties += 0.2 * mean([gap > s for gap, s in zip(tied, spread, strict=True)])
    ties += 0.2 * mean([gap > s for gap, s in zip(both, spread, strict=True)])
    ties += 0.01 * mean([math.tanh(gap / s - 1) for gap, s in zip(both, spread, strict=True)])
    flat = read(tmp_path / "out" / "exports" / "eval-set" / f"{path_of(reward_model)}.json")
    assert flat["Math"] == pytest.approx(math_score) and flat["Ties"] == pytest.approx(ties)
    metrics = read(tmp_path / "out" / "metrics.json")["reward_model"]["reward_bench_2"]
    assert metrics["score"] is None and metrics["score/section/Math"] == pytest.approx(math_score)
    kept = read(tmp_path / "out" / "exports" / "eval-set-scores" / f"{path_of(reward_model)}.json")
    assert kept["results"][6] == 0.25 and kept["results"][-1] is None and kept["num_correct"][-1] == 3


def test_several_models_on_pairs_and_conversations(ray_cluster, tmp_path, reward_model, capsys):  # noqa: F811
    both = {"lang": "de", "subset": "a"}
    write(tmp_path / "pairs.jsonl", [{**row, **both} for row in pairs(8)])
    conversation = {"messages": user("Why?") + answer("So."), "note": "kept"}
    write(tmp_path / "talks.jsonl", [conversation, {**conversation, "messages": user("Who?") + answer("I.")}])
    given = [
        "reward_models.1.type=reward_model",
        "reward_models.1.name=plain",
        f"reward_models.1.model={reward_model}",
        "reward_models.1.chat_template=chatml",
        f"sets.0.input={tmp_path / 'pairs.jsonl'}",
        f"sets.1.input={tmp_path / 'talks.jsonl'}",
        "sets.1.name=talks",
    ]
    main(words(reward_model, tmp_path / "out", *given))
    printed = capsys.readouterr().out
    assert "plain on preferences" in printed and "Rewards of conversations" in printed
    metrics = read(tmp_path / "out" / "metrics.json")
    assert set(metrics) == {"reward_model", "plain"}
    for model in metrics:
        rows = read_table(str(tmp_path / "out" / "rows" / model / "preference")).to_pylist()
        assert metrics[model]["preferences"]["score/de"] == pytest.approx(accuracy(rows))
    # Two models of one checkpoint have files of their own.
    files_of = {
        name: tmp_path / "out" / "exports" / "talks" / f"{path_of(f'{reward_model}-{name}')}_outputs.jsonl"
        for name in metrics
    }
    assert files_of["plain"].exists()
    talks = files_of["reward_model"]
    lines = [json.loads(line) for line in talks.read_text().splitlines()]
    assert [line["note"] for line in lines] == ["kept", "kept"] and lines[0]["prompt"] == "Why?"
    scored = read_table(str(tmp_path / "out" / "rows" / "plain" / "conversation")).to_pylist()
    assert len(scored) == 2 and scored[0]["scores"]["plain"][0] is not None


@pytest.mark.parametrize(("shard_rows", "token_budget", "num_workers"), [(3, 64, 2), (50, 100000, 1)])
def test_numbers_hang_on_neither_batches_nor_workers(
    ray_cluster,
    tmp_path,
    reward_model,  # noqa: F811
    shard_rows,
    token_budget,
    num_workers,
):
    from rayrm.models.rewarder import Rendering, load_rewarder

    write(tmp_path / "pairs.jsonl", pairs(17, lang="en"))
    given = [
        f"sets.0.input={tmp_path / 'pairs.jsonl'}",
        f"shard_rows={shard_rows}",
        f"reward_models.0.token_budget={token_budget}",
        f"reward_models.0.workers.num_workers={num_workers}",
    ]
    main(words(reward_model, tmp_path / "out", *given))
    rewarder = load_rewarder(reward_model, Rendering("none"))
    results = read_results(str(tmp_path / "out")).to_pylist()
    for row, result in zip(pairs(17), results, strict=True):
        own = [rewarder.rewards([(user(row["prompt"]), row[side])])[0][0] for side in ("chosen", "rejected")]
        assert result["rewards"] == pytest.approx(own, abs=1e-5)
        assert result["credit"] == float(own[0] > own[1])


def test_results_keep_their_types_and_score_as_they_did(tmp_path):
    about = {"model": "m", "model_type": "Generative RM", "set": "s", "group": "g", "num_correct": 1}
    rows = [
        {**about, "benchmark": None, "id": "a", "lang": "de", "subset": None, "rewards": None, "lengths": [1, 2]},
        {**about, "benchmark": None, "id": "b", "lang": "de", "subset": "x", "rewards": [0.5, None], "lengths": [1, 2]},
    ]
    rows = [{**row, "credit": credit, "status": "ok"} for row, credit in zip(rows, (0.5, None), strict=True)]
    write_results(str(tmp_path), rows)
    table = read_results(str(tmp_path))
    assert table.to_pylist() == rows and table.schema.field("rewards").type == Result.columns["rewards"]
    score = score_results(rows)
    assert (score.score, score.num_rows, score.num_unscored) == (0.5, 1, 1)
    assert score_results([rows[1]]).score is None


def test_ties_in_two_languages_with_ids_of_subsets(ray_cluster, tmp_path, reward_model):  # noqa: F811
    given = ["benchmark=reward_bench_2"]
    for number, lang in enumerate(("en", "de")):
        lists = {"chosen": ["red", "blue"], "rejected": ["cat", "dog"]}
        rows = [
            {"id": kind, "prompt": f"A colour in {lang}, {subset}?", **lists, "subset": subset}
            for subset, kinds in (("Math", ("1", "2")), ("Focus", ("1",)), ("Ties", ("ref:1", "tied:1")))
            for kind in kinds
        ]
        rows[-2]["chosen"] = ["red"]
        path = write(tmp_path / f"{lang}.jsonl", rows)
        given += [f"sets.{number}.input={path}", f"sets.{number}.lang={lang}"]
    main(words(reward_model, tmp_path / "out", *given))
    results = read_results(str(tmp_path / "out")).to_pylist()
    assert {row["id"] for row in results} == {"Math/1", "Math/2", "Focus/1", "Ties/ref:1", "Ties/tied:1"}
    metrics = read(tmp_path / "out" / "metrics.json")["reward_model"]["preferences"]
    german = [row["credit"] for row in results if row["lang"] == "de" and row["subset"] == "Math"]
    # Of several languages the score is that of those that are not English.
    assert metrics["score/section/Math"] == pytest.approx(sum(german) / 2)
    for code in ("eng_Latn", "deu_Latn"):
        kept = read(tmp_path / "out" / "exports" / code / "eval-set-scores" / f"{path_of(reward_model)}.json")
        assert kept["id"] == ["1", "2", "1", "ref:1", "tied:1"]


def test_what_a_benchmark_cannot_score_is_refused_before_any_model_is_loaded(tmp_path, reward_model):  # noqa: F811
    path = write(tmp_path / "pairs.jsonl", pairs(4, subset="nothing of it"))
    given = [f"sets.0.input={path}", "benchmark=reward_bench"]
    with pytest.raises(EvaluationError, match="No row of 'preferences' in en is of a subset of reward_bench"):
        main(words(reward_model, tmp_path / "out", *given))
    with pytest.raises(ConfigError, match="m_reward_bench is not translated into sw"):
        main(words(reward_model, tmp_path / "out", "benchmark=m_reward_bench", "languages=[sw]"))
    # Both times the folder is free again.
    assert list((tmp_path / "out").iterdir()) == []


def test_conversations_that_a_template_refuses_are_exported_turn_by_turn(tmp_path, reward_model):  # noqa: F811
    template = tmp_path / "strict.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "<{{ m.content }}>{% endfor %}"
    )
    render = make_render(RewardModelScoring(model=reward_model, chat_template=str(template)))
    assert render(user("Why?"), "So.") == "<Why?><So.>" and render(user("Why?"), None) == "<Why?>"
    system = [{"role": "system", "content": "Be brief."}, *user("Why?")]
    assert render(system, "So.") == "system: Be brief.\n\nuser: Why?\n\nassistant: So."


def test_a_benchmark_that_is_not_there_is_told(tmp_path, reward_model, monkeypatch):  # noqa: F811
    with pytest.raises(ConfigError, match="There is no dataset at"):
        prepare_sets(
            PreparedSets(
                sets=[EvaluationSet(input="allenai/reward-bench", split="filtered")], output=str(tmp_path / "out")
            )
        )
    write(tmp_path / "pairs.jsonl", [core_row(1, "alpacaeval-easy") | PAIR])
    given = [f"sets.0.input={tmp_path / 'pairs.jsonl'}", f"benchmark_copy={tmp_path}"]
    with pytest.raises(ConfigError, match="benchmark_copy is read for a benchmark without sets only"):
        main(words(reward_model, tmp_path / "b", *given))
