"""A reward model with its tokenizer, renderer and readout: prompts and completions in, rewards out."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from json import JSONDecodeError
from typing import Any, NamedTuple

import numpy as np
import torch

from rayrm.batching import token_batches
from rayrm.errors import CheckpointError, ConfigError
from rayrm.models.cpu import keep_freed_memory, use_onednn
from rayrm.models.folders import local_folder, read_mark
from rayrm.models.inputs import packed_batch, padded_batch
from rayrm.models.kinds import find_readout
from rayrm.models.loading import load_padding_tokenizer
from rayrm.models.own_code import check_own_code
from rayrm.models.packing import common_length, make_packable
from rayrm.models.readouts import Comparison, Encoded, Gated, Readout, Steps, Whole, parse_readout
from rayrm.models.rendering import BosRule, Renderer, Rules, Truncation, load_template
from rayrm.rows import Message

log = logging.getLogger("rayrm")


class Pair(NamedTuple):
    """A prompt and the completion to be rewarded."""

    prompt: Sequence[Message]
    completion: str
    tools: str | None = None
    """Tool schemas, a JSON list, for the template to show."""


Reward = tuple[float | None, str]
"""A reward and `ok` or `truncated`; or None and `overlength`, `empty`, `nan`, or `error` (the template refuses it, or its tools are no JSON)."""
Outputs = list[list[float]]
"""What a model gave at each token that was read, [reads][outputs]."""


class Rendering(NamedTuple):
    """How a reward model's texts become token ids; null is what the checkpoint says."""

    chat_template: str | None = None
    """Name or path of a template, `none`, or null for the tokenizer's own."""
    max_length: int | None = None
    """Most tokens of a prompt with its completion."""
    truncation: Truncation = "prompt_left"
    """Where a conversation that is too long is cut; see Rules."""
    bos: BosRule = "one"
    """What becomes of a second BOS; see Rules."""

    def renderer(self, tokenizer: Any, where: str) -> Renderer:
        """The one renderer that training and scoring share."""
        template = load_template(self.chat_template, tokenizer, where)
        return Renderer(tokenizer, template, self.max_length, Rules(self.truncation, self.bos))


class Rewarder:
    """A loaded reward model of any kind."""

    def __init__(self, model: Any, renderer: Renderer, readout: Readout, is_cost: bool = False) -> None:
        self.model = model
        self.renderer = renderer
        self.readout = readout
        self.sign = -1 if is_cost else 1
        """What the model's numbers are multiplied with to be rewards."""
        self.is_packed = False
        """Whether `read_trees` packs rows and computes what they share once."""

    def pack(self) -> None:
        """Pack rows from now on, where the model can."""
        try:
            if isinstance(self.readout, Whole) or self.renderer.rules.bos == "masked":
                raise ConfigError("Packed rows are for plain decoders that attend to all tokens before.")
            make_packable(self.model.network)
            self.is_packed = True
            # A model that cannot, and does not look like it, tells so in its first pass.
            self.read_trees([[self.blank(1)]])
        except ConfigError as obstacle:
            self.is_packed = False
            log.info("%s Rows are padded.", obstacle)

    def blank(self, num_tokens: int) -> Encoded:
        """A row of so many tokens that means nothing, read in as many places as this model's rows are."""
        token = self.renderer.tokenizer.eos_token_id or 0
        return Encoded([token] * num_tokens, [num_tokens - 1] * (2 if isinstance(self.readout, Gated) else 1), "ok")

    def rewards(self, pairs: Iterable[tuple[Any, ...]], token_budget: int = 16384) -> list[Reward]:
        """One reward for each Pair, in order; `token_budget` bounds the padded tokens of a forward pass.

        Raises CheckpointError for a model that compares two completions and rewards none.
        """
        readout = self.readout
        if isinstance(readout, Comparison):
            raise CheckpointError("This model compares two completions and gives a single one no reward; compare them.")
        encoded = [_encode(readout, self.renderer, Pair(*pair)) for pair in pairs]
        return [
            (None, row.status) if found is None else _finite(self.sign * readout.reward(found), row.status)
            for row, found in zip(encoded, self.read(encoded, token_budget), strict=True)
        ]

    def compare(
        self, questions: Sequence[tuple[Sequence[Message], str, str]], token_budget: int = 16384
    ) -> list[Reward]:
        """log p(first) − log p(second) for each (prompt, first, second), both orders averaged; its σ is p(first).

        Null where either order has no room. Raises CheckpointError for a model that rewards single completions.
        """
        readout = self.readout
        if not isinstance(readout, Comparison):
            raise CheckpointError("This model rewards single completions and compares none; reward them.")
        encoded = [side for question in questions for side in readout.encode_both(self.renderer, *question)]
        outputs = self.read(encoded, token_budget)
        found: list[Reward] = []
        for index in range(0, len(encoded), 2):
            first, second = outputs[index : index + 2]
            if first is None or second is None:
                found.append((None, encoded[index].status))
            else:
                found.append(_finite(self.sign * readout.gap(first, second), encoded[index].status))
        return found

    def read(self, encoded: Sequence[Encoded], token_budget: int = 16384) -> list[Outputs | None]:
        """The model's outputs for each row; None for a row without ids."""
        found: list[Outputs | None] = [None] * len(encoded)
        readable = [index for index, row in enumerate(encoded) if row.ids]
        for batch in token_batches([len(encoded[i].ids) for i in readable], token_budget):
            indices = [readable[i] for i in batch]
            for index, outputs in zip(indices, self._read([encoded[i] for i in indices]), strict=True):
                found[index] = outputs[: len(encoded[index].reads)]
        return found

    def num_tokens(self, tree: Sequence[Encoded]) -> int:
        """Tokens that the model computes for rows that all have ids, padding left out."""
        total = sum(len(row.ids) for row in tree)
        if not self.is_packed:
            return total
        return total - (len(tree) - 1) * common_length([np.asarray(row.ids, np.int64) for row in tree])

    @torch.inference_mode()
    def read_trees(self, trees: Sequence[Sequence[Encoded]]) -> list[list[Outputs]]:
        """The model's outputs for rows that all have ids, in one forward pass; rows of a tree may begin alike."""
        rows = [row for tree in trees for row in tree]
        if not self.is_packed:
            found = self._read(rows)
        else:
            device = next(self.model.parameters()).device
            reads = list(enumerate(row.reads for row in rows))
            outputs, _ = self.model(**packed_batch([[row.ids for row in tree] for tree in trees], reads, device))
            found = outputs.tolist()
        each = iter(outputs[: len(row.reads)] for row, outputs in zip(rows, found, strict=True))
        return [[next(each) for _ in tree] for tree in trees]

    @torch.inference_mode()
    def _read(self, rows: Sequence[Encoded]) -> list[Outputs]:
        device = next(self.model.parameters()).device
        pad_id = self.renderer.tokenizer.pad_token_id
        ids, reads = [row.ids for row in rows], [row.reads for row in rows]
        outputs, _ = self.model(**padded_batch(ids, reads, pad_id, device, [row.num_masked for row in rows]))
        found: list[Outputs] = outputs.tolist()
        return found


def _encode(readout: Any, renderer: Renderer, pair: Pair) -> Encoded:
    from jinja2 import TemplateError

    try:
        encoded: Encoded = readout.encode(renderer.with_tools(pair.tools), pair.prompt, pair.completion)
    except (TemplateError, JSONDecodeError):
        # Such as a system turn, for a template that knows none.
        return Encoded([], [], "error")
    return encoded


def _finite(reward: float, status: str) -> Reward:
    return (reward, status) if abs(reward) < float("inf") else (None, "nan")


def load_rewarder(  # noqa: PLR0913
    path: str,
    rendering: Rendering | None = None,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
    readout: Readout | None = None,
    *,
    is_cost: bool = False,
    **how: Any,
) -> Rewarder:
    """The reward model at `path`, ready to reward texts.

    A checkpoint with a completion mark is rendered and read as it was trained; `rendering` may repeat that, and serves
    the checkpoints that have no mark, as do `readout` (null: by its own code where that may run, by its gate, or at the
    last token) and `is_cost`, for a model whose numbers are lower for better completions. `device` is the GPU when there
    is one; `dtype` is bf16 on a GPU and fp32 on a CPU; `how` are further fields of Loading. Raises CheckpointError as
    `load_reward_model` does, when `rendering` is not the checkpoint's own, and when a model needs code of its own that
    may not run; ConfigError for rules on truncation that the readout has no use for.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or (torch.bfloat16 if device.startswith("cuda") else torch.float32)
    rendering = rendering or Rendering()
    mark = read_mark(path)
    stored = mark.get("rendering")
    trust_remote_code = how.get("trust_remote_code", False)
    if stored is None:
        check_own_code(path, trust_remote_code)
    elif is_cost:
        raise CheckpointError(f"'{path}' was trained here and gives rewards, not costs; set negate=false.")
    if "readout" in mark:
        readout = parse_readout(mark["readout"])
    readout = readout or find_readout(local_folder(path), trust_remote_code)
    if isinstance(readout, Steps | Comparison) and rendering.truncation != "prompt_left":
        raise ConfigError(
            f"truncation is '{rendering.truncation}', and '{path}' is not read at the end of a whole conversation; set "
            "truncation=prompt_left."
        )
    tokenizer = load_padding_tokenizer(path, trust_remote_code)
    model = readout.load(path, tokenizer, dtype=dtype, attn_implementation=attn_implementation, **how)
    if stored is not None:
        rendering = rendering._replace(
            chat_template=rendering.chat_template or stored["chat_template"],
            max_length=rendering.max_length or stored["max_length"],
        )
    if rendering.max_length is None:
        rendering = rendering._replace(max_length=getattr(model.network.config, "max_position_embeddings", None))
    renderer = rendering.renderer(tokenizer, path)
    if stored is None:
        if rendering.truncation == "prompt_left":
            renderer.check()
        log.warning("'%s' does not say how its texts were rendered; rendering them with %s", path, rendering)
    else:
        check_rendering(path, stored["fingerprint"], renderer.fingerprint())
    model = model.to(device)
    if device == "cpu":
        if not isinstance(readout, Whole):
            use_onednn(model.network.base_model)
        keep_freed_memory()
    return Rewarder(model, renderer, readout, is_cost)


def check_rendering(path: str, stored: dict[str, Any], found: dict[str, Any]) -> None:
    """Raise CheckpointError, naming what differs, unless texts are rendered as the checkpoint was trained."""
    names = sorted({*stored, *found})
    differing = [f"{n}: {stored.get(n)!r} there, {found.get(n)!r} here" for n in names if stored.get(n) != found.get(n)]
    if differing:
        raise CheckpointError(
            f"The reward model at '{path}' was trained on texts rendered in another way ({'; '.join(differing)}); its "
            "rewards would mean nothing."
        )
