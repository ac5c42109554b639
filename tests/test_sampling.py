"""Candidates from a real vLLM: the same for any sharding, one prefill a prompt, bad input told in one sentence."""

import json
import shutil
from types import SimpleNamespace

import pyarrow as pa
import pytest
import torch

from jobs import sample_candidates
from rayrm.config import build_config
from rayrm.errors import CheckpointError, ConfigError, ResourceError
from rayrm.models.creation import CreationConfig, create_model
from rayrm.models.folders import check_model, load_tokenizer, local_model
from rayrm.models.rendering import Renderer, load_template
from rayrm.models.vllm import CPU_BLOCK
from rayrm.rows import Candidates, Prompt, with_hidden
from rayrm.runs import shard_path
from rayrm.sampling import CandidateSampler, SamplingConfig, check_sampling, prompt_ids
from rayrm.shards import read_table

SENTENCE = "a red house stands near the old river where two small dogs run across wet grass"
WORDS = SENTENCE.split()
LIMIT = 160


def make_rows(num, words=12):
    rows = []
    for i in range(num):
        text = " ".join(WORDS[(i * 5 + k * (i % 3 + 1)) % len(WORDS)] for k in range(words)) + f" {i}"
        messages = [{"role": "user", "content": text}]
        rows.append(
            {
                "id": f"row{i}",
                "group": f"g{i}",
                "prompt": messages,
                "source": text,
                "reference": None,
                "anchor": None,
                "src_lang": "en",
                "tgt_lang": "de",
                "lang": "de",
                "subset": None,
            }
        )
    return rows


def as_table(rows):
    return with_hidden(Prompt.conform(pa.Table.from_pylist(rows)))


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("policy") / "model")
    sizes = CreationConfig(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=2, max_length=LIMIT
    )
    create_model([" ".join(WORDS)] * 3, sizes, path)
    return path


@pytest.fixture(scope="module")
def sampler(policy, ray_cluster):
    """`sampler(table, **changes of the config)` → candidates by an engine that lives in one actor."""
    import ray

    class Probe(CandidateSampler):
        def sample(self, table, changes):
            self.config = config.model_copy(update=changes)
            before = self.engine.prompt_tokens()
            table = self(table)
            after = self.engine.prompt_tokens()
            return table, (after.computed - before.computed, after.shared - before.shared)

    config = SamplingConfig(model=policy, num_candidates=4, max_tokens=16)
    actor = ray.remote(num_cpus=1)(Probe).remote(config)
    yield lambda table, **changes: ray.get(actor.sample.remote(table, changes))
    ray.kill(actor)


@pytest.mark.vllm
@pytest.mark.ray
def test_candidates_do_not_hang_on_the_sharding(sampler):
    rows = make_rows(21)
    tables = {size: [sampler(as_table(rows[i : i + size]))[0] for i in range(0, 21, size)] for size in (3, 7, 21)}
    texts = {size: pa.concat_tables(parts)["candidates"].to_pylist() for size, parts in tables.items()}
    assert texts[3] == texts[7] == texts[21]
    assert all(len(group) == 4 and len(set(group)) > 1 for group in texts[21])
    turned = sampler(as_table(rows[::-1]))[0]["candidates"].to_pylist()
    assert turned[::-1] == texts[21]
    other, _ = sampler(as_table([{**rows[0], "lang": "fr"}, {**rows[0], "id": "other"}]))
    first, second = other["candidates"].to_pylist()
    assert texts[21][0] != first != second != texts[21][0]


@pytest.mark.vllm
@pytest.mark.ray
def test_a_prompt_is_prefilled_once_for_all_its_candidates(sampler, policy):
    # Full blocks of a prompt are computed by its first candidate; the others compute only what is behind them.
    tokenizer = load_tokenizer(policy)
    renderer = Renderer(tokenizer, load_template(None, tokenizer, policy))
    rows = make_rows(5, words=50)
    for i, row in enumerate(rows):
        # The first word differs, so that prompts share no block with each other.
        row["prompt"][0]["content"] = f"prefill {i}: " + row["prompt"][0]["content"]
    lengths = [len(renderer.prompt_ids(row["prompt"])) for row in rows]
    assert all(length > 2 * CPU_BLOCK for length in lengths)
    tails = [length - (length - 1) // CPU_BLOCK * CPU_BLOCK for length in lengths]
    _, (computed, shared) = sampler(as_table(rows))
    assert computed == sum(lengths) + 3 * sum(tails)
    assert computed + shared == 4 * sum(lengths)
    assert computed < 2 * sum(lengths)


@pytest.mark.vllm
@pytest.mark.ray
def test_stop_texts_end_a_candidate(sampler):
    rows = as_table(make_rows(8))
    free = sampler(rows)[0]["candidates"].to_pylist()
    cut, _ = sampler(rows, stop=["e"])
    assert cut["candidates"].to_pylist() == [[text.split("e")[0] for text in group] for group in free]
    assert any("e" in text for group in free for text in group)
    for texts, unfinished in zip(free, cut["num_unfinished"].to_pylist(), strict=True):
        assert unfinished <= sum("e" not in text for text in texts)
    longer, _ = sampler(rows, min_tokens=16, max_tokens=16)
    assert longer["num_unfinished"].to_pylist() == [4] * 8
    greedy, _ = sampler(rows, temperature=0.0, num_candidates=1)
    likely, _ = sampler(rows, top_k=1, num_candidates=2)
    assert [[a, a] for (a,) in greedy["candidates"].to_pylist()] == likely["candidates"].to_pylist()


@pytest.mark.vllm
@pytest.mark.ray
def test_a_prompt_without_room_is_dropped_alone(sampler):
    rows = make_rows(3)
    rows[1]["prompt"] = [{"role": "user", "content": " ".join(WORDS * 20)}]
    table, _ = sampler(as_table(rows))
    assert table["_kept"].to_pylist() == [True, False, True]
    assert table["_dropped"].to_pylist() == [[], ["overlength"], []]
    assert table["candidates"].to_pylist()[1] is None
    alone, (computed, _) = sampler(as_table(rows[1:2]))
    assert (alone["_kept"].to_pylist(), computed) == ([False], 0)


@pytest.mark.vllm
@pytest.mark.ray
def test_the_job_resumes_where_a_shard_is_missing(policy, ray_cluster, tmp_path):
    rows = make_rows(10)
    rows[4]["prompt"] = [{"role": "user", "content": " ".join(WORDS * 20)}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    words = [f"input={tmp_path / 'prompts.jsonl'}", f"output={tmp_path / 'out'}", "shard_rows=4"]
    words += [f"sampling.model={policy}", "sampling.max_tokens=8", "sampling.num_candidates=3"]
    sample_candidates.main(words)
    done = json.loads((tmp_path / "out" / "run.json").read_text())
    assert done["counts"] == {"read": 10, "written": 9, "dropped": {"overlength": 1}, "status": {}}
    assert done["num_candidates"] == 27
    first = read_table(str(tmp_path / "out"))
    Candidates.check(first.schema, "out")
    assert first["id"].to_pylist() == [f"row{i}" for i in range(10) if i != 4]
    assert done["num_unfinished"] == sum(first["num_unfinished"].to_pylist())

    paths = [tmp_path / "out" / shard_path("", i, 3).lstrip("/") for i in range(3)]
    times = [path.stat().st_mtime_ns for path in paths]
    paths[1].unlink()
    (tmp_path / "out" / "run.json").unlink()
    sample_candidates.main(words)
    assert read_table(str(tmp_path / "out")).equals(first)
    assert [paths[i].stat().st_mtime_ns == times[i] for i in range(3)] == [True, False, True]


def test_prompts_are_the_rows_own_or_made_of_its_source(policy):
    tokenizer = load_tokenizer(policy)
    renderer = Renderer(tokenizer, None)
    row = {**make_rows(1)[0], "source": "a dog", "anchor": "the dog", "src_lang": "fr"}

    def text(prompt, row=row, limit=1000, **fields):
        engine = SimpleNamespace(is_encoder_decoder=False, max_model_len=limit)
        ids, reason = prompt_ids(row, renderer, SamplingConfig(model=policy, prompt=prompt, **fields), engine)
        return reason if ids is None else tokenizer.decode(ids)

    assert text("as_is") == row["prompt"][0]["content"]
    assert text("direct") == "Translate the following text from French into German:\nFrench: a dog\nGerman:"
    assert "English Reference: the dog\nGerman Translation:" in text("anchored")
    assert text("anchored", {**row, "anchor": None}) == "no_anchor"
    assert text("direct", {**row, "source": None}) == "no_source"
    assert text("as_is", {**row, "prompt": []}) == "empty_prompt"
    num = len(renderer.prompt_ids(row["prompt"]))
    assert text("as_is", limit=num) == "overlength" != text("as_is", limit=num + 1)
    assert text("as_is", limit=num + 4, min_tokens=5) == "overlength"


def test_bad_input_is_told_before_ray_starts(policy, tmp_path):
    with pytest.raises(CheckpointError, match="There is no model at '/nowhere/model'"):
        check_sampling(SamplingConfig(model="/nowhere/model"))
    bare = tmp_path / "bare"
    create_model(["a b"], CreationConfig(chat_template="none", num_layers=1), str(bare))
    with pytest.raises(CheckpointError, match="has no chat template; set chat_template"):
        check_sampling(SamplingConfig(model=str(bare)))
    check_sampling(SamplingConfig(model=str(bare), chat_template="none"))
    with pytest.raises(ConfigError, match="chat_template 'nope' is no .jinja file"):
        check_sampling(SamplingConfig(model=policy, chat_template="nope"))
    # The driver's own vLLM does not matter, the actor's does.
    check_sampling(SamplingConfig(model=policy, workers={"num_gpus": 1}))
    with pytest.raises(ConfigError, match="built for CPUs"):
        CandidateSampler(SamplingConfig(model=policy, workers={"num_gpus": 1}))
    with pytest.raises(ConfigError, match="an engine needs a GPU for each rank"):
        build_config(SamplingConfig, {"model": policy, "engine": {"tensor_parallel_size": 2}}, "the test")
    words = [f"input={tmp_path}", f"output={tmp_path / 'out'}", f"sampling.model={policy}"]
    with pytest.raises(ConfigError, match="temperature 0 gives 4 equal candidates"):
        sample_candidates.main([*words, "sampling.temperature=0"])
    with pytest.raises(ConfigError, match="holds no .parquet or .jsonl"):
        (tmp_path / "empty").mkdir()
        sample_candidates.main([f"input={tmp_path / 'empty'}", *words[1:]])
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_whole_is_named(policy, tmp_path):
    check_model(policy)
    with pytest.raises(CheckpointError, match="neither a folder 'runs/policy' nor a model of that name on the hub"):
        check_model("runs/policy")
    with pytest.raises(CheckpointError, match=f"no config.json; '{policy}' holds one"):
        check_model(policy.removesuffix("/model"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"not whole: it lacks model\.safetensors"):
        check_model(str(tmp_path))
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "one.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"lacks two\.safetensors"):
        check_model(str(tmp_path))


def test_a_checkpoint_of_an_unfinished_run_is_no_model(policy, tmp_path):
    copy = tmp_path / "run" / "model"
    shutil.copytree(policy, copy)
    (copy / "rayrm.json").unlink(missing_ok=True)
    check_model(str(copy))
    (tmp_path / "run" / "started.json").write_text("{}")
    with pytest.raises(CheckpointError, match="a run that has not finished"):
        check_model(str(copy))
    (copy / "rayrm.json").write_text("{}")
    check_model(str(copy))


def test_a_model_on_another_filesystem_is_copied_once(policy):
    import fsspec

    fs = fsspec.filesystem("memory")
    fs.put(f"{policy}/", "/bucket/model/", recursive=True)
    check_model("memory://bucket/model")
    copy = local_model("memory://bucket/model")
    assert load_tokenizer("memory://bucket/model").get_vocab() == load_tokenizer(policy).get_vocab()
    assert local_model("memory://bucket/model") == copy != policy


@pytest.mark.ray
def test_more_than_the_cluster_can_give_is_told_at_once(policy, ray_cluster, tmp_path):
    (tmp_path / "prompts.jsonl").write_text(json.dumps(make_rows(1)[0]))
    words = [f"input={tmp_path / 'prompts.jsonl'}", f"output={tmp_path / 'out'}", f"sampling.model={policy}"]
    with pytest.raises(ResourceError, match="Sampling asks for 1 × "):
        sample_candidates.main([*words, "sampling.workers.num_cpus=1000"])


def create_seq2seq(policy, path):
    """A random T5 with the tokenizer of a policy."""
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = load_tokenizer(policy)
    torch.manual_seed(0)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "decoder_start_token_id": 0}
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "vocab_size": len(tokenizer)}
    T5ForConditionalGeneration(T5Config(**sizes, **ends)).save_pretrained(path)
    tokenizer.save_pretrained(path)


def test_an_encoder_decoder_is_sampled_by_transformers(policy, tmp_path):
    from transformers import AutoModelForSeq2SeqLM

    path = str(tmp_path / "t5")
    create_seq2seq(policy, path)
    greedy = {"chat_template": "none", "temperature": 0.0, "num_candidates": 1, "max_tokens": 8}
    config = SamplingConfig(model=path, engine={"max_model_len": 40}, **greedy)
    check_sampling(config)
    sampler = CandidateSampler(config)
    rows = [*make_rows(3), {**make_rows(1, words=100)[0], "id": "long"}]
    table = sampler(as_table(rows))
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(path), load_tokenizer(path)
    for row, texts in zip(rows[:3], table["candidates"].to_pylist(), strict=False):
        ids = tokenizer(row["prompt"][0]["content"], return_tensors="pt")["input_ids"]
        wanted = model.generate(ids, do_sample=False, max_new_tokens=8)[0]
        assert texts == [tokenizer.decode(wanted, skip_special_tokens=True)]
    assert table["_dropped"].to_pylist() == [[], [], [], ["overlength"]]
    with pytest.raises(ConfigError, match="texts of an encoder-decoder end at end tokens alone"):
        check_sampling(config.model_copy(update={"stop": ["x"]}))
