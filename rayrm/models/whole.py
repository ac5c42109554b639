"""Reward models that bring their own code: the network's own forward pass gives the reward."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rayrm.errors import CheckpointError
from rayrm.models.loading import Loading, check_loaded, load_network
from rayrm.models.own_code import find_own_model

OUTPUTS = ("end_scores", "score", "logits")
"""Fields of a network's output that hold the reward, best first."""


class WholeModel(nn.Module):
    """A network that is given token ids and a mask, and gives one number for each row.

    Where such networks look for the last token differs; rows of one length at a time, which need no padding, suit all.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, reads: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 [rows, longest row], padded on the right → fp32 [rows, 1, 1], and a penalty of 0.

        Raises CheckpointError where the network gives anything but one number for each row.
        """
        positions = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)
        lengths = (attention_mask * positions).amax(dim=1)
        rewards = torch.zeros(len(input_ids), device=input_ids.device)
        for length in lengths.unique().tolist():
            rows = lengths == length
            output = self.network(input_ids=input_ids[rows, :length], attention_mask=attention_mask[rows, :length])
            rewards[rows] = self._rewards(output, int(rows.sum()))
        return rewards[:, None, None], torch.zeros((), device=input_ids.device)

    def _rewards(self, output: Any, num_rows: int) -> torch.Tensor:
        found = output if isinstance(output, torch.Tensor) else None
        for name in () if found is not None else OUTPUTS:
            found = found if found is not None else getattr(output, name, None)
        if found is None and isinstance(output, tuple):
            found = output[0]
        if not isinstance(found, torch.Tensor) or found.numel() != num_rows or found.shape[:1] != (num_rows,):
            given = f"numbers of shape {list(found.shape)}" if isinstance(found, torch.Tensor) else "no such field"
            raise CheckpointError(
                f"{type(self.network).__name__} has to give one number for each of {num_rows} rows, as "
                f"{', '.join(OUTPUTS)} or alone, and gives {given}."
            )
        return found.reshape(num_rows).float()


def load_whole_model(path: str, **how: Any) -> WholeModel:
    """The model at `path` as its own code makes it, in evaluation mode. `how` are the fields of Loading.

    Raises CheckpointError when it has no such code, when nothing loads and when weights are missing.
    """
    import transformers

    kind = find_own_model(path)
    if kind is None:
        raise CheckpointError(f"'{path}' has no code of its own; leave out the readout 'whole'.")
    network, loaded = load_network(path, getattr(transformers, kind), Loading(**how).settings())
    # Such code may well leave tensors of older versions alone.
    check_loaded(path, loaded | {"unexpected_keys": set()}, may_lack_head=False)
    return WholeModel(network).eval()
