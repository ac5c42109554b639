"""The policy as the learner sees it: what it gives to the tokens of completions, and their values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rayrm.models.inputs import pad_right
from rayrm.models.packing import pack
from rayrm.training.ppo.logits import judge_tokens

HEAD_GRADIENT = 1e-3
"""What the gradient of the value head's own weights is scaled by. Errors of values can be of any size, and all gradients
are clipped by one norm: unscaled, the head's would shrink the policy's. Adam is blind to the scale."""


class Judged(NamedTuple):
    """What the network gives to the tokens of some completions, one after the other: [tokens] each."""

    logprobs: Tensor
    """Log-probability of each token, fp32, at the temperature of sampling."""
    entropy: Tensor | None
    """Entropy in nats of the distribution that each token was one of, fp32; None while learning without it."""
    values: Tensor | None
    """The value before each token, fp32; None without a critic."""


class ActorCritic(nn.Module):
    """A language model, decoder-only or encoder-decoder, and a value head that reads its last hidden state.

    The output layer sees the places of completions only; it is the widest one by far.
    """

    def __init__(self, policy: Any, temperature: float, has_critic: bool) -> None:
        super().__init__()
        self.policy = policy
        self.temperature = temperature
        output = policy.get_output_embeddings()
        self.value_head: nn.Linear | None = None
        if has_critic:
            shape = getattr(output.weight, "ds_shape", output.weight.shape)
            # Zero, so that the first advantages are the rewards themselves.
            self.value_head = ValueHead(shape[1], 1, dtype=output.weight.dtype)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)
        self.entropy_learns = False
        """Whether the entropy is told with a gradient; without one it is always told."""
        self.values_alone = False
        """Whether only the value head is to learn: nothing else then bears a gradient."""
        self._places: Tensor | None = None
        self._hidden: Tensor | None = None
        output.register_forward_pre_hook(self._select)

    def _select(self, module: Any, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
        if self._places is None:
            return None
        # [1, tokens, hidden]: models take a batch apart behind their output layer.
        self._hidden = inputs[0].flatten(0, 1)[self._places].unsqueeze(0)
        return (self._hidden,)

    def forward(self, inputs: dict[str, Any], places: Tensor, targets: Tensor) -> tuple[Tensor | None, ...]:
        """What `Judged` has of each of `targets` [tokens].

        `places` [tokens] says which hidden state of the batch, counted through all rows, foretells each of them.
        """
        self._places = places
        try:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.values_alone):
                logits = self.policy(**inputs, use_cache=False).logits[0]
            hidden = self._hidden
        finally:
            self._places = self._hidden = None
        found = judge_tokens(logits, targets, self.temperature, self.entropy_learns or not torch.is_grad_enabled())
        if self.value_head is None:
            return *found, None
        assert hidden is not None
        return *found, self.value_head(hidden[0]).squeeze(-1)


class ValueHead(nn.Linear):
    """A linear layer that computes in fp32 whatever its weights are held in: values in bf16 are a mere hint."""

    def forward(self, hidden: Tensor) -> Tensor:
        """fp32 [tokens, 1]. The gradient of the weights is scaled by `HEAD_GRADIENT`, that of `hidden` is as it is."""
        weight, bias = (x.detach() + HEAD_GRADIENT * (x - x.detach()) for x in (self.weight.float(), self.bias.float()))
        return nn.functional.linear(hidden.float(), weight, bias)


class Batch(NamedTuple):
    """The arguments of one forward pass of an `ActorCritic`."""

    inputs: dict[str, Any]
    places: Tensor
    targets: Tensor

    def to(self, device: Any) -> Batch:
        """The same on a device."""
        inputs = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in self.inputs.items()}
        return Batch(inputs, self.places.to(device), self.targets.to(device))


def padded_batch(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], pad_id: int, start_id: int | None
) -> Batch:
    """Right-padded tensors on the CPU. `start_id` is the decoder's first token of an encoder-decoder, else None."""
    if start_id is None:
        ids, mask = pad_right([[*p, *c] for p, c in zip(prompts, completions, strict=True)], pad_id, "cpu")
        first = [len(prompt) - 1 for prompt in prompts]
        return _batch({"input_ids": ids, "attention_mask": mask}, first, completions, ids.shape[1])
    ids, mask = pad_right(prompts, pad_id, "cpu")
    decoder_ids, decoder_mask = pad_right([[start_id, *c[:-1]] for c in completions], pad_id, "cpu")
    inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": decoder_ids}
    inputs["decoder_attention_mask"] = decoder_mask
    return _batch(inputs, [0] * len(completions), completions, decoder_ids.shape[1])


def _batch(inputs: dict[str, Any], first: Sequence[int], completions: Sequence[Sequence[int]], width: int) -> Batch:
    """A batch of rows of `width` places whose completions are foretold from the places `first` on."""
    places = [row * width + start + k for row, start in enumerate(first) for k in range(len(completions[row]))]
    targets = [token for ids in completions for token in ids]
    return Batch(inputs, torch.tensor(places), torch.tensor(targets))


def packed_batch(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> Batch:
    """One row without padding on the CPU, in which completions of the same prompt that follow one another share it.

    The network must be packable.
    """
    trees: list[list[list[int]]] = []
    for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        if not index or prompt != prompts[index - 1]:
            trees.append([])
        trees[-1].append([*prompt, *completion])
    packed = pack(trees)
    places = [
        torch.from_numpy(where[len(prompt) - 1 : -1]) for where, prompt in zip(packed.places, prompts, strict=True)
    ]
    targets = torch.tensor([token for ids in completions for token in ids])
    return Batch({"input_ids": packed.input_ids, **packed.inputs()}, torch.cat(places), targets)


class Snapshot:
    """A copy of the weights of `model` that train, on their own device, which can stand in for them.

    Works on what each process holds of them: whole parameters, or their parts under ZeRO-3.
    """

    def __init__(self, model: nn.Module) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.copies = [held(p).detach().clone() for p in self.parameters]

    @torch.no_grad()
    def take(self) -> None:
        """Copy the weights of now."""
        for parameter, copy in zip(self.parameters, self.copies, strict=True):
            copy.copy_(held(parameter))

    @contextmanager
    def active(self) -> Iterator[None]:
        """Meanwhile the model has the weights of the copy; they bear no gradient and must not be changed."""
        kept = [held(parameter).data for parameter in self.parameters]
        try:
            for parameter, copy in zip(self.parameters, self.copies, strict=True):
                held(parameter).data = copy
            yield
        finally:
            for parameter, tensor in zip(self.parameters, kept, strict=True):
                held(parameter).data = tensor


def held(parameter: Any) -> Tensor:
    """What this process holds of a parameter: all of it, or its part under ZeRO-3."""
    return parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter


class Reference:
    """The model that training began with: the one below LoRA's updates, or a copy of all weights."""

    def __init__(self, policy: Any) -> None:
        self.adapted = policy if hasattr(policy, "disable_adapter") else None
        self.snapshot = None if self.adapted is not None else Snapshot(policy)

    def active(self) -> AbstractContextManager[Any]:
        """Meanwhile the policy is the reference."""
        if self.adapted is not None:
            return self.adapted.disable_adapter()  # type: ignore[no-any-return]
        assert self.snapshot is not None
        return self.snapshot.active()
