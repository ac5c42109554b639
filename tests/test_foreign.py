"""Reward models in other trainers' files give the rewards that their trainers would give."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from rayrm.errors import CheckpointError
from rayrm.models.foreign import find_layout
from rayrm.models.inputs import padded_batch
from rayrm.models.reward_model import NewHead, load_reward_model

HIDDEN, OBJECTIVES = 32, 19
ROWS = [[1, 7, 9, 30, 2], [1, 5, 6, 7, 8, 9, 10, 11, 2]]
GATE = {
    "gating.layers.0.weight": (16, HIDDEN),
    "gating.layers.0.bias": (16,),
    "gating.layers.1.weight": (16, 16),
    "gating.layers.1.bias": (16,),
    "gating.layers.2.weight": (OBJECTIVES, 16),
    "gating.layers.2.bias": (OBJECTIVES,),
    "gating.logit_scale": (1,),
    "reward_transform_matrix": (OBJECTIVES, OBJECTIVES),
}
GATE_CONFIG = {"num_objectives": OBJECTIVES, "gating_temperature": 5, "gating_hidden_dim": 16, "gating_n_hidden": 2}


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def policy():
    """A causal language model with random weights; its token 0 is padding."""
    sizes = {"vocab_size": 64, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=2, pad_token_id=0, tie_word_embeddings=False, dtype="float32")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def weights_of(policy, prefix="", with_lm_head=True):
    """The policy's tensors by the names that a file gives them."""
    kept = {name: tensor for name, tensor in policy.state_dict().items() if with_lm_head or name != "lm_head.weight"}
    return {prefix + name: tensor.clone() for name, tensor in kept.items()}


def save_config(policy, folder, architecture, **fields):
    folder.mkdir(exist_ok=True)
    written = policy.config.to_dict() | {"architectures": [architecture]} | fields
    (folder / "config.json").write_text(json.dumps(written))


def save_weights(folder, weights):
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def save_shards(folder, shards, ending):
    """Shards as transformers names them, with their index."""
    safe = ending == "safetensors"
    stem, weight_map = "model" if safe else "pytorch_model", {}
    for index, shard in enumerate(shards, start=1):
        name = f"{stem}-{index:05d}-of-{len(shards):05d}.{ending}"
        save_file(shard, folder / name, {"format": "pt"}) if safe else torch.save(shard, folder / name)
        weight_map |= dict.fromkeys(shard, name)
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def load(folder):
    """The layout, and the classifier that it completes; nothing is missing and nothing is left over."""
    layout = find_layout(str(folder))
    config = AutoConfig.from_pretrained(folder)
    config.num_labels = layout.num_labels
    network, loaded = AutoModelForSequenceClassification.from_pretrained(
        folder, config=config, key_mapping=layout.key_mapping, dtype=torch.float32, output_loading_info=True
    )
    layout.after_loading(network, loaded)
    assert not loaded["missing_keys"] and not loaded["mismatched_keys"]
    assert loaded["unexpected_keys"] <= {"lm_head.weight"}
    network.score.weight.data.copy_(layout.head)
    return layout, network.eval()


@torch.inference_mode()
def rewards_of(layout, network):
    """[rows, outputs] by transformers' own pooling, one row at a time, with the layout's bias added."""
    logits = torch.cat([network(input_ids=torch.tensor([row])).logits for row in ROWS])
    return logits if layout.head_bias is None else logits + layout.head_bias


@torch.inference_mode()
def rewards_by_hand(policy, head, bias=0.0):
    last = [policy.model(input_ids=torch.tensor([row])).last_hidden_state[0, -1] for row in ROWS]
    return torch.stack([hidden @ head.T + bias for hidden in last])


def check_rewards(folder, policy, head, bias=0.0):
    layout, network = load(folder)
    found, expected = rewards_of(layout, network), rewards_by_hand(policy, head, bias)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert found.shape == (len(ROWS), len(head)) and (found[0] - found[1]).abs().min() > 1e-3
    return layout


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "RewardModel"])
def test_openrlhf_head_in_sharded_files(policy, tmp_path, architecture):
    head = draw(1, 1, HIDDEN)
    save_config(policy, tmp_path, architecture, mean=0.25, std=2.0, normalize_reward=False)
    weights = weights_of(policy, with_lm_head=False)
    first = {name: weights.pop(name) for name in list(weights)[:5]}
    save_shards(tmp_path, [first, weights | {"value_head.weight": head}], "safetensors")
    layout = check_rewards(tmp_path, policy, head)
    assert (layout.name, layout.num_labels, layout.head_bias, layout.key_mapping) == ("openrlhf", 1, None, {})


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_llama_factory_head_in_a_file_of_its_own(policy, tmp_path, ending):
    head, bias = draw(2, 1, HIDDEN), torch.tensor([0.75])
    save_config(policy, tmp_path, "LlamaForCausalLM")
    policy.save_pretrained(tmp_path)
    value_head = {"v_head.summary.weight": head, "v_head.summary.bias": bias}
    if ending == "bin":
        torch.save(value_head, tmp_path / "value_head.bin")
    else:
        save_file(value_head, tmp_path / "value_head.safetensors", {"format": "pt"})
    layout = check_rewards(tmp_path, policy, head, bias)
    assert layout.name == "llama_factory" and torch.equal(layout.head_bias, bias)


@pytest.mark.parametrize("prefix", ["", "pretrained_model.", "model."])
@pytest.mark.parametrize("ending", ["safetensors", "bin", "shards"])
def test_value_head_of_trl_beside_the_model_in_its_wrapper(policy, tmp_path, prefix, ending):
    head, bias = draw(3, 1, HIDDEN), torch.tensor([-1.5])
    save_config(policy, tmp_path, "LlamaForCausalLM")
    weights = weights_of(policy, prefix) | {"v_head.summary.weight": head, "v_head.summary.bias": bias}
    if ending == "safetensors":
        save_weights(tmp_path, weights)
    elif ending == "bin":
        torch.save(weights, tmp_path / "pytorch_model.bin")
    else:
        last = {name: weights.pop(name) for name in list(weights)[-4:]}
        save_shards(tmp_path, [weights, last], "bin")
    layout = check_rewards(tmp_path, policy, head, bias)
    assert layout.name == "trl_value_head" and len(layout.key_mapping) == (prefix != "")


def test_value_head_of_trl_on_gpt2_with_tied_embeddings(tmp_path):
    sizes = {"vocab_size": 64, "n_embd": HIDDEN, "n_layer": 2, "n_head": 2, "n_positions": 16}
    with torch.random.fork_rng():
        torch.manual_seed(4)
        policy = GPT2LMHeadModel(GPT2Config(**sizes, pad_token_id=0, eos_token_id=2, bos_token_id=1)).eval()
    head, bias = draw(4, 1, HIDDEN), torch.tensor([0.5])
    save_config(policy, tmp_path, "GPT2LMHeadModel")
    weights = weights_of(policy, "pretrained_model.", with_lm_head=False)
    save_weights(tmp_path, weights | {"v_head.summary.weight": head, "v_head.summary.bias": bias})
    check_rewards(tmp_path, SimpleNamespace(model=policy.transformer), head, bias)


def test_regression_head_of_ultrarm_in_an_old_torch_file(policy, tmp_path):
    head = draw(5, 1, HIDDEN)
    save_config(policy, tmp_path, "LlamaRewardModel")
    weights = weights_of(policy, with_lm_head=False) | {"regression_head.weight": head}
    # Checkpoints of that age hold the rotary frequencies of each layer.
    weights |= {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": draw(0, 8) for layer in (0, 1)}
    torch.save(weights, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert check_rewards(tmp_path, policy, head).name == "ultrarm"


def layered_head(names, seed, *widths):
    """Random layers by the names of a file, and the same as a function of the decoder's state."""
    shapes = list(zip(widths[1:], widths, strict=False))
    layers = [(draw(seed + i, *shape), draw(seed + 50 + i, shape[0])) for i, shape in enumerate(shapes)]
    tensors = {f"{n}.weight": weight for n, (weight, _) in zip(names, layers, strict=True)}
    tensors |= {f"{n}.bias": bias for n, (_, bias) in zip(names, layers, strict=True)}

    def apply(state):
        for index, (weight, bias) in enumerate(layers):
            state = weight @ (state.clamp(min=0) if index else state) + bias
        return state

    return tensors, apply


@torch.inference_mode()
def check_whole_rewards(folder, policy, head):
    """Against `head` at the last token of rows that are padded together."""
    model, reads = load_reward_model(str(folder)), [[len(row) - 1] for row in ROWS]
    found = model(**padded_batch(ROWS, reads, 0, "cpu"))[0][:, 0]
    states = [policy.model(input_ids=torch.tensor([row])).last_hidden_state[0, -1] for row in ROWS]
    expected = torch.stack([head(state) for state in states])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (found[0] - found[1]).abs() > 1e-3


@pytest.mark.parametrize(
    ("name", "names", "widths"),
    [
        ("grm", ["v_head.summary.0", "v_head.summary.2"], (HIDDEN, 24, 1)),
        ("grm", ["v_head.summary.0", "v_head.summary.2", "v_head.summary.4"], (HIDDEN, 24, 16, 1)),
        ("inf_orm", ["score.0", "score.2"], (HIDDEN, HIDDEN, 1)),
    ],
)
def test_heads_of_several_layers(policy, tmp_path, name, names, widths):
    save_config(policy, tmp_path, "LlamaForSequenceClassification" if name == "inf_orm" else "LlamaForCausalLM")
    tensors, head = layered_head(names, 60, *widths)
    save_weights(tmp_path, weights_of(policy, with_lm_head=False) | tensors)
    layout = find_layout(str(tmp_path))
    assert (layout.name, len(layout.hidden_layers), layout.num_labels) == (name, len(names) - 1, 1)
    check_whole_rewards(tmp_path, policy, head)
    with pytest.raises(CheckpointError, match="several layers, and only linear heads can be trained on"):
        load_reward_model(str(tmp_path), new_head=NewHead(0))
    assert load_reward_model(str(tmp_path), new_head=NewHead(0), keeps_head=False).network.score.out_features == 1


def test_heads_of_several_layers_that_do_not_fit_are_refused(policy, tmp_path):
    save_config(policy, tmp_path, "LlamaForCausalLM")
    tensors, _ = layered_head(["v_head.summary.0", "v_head.summary.2"], 60, HIDDEN, 24, 1)
    weights = weights_of(policy, with_lm_head=False)
    save_weights(tmp_path, weights | tensors | {"v_head.summary.2.weight": draw(0, 1, 16)})
    with pytest.raises(CheckpointError, match=r"'v_head.summary.2.weight' .* \[1, 16\]; the config asks for \[1, 24\]"):
        find_layout(str(tmp_path))
    save_weights(tmp_path, weights | tensors | {"v_head.summary.0.weight": draw(0, 24, 8)})
    with pytest.raises(
        CheckpointError, match=r"'v_head.summary.0.weight' .* \[24, 8\]; the config asks for \[24, 32\]"
    ):
        find_layout(str(tmp_path))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, lambda score: score),
        ({"score_type": "reward", "do_normalize": True}, lambda score: (score - 0.5) / 2),
        ({"score_type": "cost", "do_normalize": True}, lambda score: score / 2),
        ({"score_type": "critic", "do_normalize": True}, lambda score: score),
    ],
)
def test_score_head_of_safe_rlhf_with_its_normalisation(policy, tmp_path, fields, expected):
    head = draw(70, 1, HIDDEN)
    save_config(policy, tmp_path, "LlamaModelForScore", mean=[0.5], var=[4.0], **fields)
    held = {"score_head.weight": head, "normalizer.mean": torch.tensor([0.5]), "normalizer.var": torch.tensor([4.0])}
    save_weights(tmp_path, weights_of(policy, with_lm_head=False) | held)
    assert find_layout(str(tmp_path)).name == "safe_rlhf"
    check_whole_rewards(tmp_path, policy, lambda state: expected(head @ state))


def save_armorm(policy, folder, **changes):
    """An ArmoRM; `changes` are tensors by name with dots as double underscores, None for a tensor that lacks."""
    save_config(policy, folder, "LlamaForRewardModelWithGating", **GATE_CONFIG)
    gate = {name: draw(seed, *shape) for seed, (name, shape) in enumerate(GATE.items(), start=20)}
    weights = weights_of(policy, with_lm_head=False) | gate | {"regression_layer.weight": draw(6, OBJECTIVES, HIDDEN)}
    weights |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_weights(folder, {name: tensor for name, tensor in weights.items() if tensor is not None})
    return gate


def test_armorm_gives_its_objectives_and_its_gate_apart(policy, tmp_path):
    gate = save_armorm(policy, tmp_path)
    layout = check_rewards(tmp_path, policy, draw(6, OBJECTIVES, HIDDEN))
    assert (layout.name, layout.num_labels, layout.gate_temperature) == ("armorm", 19, 5.0)
    assert layout.gate.keys() == gate.keys()
    assert all(torch.equal(layout.gate[name], gate[name]) for name in gate)


def test_head_is_read_in_fp32_from_a_file_in_bf16(policy, tmp_path):
    save_config(policy, tmp_path, "RewardModel")
    head = draw(7, 1, HIDDEN).bfloat16()
    weights = weights_of(policy, with_lm_head=False) | {"value_head.weight": head}
    save_weights(tmp_path, {name: tensor.bfloat16() for name, tensor in weights.items()})
    found = find_layout(str(tmp_path)).head
    assert found.dtype == torch.float32 and torch.equal(found, head.float())


@pytest.mark.parametrize("prefix", ["pretrained_model.", "model."])
def test_what_was_loaded_through_a_wrapper_saves_under_plain_names(policy, tmp_path, prefix):
    head = draw(8, 1, HIDDEN)
    save_config(policy, tmp_path, "LlamaForCausalLM")
    save_weights(tmp_path, weights_of(policy, prefix) | {"v_head.summary.weight": head})
    load(tmp_path)[1].save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == {*weights_of(policy, with_lm_head=False), "score.weight"}
    assert find_layout(str(tmp_path / "saved")) is None
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    with torch.inference_mode():
        found = torch.cat([plain(input_ids=torch.tensor([row])).logits for row in ROWS])
    torch.testing.assert_close(found, rewards_by_hand(policy, head), atol=1e-5, rtol=0)


def test_plain_heads_and_no_heads_are_no_foreign_layout(policy, tmp_path):
    assert find_layout(str(tmp_path)) is None
    save_config(policy, tmp_path, "LlamaForCausalLM")
    policy.save_pretrained(tmp_path)
    assert find_layout(str(tmp_path)) is None
    save_weights(tmp_path, weights_of(policy, with_lm_head=False) | {"score.weight": draw(9, 1, HIDDEN)})
    assert find_layout(str(tmp_path)) is None


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("value_head.weight", (1, 16), r"'value_head.weight' in .* has shape \[1, 16\]; the config asks for \[1, 32\]"),
        ("value_head.weight", (2, HIDDEN), r"'value_head.weight' .* shape \[2, 32\]; the config asks for \[1, 32\]"),
        ("v_head.summary.weight", (HIDDEN,), r"'v_head.summary.weight' .* shape \[32\]; .* \[1, 32\]"),
        ("regression_head.weight", (5, HIDDEN), r"'regression_head.weight' .* shape \[5, 32\]; .* \[1, 32\]"),
    ],
)
def test_head_of_another_shape_is_refused(policy, tmp_path, name, shape, expected):
    save_config(policy, tmp_path, "LlamaForCausalLM")
    save_weights(tmp_path, weights_of(policy) | {name: torch.zeros(shape)})
    with pytest.raises(CheckpointError, match=expected):
        find_layout(str(tmp_path))


def test_armorm_with_a_gate_that_does_not_fit_is_refused(policy, tmp_path):
    save_armorm(policy, tmp_path, regression_layer__weight=draw(0, 5, HIDDEN))
    with pytest.raises(
        CheckpointError, match=r"'regression_layer.weight' .* \[5, 32\]; the config asks for \[19, 32\]"
    ):
        find_layout(str(tmp_path))
    save_armorm(policy, tmp_path, gating__layers__1__weight=draw(0, 16, 8))
    with pytest.raises(CheckpointError, match=r"'gating.layers.1.weight' .* \[16, 8\]; the config asks for \[16, 16\]"):
        find_layout(str(tmp_path))
    save_armorm(policy, tmp_path, reward_transform_matrix=None, gating__logit_scale=None)
    with pytest.raises(CheckpointError, match=r"lacks gating.logit_scale, reward_transform_matrix\."):
        find_layout(str(tmp_path))


def test_two_heads_are_refused(policy, tmp_path):
    save_config(policy, tmp_path, "LlamaForCausalLM")
    save_weights(tmp_path, weights_of(policy) | {"score.weight": draw(0, 1, HIDDEN)})
    save_file({"v_head.summary.weight": draw(1, 1, HIDDEN)}, tmp_path / "value_head.safetensors")
    with pytest.raises(CheckpointError, match=r"several heads \(score.weight, v_head.summary.weight\)"):
        find_layout(str(tmp_path))


def test_adapters_are_refused_with_the_advice_to_merge_them(policy, tmp_path):
    adapter, wrapped = tmp_path / "adapter", tmp_path / "wrapped"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "base"}')
    save_file({"v_head.summary.weight": draw(0, 1, HIDDEN)}, adapter / "value_head.safetensors")
    save_config(policy, wrapped, "LlamaForCausalLM")
    name = "pretrained_model.base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    save_weights(wrapped, {name: draw(0, 2, HIDDEN), "v_head.summary.weight": draw(0, 1, HIDDEN)})
    for folder in (adapter, wrapped):
        with pytest.raises(CheckpointError, match="holds a PEFT adapter.*merge it into its base model"):
            find_layout(str(folder))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "value_head.safetensors", "value_head.bin"])
def test_files_cut_short_are_refused(policy, tmp_path, name):
    save_config(policy, tmp_path, "LlamaForCausalLM")
    weights = {"v_head.summary.weight": draw(0, 1, HIDDEN), "v_head.summary.bias": draw(1, 1)}
    if name.startswith("value_head"):
        save_weights(tmp_path, weights_of(policy))
    else:
        weights = weights_of(policy) | weights
    path = tmp_path / name
    torch.save(weights, path) if name.endswith("bin") else save_file(weights, path)
    assert find_layout(str(tmp_path)).num_labels == 1
    whole = path.read_bytes()
    for length in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=f"does not load as a reward model: its {name} cannot be read"):
            find_layout(str(tmp_path))


def test_broken_index_and_missing_shard_are_refused(policy, tmp_path):
    save_config(policy, tmp_path, "LlamaForCausalLM")
    save_shards(tmp_path, [weights_of(policy), {"value_head.weight": draw(0, 1, HIDDEN)}], "safetensors")
    assert find_layout(str(tmp_path)).name == "openrlhf"
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"its model-00002-of-00002.safetensors cannot be read"):
        find_layout(str(tmp_path))
    index = tmp_path / "model.safetensors.index.json"
    for text in ('{"weight_map": {"model.nor', "{}", "[]"):
        index.write_text(text)
        with pytest.raises(CheckpointError, match=r"its model.safetensors.index.json cannot be read"):
            find_layout(str(tmp_path))
