"""Reward models: a decoder with a linear head, read at the last attended token of a rendered conversation.

The weights are those of transformers' `AutoModelForSequenceClassification` with one label. What is done differently:
the reward is pooled by the attention mask, not by comparing ids with the pad token, and head and reward are fp32.
With right padding and a pad token that never ends a conversation, plain transformers gives the same numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from rayrm import files
from rayrm.batching import token_batches
from rayrm.errors import CheckpointError
from rayrm.models.folders import load_tokenizer, local_model
from rayrm.models.rendering import Rendered, Renderer, load_template
from rayrm.rows import Message

log = logging.getLogger("rayrm")
HEAD = "score"
"""Name of the head in the decoders of transformers; its only tensor is `score.weight` [1, hidden size]."""
PAD_TOKENS = (
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_0|>",
    "<|fim_pad|>",
    "<|vision_pad|>",
    "<pad>",
    "[PAD]",
    "<unk>",
)
"""Tokens that serve as padding, best first, where a tokenizer has no pad token of its own."""

Pair = tuple[Sequence[Message], str]
"""A prompt and the completion to be rewarded."""
Reward = tuple[float | None, str]
"""A reward and `ok` or `truncated`; or None and `overlength`, `empty` or `nan`."""


class RewardHead(nn.Linear):
    """A linear head that computes in fp32 whatever the precision of the hidden states and of its weights."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[…, hidden size] in any precision → […, 1] in fp32."""
        with torch.autocast(input.device.type, enabled=False):
            return nn.functional.linear(input.float(), self.weight.float())


class RewardModel(nn.Module):
    """`network` is a transformers sequence classifier with one label whose head is a `RewardHead`."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Rewards of a padded batch: two int64 tensors [batch, length] → fp32 [batch]. Padding may be on either side."""
        output = self.network.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        last = (attention_mask * positions).argmax(dim=1)
        rows = torch.arange(input_ids.shape[0], device=input_ids.device)
        rewards: torch.Tensor = self.network.score(output.last_hidden_state[rows, last])
        return rewards.squeeze(-1)


def load_reward_model(
    path: str,
    *,
    head_seed: int | None = None,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
) -> RewardModel:
    """The reward model at `path`, a local folder or a hub id, in evaluation mode and without dropout.

    With `head_seed`, a checkpoint without a head (a causal language model) gets a new one, drawn from
    N(0, initializer_range²). Raises CheckpointError when nothing loads, when weights are missing or of another
    shape, when a head is missing and there is no `head_seed`, and when a head has another name or more than one output.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification
    from transformers.utils import logging

    # What they would print is found and said by `_check_loaded`.
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        folder = local_model(path)
        config = AutoConfig.from_pretrained(folder)
        is_classifier = any("SequenceClassification" in name for name in config.architectures or [])
        if is_classifier and config.num_labels != 1:
            raise CheckpointError(f"The classifier at '{path}' has {config.num_labels} labels; a reward model has one.")
        config.num_labels, config.problem_type = 1, "regression"
        _turn_off_dropout(config)
        network, loaded = AutoModelForSequenceClassification.from_pretrained(
            folder, config=config, dtype=dtype, attn_implementation=attn_implementation, output_loading_info=True
        )
    except CheckpointError:
        raise
    except Exception as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0].rstrip(".")
        raise CheckpointError(f"'{path}' does not load as a reward model: {reason}.") from error
    head = getattr(network, HEAD, None)
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise CheckpointError(f"{type(network).__name__} at '{path}' is no decoder with a linear head '{HEAD}'.")
    _check_loaded(path, loaded, may_lack_head=head_seed is not None)
    setattr(network, HEAD, _as_reward_head(head))
    if loaded["missing_keys"] and head_seed is not None:
        draw_head(network, head_seed)
    return RewardModel(network).eval()


def _turn_off_dropout(config: Any) -> None:
    for name, value in vars(config).items():
        if isinstance(value, float) and ("dropout" in name or name.endswith("_pdrop")):
            setattr(config, name, 0.0)


def _check_loaded(path: str, loaded: dict[str, Any], may_lack_head: bool) -> None:
    missing = sorted(str(name) for name in loaded["missing_keys"])
    foreign = sorted(str(name) for name in loaded["unexpected_keys"] if "lm_head" not in str(name))
    if missing == [f"{HEAD}.weight"]:
        if may_lack_head and not foreign:
            return
        named = f" (it holds {', '.join(foreign[:3])}, which is none)" if foreign else ""
        raise CheckpointError(
            f"The checkpoint at '{path}' has no reward head '{HEAD}.weight'{named}; train a reward model first."
        )
    faults = [f"lacks {', '.join(missing[:3])}"] if missing else []
    faults += [f"holds {', '.join(foreign[:3])}"] if foreign else []
    faults += [f"has other shapes in {loaded['mismatched_keys']}"] if loaded["mismatched_keys"] else []
    if faults:
        raise CheckpointError(f"The weights at '{path}' are not those of its config: the file {'; '.join(faults)}.")


def _as_reward_head(linear: nn.Linear) -> RewardHead:
    head = RewardHead(linear.in_features, linear.out_features, bias=False, device="meta")
    head.weight = linear.weight
    return head


def draw_head(network: Any, seed: int) -> None:
    """Draw the head's weights from `seed`, the same ones at any ZeRO stage and on any number of processes."""
    weight = network.score.weight
    drawn = torch.empty((1, network.score.in_features))
    std = getattr(network.config.get_text_config(), "initializer_range", 0.02)
    drawn.normal_(0.0, std, generator=torch.Generator().manual_seed(seed))
    if not hasattr(weight, "ds_id"):
        weight.data.copy_(drawn)
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
        weight.data.copy_(drawn)


def load_padding_tokenizer(path: str) -> Any:
    """The tokenizer at `path`, padding on the right with a token that never ends a conversation.

    Raises CheckpointError when nothing loads or no token can serve as padding.
    """
    tokenizer = load_tokenizer(path)
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        known = tokenizer.get_vocab()
        choices = [t for t in (*PAD_TOKENS, tokenizer.unk_token, tokenizer.bos_token) if t in known]
        choices = [token for token in choices if known[token] != tokenizer.eos_token_id]
        if not choices:
            raise CheckpointError(
                f"The tokenizer at '{path}' has no token for padding but its end token '{tokenizer.eos_token}', where "
                "rewards are read; give it a pad_token."
            )
        tokenizer.pad_token = choices[0]
    return tokenizer


def pad_right(rows: Sequence[Any], pad_id: int, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both int64 [rows, longest row], of rows of ids (lists or arrays)."""
    width = max(len(row) for row in rows)
    ids = np.full((len(rows), width), pad_id, np.int64)
    mask = np.zeros((len(rows), width), np.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
        mask[index, : len(row)] = 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


class Rendering(NamedTuple):
    """How a reward model's texts become token ids; null is what the checkpoint says."""

    chat_template: str | None = None
    """Name or path of a template, `none`, or null for the tokenizer's own."""
    max_length: int | None = None
    """Most tokens of a prompt with its completion."""

    def renderer(self, tokenizer: Any, where: str) -> Renderer:
        """The one renderer that training and scoring share."""
        return Renderer(tokenizer, load_template(self.chat_template, tokenizer, where), self.max_length)


class Rewarder:
    """A reward model with its tokenizer and renderer: prompts and completions in, rewards out."""

    def __init__(self, model: RewardModel, renderer: Renderer) -> None:
        self.model = model
        self.renderer = renderer

    def rewards(self, pairs: Sequence[Pair], token_budget: int = 16384) -> list[Reward]:
        """One reward for each pair, in order; `token_budget` bounds the padded tokens of a forward pass."""
        rendered = [self._render(pair) for pair in pairs]
        found: list[Reward] = [(None, row.status) for row in rendered]
        scorable = [index for index, row in enumerate(rendered) if row.ids]
        for batch in token_batches([len(rendered[i].ids) for i in scorable], token_budget):
            indices = [scorable[i] for i in batch]
            for index, reward in zip(indices, self.read([rendered[i].ids for i in indices]), strict=True):
                is_number = abs(reward) < float("inf")
                found[index] = (reward, rendered[index].status) if is_number else (None, "nan")
        return found

    def _render(self, pair: Pair) -> Rendered:
        prompt, completion = pair
        return self.renderer.pair_ids(prompt, completion) if completion.strip() else Rendered([], 0, "empty")

    @torch.inference_mode()
    def read(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """Rewards of rows of token ids, in one forward pass."""
        device = next(self.model.parameters()).device
        rewards: list[float] = self.model(*pad_right(rows, self.renderer.tokenizer.pad_token_id, device)).tolist()
        return rewards


def load_rewarder(
    path: str,
    rendering: Rendering | None = None,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
) -> Rewarder:
    """The reward model at `path`, ready to reward texts.

    A checkpoint with a completion mark is rendered as it was trained; `rendering` may repeat that, and serves the
    checkpoints that have no mark. `device` is the GPU when there is one; `dtype` is bf16 on a GPU and fp32 on a CPU.
    Raises CheckpointError as `load_reward_model` does, and when `rendering` is not the checkpoint's own.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or (torch.bfloat16 if device.startswith("cuda") else torch.float32)
    model = load_reward_model(path, dtype=dtype, attn_implementation=attn_implementation)
    rendering = rendering or Rendering()
    stored = (files.read_json(files.join(path, files.CHECKPOINT_MARK)) or {}).get("rendering")
    if stored is not None:
        own = (rendering.chat_template or stored["chat_template"], rendering.max_length or stored["max_length"])
        rendering = Rendering(*own)
    if rendering.max_length is None:
        rendering = rendering._replace(max_length=getattr(model.network.config, "max_position_embeddings", None))
    renderer = rendering.renderer(load_padding_tokenizer(path), path)
    if stored is None:
        log.warning("'%s' does not say how its texts were rendered; rendering them with %s", path, rendering)
    else:
        check_rendering(path, stored["fingerprint"], renderer.fingerprint())
    return Rewarder(model.to(device), renderer)


def check_rendering(path: str, stored: dict[str, Any], found: dict[str, Any]) -> None:
    """Raise CheckpointError, naming what differs, unless texts are rendered as the checkpoint was trained."""
    names = sorted({*stored, *found})
    differing = [f"{n}: {stored.get(n)!r} there, {found.get(n)!r} here" for n in names if stored.get(n) != found.get(n)]
    if differing:
        raise CheckpointError(
            f"The reward model at '{path}' was trained on texts rendered in another way ({'; '.join(differing)}); its "
            "rewards would mean nothing."
        )
