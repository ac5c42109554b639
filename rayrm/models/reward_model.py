"""The networks of reward models: a decoder, read at some tokens by a head.

Most are transformers' `AutoModelForSequenceClassification`, with one output or several. What is done differently: who
calls says which tokens are read, by the attention mask and not by comparing ids with the pad token, and head and
outputs are fp32. With one output, right padding and a pad token that never ends a conversation, plain transformers
gives the same numbers. A model that compares two completions is a causal language model, read at the words of its
verdict.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from rayrm.errors import CheckpointError
from rayrm.models.folders import local_folder
from rayrm.models.foreign import find_layout
from rayrm.models.gating import GatedHead, load_gate
from rayrm.models.loading import HEAD, Loading, check_loaded, load_network


class RewardHead(nn.Linear):
    """A linear head that computes in fp32 whatever the precision of the hidden states and of its weights."""

    def forward(self, input: torch.Tensor | None) -> torch.Tensor:
        """[…, hidden size] in any precision → […, outputs] in fp32; without an input, the weights in fp32."""
        if input is None:
            # By way of `forward`, ZeRO-3 puts the weights together first.
            return self.weight.float().clone()
        with torch.autocast(input.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return nn.functional.linear(input.float(), self.weight.float(), bias)


class LayeredHead(nn.Module):
    """Linear layers with ReLU between them, in fp32; each is its weights [outputs, inputs] and its constant or None."""

    def __init__(self, layers: Sequence[tuple[torch.Tensor, torch.Tensor | None]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for weight, bias in layers:
            layer = RewardHead(weight.shape[1], len(weight), bias=False, device="meta")
            layer.weight = nn.Parameter(weight)
            if bias is not None:
                layer.bias = nn.Parameter(bias)
            self.layers.append(layer)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[…, hidden size] in any precision → […, outputs] in fp32."""
        for index, layer in enumerate(self.layers):
            input = layer(input.relu() if index else input)
        return input


class NewHead(NamedTuple):
    """How a head is made where a checkpoint has none."""

    seed: int
    init: Literal["initializer_range", "inverse_width", "zero"] = "initializer_range"
    """Standard deviation of the weights, around 0: the config's initializer_range, or 1 / (hidden size + 1), or 0."""

    def draw(self, network: Any) -> torch.Tensor:
        """Weights for the network's head: the same ones at any ZeRO stage and on any number of processes."""
        head = getattr(network, HEAD)
        width = getattr(network.config.get_text_config(), "initializer_range", 0.02)
        std = {"initializer_range": width, "inverse_width": 1 / (head.in_features + 1), "zero": 0.0}[self.init]
        drawn = torch.empty((head.out_features, head.in_features))
        return drawn.normal_(0.0, std, generator=torch.Generator().manual_seed(self.seed))


class Penalties(NamedTuple):
    """Weights of what training adds to the loss and no output shows."""

    router: float = 0.0
    """Of the load-balancing loss of a mixture of experts (arXiv 2101.03961, equations 4 to 6)."""
    overlap: float = 0.0
    """Of |cos| between the first two rows of the head."""


class RewardModel(nn.Module):
    """`network` read by its `RewardHead`, or, with `labels`, by the log-probabilities of two tokens.

    With a `gate`, each row of `reads` is the end of a prompt and that of its completion, and the outputs [rows, 1, …]
    are the reward, the scores of all objectives and the gate's weights of them.
    """

    def __init__(self, network: Any, labels: tuple[int, int] | None = None, gate: GatedHead | None = None) -> None:
        super().__init__()
        self.network = network
        self.labels = labels
        self.gate = gate
        self.penalties = Penalties()

    def forward(
        self, input_ids: torch.Tensor, reads: torch.Tensor, uses: torch.Tensor | None = None, **inputs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Outputs at some tokens of a batch, and the penalty, an fp32 number.

        `input_ids` is int64 [batch, length]; `reads`, int64 of any shape, counts the batch's tokens row by row, and the
        outputs are fp32 [*reads, outputs]. `uses`, of a packed batch, tells how many sequences each token stands for.
        `inputs` go to the decoder: `attention_mask`, `position_ids` and so on.
        """
        wants_router = bool(self.penalties.router) and self.training
        if wants_router:
            inputs["output_router_logits"] = True
        output = self.network.base_model(input_ids=input_ids, use_cache=False, **inputs)
        hidden = output.last_hidden_state.flatten(0, 1)[reads]
        penalty = torch.zeros((), device=hidden.device)
        if wants_router:
            loss = _router_loss(
                self.network, output.router_logits, inputs.get("attention_mask") if uses is None else uses
            )
            penalty = penalty + self.penalties.router * loss
        if self.penalties.overlap and self.training:
            first, second = getattr(self.network, HEAD)(None)[:2]
            penalty = penalty + self.penalties.overlap * nn.functional.cosine_similarity(first, second, dim=0).abs()
        if self.gate is not None:
            rewards, scores, weights = self.gate(getattr(self.network, HEAD)(hidden[:, 1:]), hidden[:, :1])
            return torch.cat([rewards[..., None], scores, weights], dim=-1), penalty
        if self.labels is None:
            return getattr(self.network, HEAD)(hidden), penalty
        return _label_logits(self.network, hidden).log_softmax(-1)[..., list(self.labels)], penalty


def _router_loss(network: Any, logits: Any, mask: torch.Tensor | None) -> torch.Tensor:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    config = network.config.get_text_config()
    loss = load_balancing_loss_func(logits, num_experts(config), config.num_experts_per_tok, mask)
    return torch.as_tensor(loss)


def num_experts(config: Any) -> int:
    """Experts a layer of the model with this config; 0 for one that is no mixture of experts."""
    return next((getattr(config, n) for n in ("num_local_experts", "num_experts") if getattr(config, n, None)), 0)


def _label_logits(network: Any, hidden: torch.Tensor) -> torch.Tensor:
    """The language model's logits in fp32, scaled and capped as its own forward pass does."""
    config = network.config.get_text_config()
    logits: torch.Tensor = network.get_output_embeddings()(hidden).float()
    logits = logits * (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def load_reward_model(
    path: str, *, num_outputs: int = 1, new_head: NewHead | None = None, keeps_head: bool = True, **how: Any
) -> RewardModel:
    """The reward model at `path`, a local folder or a hub id, in evaluation mode and without dropout.

    The head may be transformers' own or that of another trainer, see `find_layout`. With `new_head`, which is for
    training, a checkpoint without a head (a causal language model) gets that one, and a head's constant, which plain
    transformers has no place for, is left out; without `keeps_head` any head is replaced by a new one. `how` are the
    fields of Loading. Raises CheckpointError when nothing loads, when weights are missing or of another shape, when a
    head is missing and there is no `new_head`, when a head of several layers is to be trained, and when a head has a
    name that nobody uses or another number of outputs.
    """
    from transformers import AutoModelForSequenceClassification

    loading = Loading(**how)
    layout = find_layout(local_folder(path))
    if layout and layout.hidden_layers and keeps_head and new_head is not None:
        raise CheckpointError(f"The head at '{path}' has several layers, and only linear heads can be trained on.")

    def prepare(config: Any) -> None:
        is_classifier = any("SequenceClassification" in name for name in config.architectures or [])
        found = layout.num_labels if layout else config.num_labels if is_classifier else num_outputs
        if found != num_outputs and keeps_head:
            raise CheckpointError(
                f"The head at '{path}' has {found} outputs; a reward model of this kind has {num_outputs}."
            )
        config.num_labels, config.problem_type = num_outputs, "regression"

    settings = loading.settings()
    settings["ignore_mismatched_sizes"] = not keeps_head
    if layout:
        settings["key_mapping"] = layout.key_mapping
    network, loaded = load_network(path, AutoModelForSequenceClassification, settings, prepare)
    head = getattr(network, HEAD, None)
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise CheckpointError(f"{type(network).__name__} at '{path}' is no decoder with a linear head '{HEAD}'.")
    if layout:
        layout.after_loading(network, loaded)
    if not keeps_head:
        loaded["mismatched_keys"] = {key for key in loaded["mismatched_keys"] if key[0] != f"{HEAD}.weight"}
        loaded["missing_keys"] = {*loaded["missing_keys"], f"{HEAD}.weight"}
    check_loaded(path, loaded, may_lack_head=new_head is not None)
    setattr(network, HEAD, _as_reward_head(head))
    if layout and layout.hidden_layers and keeps_head:
        setattr(network, HEAD, LayeredHead([*layout.hidden_layers, (layout.head, layout.head_bias)]))
    elif layout and keeps_head:
        set_head(network, layout.head)
        if layout.head_bias is not None and new_head is None:
            getattr(network, HEAD).bias = nn.Parameter(layout.head_bias)
    elif loaded["missing_keys"] and new_head is not None:
        set_head(network, new_head.draw(network))
    elif loading.dtype != torch.float32 and new_head is None:
        # The network's precision has rounded it.
        stored = _stored_head(local_folder(path))
        if stored is not None:
            getattr(network, HEAD).weight = nn.Parameter(stored)
    return RewardModel(network).eval()


def _stored_head(folder: str) -> torch.Tensor | None:
    """The head in fp32 as the safetensors files of a folder hold it; None where they hold none."""
    from safetensors import safe_open

    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, "pt") as tensors:
            if f"{HEAD}.weight" in set(tensors.keys()):
                return tensors.get_tensor(f"{HEAD}.weight").float()
    return None


def load_gated_model(path: str, objectives: Sequence[str], **settings: Any) -> RewardModel:
    """The reward model at `path` with its gate, as training here or ArmoRM's saves them, in evaluation mode.

    `settings` are the fields of Loading. Raises CheckpointError as `load_reward_model` does, and when there is no gate.
    """
    folder = local_folder(path)
    layout = find_layout(folder)
    if layout is not None and layout.gate_temperature is not None:
        gate = GatedHead.from_tensors(layout.gate, objectives, layout.gate_temperature, f"'{path}'")
    else:
        gate = load_gate(folder)
    model = load_reward_model(path, num_outputs=len(objectives), **settings)
    model.gate = gate
    return model


def load_comparing_model(path: str, labels: tuple[int, int], **how: Any) -> RewardModel:
    """The causal language model at `path`, read at the log-probabilities of the tokens `labels`.

    `how` are the fields of Loading. Raises CheckpointError when nothing loads or weights are missing.
    """
    from transformers import AutoModelForCausalLM

    network, loaded = load_network(path, AutoModelForCausalLM, Loading(**how).settings())
    check_loaded(path, loaded, may_lack_head=False)
    return RewardModel(network, labels).eval()


def _as_reward_head(linear: nn.Linear) -> RewardHead:
    head = RewardHead(linear.in_features, linear.out_features, bias=False, device="meta")
    head.weight = linear.weight
    return head


def set_head(network: Any, values: torch.Tensor) -> None:
    """Put `values` [outputs, hidden size] into the head, at any ZeRO stage."""
    weight = getattr(network, HEAD).weight
    if not hasattr(weight, "ds_id"):
        weight.data.copy_(values)
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
        weight.data.copy_(values)
