"""The configs beside the job: each says what was published, and trains a small model of its family."""

import itertools
import json
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import test_train_reward_model as base
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from jobs.run_recipe import RunRecipe, load_steps
from jobs.train_reward_model import TrainRewardModel
from rayrm.config import load_config
from rayrm.models.creation import BOS, EOS, PAD, CreationConfig, train_tokenizer
from rayrm.models.gating import load_gate
from rayrm.models.rendering import load_template
from rayrm.models.rewarder import Rendering, load_rewarder
from rayrm.splits import is_held_out
from rayrm.training import gate_loop
from rayrm.training.batches import batch_of_step
from rayrm.training.checkpoints import gather_state
from rayrm.training.gating import PENALTIES
from rayrm.training.probes import encode_probe, probe_outputs

JOBS = Path(__file__).resolve().parents[1] / "jobs"
alone = base.alone

CHATML = load_template("chatml", None, "")
GEMMA_TURNS = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    "{% for message in messages %}<start_of_turn>{{ 'model' if message['role'] == 'assistant' else 'user' }}\n"
    "{{ message['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL_TURNS = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "[INST] {{ message['content'] }} [/INST]{% else %} {{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
LLAMA_HEADER = "<|start_header_id|>assistant<|end_header_id|>\n\n"
LLAMA_TURNS = (
    "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}<|start_header_id|>"
    "{{ message['role'] }}<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}" + LLAMA_HEADER + "{% endif %}"
)
QWEN_TURNS = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}" + CHATML
)


class Family(NamedTuple):
    """What the models and tokenizers of a family have in common."""

    config: type[PretrainedConfig]
    renamed: tuple[str, str, str]
    """Names of the tokens that a tokenizer made here has for padding, BOS and EOS."""
    further: tuple[str, ...]
    """More special tokens."""
    special: dict[str, str]
    """What the special tokens are for."""
    template: str
    turn_end: str
    """Token that ends the assistant's turn."""
    padding: str
    """Token that pads a reward model's rows."""


GEMMA = Family(
    GemmaConfig,
    ("<pad>", "<bos>", "<eos>"),
    ("<start_of_turn>", "<end_of_turn>"),
    {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"},
    GEMMA_TURNS,
    "<end_of_turn>",
    "<pad>",
)
MISTRAL = Family(
    MistralConfig,
    ("<unk>", "<s>", "</s>"),
    (),
    {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    MISTRAL_TURNS,
    "</s>",
    "<unk>",
)
LLAMA = Family(
    LlamaConfig,
    ("<|reserved_special_token_0|>", "<|begin_of_text|>", "<|end_of_text|>"),
    ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    LLAMA_TURNS,
    "<|eot_id|>",
    "<|reserved_special_token_0|>",
)
QWEN = Family(
    Qwen2Config,
    ("<|fim_pad|>", "<|im_start|>", "<|endoftext|>"),
    ("<|im_end|>",),
    {"pad_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
    QWEN_TURNS,
    "<|im_end|>",
    "<|fim_pad|>",
)
FAMILIES = {
    "gemma_2b_it": GEMMA,
    "gemma_7b_it": GEMMA,
    "mistral_7b": MISTRAL,
    "llama_3_8b": LLAMA,
    "mixtral": MISTRAL._replace(config=MixtralConfig),
    "qwen_2_5_7b_zero3": QWEN,
    "pair_llama_3_8b": LLAMA,
    "armorm": LLAMA,
}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
ALPHAS = [10.0**power for power in range(-4, 5)]


def read_config(name, *words):
    return load_config(TrainRewardModel, JOBS / "reward_models" / f"{name}.yaml", words)


# What was published.


def test_every_config_beside_the_job_is_tested():
    assert {path.stem for path in (JOBS / "reward_models").iterdir()} == {*FAMILIES}


@pytest.mark.parametrize(
    ("name", "model", "lr", "batch", "max_length", "warmup", "decay"),
    [
        ("gemma_2b_it", "google/gemma-2b-it", 1e-5, 256, 4096, 0.03, 0.001),
        ("gemma_7b_it", "google/gemma-7b-it", 5e-6, 256, 4096, 0.03, 0.001),
        ("mistral_7b", "mistralai/Mistral-7B-Instruct-v0.2", 5e-6, 512, 4096, 0.03, 0.001),
        ("llama_3_8b", "meta-llama/Meta-Llama-3-8B-Instruct", 2e-6, 512, 4096, 0.03, 0.001),
        ("mixtral", "mistralai/Mixtral-8x7B-Instruct-v0.1", 5e-6, 512, 4096, 0.03, 0.001),
        ("qwen_2_5_7b_zero3", "Qwen/Qwen2.5-7B", 4e-6, 32, 2048, 0.1, 0.0),
        # Both orders of 64 pairs are 128 questions.
        ("pair_llama_3_8b", "meta-llama/Meta-Llama-3-8B-Instruct", 5e-6, 64, 3072, 0.004, 0.0),
    ],
)
def test_configs_say_what_was_published(name, model, lr, batch, max_length, warmup, decay):
    config = read_config(name)
    found = config.training
    assert (found.model, found.lr, found.global_batch_size, found.max_length) == (model, lr, batch, max_length)
    assert (found.warmup_fraction, found.weight_decay, found.schedule, found.num_epochs) == (warmup, decay, "cosine", 1)
    assert found.objective.type == ("comparison" if name.startswith("pair") else "bradley_terry")
    assert config.parallelism.uses_bf16(config.workers.num_gpus) and config.parallelism.gradient_checkpointing
    assert (config.workers.num_workers, config.workers.num_gpus) == (8, 1)


def test_settings_of_eax_are_those_of_its_recipe():
    steps = load_steps(load_config(RunRecipe, JOBS / "recipes" / "towerblocks.yaml"))
    recipe = next(step.config for step in steps if isinstance(step.config, TrainRewardModel))
    config = read_config("qwen_2_5_7b_zero3")
    # The recipe starts from a policy that was saved with the template.
    apart = {"model": config.training.model, "chat_template": config.training.chat_template}
    assert recipe.training.model_copy(update=apart) == config.training
    assert recipe.parallelism == config.parallelism and recipe.workers == config.workers
    assert config.parallelism.zero_stage == 3 and config.training.held_out_fraction == 0.04


# A small model of each family.


def make_model(family, folder, network_class=AutoModelForCausalLM):
    """A model of the family with random weights, and a tokenizer that behaves as the family's."""
    sizes = CreationConfig(vocab_size=320, chat_template="none")
    plain = train_tokenizer(["one two three good bad user assistant"] * 9, sizes).backend_tokenizer.to_str()
    for old, new in zip((PAD, BOS, EOS), family.renamed, strict=True):
        plain = plain.replace(json.dumps(old), json.dumps(new))
    stored = json.loads(plain)
    if "bos_token" not in family.special:
        stored["post_processor"] = None
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(stored)), **family.special)
    tokenizer.add_special_tokens({"additional_special_tokens": list(family.further)})
    tokenizer.chat_template = family.template
    tokenizer.save_pretrained(folder)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    experts = {"num_local_experts": 4} if family.config is MixtralConfig else {}
    config = family.config(vocab_size=len(tokenizer), num_labels=1, dtype="float32", **SIZES, **experts, **ids)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = network_class.from_config(config)
    network.save_pretrained(folder)
    return network.eval()


def name_groups(training, num, is_apart):
    """Names of groups that the config holds out, or does not."""
    names = (f"g{number}" for number in itertools.count())
    fits = (n for n in names if is_held_out(n, training.held_out_fraction, training.seed) == is_apart)
    return list(itertools.islice(fits, num))


def write_pairs(training, path):
    """24 pairs to train on and 4 that are held out."""
    rng = random.Random(0)
    groups = name_groups(training, 24, False) + name_groups(training, 4, True)
    rows = [base.preference(index, rng) | {"group": group} for index, group in enumerate(groups)]
    pq.write_table(pa.Table.from_pylist(rows), path)


def make_job(name, folder, *words):
    """The config's job on the small model and the pairs in `folder`, in one process on the CPU."""
    write_pairs(read_config(name).training, folder / "pairs.parquet")
    small = ["training.max_length=512", "training.micro_batch_size=2", f"training.model={folder}/base"]
    places = [f"input={folder}/pairs.parquet", f"output={folder}/run"]
    alone = ["workers.num_workers=1", "workers.num_cpus=1", "workers.num_gpus=0", "parallelism.precision=fp32"]
    return read_config(name, *places, *small, *alone, *words)


def assert_one_bos(tokenizer, ids):
    """The first id is BOS, and no other one is; or there is no BOS, and no turn but those of the row."""
    if tokenizer.bos_token is None:
        assert tokenizer.decode(ids).startswith("<|im_start|>user\n")
    else:
        assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1


def reread(trainer, readout, facts):
    """The sides of the probe rows, and what the saved model gives each of them, which is what training gave them."""
    job, renderer = trainer.job, trainer.renderer
    rendering = {"chat_template": None, "max_length": 512, "fingerprint": renderer.fingerprint()}
    mark = {"rendering": rendering, "readout": readout.model_dump(), "probe": facts["probe"]}
    found = probe_outputs(f"{job.output}/model", mark, job.training.objective, "fp32")
    assert len(found) == 4
    for row, sides in zip(facts["probe"], found, strict=True):
        for expected, side in zip(row["outputs"], sides, strict=True):
            np.testing.assert_allclose(side, expected, atol=1e-4)
    encoded = [side for row in facts["probe"] for side in encode_probe(row, job.training.objective, renderer)]
    return encoded, [side for row in found for side in row]


@torch.no_grad()
def plain_logits(path, model_class, encoded):
    """What transformers alone gives the sides in one batch: logits, and the tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    batch = tokenizer.pad({"input_ids": [side.ids for side in encoded]}, padding_side="right", return_tensors="pt")
    network, loaded = model_class.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not loaded["missing_keys"] and not loaded["unexpected_keys"] and not loaded["mismatched_keys"]
    return network.eval()(**batch).logits, tokenizer


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "armorm"])
def test_config_trains_a_small_model_of_its_family(name, tmp_path, alone):
    family, is_pair = FAMILIES[name], name.startswith("pair")
    weights = make_model(family, tmp_path / "base").state_dict()
    job = make_job(name, tmp_path, "training.global_batch_size=6", "training.max_steps=3")
    trainer = base.start(job)
    tokenizer = trainer.renderer.tokenizer
    assert tokenizer.pad_token == family.padding
    end = "<|eot_id|>" + LLAMA_HEADER if is_pair else family.turn_end
    for side, reads in zip(trainer.rows.sides, trainer.rows.reads, strict=True):
        for row in range(28):
            ids = side[row].tolist()
            assert_one_bos(tokenizer, ids)
            assert reads[row].tolist() == [len(ids) - 1] and tokenizer.decode(ids).endswith(end)

    before = gather_state(trainer.engine.module.network)
    assert [n for n in before if n != "score.weight" and not torch.equal(before[n], weights[n])] == []
    trainer.train(show_progress=False)
    after = gather_state(trainer.engine.module.network)
    # A random model knows nothing: both sides of a pair are as good, and all tokens as likely.
    first, last = trainer.history
    expected = math.log(len(tokenizer)) if is_pair else math.log(2)
    assert first["loss"] == pytest.approx(expected, abs=0.1) and last["eval_loss"] == pytest.approx(expected, abs=0.1)
    assert [n for n in before if torch.equal(before[n], after[n]) or not after[n].isfinite().all()] == []

    encoded, found = reread(trainer, trainer.readout, trainer.finish())
    model_class = AutoModelForCausalLM if is_pair else AutoModelForSequenceClassification
    logits, saved = plain_logits(f"{job.output}/model", model_class, encoded)
    assert (saved.pad_token, saved.chat_template) == (family.padding, trainer.renderer.template)
    if is_pair:
        logits = logits[torch.arange(len(encoded)), torch.tensor([side.reads[0] for side in encoded])]
        logits = logits.log_softmax(-1)[:, saved.convert_tokens_to_ids(["A", "B"])]
    np.testing.assert_allclose(logits.tolist(), [outputs[0] for outputs in found], atol=1e-4)


# The load of the experts.


def test_router_loss_of_mixtral_is_that_of_transformers(tmp_path, alone, monkeypatch):
    plain = make_model(FAMILIES["mixtral"], tmp_path / "base")
    words = ["training.global_batch_size=6", "training.micro_batch_size=6"]
    words += ["parallelism.zero_stage=0", "parallelism.offload_optimizer=false"]
    gradients, penalties = [], []
    for changed in ([], ["training.router_loss=0"]):
        trainer = base.start(make_job("mixtral", tmp_path, *words, *changed))
        gradients.append({})
        for name, router in trainer.engine.module.network.named_parameters():
            if "mlp.gate." in name:
                router.register_hook(lambda gradient, n=name, f=gradients[-1]: f.update({n: gradient.clone()}))
        rows = [trainer.rows.train[index] for index in batch_of_step(0, 24, 6, trainer.training.seed)]
        trainer.engine.train()
        penalties.append(trainer.forward(rows)[1].item())
        trainer.train_step()
    sides = [side[row].tolist() for side in trainer.rows.sides for row in rows]
    batch = trainer.renderer.tokenizer.pad({"input_ids": sides}, padding_side="right", return_tensors="pt")
    assert not batch["attention_mask"].all()
    loss = 0.02 * plain(**batch, output_router_logits=True).aux_loss
    loss.backward()
    expected = {n: p.grad for n, p in plain.named_parameters() if "mlp.gate." in n}
    assert penalties == [pytest.approx(loss.item(), rel=1e-5), 0.0]
    assert len(expected) == 2 and expected.keys() == gradients[0].keys() == gradients[1].keys()
    for name, gradient in expected.items():
        found = gradients[0][name] - gradients[1][name]
        torch.testing.assert_close(found, gradient, atol=1e-3 * gradient.abs().max().item(), rtol=0)


# Several objectives and a gate.


def write_ratings(path, prefixes, objectives, num):
    """Rows rated for the objectives of one prefix each; a longer completion is more verbose and a little better."""
    rng = random.Random(num)
    rows = []
    for index in range(num):
        row = base.preference(index, rng)
        words = [rng.choice(["one", "two", "three", "good", "bad"]) for _ in range(rng.randint(1, 20))]
        rated = [name for name in objectives if name.startswith(prefixes[index % len(prefixes)])]
        ratings = {name: 0.03 * len(words) + 0.4 * rng.random() if name in rated else None for name in objectives}
        plain = {name: value for name, value in row.items() if name not in ("chosen", "rejected", "margin")}
        rows.append(plain | {"completion": base.message(" ".join(words)), "ratings": ratings})
    table = pa.Table.from_pylist(rows)
    kind = pa.struct([(name, pa.float64()) for name in objectives])
    table = table.set_column(table.column_names.index("ratings"), "ratings", table["ratings"].cast(kind))
    pq.write_table(table, path)
    return rows


def render_ratings_here(job, monkeypatch):
    """What `render_ratings` does with its tasks run in this process."""
    with monkeypatch.context() as patch:
        patch.setattr("rayrm.cluster.connect", lambda: None)
        patch.setattr("rayrm.training.rendered.fetch", lambda results, what: list(results))
        patch.setattr("ray.remote", lambda **options: lambda function: SimpleNamespace(remote=function))
        gate_loop.render_ratings(job)


def test_armorm_fits_heads_penalties_and_gate(tmp_path, alone, monkeypatch):
    weights = make_model(LLAMA, tmp_path / "base", AutoModelForSequenceClassification).state_dict()
    objectives = read_config("armorm").training.objective.objectives
    prefixes = ["helpsteer", "ultrafeedback", "beavertails", "prometheus", "argilla", "code"]
    write_ratings(tmp_path / "ratings.parquet", prefixes, objectives, 120)
    reference = write_ratings(tmp_path / "reference.parquet", ["ultrafeedback"], objectives, 60)
    words = [f"training.objective.{name}={tmp_path}/{name}.parquet" for name in ("ratings", "reference")]
    words += ["training.objective.fit.num_steps=3", "training.objective.fit.batch_size=16"]
    job = make_job("armorm", tmp_path, *words)
    assert not base.render_here(job)["counts"]["dropped"]
    render_ratings_here(job, monkeypatch)
    trainer = gate_loop.GateTrainer(job, 8)
    tokenizer = trainer.renderer.tokenizer
    for row in range(28):
        for side, reads in zip(trainer.pairs.sides, trainer.pairs.reads, strict=True):
            ids = side[row].tolist()
            assert_one_bos(tokenizer, ids)
            # The end of the question, before the header of the answer, and the end of the answer.
            assert reads[row].tolist() == [find_last(ids, boundary(tokenizer)), len(ids) - 1]
            assert ids[-1] == tokenizer.convert_tokens_to_ids("<|eot_id|>")
    trainer.embed(show_progress=False)
    facts = trainer.fit()

    assert facts["metrics"]["loss"] == pytest.approx(math.log(2), abs=0.1) and "eval_accuracy" in facts["metrics"]
    assert [*facts["heads"]] == [*objectives]
    assert all(math.isfinite(head["mse"]) and head["alpha"] in ALPHAS for head in facts["heads"].values())
    saved = load_file(f"{job.output}/model/model.safetensors")
    assert saved["score.weight"].shape == (19, 32) and saved["score.weight"].abs().amax(1).min() > 0.01
    assert all(torch.equal(saved[name], tensor) for name, tensor in weights.items() if name != "score.weight")
    assert load_gate(f"{job.output}/model").gating.logit_scale.item() != 1

    verbosity, transform = 4, np.array(facts["transform"])
    penalties = -transform[verbosity]
    rest = np.delete(np.arange(19), verbosity)
    np.testing.assert_array_equal(transform[np.ix_(rest, rest)], np.eye(18))
    assert not transform[:, verbosity].any() and {*penalties[rest]} <= {*PENALTIES, 1.0} and (penalties > 0).sum() > 3
    rewarder = load_rewarder(f"{job.output}/model", Rendering(max_length=512))
    sides = [
        rewarder.readout.encode(rewarder.renderer, row["prompt"], row["completion"][0]["content"]) for row in reference
    ]
    scores = np.array([outputs[0][1:20] for outputs in rewarder.read(sides)])
    adjusted = scores @ transform
    for column in rest:
        # At 1 it may stay above.
        assert spearman(adjusted[:, column], scores[:, verbosity]) < 0.031 or penalties[column] == 1.0

    encoded, found = reread(trainer, job.training.objective.reading, facts)
    logits, _ = plain_logits(f"{job.output}/model", AutoModelForSequenceClassification, encoded)
    for scores, (outputs,) in zip(logits.numpy(), found, strict=True):
        np.testing.assert_allclose(outputs[1:20], scores, atol=1e-4)
        assert outputs[0] == pytest.approx(np.dot(outputs[20:], scores @ transform), abs=1e-4)


def spearman(a, b):
    return np.corrcoef(a.argsort().argsort(), b.argsort().argsort())[0, 1]


def boundary(tokenizer):
    """Ids between a question and its answer."""
    return tokenizer.encode("<|eot_id|>" + LLAMA_HEADER, add_special_tokens=False)


def find_last(ids, pattern):
    return max(start for start in range(len(ids)) if ids[start : start + len(pattern)] == pattern)


@pytest.mark.parametrize("writes_header", [True, False])
def test_released_armorm_gives_the_reward_that_its_tensors_make(tmp_path, writes_header):
    template = LLAMA_TURNS if writes_header else LLAMA_TURNS.partition("{% if add_generation_prompt %}")[0]
    policy = make_model(LLAMA._replace(template=template), tmp_path)
    random_of = torch.Generator().manual_seed(1)
    shapes = {"regression_layer.weight": (19, 32), "reward_transform_matrix": (19, 19), "gating.logit_scale": (1,)}
    for index, (inputs, outputs) in enumerate([(32, 16), (16, 16), (16, 16), (16, 19)]):
        shapes |= {f"gating.layers.{index}.weight": (outputs, inputs), f"gating.layers.{index}.bias": (outputs,)}
    tensors = {name: torch.randn(shape, generator=random_of) for name, shape in shapes.items()}
    decoder = {name: tensor for name, tensor in policy.state_dict().items() if name != "lm_head.weight"}
    save_file(decoder | tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text()) | {
        "architectures": ["LlamaForRewardModelWithGating"],
        "auto_map": {"AutoModelForSequenceClassification": "modeling_custom.LlamaForRewardModelWithGating"},
        "num_objectives": 19,
        "gating_temperature": 10,
        "gating_hidden_dim": 16,
        "gating_n_hidden": 3,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))

    rewarder = load_rewarder(str(tmp_path))
    prompt = [*base.message("one", "user"), *base.message("two"), *base.message("three one", "user")]
    answers = ["good", "bad two"]
    found = [reward for reward, _ in rewarder.rewards([(prompt, answer) for answer in answers])]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for answer, reward in zip(answers, found, strict=True):
        text = tokenizer.apply_chat_template([*prompt, *base.message(answer)], tokenize=False)
        ids = tokenizer.encode(text, add_special_tokens=False)
        with torch.no_grad():
            hidden = policy.model(torch.tensor([ids])).last_hidden_state[0]
        scores = tensors["regression_layer.weight"] @ hidden[-1]
        gate = hidden[find_last(ids, boundary(tokenizer))]
        for index in range(4):
            gate = tensors[f"gating.layers.{index}.weight"] @ gate + tensors[f"gating.layers.{index}.bias"]
            gate = gate.relu() if index < 3 else (gate / 10).softmax(0) * tensors["gating.logit_scale"]
        assert reward == pytest.approx((gate * (scores @ tensors["reward_transform_matrix"])).sum().item(), abs=1e-4)
    assert abs(found[0] - found[1]) > 1e-2
