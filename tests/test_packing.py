import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from rayrm.errors import ConfigError
from rayrm.models.inputs import packed_batch
from rayrm.models.packing import common_length, make_packable, pack
from rayrm.models.reward_model import Penalties, RewardHead, RewardModel

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "num_labels": 1,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "qwen2": {},
    "qwen3": {"head_dim": 8, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    "gemma": {"head_dim": 8, "num_key_value_heads": 1},
    "gemma3_text": {"head_dim": 8, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
    "phi3": {"sliding_window": 6},
    "gpt2": {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    | {"embd_pdrop": 0.0},
}
"""Options beside SIZES; the windows are shorter than the sequences."""
TREES = [
    [[5, 6, 7, 8, 9, 10, 11, 12, 13], [5, 6, 7, 8, 20, 21, 22]],
    [[30, 31, 32, 33], [30, 31, 32, 33, 34, 35, 36]],
    [[40, 41, 42, 43, 44, 45], [3, 41, 42]],
    [[8, 8, 8, 8, 8, 8, 8, 9], [8, 8, 8, 8, 8, 8, 8, 9]],
]
"""Trees of two: a shared prompt, one that begins the other, nothing in common, the same twice."""


def small_model(family="llama", dtype=torch.float64, **options):
    config = AutoConfig.for_model(family, **(SIZES | FAMILIES.get(family, {}) | options))
    torch.manual_seed(0)
    network = AutoModelForSequenceClassification.from_config(config, dtype=dtype)
    for name, module in list(network.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            # Those of transformers compute in fp32.
            network.set_submodule(name, torch.nn.RMSNorm(module.weight.shape, eps=1e-6, dtype=dtype))
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return network.train()


def packed_rewards(network, trees):
    packed = pack(trees)
    hidden = network.base_model(packed.input_ids, use_cache=False, **packed.inputs()).last_hidden_state[0]
    return network.score(hidden[packed.last]).squeeze(-1)


def separate_rewards(network, trees):
    rewards = []
    for row in [row for tree in trees for row in tree]:
        output = network.base_model(input_ids=torch.tensor([row]), use_cache=False)
        rewards.append(network.score(output.last_hidden_state[0, -1]))
    return torch.cat(rewards)


def gradients(network, rewards):
    """Of the Bradley-Terry loss of pairs, by parameter."""
    network.zero_grad()
    (-torch.nn.functional.logsigmoid(rewards[0::2] - rewards[1::2]).mean()).backward()
    return {name: parameter.grad.clone() for name, parameter in network.named_parameters()}


def check_equal(network, trees, tolerance):
    network.set_attn_implementation("sdpa")
    expected = separate_rewards(network, trees)
    expected_gradients = gradients(network, expected)
    make_packable(network)
    found = packed_rewards(network, trees)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    found_gradients = gradients(network, found)
    assert any(gradient.abs().max() > 1e-3 for gradient in found_gradients.values())
    torch.testing.assert_close(found_gradients, expected_gradients, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("family", sorted({*FAMILIES} - {"mixtral"}))
def test_rewards_and_gradients_are_those_of_a_pass_over_each_sequence(family):
    check_equal(small_model(family), TREES, 1e-10)


@pytest.mark.parametrize("family", ["llama", "mistral", "mixtral"])
def test_they_are_the_same_in_fp32(family):
    check_equal(small_model(family, torch.float32), TREES, 1e-5)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_they_are_the_same_with_gradient_checkpointing(family):
    network = small_model(family)
    network.gradient_checkpointing_enable({"use_reentrant": False})
    check_equal(network, TREES, 1e-10)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_trees_may_have_one_sequence_or_many(family):
    trees = [[[5, 6, 7, 8, 9]], [[1, 2, 3, 4, 5, 6], [1, 2, 3, 9], [1, 2, 3, 4, 4, 4, 4], [1, 2, 3, 9, 9]], [[7]]]
    check_equal(small_model(family), trees, 1e-10)


def test_padded_passes_of_a_packable_model_stay_what_they_were():
    network = small_model("mistral")
    rows = [[5, 6, 7, 8, 9, 10, 11, 12], [3, 4, 5]]
    ids = torch.tensor([rows[0], rows[1] + [0] * 5])
    expected = separate_rewards(network, [rows])
    make_packable(network)
    hidden = network.base_model(ids, attention_mask=(ids > 0).long(), use_cache=False).last_hidden_state
    torch.testing.assert_close(network.score(hidden[[0, 1], [7, 2]])[:, 0], expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(separate_rewards(network, [rows]), expected, atol=1e-10, rtol=0)


def test_bf16_is_kept_and_near():
    network = small_model("mistral", torch.bfloat16)
    expected = separate_rewards(network, TREES)
    make_packable(network)
    found = packed_rewards(network, TREES)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0.1)


def test_a_row_holds_common_prefixes_once():
    packed = pack([[[5, 6, 7], [5, 6, 8, 9]], [[1, 2]], [[3, 4], [3, 4, 5]]])
    assert packed.input_ids.tolist() == [[5, 6, 7, 8, 9, 1, 2, 3, 4, 4, 5]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 2, 3, 0, 1, 0, 1, 1, 2]]
    assert packed.uses.tolist() == [[2, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1]]
    assert packed.last.tolist() == [2, 4, 6, 8, 10]
    assert [places.tolist() for places in packed.places] == [[0, 1, 2], [0, 1, 3, 4], [5, 6], [7, 8], [7, 9, 10]]


@pytest.mark.parametrize(
    ("rows", "length"),
    [
        ([[1, 2, 3]], 0),
        ([[1, 2, 3], [1, 2, 4]], 2),
        ([[1, 2], [1, 2, 3]], 1),
        ([[1, 2, 3], [1, 2, 3]], 2),
        ([[1, 2, 3], [4, 2, 3]], 0),
        ([[1], [1, 2]], 0),
        ([[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 9, 4]], 2),
    ],
)
def test_the_common_prefix_leaves_every_sequence_a_token(rows, length):
    assert common_length([np.array(row) for row in rows]) == length


def test_weights_make_the_load_of_experts_that_of_separate_passes():
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    network = small_model("mixtral", torch.float32)
    tree = [[5, 6, 7, 8, 9], [5, 6, 7, 3, 2]]
    ids = torch.tensor(tree)
    logits = network.base_model(ids, use_cache=False, output_router_logits=True).router_logits
    expected = load_balancing_loss_func(logits, 4, 2, torch.ones_like(ids))
    make_packable(network)
    network.score = RewardHead(network.config.hidden_size, 1, bias=False)
    model = RewardModel(network).train()
    model.penalties = Penalties(router=2.0)
    _, found = model(**packed_batch([tree], [(0, [4]), (1, [4])], "cpu"))
    torch.testing.assert_close(found, 2 * expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("gemma2", {"head_dim": 8}, "caps attention scores"),
        ("bert", {}, "no causal decoder"),
        ("bloom", {}, "attention is one of its own"),
        ("qwen3_next", {"num_experts": 2, "head_dim": 8}, "layers of the kind 'linear_attention'"),
        ("gpt_oss", {"num_local_experts": 2, "head_dim": 8}, "has sinks"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            r"positions \(dynamic\) hang on the longest",
        ),
    ],
)
def test_models_that_would_give_something_else_are_refused(family, options, reason):
    network = small_model(family, torch.float32, **options)
    before = network.config._attn_implementation
    with pytest.raises(ConfigError, match=reason):
        make_packable(network)
    assert network.config._attn_implementation == before


def test_a_model_that_hands_nothing_on_to_its_attention_is_refused_in_its_first_pass():
    network = small_model("nemotron", torch.float32, head_dim=8)
    make_packable(network)
    with pytest.raises(ConfigError, match="NemotronAttention is not told how a packed row is cut"):
        packed_rewards(network, TREES)


def test_dropout_in_the_attention_is_refused():
    network = small_model("llama", torch.float32, attention_dropout=0.1)
    make_packable(network)
    with pytest.raises(ConfigError, match="LlamaAttention uses dropout"):
        packed_rewards(network, TREES)
