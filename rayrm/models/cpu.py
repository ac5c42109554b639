"""Inference on a CPU: linear layers by oneDNN, and memory that is not given back between two layers.

PyTorch multiplies fp32 matrices with MKL, which leaves the wide vector units of other makers' processors unused; oneDNN
finds them by itself. Weights are laid out once in the blocks that its kernels read.
"""

from __future__ import annotations

import ctypes

import torch
from torch import nn

MIN_SIZE = 64
"""Fewest inputs and outputs of a layer for which the call is worth it."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's malloc.h. The second takes 32 MiB at the most."""


class OneDnnLinear(nn.Module):
    """A linear layer without gradients, […, inputs] → […, outputs]."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        # A buffer of this layout cannot be saved or moved, so it is a plain attribute.
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.bias = linear.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As `nn.Linear.forward`."""
        output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(input, self._weight, self.bias, "none", [], "")
        return output


def dtypes() -> tuple[torch.dtype, ...]:
    """Number formats that oneDNN multiplies on this processor; bf16 takes vector units that not every one has."""
    has_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return (torch.float32, torch.bfloat16) if has_bf16 else (torch.float32,)


def use_onednn(network: nn.Module) -> None:
    """Replace all plain linear layers of a model on a CPU that is only read from now on."""
    if not torch.backends.mkldnn.is_available():
        return
    for module in list(network.modules()):
        for name, child in module.named_children():
            # No subclasses, which do something else.
            if type(child) is nn.Linear and _is_for_onednn(child.weight):
                setattr(module, name, OneDnnLinear(child))


def keep_freed_memory() -> None:
    """Let this process use the memory that one layer frees for the next one.

    glibc gives large blocks back to the kernel, which clears each page anew when it hands them out again. Other C
    libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 32 * 2**20)
        mallopt(M_TRIM_THRESHOLD, 2**30)


def _is_for_onednn(weight: torch.Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype in dtypes() and min(weight.shape) >= MIN_SIZE
