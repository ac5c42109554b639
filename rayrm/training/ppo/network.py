"""The policy as the learner sees it: what it gives to the tokens of completions, and their values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rayrm.training.ppo.losses import entropy_of


class Judged(NamedTuple):
    """What the network gives to the tokens of some completions, one after the other: [tokens] each."""

    logprobs: Tensor
    """Log-probability of each token, fp32, at the temperature of sampling."""
    entropy: Tensor
    """Entropy in nats of the distribution that each token was one of, fp32."""
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
            self.value_head = nn.Linear(shape[1], 1, dtype=output.weight.dtype)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)
        self._places: Tensor | None = None
        self._hidden: Tensor | None = None
        output.register_forward_pre_hook(self._select)

    def _select(self, module: Any, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
        if self._places is None:
            return None
        # [1, tokens, hidden]: models take a batch apart behind their output layer.
        self._hidden = inputs[0][self._places].unsqueeze(0)
        return (self._hidden,)

    def forward(self, inputs: dict[str, Tensor], places: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """Log-probability, entropy and, with a critic, value of each of `targets` [tokens].

        `places` [rows, width] is true where the hidden state foretells a token of a completion, in the order of
        `targets`.
        """
        self._places = places
        try:
            logits = self.policy(**inputs, use_cache=False).logits[0].float() / self.temperature
            hidden = self._hidden
        finally:
            self._places = self._hidden = None
        logprobs = -nn.functional.cross_entropy(logits, targets, reduction="none")
        found = (logprobs, entropy_of(logits))
        if self.value_head is None:
            return found
        assert hidden is not None
        return *found, self.value_head(hidden[0]).squeeze(-1).float()


class Batch(NamedTuple):
    """The arguments of one forward pass of an `ActorCritic`."""

    inputs: dict[str, Tensor]
    places: Tensor
    targets: Tensor


def make_batch(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], pad_id: int, start_id: int | None
) -> Batch:
    """Right-padded tensors on the CPU. `start_id` is the decoder's first token of an encoder-decoder, else None."""
    targets = torch.tensor([token for ids in completions for token in ids], dtype=torch.long)
    if start_id is None:
        ids, mask = _pad([[*p, *c] for p, c in zip(prompts, completions, strict=True)], pad_id)
        places = torch.zeros_like(mask, dtype=torch.bool)
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            places[row, len(prompt) - 1 : len(prompt) - 1 + len(completion)] = True
        return Batch({"input_ids": ids, "attention_mask": mask}, places, targets)
    ids, mask = _pad(prompts, pad_id)
    decoder_ids, decoder_mask = _pad([[start_id, *c[:-1]] for c in completions], pad_id)
    inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": decoder_ids}
    return Batch(inputs | {"decoder_attention_mask": decoder_mask}, decoder_mask.bool(), targets)


def _pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad_id] * (width - len(row))] for row in rows], dtype=torch.long)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], dtype=torch.long)
    return ids, mask


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


def stand_in(snapshot: Snapshot | None) -> AbstractContextManager[None]:
    """`snapshot.active()`, or nothing without one."""
    return nullcontext() if snapshot is None else snapshot.active()
