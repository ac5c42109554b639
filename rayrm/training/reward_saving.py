"""LoRA updates on a reward model, and the trained model written whole."""

from __future__ import annotations

import copy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from rayrm import files
from rayrm.errors import CheckpointError
from rayrm.models.loading import HEAD
from rayrm.models.readouts import Readout
from rayrm.models.rendering import Renderer
from rayrm.training.checkpoints import export_model, gather_state, publish

if TYPE_CHECKING:
    from rayrm.training.reward_model import RewardTraining
    from rayrm.training.settings import LowRank

ADAPTER = "adapter"


def add_updates(network: Any, lora: LowRank, seed: int) -> Any:
    """Put LoRA updates, drawn from `seed`, into `network` and freeze all else but the head.

    Returns peft's view of the network, which can merge them.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        view = lora.add_to(network, exclude_modules=[HEAD, "lm_head"])
    if hasattr(network, HEAD):
        getattr(network, HEAD).requires_grad_(True)
    return view


def gather_trained(network: Any, lora: LowRank | None) -> dict[str, Any]:
    """The tensors of `network` that training decides, whole and on the CPU, on rank 0; all ranks call it."""
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    return gather_state(network, lambda name: lora is None or name in trained)


def export_reward_model(
    network: Any, state: dict[str, Any], training: RewardTraining, renderer: Renderer, readout: Readout, output: str
) -> None:
    """Save and verify `network` with the tensors of `state` as `<output>/model`.

    LoRA updates are merged, and also saved alone, with the head, as `<output>/adapter`, which peft loads. All ranks
    call it, and `state` counts on rank 0.
    """
    if dist.get_rank() == 0:
        renderer.tokenizer.chat_template = renderer.template
        if training.lora is not None:
            # What rank 0 loads alone must be whole.
            unset_hf_deepspeed_config()
            tokenizer, new_head = renderer.tokenizer, training.new_head
            dtype, in_4bit = network.dtype, training.load_in_4bit
            whole = readout.load(
                training.model, tokenizer, new_head=new_head, dtype=dtype, load_in_4bit=in_4bit
            ).network
            if in_4bit:
                whole = whole.dequantize()
            whole.config.pad_token_id = network.config.pad_token_id
            view = add_updates(whole, training.lora, training.seed)
            whole.load_state_dict(state, strict=False)
            save_adapter(view, training.model, renderer, output)
            network = view.merge_and_unload()
            state = network.state_dict()

        def write(folder: Path) -> None:
            network.save_pretrained(folder, state_dict=state)
            renderer.tokenizer.save_pretrained(folder)

        is_classifier = hasattr(network, HEAD)
        export_model(output, write, AutoModelForSequenceClassification if is_classifier else AutoModelForCausalLM)
    dist.barrier()


def save_adapter(view: Any, base: str, renderer: Renderer, output: str) -> None:
    """Save the LoRA updates of `view`, the head where it has one, and the tokenizer to `<output>/adapter`, whole.

    Raises CheckpointError when a tensor is not finite.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    network = view.get_base_model()
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in get_peft_model_state_dict(view).items()}
    settings = copy.deepcopy(view.peft_config["default"])
    settings.base_model_name_or_path, settings.inference_mode, settings.task_type = base, True, "CAUSAL_LM"
    if hasattr(network, HEAD):
        settings.task_type, settings.modules_to_save = "SEQ_CLS", [HEAD]
        state[f"base_model.model.{HEAD}.weight"] = getattr(network, HEAD).weight.detach().cpu().contiguous()
    for name, tensor in state.items():
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"Tensor '{name}' of the adapter in '{output}' is not finite; try a lower lr.")
    # Beside its place, so that it is moved there at once.
    with TemporaryDirectory(prefix=".adapter-", dir=None if "://" in output else output) as temporary:
        folder = Path(temporary) / ADAPTER
        folder.mkdir()
        renderer.tokenizer.save_pretrained(folder)
        settings.save_pretrained(str(folder))
        save_file(state, folder / "adapter_model.safetensors", {"format": "pt"})
        publish(folder, files.join(output, ADAPTER))
