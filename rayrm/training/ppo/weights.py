"""The weights that samplers need, under the names that a saved model has."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch.distributed as dist
from peft.tuners import lora
from torch import Tensor

from rayrm.training.checkpoints import gather_state

ADAPTED, BASE = "base_model.model.", ".base_layer"


def sampler_state(policy: Any) -> dict[str, Tensor]:
    """The tensors of `policy` on the CPU of rank 0, LoRA's updates added in; nothing on other ranks.

    All ranks call it together. Under ZeRO-3 they are put together one at a time.
    """
    if not hasattr(policy, "disable_adapter"):
        return gather_state(policy)
    state = {
        name.removeprefix(ADAPTED).replace(BASE, ""): tensor
        for name, tensor in gather_state(policy, lambda name: "lora_" not in name).items()
    }
    is_first = dist.get_rank() == 0
    for name, module in policy.named_modules():
        if not hasattr(module, "get_delta_weight"):
            continue
        with _whole(module):
            if is_first:
                key = f"{name.removeprefix(ADAPTED)}.weight"
                state[key] = (state[key].float() + _update(module).cpu()).to(state[key].dtype)
    return state


def _update(layer: Any) -> Tensor:
    """What LoRA adds to a layer's weight, in fp32: peft rounds it to the parameters' format before the sum is."""
    is_linear = isinstance(layer, lora.Linear)
    if not is_linear:
        return layer.get_delta_weight("default").detach().float()
    up, down = (part["default"].weight.detach().float() for part in (layer.lora_B, layer.lora_A))
    update = up @ down * layer.scaling["default"]
    return update.T if layer.fan_in_fan_out else update


def _whole(module: Any) -> Any:
    """Meanwhile the parameters of `module` are whole on all ranks."""
    parameters = [p for p in module.parameters() if hasattr(p, "ds_id")]
    if not parameters:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)
