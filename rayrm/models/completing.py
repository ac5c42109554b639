"""Complete a batch of prompts token by token with a network of transformers, and drop rows that have ended from it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rayrm.errors import CheckpointError, ConfigError
from rayrm.models.vllm import Drawn

if TYPE_CHECKING:
    from rayrm.models.vllm import DecodingConfig

MIN_DONE_FRACTION = 1 / 8
"""Share of a batch's rows that have ended before they are taken out of it."""


def uniform_numbers(seed: int, num_candidates: int, max_tokens: int) -> np.ndarray:
    """fp64 [num_candidates, max_tokens] between 0 and 1, both excluded."""
    numbers = np.random.default_rng(seed).integers(1 << 32, size=(num_candidates, max_tokens))
    # Never so near to 1 that a sum of probabilities would round to it.
    uniform: np.ndarray = (numbers + 0.5) / (1 << 32)
    return uniform


def choose_tokens(
    logits: torch.Tensor, noise: torch.Tensor, config: DecodingConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """The token of each row where its number falls among the probabilities, and its log-probability.

    `logits` are fp32 [rows, vocabulary], `noise` fp64 [rows] between 0 and 1. Filters act after the temperature, top_k
    first. At temperature 0 the most likely token is taken.
    """
    if config.temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    logits = logits / config.temperature
    if config.top_k is not None and config.top_k < logits.shape[1]:
        least = logits.topk(config.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if config.top_p < 1:
        ordered, places = logits.sort(descending=True)
        likely = ordered.softmax(-1, dtype=torch.float64)
        # A token stays while the more likely ones have not reached top_p; the first one always does.
        out = likely.cumsum(-1) - likely >= config.top_p
        logits = logits.masked_fill(torch.zeros_like(out).scatter(1, places, out), -torch.inf)
    logprobs = logits.log_softmax(-1)
    sums = logprobs.exp().cumsum(-1, dtype=torch.float64)
    tokens = torch.searchsorted(sums, noise[:, None] * sums[:, -1:], right=True)
    return tokens[:, 0], logprobs.gather(1, tokens)[:, 0]


def check_first_token(network: Any, path: str) -> None:
    """Raise ConfigError for a language model that is told its first token."""
    if getattr(network.generation_config, "forced_bos_token_id", None) is not None:
        raise ConfigError(f"'{path}' forces its first token (forced_bos_token_id), which nobody draws.")


def complete(
    rows: DecoderRows | EncoderDecoderRows,
    noise: torch.Tensor,
    bounds: list[int],
    config: DecodingConfig,
    ends: list[int],
) -> list[Drawn]:
    """Draw token after token for all rows, each to an end token or to its bound."""
    device = noise.device
    end_ids = torch.tensor(ends, device=device)
    lengths = torch.tensor(bounds, device=device)
    ids = torch.zeros(noise.shape, dtype=torch.long, device=device)
    logprobs = torch.zeros(noise.shape, device=device)
    is_finished = torch.zeros(len(bounds), dtype=torch.bool, device=device)
    alive = torch.arange(len(bounds), device=device)
    logits = rows.start()
    for place in range(max(bounds)):
        logits = logits.float()
        if place < config.min_tokens:
            logits[:, end_ids] = -torch.inf
        tokens, found = choose_tokens(logits, noise[alive, place], config)
        ids[alive, place], logprobs[alive, place] = tokens, found
        # A row that is done runs on until it is taken out; what is behind its length is never read.
        ended = torch.isin(tokens, end_ids) & (place < lengths[alive])
        lengths[alive[ended]] = place + 1
        is_finished[alive[ended]] = True
        goes_on = lengths[alive] > place + 1
        num_left = int(goes_on.sum())
        if not num_left:
            break
        if len(alive) - num_left >= MIN_DONE_FRACTION * len(alive):
            kept = goes_on.nonzero()[:, 0]
            rows.keep(kept)
            alive, tokens = alive[kept], tokens[kept]
        logits = rows.step(tokens)
    facts = zip(ids.tolist(), logprobs.tolist(), lengths.tolist(), is_finished.tolist(), strict=True)
    return [Drawn(row[:length], found[:length], ended) for row, found, length, ended in facts]


class DecoderRows:
    """Rows of a decoder-only model: prompts padded on the left, each continued `num` times."""

    def __init__(self, network: Any, prompts: Sequence[Sequence[int]], num: int, max_model_len: int) -> None:
        self.network, self.num, self.last = network, num, max_model_len - 1
        longest = max(map(len, prompts))
        ids = [[0] * (longest - len(row)) + list(row) for row in prompts]
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in prompts]
        self.ids = torch.tensor(ids, device=network.device)
        self.mask = torch.tensor(mask, device=network.device)
        parameters = inspect.signature(network.forward).parameters
        self.takes_positions = "position_ids" in parameters
        self.last_only = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        self.cache: Any = None

    def start(self) -> torch.Tensor:
        """Logits of the first token, [prompts × num, vocabulary]."""
        logits = self._forward(self.ids, (self.mask.cumsum(1) - 1).clamp(min=0))
        self.cache.batch_repeat_interleave(self.num)
        self.mask = self.mask.repeat_interleave(self.num, 0)
        return logits.repeat_interleave(self.num, 0)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits of the next token behind `tokens`, [rows, vocabulary]."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
        # A row that is done may run past the model's last position.
        return self._forward(tokens[:, None], (self.mask.sum(1, keepdim=True) - 1).clamp(max=self.last))

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows alone."""
        self.cache.batch_select_indices(rows)
        self.mask = self.mask[rows]

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        more = {"position_ids": positions} if self.takes_positions else {}
        output = self.network(
            input_ids=ids,
            attention_mask=self.mask,
            past_key_values=self.cache,
            use_cache=True,
            **more,
            **self.last_only,
        )
        self.cache = output.past_key_values
        return output.logits[:, -1]


class EncoderDecoderRows:
    """Rows of an encoder-decoder: each prompt is encoded once and decoded `num` times."""

    def __init__(self, network: Any, prompts: Sequence[Sequence[int]], num: int) -> None:
        self.network = network
        longest = max(map(len, prompts))
        ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in prompts], device=network.device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in prompts], device=network.device)
        self.encoded = network.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
        self.encoded = self.encoded.repeat_interleave(num, 0)
        self.mask = mask.repeat_interleave(num, 0)
        self.cache: Any = None

    def start(self) -> torch.Tensor:
        """Logits of the first token, [prompts × num, vocabulary]."""
        first = decoder_start(self.network)
        return self.step(torch.full((len(self.mask),), first, device=self.mask.device))

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits of the next token behind `tokens`, [rows, vocabulary]."""
        from transformers.modeling_outputs import BaseModelOutput

        output = self.network(
            encoder_outputs=BaseModelOutput(last_hidden_state=self.encoded),
            attention_mask=self.mask,
            decoder_input_ids=tokens[:, None],
            past_key_values=self.cache,
            use_cache=True,
        )
        self.cache = output.past_key_values
        return output.logits[:, -1]

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows alone."""
        self.cache.batch_select_indices(rows)
        self.encoded, self.mask = self.encoded[rows], self.mask[rows]


def decoder_start(network: Any) -> int:
    """The token that an encoder-decoder's completions start from; it is no part of them. Raises CheckpointError."""
    starts = (network.generation_config.decoder_start_token_id, network.config.decoder_start_token_id)
    for start in starts:
        if start is not None:
            return int(start)
    raise CheckpointError("The encoder-decoder's config has no decoder_start_token_id; give it one.")
