"""The evaluation job with a small reward model: rows, metrics, page, splits, failures."""

import json
import math
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import score_candidates
from jobs.evaluate_reward_model import EvaluateRewardModel, main
from rayrm import files
from rayrm.config import load_config
from rayrm.errors import CheckpointError, ConfigError, EvaluationError, OutputExistsError, SchemaError
from rayrm.evaluation.benchmarks import pair_credit
from rayrm.evaluation.exports import path_of
from rayrm.evaluation.results import read_results
from rayrm.evaluation.rewarding import RewardStage, Split, find_split, keep_held_out
from rayrm.models.readouts import Comparison, Gated, LastToken, Ratings, Steps
from rayrm.rows import Preference
from rayrm.scoring.reward_model import RewardModelScoring
from rayrm.shards import read_table
from rayrm.splits import is_held_out


def message(text, role="assistant"):
    return [{"role": role, "content": text}]


def preferences(num=12, **more):
    rows = []
    for index in range(num):
        src, tgt = [("en", "de"), ("de", "en")][index % 2]
        row = {
            "id": f"r{index}",
            "group": f"g{index}",
            "prompt": message(f"Translate number {index}.", "user"),
            "chosen": message("ein Hund läuft" + " schnell" * (index % 3)),
            "rejected": message("Hund" + " Hund" * (index % 4)),
            "margin": 1.0,
            "src_lang": src,
            "tgt_lang": tgt,
            "lang": tgt,
            "subset": None,
        }
        rows.append({**row, **more})
    return rows


def write_preferences(path, rows):
    table = pa.Table.from_pylist(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        table.set_column(table.column_names.index("subset"), "subset", table["subset"].cast(pa.string())), path
    )
    return str(path)


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    """A reward model of 2 layers with random weights, over single characters."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

    letters = [
        "<pad>",
        "<s>",
        "</s>",
        "<unk>",
        *"abcdefghijklmnopqrstuvwxyzäöüABCDEFGHIJKLMNOPQRSTUVWXYZ .,!?0123456789\n",
    ]
    model = models.WordLevel({letter: index for index, letter in enumerate(letters)}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(letters),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        num_labels=1,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    folder = tmp_path_factory.mktemp("evaluated")
    LlamaForSequenceClassification(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return str(folder)


def words(model, path, output, *more):
    fixed = ["reward_models.0.type=reward_model", "reward_models.0.chat_template=none", "bootstrap.num_resamples=50"]
    inputs = [f"sets.0.input={path}", f"output={output}", f"reward_models.0.model={model}", "shard_rows=5"]
    return [*inputs, *fixed, *more]


def test_split_comes_from_the_checkpoint(tmp_path):
    with pytest.raises(ConfigError, match="names no held-out share"):
        find_split(str(tmp_path))
    mark = {"config": {"training": {"held_out_fraction": 0.25, "seed": 7}}}
    files.write_json(f"{tmp_path}/rayrm.json", mark)
    assert find_split(str(tmp_path)) == Split(0.25, 7)


def test_held_out_rows_are_kept():
    split = Split(0.5, 3)
    kept = {f"g{i}" for i in range(200) if keep_held_out({"group": f"g{i}"}, split) == ({}, [])}
    assert kept == {f"g{i}" for i in range(200) if is_held_out(f"g{i}", 0.5, 3)}
    assert 60 < len(kept) < 140
    assert keep_held_out({"group": "g"}, Split(0.0, 3)) == (None, ["trained_on"])


def test_bad_names_and_paths_are_named(tmp_path, reward_model):
    path = write_preferences(tmp_path / "in.parquet", preferences(2))
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match=r"'sets.0.name' is 'a/b'"):
        main(words(reward_model, path, out, "sets.0.name=a/b"))
    with pytest.raises(ConfigError, match="several reward models are called 'reward_model'"):
        main(words(reward_model, path, out, "reward_models.1.type=reward_model", "reward_models.1.model=m"))
    with pytest.raises(ConfigError, match="there is nothing to evaluate on; set benchmark or sets"):
        main([f"output={out}", "reward_models.0.type=reward_model", f"reward_models.0.model={reward_model}"])
    with pytest.raises(ConfigError, match="there is no language xx"):
        main(words(reward_model, path, out, "languages=[xx]"))
    with pytest.raises(CheckpointError, match="no model at"):
        main(words(str(tmp_path / "a" / "nothing"), path, out))
    with pytest.raises(CheckpointError, match="has no chat template; set chat_template"):
        main(words(reward_model, path, out, "reward_models.0.chat_template=null"))
    assert not out.exists()
    with pytest.raises(ConfigError, match="names no held-out share"):
        main(words(reward_model, path, out, "split=held_out"))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"id": "a", "group": "b"}\n')
    with pytest.raises(SchemaError, match=r"no columns chosen and rejected, or messages.*found id \(string\), group"):
        main(words(reward_model, prompts, out))
    # Nothing was done, and another config may have the folder.
    assert list(out.iterdir()) == []


def test_sets_and_models_are_inputs():
    from rayrm.runs import input_paths

    overrides = ["output=b", "reward_models.0.type=reward_model", "reward_models.0.model=m"]
    sets = ["sets.0.input=a", "sets.1.input=c", "sets.1.name=grammar"]
    assert input_paths(load_config(EvaluateRewardModel, None, [*overrides, *sets])) == {
        "sets.0.input": "a",
        "reward_models.0.model": "m",
        "sets.1.input": "c",
    }


@pytest.fixture(scope="module")
def evaluated(ray_cluster, tmp_path_factory, reward_model):
    """A finished evaluation on two sets: the words that made it, and its folder."""
    folder = tmp_path_factory.mktemp("evaluation")
    rows = preferences(12)
    rows[3]["rejected"] = message("x" * 300)
    rows.append({**rows[0], "id": "empty", "chosen": message(" ")})
    path = write_preferences(folder / "in.parquet", rows)
    other = write_preferences(folder / "other.parquet", preferences(4))
    argv = words(reward_model, path, folder / "out", "sets.1.name=grammar", f"sets.1.input={other}")
    main(argv)
    return argv, folder / "out"


ROWS = "rows/reward_model/preference"


@pytest.mark.ray
def test_job_writes_rows_metrics_and_page(evaluated):
    _, out = evaluated
    rewarded = read_table(str(out / ROWS)).to_pylist()
    assert [(row["set"], row["id"]) for row in rewarded] == [("preferences", f"r{i}") for i in range(12)] + [
        ("grammar", f"r{i}") for i in range(4)
    ]
    assert rewarded[3]["rejected_reward"] is None
    assert rewarded[3]["status"] == {"reward_model": ["ok", "overlength"]}
    metrics = json.loads((out / "metrics.json").read_text())
    assert set(metrics) == {"reward_model"} and set(metrics["reward_model"]) == {"preferences", "grammar"}
    found = metrics["reward_model"]["preferences"]
    scored = [row for row in rewarded[:12] if row["rejected_reward"] is not None]
    hits = sum(row["chosen_reward"] > row["rejected_reward"] for row in scored)
    assert found["num_rows"] == 11
    assert found["num_unscored"] == 1
    assert found["accuracy"] == found["score"] == pytest.approx(hits / 11)
    assert metrics["reward_model"]["grammar"]["num_rows/en-de"] == 2
    mark = json.loads((out / "run.json").read_text())
    assert mark["metrics"] == metrics
    assert set(mark["inputs"]) == {"sets.0.input", "sets.1.input", "reward_models.0.model"}
    (counts, _) = json.loads((out / "sets" / "run.json").read_text())["sets"].values()
    assert counts["dropped"] == {"empty_content": 1}
    page = (out / "report.html").read_text()
    assert "grammar" in page and "empty_content" in page


@pytest.mark.ray
def test_results_and_exports_tell_the_same(evaluated, reward_model):
    _, out = evaluated
    results = read_results(str(out)).to_pylist()
    rewarded = read_table(str(out / ROWS)).to_pylist()
    for result, row in zip(results, rewarded, strict=True):
        assert result["rewards"] == [row["chosen_reward"], row["rejected_reward"]]
        assert result["credit"] == pair_credit(row["chosen_reward"], row["rejected_reward"])
        assert result["lengths"] == [len(row["chosen"][0]["content"]), len(row["rejected"][0]["content"])]
        assert (result["model"], result["model_type"]) == ("reward_model", "Seq. Classifier")
    assert results[3]["credit"] is None and results[3]["status"] == "overlength"
    lines = (out / "exports" / "grammar" / f"{path_of(reward_model)}_outputs.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    assert len(lines) == 4 and first["scores_chosen"] == pytest.approx(rewarded[12]["chosen_reward"])
    assert first["results"] == results[12]["credit"]


@pytest.mark.ray
def test_rewards_are_those_of_plain_transformers(evaluated, reward_model):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, tokenizer = (c.from_pretrained(reward_model) for c in (AutoModelForSequenceClassification, AutoTokenizer))
    for row in read_table(str(evaluated[1] / ROWS)).to_pylist()[12:]:
        for side in ("chosen", "rejected"):
            text = f"{row['prompt'][0]['content']} {row[side][0]['content']}</s>"
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                expected = model(ids).logits.item()
            assert row[f"{side}_reward"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.ray
def test_finished_evaluation_is_not_done_again(evaluated, capsys):
    argv, out = evaluated
    before = (out / ROWS / "run.json").stat().st_mtime_ns
    main(argv)
    printed = capsys.readouterr().out
    assert "en-de" in printed and str(out / "report.html") in printed
    assert (out / ROWS / "run.json").stat().st_mtime_ns == before
    with pytest.raises(OutputExistsError, match="num_resamples"):
        main([*argv, "bootstrap.num_resamples=60"])


@pytest.mark.ray
def test_killed_run_goes_on_with_the_missing_shards(evaluated, tmp_path, capsys):
    argv, finished = evaluated
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    for name in ("run.json", "metrics.json", "report.html", f"{ROWS}/run.json"):
        (out / name).unlink()
    shards = sorted((out / ROWS).glob("*.parquet"))
    assert len(shards) == 4
    shards[1].unlink()
    kept = shards[0].stat().st_mtime_ns
    main([*argv, f"output={out}"])
    assert shards[1].exists() and shards[0].stat().st_mtime_ns == kept
    assert json.loads((out / "metrics.json").read_text()) == json.loads((finished / "metrics.json").read_text())
    printed = capsys.readouterr().out
    assert "en-de" in printed and str(out / "report.html") in printed


def test_a_set_without_held_out_groups_is_refused(tmp_path, reward_model):
    model = tmp_path / "model"
    shutil.copytree(reward_model, model)
    files.write_json(f"{model}/rayrm.json", {"config": {"training": {"held_out_fraction": 0.3, "seed": 5}}})
    trained_on = next(f"g{i}" for i in range(40) if not is_held_out(f"g{i}", 0.3, 5))
    path = write_preferences(tmp_path / "seen.parquet", preferences(3, group=trained_on))
    with pytest.raises(EvaluationError, match="held out"):
        main(words(str(model), path, tmp_path / "out", "split=held_out"))
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.ray
def test_only_held_out_groups_count(ray_cluster, tmp_path, reward_model):
    path = write_preferences(tmp_path / "in.parquet", preferences(40))
    mark = tmp_path / "model" / "rayrm.json"
    (tmp_path / "model").symlink_to(reward_model)
    marked = {"config": {"training": {"held_out_fraction": 0.3, "seed": 5}}}
    mark.write_text(json.dumps(marked))
    try:
        main(words(str(tmp_path / "model"), path, tmp_path / "out", "split=held_out"))
        expected = {f"r{i}" for i in range(40) if is_held_out(f"g{i}", 0.3, 5)}
        rewarded = read_table(str(tmp_path / "out" / ROWS))
        assert set(rewarded["id"].to_pylist()) == expected
        assert "whose groups it was never trained on" in (tmp_path / "out" / "report.html").read_text()
    finally:
        mark.unlink()


@pytest.mark.ray
def test_too_many_failed_rewards_end_the_job(ray_cluster, tmp_path, reward_model):
    rows = preferences(4)
    rows[0]["rejected"] = rows[1]["rejected"] = message("y" * 300)
    path = write_preferences(tmp_path / "in.parquet", rows)
    with pytest.raises(EvaluationError, match=r"2 of 8 scores .* max_failed_fraction"):
        main(words(reward_model, path, tmp_path / "out"))
    assert not (tmp_path / "out" / "run.json").exists()


# Models of other kinds.

READOUTS = {
    "last_token": LastToken(),
    "ratings": Ratings(names=("a", "b"), weights=(1.0, -2.0), means=(3.0, 0.5), stds=(10.0, 20.0), is_logit=False),
    "steps": Steps(separator=" "),
    "gated": Gated(names=("a", "b")),
    "comparison": Comparison(),
}


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """A language model of 2 layers with random weights and a chat template."""
    from rayrm.models.creation import CreationConfig, create_model

    sizes = CreationConfig(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=2, max_length=256
    )
    folder = str(tmp_path_factory.mktemp("language_model"))
    create_model(["Translate number. ein Hund schnell"] * 9, sizes, folder)
    return folder


@pytest.fixture
def kind(language_model, tmp_path, request):
    """A checkpoint with the readout `request.param`, as training saves it."""
    import torch

    from rayrm.models.gating import Gate, GatedHead, save_gate
    from rayrm.models.reward_model import NewHead, load_reward_model
    from rayrm.models.rewarder import Rendering, load_rewarder

    readout = READOUTS[request.param]
    folder = tmp_path / request.param
    shutil.copytree(language_model, folder)
    if not isinstance(readout, Comparison):
        num_outputs = len(getattr(readout, "names", "1"))
        network = load_reward_model(language_model, num_outputs=num_outputs, new_head=NewHead(3)).network
        network.save_pretrained(folder)
    if isinstance(readout, Gated):
        torch.manual_seed(0)
        save_gate(folder, GatedHead(Gate([64, 2], temperature=0.1), torch.eye(2), readout.names))
    renderer = load_rewarder(str(folder), Rendering(max_length=200), readout=readout).renderer
    rendering = {"chat_template": None, "max_length": 200, "fingerprint": renderer.fingerprint()}
    mark = {"digest": "0" * 16, "rendering": rendering, "readout": readout.model_dump()}
    files.write_json(f"{folder}/rayrm.json", mark)
    return str(folder)


def reward(model, rows, **settings):
    return RewardStage(RewardModelScoring(model=model, **settings), None)(
        Preference.conform(pa.Table.from_pylist(rows))
    )


def conversation(row, side):
    return [*row["prompt"], *row[side]]


@pytest.mark.parametrize("kind", ["last_token", "ratings", "steps", "gated"], indirect=True)
def test_both_sides_are_rewarded_by_a_model_of_any_kind(kind):
    from rayrm.models.rewarder import load_rewarder

    rows = preferences(4)
    rows[2]["rejected"] = message(" ")
    rewarded = reward(kind, rows).to_pylist()
    rewarder = load_rewarder(kind)
    for side in ("chosen", "rejected"):
        expected = rewarder.rewards([(row["prompt"], row[side][0]["content"]) for row in rows])
        assert [row[f"{side}_reward"] for row in rewarded] == [
            None if reward is None else pytest.approx(reward, abs=1e-5) for reward, _ in expected
        ]
    assert [row["status"]["reward_model"] for row in rewarded] == [["ok", "ok"]] * 2 + [["ok", "empty"], ["ok", "ok"]]
    assert len({row["chosen_reward"] for row in rewarded}) == 4


@pytest.mark.parametrize("kind", ["ratings"], indirect=True)
def test_ratings_are_weighed_in_the_scale_of_the_rows(kind):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    plain, tokenizer = (c.from_pretrained(kind) for c in (AutoModelForSequenceClassification, AutoTokenizer))
    (row,) = preferences(1)
    text = tokenizer.apply_chat_template(conversation(row, "chosen"), tokenize=False).rstrip()
    with torch.no_grad():
        first, second = plain(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits[0].tolist()
    expected = (3.0 + 10.0 * first) - 2.0 * (0.5 + 20.0 * second)
    assert reward(kind, [row])["chosen_reward"].to_pylist() == [pytest.approx(expected, abs=1e-4)]


def chance(model, tokenizer, row, sides):
    """The first side's share of A and B, the first being A, by plain transformers."""
    import torch

    turns = "".join(f"\n<turn> {turn['role']}\n {turn['content']}\n" for turn in row["prompt"])
    first, second = (row[side][0]["content"] for side in sides)
    question = f"[CONTEXT] \n{turns} [RESPONSE A] {first} [RESPONSE B] {second} \n"
    text = tokenizer.apply_chat_template(message(question, "user"), tokenize=False, add_generation_prompt=True)
    with torch.no_grad():
        logits = model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits[0, -1]
    words = logits[[tokenizer.convert_tokens_to_ids(word) for word in "AB"]].double().softmax(0).tolist()
    return words[0]


@pytest.mark.parametrize("kind", ["comparison"], indirect=True)
def test_a_model_that_compares_gives_each_side_the_log_of_its_chance(kind):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (c.from_pretrained(kind) for c in (AutoModelForCausalLM, AutoTokenizer))
    rows = preferences(4)
    for row, rewarded in zip(rows, reward(kind, rows).to_pylist(), strict=True):
        forward = chance(model, tokenizer, row, ("chosen", "rejected"))
        backward = 1 - chance(model, tokenizer, row, ("rejected", "chosen"))
        expected = (forward + backward) / 2
        assert rewarded["chosen_reward"] == pytest.approx(math.log(expected), abs=1e-5)
        assert rewarded["rejected_reward"] == pytest.approx(math.log(1 - expected), abs=1e-5)
        assert rewarded["status"] == {"reward_model": ["ok", "ok"]}


@pytest.mark.parametrize("kind", ["comparison"], indirect=True)
def test_sides_that_cannot_be_compared_have_no_rewards(kind):
    rows = preferences(5)
    rows[1]["chosen"] = message(" ")
    rows[2]["rejected"] = message("Hund " * 300)
    rows[3]["chosen"] = [*message("eins"), *message("Und?", "user"), *message("zwei")]
    rows[4]["rejected"] = rows[4]["chosen"]
    rewarded = reward(kind, rows).to_pylist()
    words = [row["status"]["reward_model"] for row in rewarded]
    assert words == [[word] * 2 for word in ("ok", "empty", "overlength", "error", "ok")]
    rewards = [(row["chosen_reward"], row["rejected_reward"]) for row in rewarded]
    assert rewards[1:4] == [(None, None)] * 3
    # A tie, up to the rounding of the two orders.
    assert rewards[4] == pytest.approx((math.log(0.5), math.log(0.5)), abs=1e-6)
    rows[3]["rejected"] = [*rows[3]["chosen"][:-1], *message("drei")]
    assert reward(kind, [rows[3]])["status"].to_pylist() == [{"reward_model": ["ok", "ok"]}]


@pytest.mark.parametrize("kind", ["comparison"], indirect=True)
def test_a_model_that_compares_scores_no_candidates(kind, tmp_path):
    row = {key: value for key, value in preferences(1)[0].items() if key not in ("chosen", "rejected", "margin")}
    path = write_preferences(tmp_path / "in.parquet", [{**row, "candidates": ["ein Hund", "Hund"]}])
    given = [f"input={path}", f"output={tmp_path}/out", "scoring.type=reward_model", f"scoring.model={kind}"]
    with pytest.raises(CheckpointError, match="compares two completions and gives a single one no reward"):
        score_candidates.main(given)
    assert not (tmp_path / "out").exists()


@pytest.mark.ray
@pytest.mark.parametrize("kind", ["comparison"], indirect=True)
def test_job_evaluates_a_model_that_compares_on_rows_with_tools(kind, tmp_path, ray_cluster):
    rows = preferences(6)
    for index, row in enumerate(rows):
        row["tools"] = '[{"name": "search"}]' if index % 2 else None
    path = write_preferences(tmp_path / "in.parquet", rows)
    given = ["reward_models.0.type=reward_model", f"reward_models.0.model={kind}", "bootstrap.num_resamples=50"]
    main([f"sets.0.input={path}", f"output={tmp_path}/out", *given])
    rewarded = read_table(f"{tmp_path}/out/{ROWS}").to_pylist()
    tools = [None if row["tools"] is None else json.loads(row["tools"]) for row in rewarded]
    assert tools == [[{"name": "search"}] if index % 2 else None for index in range(6)]
    assert all(math.exp(r["chosen_reward"]) + math.exp(r["rejected_reward"]) == pytest.approx(1) for r in rewarded)
    metrics = files.read_json(f"{tmp_path}/out/metrics.json")["reward_model"]["preferences"]
    hits = sum(row["chosen_reward"] > row["rejected_reward"] for row in rewarded)
    assert metrics["accuracy"] == pytest.approx(hits / 6) and metrics["num_unscored"] == 0
    assert files.read_json(f"{tmp_path}/out/run.json")["verified"] == {"reward_model": True}
    lists = tmp_path / "lists.jsonl"
    lists.write_text(json.dumps({"prompt": "Why?", "chosen": ["So."], "rejected": ["No."]}) + "\n")
    with pytest.raises(ConfigError, match="compares two completions, and the sets hold best_of rows"):
        main([f"sets.0.input={lists}", f"output={tmp_path}/lists", *given])
