"""Reward models as other trainers save them: which layout a folder has, and where its head is.

Transformers' `AutoModelForSequenceClassification` loads the decoder of each of them, but knows a head only by the name
`score.weight`, and draws a random one where the head has another name. The heads are therefore read here.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rayrm.errors import CheckpointError

PLAIN_HEAD = "score.weight"
HEADS = {
    "value_head.weight": "openrlhf",
    "v_head.summary.weight": "trl_value_head",
    "v_head.summary.0.weight": "grm",
    "regression_head.weight": "ultrarm",
    "regression_layer.weight": "armorm",
    "score.0.weight": "inf_orm",
    "score_head.weight": "safe_rlhf",
}
"""Layouts by the name of the head's tensor, or of its first layer; a `trl_value_head` in a file of its own is
`llama_factory`."""
NORMALIZER = ("normalizer.mean", "normalizer.var", "normalizer.count")
"""Tensors of safe-rlhf's normalisation, whose values its config holds too."""
MODEL_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Files of a model's weights, in the order in which transformers looks for them."""
VALUE_HEAD_FILES = ("value_head.safetensors", "value_head.bin")
"""Files in which a value head stands apart from its model."""
WRAPPERS = {r"^pretrained_model\.": "", r"^model\.(?=model\.|lm_head\.)": ""}
"""What a trainer's wrapper puts before the names of the model inside it, for `key_mapping`."""


class ForeignLayout(NamedTuple):
    """What `AutoModelForSequenceClassification` needs beside the folder to be the reward model that it holds.

    The reward is `head @ hidden + head_bias` at the last attended token, `hidden` being what `hidden_layers` make of the
    decoder's state. Set the config's `num_labels`, load with
    `key_mapping` and `output_loading_info`, call `after_loading`, and put `head` into `score.weight`.
    """

    name: str
    """A value of `HEADS`, or llama_factory."""
    key_mapping: dict[str, str]
    """Regular expression → replacement for the names of the decoder's tensors; empty where they need none."""
    head: torch.Tensor
    """Fp32 [outputs, inputs]; one output, except for armorm, which has one for each objective. The inputs are the hidden
    state, or what the layers before give."""
    head_bias: torch.Tensor | None
    """Fp32 [outputs]."""
    gate: dict[str, torch.Tensor]
    """Tensors of armorm's gate in fp32, by their names in the file; empty elsewhere."""
    gate_temperature: float | None
    """What armorm's gate divides its logits by."""
    hidden_layers: tuple[tuple[torch.Tensor, torch.Tensor | None], ...] = ()
    """Weights and constants of the layers before `head`, each followed by ReLU, of grm and inf_orm."""
    held: frozenset[str] = frozenset()
    """Names of the tensors of the head and its gate."""

    @property
    def num_labels(self) -> int:
        """Outputs of the head."""
        return len(self.head)

    def after_loading(self, network: Any, loaded: dict[str, Any]) -> None:
        """Take what this layout holds out of `loaded`, transformers' loading info, so that only faults are left.

        `network` forgets `key_mapping` too, which it would otherwise turn round when it is saved.
        """
        loaded["missing_keys"] = set(loaded["missing_keys"]) - {PLAIN_HEAD}
        loaded["unexpected_keys"] = set(loaded["unexpected_keys"]) - self.held
        # Transformers' own renaming for the model's type then takes its place.
        network._weight_conversions = None


def find_layout(folder: str) -> ForeignLayout | None:
    """The layout of the checkpoint in the local `folder`; None where it has a plain `score.weight` or no known head.

    Of the tensors, only those of the head and its gate are read whole. Raises CheckpointError for a PEFT adapter, for a
    file that is broken or cut short, for two heads, and for a head or gate that lacks a tensor or has another shape
    than its config asks for.
    """
    where = _tensor_files(Path(folder))
    if (Path(folder) / "adapter_config.json").is_file() or any(".lora_A." in name for name in where):
        raise CheckpointError(
            f"'{folder}' holds a PEFT adapter, which is no whole model; merge it into its base model and load that."
        )
    heads = [name for name in (PLAIN_HEAD, *HEADS) if name in where]
    if len(heads) > 1:
        raise CheckpointError(f"'{folder}' holds several heads ({', '.join(heads)}); keep the one that gives rewards.")
    if not heads or heads == [PLAIN_HEAD]:
        return None
    config, name = _load_config(folder), HEADS[heads[0]]
    gate_shapes = _gate_shapes(config) if name == "armorm" else {}
    layers = _read_layers(folder, where, heads[0], _hidden_size(config), _num_objectives(config) if gate_shapes else 1)
    *hidden_layers, (head, head_bias) = layers.values()
    if name == "safe_rlhf" and getattr(config, "do_normalize", False):
        head, head_bias = _normalised(config, head, head_bias)
    gate = _read_tensors(folder, where, gate_shapes)
    return ForeignLayout(
        name="llama_factory" if where[heads[0]].name in VALUE_HEAD_FILES else name,
        key_mapping={old: new for old, new in WRAPPERS.items() if any(re.search(old, each) for each in where)},
        head=head,
        head_bias=head_bias,
        gate=gate,
        gate_temperature=float(getattr(config, "gating_temperature", 10)) if gate_shapes else None,
        hidden_layers=tuple(hidden_layers),
        held=frozenset({*layers, *map(_bias_of, layers), *gate, *NORMALIZER}),
    )


def _read_layers(
    folder: str, where: Mapping[str, Path], first: str, width: int, outputs: int
) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
    """Weights and constants of the head's layers from `width` inputs to `outputs`, by the names of the weights."""
    names = [first]
    if stem := first.removesuffix("0.weight") if first.endswith(".0.weight") else "":
        # Numbers between those of two layers are those of their activations.
        names = sorted((n for n in where if re.fullmatch(rf"{re.escape(stem)}\d+\.weight", n)), key=_number)
    layers = {}
    for name in names:
        height = outputs if name == names[-1] else None
        weight = _read_tensors(folder, where, {name: (height, width)})[name]
        bias = _bias_of(name)
        constant = _read_tensors(folder, where, {bias: (len(weight),)})[bias] if bias in where else None
        layers[name], width = (weight, constant), len(weight)
    return layers


def _number(layer: str) -> int:
    return int(layer.split(".")[-2])


def _normalised(config: Any, head: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The head whose outputs are those of a safe-rlhf head after its normalisation: a reward in standard deviations
    from the mean, and a cost in standard deviations from 0."""
    kind = getattr(config, "score_type", "reward")
    if kind == "critic":
        return head, bias
    mean = torch.as_tensor(config.mean, dtype=torch.float32) if kind == "reward" else torch.zeros(1)
    std = torch.as_tensor(config.var, dtype=torch.float32).sqrt() + 1e-8
    return head / std[:, None], ((torch.zeros(1) if bias is None else bias) - mean) / std


def _bias_of(head: str) -> str:
    return head.removesuffix("weight") + "bias"


def _load_config(folder: str) -> Any:
    from transformers import AutoConfig

    with _reading(Path(folder) / "config.json"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def _hidden_size(config: Any) -> int:
    size: int = config.get_text_config().hidden_size
    return size


def _num_objectives(config: Any) -> int:
    return int(getattr(config, "num_objectives", 19))


def _gate_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of ArmoRM's gate (arXiv:2406.12845): linear layers with ReLU between them, over the prompt's state."""
    outputs, num_hidden = _num_objectives(config), int(getattr(config, "gating_n_hidden", 3))
    widths = [_hidden_size(config), *[int(getattr(config, "gating_hidden_dim", 1024))] * num_hidden, outputs]
    shapes: dict[str, tuple[int, ...]] = {}
    for index, (width, next_width) in enumerate(pairwise(widths)):
        shapes[f"gating.layers.{index}.weight"] = (next_width, width)
        shapes[f"gating.layers.{index}.bias"] = (next_width,)
    return shapes | {"gating.logit_scale": (1,), "reward_transform_matrix": (outputs, outputs)}


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Names of the tensors of a checkpoint → the files they stand in; a value head apart goes before one inside."""
    found: dict[str, Path] = {}
    for names in (MODEL_FILES, VALUE_HEAD_FILES):
        file = next((folder / name for name in names if (folder / name).is_file()), None)
        if file is not None and file.suffix == ".json":
            with _reading(file):
                found |= {name: folder / shard for name, shard in json.loads(file.read_text())["weight_map"].items()}
        elif file is not None:
            with _reading(file), _tensors_of(file) as tensors:
                found |= dict.fromkeys(tensors.keys(), file)
    return found


def _read_tensors(
    folder: str, where: Mapping[str, Path], shapes: Mapping[str, tuple[int | None, ...]]
) -> dict[str, torch.Tensor]:
    """The tensors named in `shapes`, in fp32. Raises CheckpointError where one is missing or has another shape.

    None in a shape stands for any size.
    """
    if missing := [name for name in shapes if name not in where]:
        raise CheckpointError(f"The checkpoint in '{folder}' lacks {', '.join(missing[:3])}.")
    read = {}
    for name, shape in shapes.items():
        with _reading(where[name]), _tensors_of(where[name]) as tensors:
            read[name] = tensors.get_tensor(name).to(torch.float32, copy=True)
        found = list(read[name].shape)
        wanted = [size if size is not None or len(found) != len(shape) else found[i] for i, size in enumerate(shape)]
        if found != wanted:
            raise CheckpointError(f"The tensor '{name}' in '{folder}' has shape {found}; the config asks for {wanted}.")
    return read


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0].rstrip(".")
        raise CheckpointError(
            f"'{file.parent}' does not load as a reward model: its {file.name} cannot be read, as when it is cut short "
            f"({reason})."
        ) from error


class _PickledTensors(dict[str, torch.Tensor]):
    def get_tensor(self, name: str) -> torch.Tensor:
        return self[name]


@contextmanager
def _tensors_of(file: Path) -> Iterator[Any]:
    """The tensors of a safetensors or torch file, each read only when asked for: `keys()` and `get_tensor(name)`."""
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(file, framework="pt") as tensors:
            yield tensors
    else:
        # Torch files from before the zip format cannot be mapped.
        stored = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        yield _PickledTensors(stored)
