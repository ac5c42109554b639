"""What a reward model's forward pass takes: rows of token ids, padded or packed, and the tokens that are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rayrm.models.packing import pack


def pad_right(rows: Sequence[Any], pad_id: int, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both int64 [rows, longest row], of rows of ids (lists or arrays)."""
    width = max(len(row) for row in rows)
    ids = np.full((len(rows), width), pad_id, np.int64)
    mask = np.zeros((len(rows), width), np.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
        mask[index, : len(row)] = 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


def padded_batch(
    rows: Sequence[Any], reads: Sequence[Sequence[int]], pad_id: int, device: Any, masked: Sequence[int] = ()
) -> dict[str, torch.Tensor]:
    """What `RewardModel.forward` takes for rows of ids, padded on the right, to be read at `reads` of each row.

    `reads` [rows, most reads of a row] points to the first token where a row has fewer. `masked` tells how many of the
    first tokens of each row no token attends to; they count as positions.
    """
    ids, mask = pad_right(rows, pad_id, device)
    for index, num in enumerate(masked):
        mask[index, :num] = 0
    most = max(len(positions) for positions in reads)
    flat = [
        [index * ids.shape[1] + position for position in positions] + [0] * (most - len(positions))
        for index, positions in enumerate(reads)
    ]
    return {"input_ids": ids, "attention_mask": mask, "reads": torch.tensor(flat, device=device)}


def packed_batch(
    trees: Sequence[Sequence[Any]], reads: Sequence[tuple[int, Sequence[int]]], device: Any
) -> dict[str, Any]:
    """What `RewardModel.forward` takes for trees of sequences, each of which computes what they share once.

    The network must be packable. `reads` holds, in the order of the outputs, a sequence, by its number through all
    trees, and its positions; one with fewer reads than others points to the row's first token.
    """
    packed = pack(trees, device)
    flat = np.zeros((len(reads), max(len(positions) for _, positions in reads)), np.int64)
    for index, (sequence, positions) in enumerate(reads):
        flat[index, : len(positions)] = packed.places[sequence][list(positions)]
    return {
        "input_ids": packed.input_ids,
        "reads": torch.from_numpy(flat).to(device),
        "uses": packed.uses,
        **packed.inputs(),
    }
