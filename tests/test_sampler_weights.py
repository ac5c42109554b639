"""What samplers are given: all weights under the names of a saved model, LoRA's updates added in."""

import torch

from rayrm.models.creation import CreationConfig, create_model
from rayrm.training.ppo.weights import sampler_state
from rayrm.training.settings import LowRank

SIZES = CreationConfig(vocab_size=300, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2, max_length=64)


def test_updates_are_added_before_anything_is_rounded_to_bf16(tmp_path, process_group):
    from transformers import AutoModelForCausalLM

    create_model(["one two three"] * 9, SIZES, str(tmp_path / "model"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    start = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    policy = LowRank(r=4, alpha=8).add_to(plain, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    updates = {}
    for name, module in policy.named_modules():
        if hasattr(module, "get_delta_weight"):
            up, down = module.lora_B["default"].weight, module.lora_A["default"].weight
            assert up.dtype == torch.bfloat16
            torch.nn.init.normal_(up, std=0.02)
            updates[f"{name.removeprefix('base_model.model.')}.weight"] = 2 * (up.float() @ down.float()).detach()
    found = sampler_state(policy)
    # Seven linear layers in each of two blocks.
    assert len(updates) == 14 and found.keys() == start.keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        if name not in updates:
            assert torch.equal(tensor, start[name])
            continue
        exact = start[name].double() + updates[name].double()
        # Half a unit in the last of bf16's 8 places; fp32 has 24 of them for the sum.
        assert ((tensor.double() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-8).all()
        assert not torch.equal(tensor, start[name])
