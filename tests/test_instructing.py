"""Instructions for preferences, and the length of both sides of a rendered chat."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import instruct_preferences
from rayrm.config import build_config
from rayrm.errors import CheckpointError, ConfigError, SchemaError
from rayrm.instructing import InstructingConfig, Instructor, count_tokens, load_renderer
from rayrm.models.creation import CreationConfig, train_tokenizer
from rayrm.prompts import direct_prompt, diverse_prompt
from rayrm.rows import MESSAGES
from rayrm.shards import read_table

TEXTS = ["Translate the following text from German into English:", "Der Hund schläft.", "The dog sleeps."]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a tokenizer that has a chat template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, CreationConfig(vocab_size=320)).save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return str(folder)


def answer(text):
    return [{"role": "assistant", "content": text}]


def preferences(sides, **changed):
    num = len(sides)
    columns = {
        "id": [f"r{i}" for i in range(num)],
        "group": [f"g{i}" for i in range(num)],
        "prompt": pa.array([[{"role": "user", "content": "old"}]] * num, MESSAGES),
        "chosen": pa.array([answer(chosen) for chosen, _ in sides], MESSAGES),
        "rejected": pa.array([answer(rejected) for _, rejected in sides], MESSAGES),
        "margin": [1.0] * num,
        "src_lang": ["de"] * num,
        "tgt_lang": ["en"] * num,
        "lang": ["en"] * num,
        "source": [f"Satz {i}." for i in range(num)],
        **changed,
    }
    return pa.table(columns)


def config(**values):
    return build_config(InstructingConfig, values, "the test")


def test_prompts_are_fixed_or_chosen_by_id():
    table = preferences([("a", "b")] * 30)
    fixed = Instructor(config())(table)
    assert fixed["prompt"][3].as_py() == [{"role": "user", "content": direct_prompt("Satz 3.", "de", "en")}]
    assert fixed["chosen"].to_pylist() == table["chosen"].to_pylist()
    diverse = Instructor(config(instructions="diverse", seed=2))(table)["prompt"].to_pylist()
    assert diverse[7][0]["content"] == diverse_prompt("Satz 7.", "de", "en", "r7", 2)
    tail = Instructor(config(instructions="diverse", seed=2))(table.slice(20))["prompt"].to_pylist()
    assert diverse[20:] == tail


def test_rows_without_source_or_language_are_dropped():
    table = preferences([("a", "b")] * 3, source=["x", None, "y"], src_lang=["de", "de", None])
    done = Instructor(config())(table)
    assert done["_kept"].to_pylist() == [True, False, False]
    assert done["_dropped"].to_pylist() == [[], ["no_source"], ["no_source"]]


def test_length_counts_the_chat_and_the_longer_side(model):
    options = config(max_length=500, tokenizer=model)
    renderer = load_renderer(options)
    tokenizer = renderer.tokenizer
    prompt = [{"role": "user", "content": "Der Hund schläft."}]
    row = {"prompt": prompt, "chosen": answer("The dog sleeps."), "rejected": answer("The dog sleeps. The dog sleeps.")}
    whole = tokenizer.apply_chat_template([*prompt, *row["rejected"]], tokenize=False).rstrip()
    assert count_tokens(row, renderer) == len(tokenizer(whole, add_special_tokens=False)["input_ids"])
    swapped = {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
    assert count_tokens(swapped, renderer) == count_tokens(row, renderer)
    assert count_tokens({**row, "rejected": row["chosen"]}, renderer) < count_tokens(row, renderer)


def test_overlong_pairs_are_dropped_on_either_side(model):
    table = preferences([("a", "b"), ("a", "b " * 200), ("a " * 200, "b"), ("c", "d")])
    limit = 200
    done = Instructor(config(max_length=limit, tokenizer=model))(table)
    kept = done.filter(done["_kept"])
    assert set(kept["id"].to_pylist()) == {"r0", "r3"}
    assert sorted(done["_dropped"].to_pylist()) == [[], [], ["overlength"], ["overlength"]]
    renderer = load_renderer(config(max_length=limit, tokenizer=model))
    longest = max(count_tokens(row, renderer) for row in kept.to_pylist())
    edge = Instructor(config(max_length=longest, tokenizer=model))(table)
    assert edge.filter(edge["_kept"]).num_rows == 2
    below = Instructor(config(max_length=longest - 1, tokenizer=model))(table)
    assert below.filter(below["_kept"]).num_rows < 2


def test_options_that_would_do_nothing_are_refused():
    for values in ({"max_length": 10}, {"tokenizer": "x"}, {"chat_template": "chatml"}):
        with pytest.raises(ConfigError, match="max_length"):
            config(**values)


@pytest.mark.ray
def test_job_instructs_and_counts(tmp_path, ray_cluster, model):
    pq.write_table(preferences([("a", "b"), ("a", "b " * 300), ("c", "d")]), tmp_path / "in.parquet")
    words = [f"input={tmp_path / 'in.parquet'}", f"output={tmp_path / 'out'}"]
    instruct_preferences.main([*words, "instructing.max_length=200", f"instructing.tokenizer={model}"])
    rows = {row["id"]: row for row in read_table(str(tmp_path / "out")).to_pylist()}
    assert set(rows) == {"r0", "r2"}
    assert rows["r2"]["prompt"][0]["content"].endswith("German: Satz 2.\nEnglish:")
    done = json.loads((tmp_path / "out" / "run.json").read_text())
    assert done["counts"]["dropped"] == {"overlength": 1}
    assert "instructing.tokenizer" in done["inputs"]


def test_bad_input_is_named(tmp_path, model):
    out = f"output={tmp_path / 'out'}"
    table = preferences([("a", "b")])
    pq.write_table(table.drop_columns(["source"]), tmp_path / "in.parquet")
    with pytest.raises(SchemaError, match="lacks source"):
        instruct_preferences.main([f"input={tmp_path / 'in.parquet'}", out])
    pq.write_table(table, tmp_path / "good.parquet")
    words = [f"input={tmp_path / 'good.parquet'}", out, "instructing.max_length=9"]
    with pytest.raises(CheckpointError, match="no tokenizer that loads"):
        instruct_preferences.main([*words, f"instructing.tokenizer={tmp_path / 'nowhere'}"])
    train_tokenizer(TEXTS, CreationConfig(vocab_size=320, chat_template="none")).save_pretrained(tmp_path / "plain")
    with pytest.raises(CheckpointError, match="has no chat template"):
        instruct_preferences.main([*words, f"instructing.tokenizer={tmp_path / 'plain'}"])
    assert not (tmp_path / "out").exists()
