"""The evaluation job with a small reward model: rows, metrics, page, splits, failures."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.evaluate_reward_model import EvaluateRewardModel, main
from rayrm import files
from rayrm.config import load_config
from rayrm.errors import CheckpointError, ConfigError, EvaluationError, OutputExistsError, SchemaError
from rayrm.evaluation.judging import Split, find_split, keep_held_out
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
    fixed = ["reward_model.chat_template=none", "bootstrap.num_resamples=50", "shard_rows=5"]
    return [f"input={path}", f"output={output}", f"reward_model.model={model}", *fixed, *more]


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
    with pytest.raises(ConfigError, match="names a folder below rows"):
        main(words(reward_model, path, tmp_path / "out", "agreement={a/b: x}"))
    with pytest.raises(CheckpointError, match="no model at"):
        main(words(str(tmp_path / "a" / "nothing"), path, tmp_path / "out"))
    with pytest.raises(ConfigError, match="names no held-out share"):
        main(words(reward_model, path, tmp_path / "out", "split=held_out"))
    with pytest.raises(CheckpointError, match="has no chat template; set chat_template"):
        main(words(reward_model, path, tmp_path / "out", "reward_model.chat_template=null"))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"id": "a", "group": "b"}\n')
    with pytest.raises(SchemaError, match="lacks prompt, chosen, rejected"):
        main(words(reward_model, prompts, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_agreement_paths_are_inputs():
    from rayrm.runs import input_paths

    overrides = ["input=a", "output=b", "reward_model.model=m", "agreement.grammar=c"]
    assert input_paths(load_config(EvaluateRewardModel, None, overrides)) == {
        "input": "a",
        "reward_model.model": "m",
        "agreement.grammar": "c",
    }


@pytest.fixture(scope="module")
def evaluated(ray_cluster, tmp_path_factory, reward_model):
    """A finished evaluation of two sets: the words that made it, and its folder."""
    folder = tmp_path_factory.mktemp("evaluation")
    rows = preferences(12)
    rows[3]["rejected"] = message(" ")
    path = write_preferences(folder / "in.parquet", rows)
    other = write_preferences(folder / "other.parquet", preferences(4))
    argv = words(reward_model, path, folder / "out", f"agreement.grammar={other}")
    main(argv)
    return argv, folder / "out"


@pytest.mark.ray
def test_job_writes_rows_metrics_and_page(evaluated):
    _, out = evaluated
    judged = read_table(str(out / "rows" / "preferences")).to_pylist()
    assert [row["id"] for row in judged] == [f"r{i}" for i in range(12)]
    assert judged[3]["rejected_reward"] is None
    assert judged[3]["status"] == {"reward_model": ["ok", "empty"]}
    metrics = json.loads((out / "metrics.json").read_text())
    assert set(metrics) == {"preferences", "grammar"}
    scored = [row for row in judged if row["rejected_reward"] is not None]
    hits = sum(row["chosen_reward"] > row["rejected_reward"] for row in scored)
    assert metrics["preferences"]["num_rows"] == 11
    assert metrics["preferences"]["num_unscored"] == 1
    assert metrics["preferences"]["accuracy"] == pytest.approx(hits / 11)
    assert metrics["grammar"]["num_rows/en-de"] == 2
    mark = json.loads((out / "run.json").read_text())
    assert mark["metrics"] == metrics
    assert mark["verified"] is False
    assert set(mark["inputs"]) == {"input", "reward_model.model", "agreement.grammar"}
    assert "Agreement with grammar" in (out / "report.html").read_text()


@pytest.mark.ray
def test_rewards_are_those_of_plain_transformers(evaluated, reward_model):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, tokenizer = (c.from_pretrained(reward_model) for c in (AutoModelForSequenceClassification, AutoTokenizer))
    for row in read_table(str(evaluated[1] / "rows" / "grammar")).to_pylist():
        for side in ("chosen", "rejected"):
            text = f"{row['prompt'][0]['content']} {row[side][0]['content']}</s>"
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                expected = model(ids).logits.item()
            assert row[f"{side}_reward"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.ray
def test_finished_evaluation_is_not_done_again(evaluated, capsys):
    argv, out = evaluated
    before = (out / "rows" / "preferences" / "run.json").stat().st_mtime_ns
    main(argv)
    printed = capsys.readouterr().out
    assert "en-de" in printed and str(out / "report.html") in printed
    assert (out / "rows" / "preferences" / "run.json").stat().st_mtime_ns == before
    with pytest.raises(OutputExistsError, match="num_resamples"):
        main([*argv, "bootstrap.num_resamples=60"])


@pytest.mark.ray
def test_killed_run_goes_on_with_the_missing_shards(evaluated, tmp_path, capsys):
    argv, finished = evaluated
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    for name in ("run.json", "metrics.json", "report.html", "rows/preferences/run.json"):
        (out / name).unlink()
    shards = sorted((out / "rows" / "preferences").glob("*.parquet"))
    assert len(shards) == 3
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
    with pytest.raises(EvaluationError, match="holds no row of a group"):
        main(words(str(model), path, tmp_path / "out", "split=held_out"))
    assert not (tmp_path / "out").exists()


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
        judged = read_table(str(tmp_path / "out" / "rows" / "preferences"))
        assert set(judged["id"].to_pylist()) == expected
        assert "whose groups it was never trained on" in (tmp_path / "out" / "report.html").read_text()
    finally:
        mark.unlink()


@pytest.mark.ray
def test_too_many_failed_rewards_end_the_job(ray_cluster, tmp_path, reward_model):
    rows = preferences(4)
    rows[0]["rejected"] = rows[1]["rejected"] = message("")
    path = write_preferences(tmp_path / "in.parquet", rows)
    with pytest.raises(EvaluationError, match=r"2 of 8 scores .* max_failed_fraction"):
        main(words(reward_model, path, tmp_path / "out"))
    assert not (tmp_path / "out" / "run.json").exists()
