"""The gate of a reward model with several objectives: it weighs their scores by the prompt (arXiv 2406.12845)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rayrm.errors import CheckpointError

GATE_FILE = "gate/gate.safetensors"
"""Where a model's folder holds its gate: in a folder of its own, for vLLM takes every .safetensors file that lies
beside the model's weights for a part of them."""
TRANSFORM = "reward_transform_matrix"
"""Name of the transform among the tensors."""


class Gate(nn.Module):
    """A perceptron from the embedding of a prompt to one weight for each objective, in fp32.

    The weights are softmax(logits / temperature) over the objectives, times a scale that is learned and starts at 1:
    each is above 0 while the scale is, and together they make the scale.
    """

    def __init__(self, widths: Sequence[int], temperature: float = 10.0, dropout: float = 0.0) -> None:
        """`widths` are the embedding's, those of the hidden layers, and the number of objectives.

        `dropout` is the share of hidden values that training leaves out.
        """
        super().__init__()
        self.widths = tuple(widths)
        self.layers = nn.ModuleList(nn.Linear(inputs, outputs) for inputs, outputs in pairwise(widths))
        self.logit_scale = nn.Parameter(torch.ones(1))
        self.temperature = temperature
        self.dropout = nn.Dropout(dropout)

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], temperature: float = 10.0, where: str = "the checkpoint"
    ) -> Gate:
        """The gate in `gating.layers.{i}.weight`, `gating.layers.{i}.bias` and `gating.logit_scale`, for evaluation.

        The tensors may have any precision and lie among others; they give the number of layers and their widths.
        Raises CheckpointError, naming the tensor and `where`, for one that is missing, does not fit or is not finite.
        """
        names = [name for name in tensors if name.startswith("gating.layers.") and name.endswith(".weight")]
        weights = [_take(tensors, f"gating.layers.{index}.weight", where) for index in range(max(len(names), 1))]
        gate = cls([weights[0].shape[-1], *(len(weight) for weight in weights)], temperature)
        state = {name: _take(tensors, f"gating.{name}", where, own.shape) for name, own in gate.state_dict().items()}
        gate.load_state_dict(state)
        return gate.eval()

    def forward(self, prompt_embeddings: Tensor) -> Tensor:
        """Embeddings […, hidden size] in any precision → weights […, objectives] in fp32."""
        with torch.autocast(prompt_embeddings.device.type, enabled=False):
            hidden = prompt_embeddings.float()
            for layer in self.layers[:-1]:
                hidden = self.dropout(layer(hidden).relu())
            logits: Tensor = self.layers[-1](hidden)
            return (logits / self.temperature).softmax(dim=-1) * self.logit_scale


class GatedRewards(NamedTuple):
    """What a gated head says of prompts with completions, all of it in fp32."""

    rewards: Tensor
    """[…]."""
    scores: Tensor
    """Score of each objective, before the transform: […, objectives]."""
    weights: Tensor
    """The gate's weight of each objective: […, objectives]."""


class GatedHead(nn.Module):
    """From the scores of the objectives to the reward: Σ weights · (scores @ transform), with the gate's weights.

    Column j of the transform makes the adjusted score of objective j from all scores; the identity leaves them.
    """

    reward_transform_matrix: Tensor

    def __init__(self, gate: Gate, transform: Tensor, objectives: Sequence[str]) -> None:
        """`transform` is [objectives, objectives]; `objectives` are the names, in the order of the scores."""
        super().__init__()
        self.gating = gate
        self.register_buffer(TRANSFORM, transform.detach().float())
        self.objectives = tuple(objectives)

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, Tensor],
        objectives: Sequence[str],
        temperature: float = 10.0,
        where: str = "the checkpoint",
    ) -> GatedHead:
        """The gate and `reward_transform_matrix` in `tensors`, for evaluation.

        Raises CheckpointError as `Gate.from_tensors` does, and when there are not as many names as objectives.
        """
        gate = Gate.from_tensors(tensors, temperature, where)
        num_objectives = gate.widths[-1]
        if len(objectives) != num_objectives:
            raise CheckpointError(
                f"The gate of {where} weighs {num_objectives} objectives, and {len(objectives)} have names; name them all."
            )
        return cls(gate, _take(tensors, TRANSFORM, where, (num_objectives, num_objectives)), objectives).eval()

    def forward(self, scores: Tensor, prompt_embeddings: Tensor) -> GatedRewards:
        """Scores […, objectives] and prompts' embeddings […, hidden size] in any precision → what the head says."""
        with torch.autocast(scores.device.type, enabled=False):
            scores, weights = scores.float(), self.gating(prompt_embeddings)
            return GatedRewards((weights * (scores @ self.reward_transform_matrix)).sum(dim=-1), scores, weights)


def _take(tensors: Mapping[str, Tensor], name: str, where: str, shape: Sequence[int] | None = None) -> Tensor:
    if name not in tensors:
        raise CheckpointError(f"The gate of {where} lacks '{name}'; save it again.")
    tensor = tensors[name].float()
    if shape is None and tensor.dim() != 2:
        raise CheckpointError(
            f"'{name}' of {where} has the shape {tuple(tensor.shape)}; a layer's weights are a matrix."
        )
    if shape is not None and tuple(tensor.shape) != tuple(shape):
        raise CheckpointError(
            f"'{name}' of {where} has the shape {tuple(tensor.shape)}, where its neighbours ask for {tuple(shape)}."
        )
    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"'{name}' of {where} is not finite; train with a lower lr.")
    return tensor


def save_gate(folder: str | Path, head: GatedHead) -> None:
    """Write the gate, the transform, the temperature and the objectives' names to the local folder of a model."""
    path = Path(folder) / GATE_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}
    facts = {"temperature": json.dumps(head.gating.temperature), "objectives": json.dumps(head.objectives)}
    save_file(tensors, path, {"format": "pt", **facts})


def load_gate(folder: str | Path) -> GatedHead:
    """What `save_gate` wrote to the local folder of a model, on the CPU and for evaluation.

    Raises CheckpointError when there is no such file, when it is cut short, and as `GatedHead.from_tensors` does.
    """
    path = Path(folder) / GATE_FILE
    if not path.exists():
        raise CheckpointError(f"The model at '{folder}' has no gate, for there is no '{GATE_FILE}' in it.")
    try:
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        objectives, temperature = json.loads(facts["objectives"]), json.loads(facts["temperature"])
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"The gate at '{path}' cannot be read, perhaps it is cut short: {error}.") from error
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"The gate at '{path}' does not say its temperature and objectives; save it again."
        ) from error
    return GatedHead.from_tensors(tensors, objectives, temperature, f"'{path}'")
