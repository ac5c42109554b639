"""Log-probabilities and entropies of tokens, against the plain formula in fp64."""

import math

import pytest
import torch

from rayrm.training.ppo import logits as module
from rayrm.training.ppo.logits import judge_tokens


def plain(logits, targets, temperature):
    logprobs = (logits.double() / temperature).log_softmax(-1)
    return logprobs[range(len(targets)), targets], -(logprobs.exp() * logprobs).sum(-1)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Two rows at a time."""
    monkeypatch.setattr(module, "CHUNK", 25)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_values_and_gradients_are_those_of_the_plain_formula(dtype, near, temperature):
    generator = torch.Generator().manual_seed(0)
    logits = [(4 * torch.randn(5, 11, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()]
    logits.append(logits[0].detach().clone().requires_grad_())
    targets = torch.tensor([3, 0, 10, 3, 7])
    weights = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    for kinds in ((True, True), (True, False), (False, True)):
        found = judge_tokens(logits[0], targets, temperature, kinds[1])
        wanted = plain(logits[1], targets, temperature)
        assert (found[1] is None) == (not kinds[1])
        losses = []
        for judged in (found, wanted):
            pairs = zip(judged, weights, kinds, strict=True)
            losses.append(sum((values.double() * weight).sum() for values, weight, is_in in pairs if is_in))
        for number, is_in in enumerate(kinds):
            if is_in:
                # Both read the same logits, and only the sums are fp32.
                torch.testing.assert_close(found[number].double(), wanted[number], atol=min(near, 1e-5), rtol=0)
        gradients = [torch.autograd.grad(loss, x)[0] for loss, x in zip(losses, logits, strict=True)]
        assert gradients[0].dtype == dtype
        torch.testing.assert_close(gradients[0].double(), gradients[1].double(), atol=near, rtol=near)


def test_what_cannot_be_drawn_counts_nothing():
    """Some models mask tokens by logits of −∞."""
    some = torch.tensor([[0.5, -1.0, 2.0], [1.0, 0.0, 0.0]], requires_grad=True)
    masked = torch.cat([some, torch.full((2, 2), -torch.inf)], 1)
    targets, found = torch.tensor([2, 0]), []
    for logits in (some, masked):
        logprobs, entropy = judge_tokens(logits, targets, 1.0, with_entropy=True)
        found.append((logprobs, entropy, *torch.autograd.grad((logprobs + 3 * entropy).sum(), some)))
    for plainly, behind in zip(*found, strict=True):
        torch.testing.assert_close(behind, plainly)


def test_entropy_of_a_fair_choice_and_of_a_certain_one():
    logits = torch.stack([torch.zeros(8), torch.tensor([0.0] * 7 + [200.0])])
    logprobs, entropy = judge_tokens(logits, torch.tensor([0, 7]), 1.0, with_entropy=True)
    assert entropy.tolist() == pytest.approx([math.log(8), 0], abs=1e-6)
    assert logprobs.tolist() == pytest.approx([-math.log(8), 0], abs=1e-6)
