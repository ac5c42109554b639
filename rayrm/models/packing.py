"""Many sequences in one row without padding, where sequences that begin alike share what they have in common.

A tree is a set of sequences, usually chosen and rejected. The row holds the longest common prefix of their tokens once,
and then what each of them has of its own:

    row        the common prefix | rest of chosen | rest of rejected | the next tree
    positions    0, 1, …, 8      |   9, …, 14     |   9, …, 12       |   0, 1, …

A token attends to its own sequence up to itself and to nothing else, so outputs and gradients are those of a pass over
each sequence alone. In each layer a piece of the row, a prefix or the rest of a sequence, is one call of an attention
kernel, with the piece's queries and the keys of its sequence.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from rayrm.errors import ConfigError

ATTENTION = "rayrm_packed"
"""Name of this attention among those of transformers."""
Ids = Sequence[int] | np.ndarray
"""Token ids of a sequence, one or more."""


class Piece(NamedTuple):
    """Consecutive tokens of the row that belong to the same sequences: a common prefix, or what is left of a sequence."""

    size: int
    """Its tokens."""
    position: int
    """Position of its first token: how many tokens its sequence has before it."""
    prefix: int | None
    """Number of the piece that holds those tokens; None where there are none."""


class Call(NamedTuple):
    """One call of an attention kernel."""

    piece: Piece
    """Its queries."""
    first: int
    """Position of the first key."""
    mask: torch.Tensor | None
    """[1, 1, queries, keys]: 0 where a query sees a key, else -inf. None where the keys are the piece's own and plainly
    causal."""


@dataclass(frozen=True, eq=False)
class Segments:
    """How the attention of all layers cuts a row."""

    pieces: list[Piece]
    """All pieces in the order of the row."""
    longest: int
    """Tokens of the longest sequence."""
    _known: dict[tuple[int, torch.dtype, torch.device], list[Call]] = field(default_factory=dict)

    def calls(self, window: int | None, like: torch.Tensor) -> list[Call]:
        """The calls of a layer whose queries see `window` tokens, themselves included, or all before them (None).

        Masks have the type and the device of `like`. Layers with the same window share them.
        """
        window = min(window or self.longest, self.longest)
        key = (window, like.dtype, like.device)
        if key not in self._known:
            self._known[key] = list(_calls(self, window, like))
        return self._known[key]


def _calls(segments: Segments, window: int, like: torch.Tensor) -> Iterator[Call]:
    longest, masked = segments.longest, [piece for piece in segments.pieces if piece.position or piece.size > window]
    # Any piece's queries against keys; both are counted from its first token, which is column `longest`.
    most = max((piece.size for piece in masked), default=0)
    ahead = torch.arange(-longest, most, device=like.device) - torch.arange(most, device=like.device)[:, None]
    mask = like.new_zeros(ahead.shape).masked_fill_((ahead > 0) | (ahead <= -window), -torch.inf)[None, None]
    for piece in segments.pieces:
        if piece.position or piece.size > window:
            first = max(0, piece.position - window + 1)
            begin = longest - piece.position + first
            yield Call(piece, first, mask[:, :, : piece.size, begin : longest + piece.size])
        else:
            yield Call(piece, 0, None)


class Packed(NamedTuple):
    """A row of trees. Its sequences are numbered through all trees, in the order given."""

    input_ids: torch.Tensor
    """int64 [1, length]."""
    position_ids: torch.Tensor
    """int64 [1, length]."""
    segments: Segments
    """How the attention cuts the row."""
    uses: torch.Tensor
    """int64 [1, length]: how many sequences each token stands for, its weight in a mean over all their tokens."""
    last: torch.Tensor
    """int64 [sequences]: places in the row of their last tokens."""
    places: list[np.ndarray]
    """For each sequence, the places in the row of all its tokens, int64."""

    def inputs(self) -> dict[str, Any]:
        """What the decoder of a packable network takes beside `input_ids`.

        The mask is empty: with four dimensions, transformers makes none of its own, which would be as wide and as high
        as the row is long, and hands it on to the attention.
        """
        mask = torch.empty((1, 1, 0, 0), device=self.input_ids.device)
        return {"attention_mask": mask, "position_ids": self.position_ids, "segments": self.segments}


def pack(trees: Sequence[Sequence[Ids]], device: torch.device | str = "cpu") -> Packed:
    """All sequences of all trees in one row.

    The common prefix leaves every sequence of a tree its last token, so that each can be read at one of its own.
    """
    pieces: list[Piece] = []
    ids, positions, uses, places = [], [], [], []
    end = 0
    for tree in trees:
        rows = [np.asarray(sequence, np.int64) for sequence in tree]
        shared = common_length(rows)
        before, number = np.arange(end, end + shared), len(pieces) if shared else None
        spans = [(rows[0], 0, shared)] if shared else []
        spans += [(row, shared, len(row)) for row in rows]
        for row, begin, stop in spans:
            is_rest = stop > shared
            pieces.append(Piece(stop - begin, begin, number if is_rest else None))
            ids.append(row[begin:stop])
            positions.append(np.arange(begin, stop))
            uses.append(np.full(stop - begin, 1 if is_rest else len(rows)))
            if is_rest:
                places.append(np.concatenate([before, np.arange(end, end + stop - begin)]))
            end += stop - begin
    input_ids, position_ids, weights = (
        torch.from_numpy(np.concatenate(parts)).to(device)[None] for parts in (ids, positions, uses)
    )
    last = torch.tensor([found[-1] for found in places], device=device)
    return Packed(input_ids, position_ids, Segments(pieces, max(map(len, places))), weights, last, places)


def common_length(rows: Sequence[np.ndarray]) -> int:
    """Tokens that all rows begin with, at most all but the last one of the shortest; 0 for a single row."""
    if len(rows) == 1:
        return 0
    common = rows[0][: min(len(row) for row in rows) - 1]
    for row in rows[1:]:
        differing = np.flatnonzero(common != row[: len(common)])
        common = common[: differing[0]] if differing.size else common
    return len(common)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    segments: Segments | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """A layer's attention over a row, as transformers calls it: [1, heads, length, size] → [1, length, heads, size].

    Without `segments` the batch is a padded one, and the attention is transformers' `sdpa`. Raises ConfigError when the
    layer asks for something else than causal softmax attention.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if segments is None:
        if attention_mask is not None and not attention_mask.numel():
            raise ConfigError(f"{type(module).__name__} is not told how a packed row is cut; turn packing off.")
        padded, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return padded, None
    _check_layer(module, options)
    sizes = [piece.size for piece in segments.pieces]
    queries, keys, values = (whole.split(sizes, dim=2) for whole in (query, key, value))
    outputs = []
    for number, call in enumerate(segments.calls(_window(module, options), query)):
        seen = [number] if call.piece.prefix is None else [call.piece.prefix, number]
        key, value = (_join([parts[n] for n in seen])[:, :, call.first :] for parts in (keys, values))
        output, _ = sdpa_attention_forward(
            module, queries[number], key, value, call.mask, scaling=options.get("scaling")
        )
        outputs.append(output)
    return torch.cat(outputs, dim=1), None


def _join(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _check_layer(module: Any, options: dict[str, Any]) -> None:
    unknown = [name for name in ("softcap", "s_aux", "position_bias") if options.get(name) is not None]
    unknown += ["dropout"] if options.get("dropout") else []
    unknown += [] if getattr(module, "is_causal", True) else ["attention to what follows"]
    if unknown:
        raise ConfigError(
            f"{type(module).__name__} uses {unknown[0]}, which packed rows do not know; turn packing off."
        )


def _window(module: Any, options: dict[str, Any]) -> int | None:
    """Tokens that a query of this layer sees, itself included; None for all before it."""
    config: Any = getattr(module, "config", None)
    if "sliding_window" in options:
        window = options["sliding_window"]
    elif getattr(config, "layer_types", None) is None and hasattr(type(config), "sliding_window"):
        window = config.sliding_window
    else:
        window = getattr(module, "sliding_window", None)
    return window or None


def make_packable(network: Any) -> None:
    """Give a transformers model this attention; padded batches go on to be computed as by `sdpa`.

    Raises ConfigError, with the reason, where packed rows would not give what separate passes give. A model that does
    not hand `segments` on to its attention is found out, with the same error, in its first pass over a row.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    obstacle = _obstacle(network)
    if obstacle:
        raise ConfigError(f"{type(network).__name__} cannot run on packed rows, since {obstacle}; turn packing off.")
    AttentionInterface.register(ATTENTION, packed_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    network.set_attn_implementation(ATTENTION)


def _obstacle(network: Any) -> str | None:
    config, decoder = network.config, network.base_model
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    ropes = getattr(config, "rope_parameters", None) or {}
    ropes = {rope.get("rope_type") for rope in (ropes, *ropes.values()) if isinstance(rope, dict)}
    modules = list(decoder.modules())
    if config.get_text_config() is not config or config.is_encoder_decoder:
        return "it is made of several models"
    if kinds or decoder._is_stateful:
        return f"it has layers of the kind '{min(kinds, default='recurrent')}'"
    if not decoder._supports_attention_backend or getattr(config, "alibi", False):
        return "its attention is one of its own and cannot be replaced"
    if any(getattr(module, "is_causal", True) is False for module in modules):
        return "it is no causal decoder"
    if getattr(config, "attn_logit_softcapping", None):
        return "it caps attention scores (attn_logit_softcapping)"
    if any(hasattr(module, "sinks") for module in modules):
        return "its attention has sinks"
    if ropes & {"dynamic", "longrope"}:
        return f"its rotary positions ({min(ropes & {'dynamic', 'longrope'})}) hang on the longest sequence of a pass"
    if "position_ids" not in inspect.signature(decoder.forward).parameters:
        return "it takes no position ids"
    return None
