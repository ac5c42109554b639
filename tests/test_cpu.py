"""Linear layers by oneDNN give what PyTorch's give."""

import pytest
import torch
from torch import nn

from rayrm.models.cpu import MIN_SIZE, OneDnnLinear, dtypes, use_onednn


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_are_those_of_pytorch(dtype, tolerance, bias):
    if dtype not in dtypes():
        pytest.skip(f"oneDNN has no {dtype} on this processor")
    torch.manual_seed(0)
    linear = nn.Linear(96, 160, bias=bias).to(dtype)
    fast = OneDnnLinear(linear)
    with torch.inference_mode():
        for shape in [(96,), (1, 96), (3, 7, 96), (1, 513, 96), (0, 96)]:
            given = torch.randn(shape, dtype=dtype)
            expected = nn.functional.linear(
                given.double(), linear.weight.double(), linear.bias.double() if bias else None
            )
            found = fast(given)
            assert found.shape == expected.shape and found.dtype == dtype
            torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)


def test_only_plain_linear_layers_are_replaced():
    class Own(nn.Linear):
        pass

    network = nn.ModuleDict(
        {"plain": nn.Sequential(nn.Linear(64, 64)), "own": Own(64, 64), "tiny": nn.Linear(64, MIN_SIZE - 1)}
    )
    network["bf16"] = nn.Linear(64, 64).bfloat16()
    network["fp16"] = nn.Linear(64, 64).half()
    use_onednn(network)
    kinds = {name: type(module) for name, module in network.named_modules()}
    assert kinds["plain.0"] is OneDnnLinear
    assert kinds["own"] is Own
    assert kinds["tiny"] is nn.Linear
    assert kinds["fp16"] is nn.Linear
    assert kinds["bf16"] is (OneDnnLinear if torch.bfloat16 in dtypes() else nn.Linear)
