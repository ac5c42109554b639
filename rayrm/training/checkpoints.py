"""Write a trained model whole: gather it, save it, load it again, and move it into place."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rayrm import files
from rayrm.errors import CheckpointError
from rayrm.models.folders import local_model
from rayrm.training.launch import MODEL


def gather_state(model: Any, wants: Callable[[str], bool] = lambda name: True) -> dict[str, Any]:
    """The tensors of `model` whose name `wants` accepts, whole and on the CPU, on rank 0; nothing on other ranks.

    All ranks call it together: under ZeRO-3 each parameter is put together from its parts, one at a time.
    """
    import torch.distributed as dist

    is_first = not dist.is_initialized() or dist.get_rank() == 0
    state: dict[str, Any] = {}
    copies: dict[int, Any] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not wants(name):
            continue
        if id(tensor) not in copies:
            copies[id(tensor)] = _whole(tensor, is_first)
        if is_first:
            state[name] = copies[id(tensor)]
    return state


def _whole(tensor: Any, is_first: bool) -> Any:
    if not hasattr(tensor, "ds_id"):
        return tensor.detach().cpu().clone() if is_first else None
    import deepspeed

    with deepspeed.zero.GatheredParameters([tensor]):
        return tensor.detach().cpu().clone() if is_first else None


def export_model(output: str, write: Callable[[Path], None], model_class: Any) -> None:
    """Have `write` fill a local folder, verify it, and move it to `<output>/model`; one process calls it.

    What stood there before is replaced. Raises CheckpointError as `verify_model` does.
    """
    if "://" not in output:
        os.makedirs(output, exist_ok=True)
    with TemporaryDirectory(prefix=".model-", dir=None if "://" in output else output) as temporary:
        folder = Path(temporary) / MODEL
        folder.mkdir()
        write(folder)
        verify_model(folder, model_class)
        publish(folder, files.join(output, MODEL))


def verify_model(folder: Path, model_class: Any) -> Any:
    """Load `folder` afresh with `model_class.from_pretrained` on the CPU and return the model.

    Raises CheckpointError when a tensor is missing, not the model's, empty or not finite.
    """
    import torch
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    # With ZeRO-3 still on, the load would wait for the other ranks to take their parts.
    unset_hf_deepspeed_config()
    try:
        model, info = model_class.from_pretrained(folder, dtype="auto", output_loading_info=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"The saved model in '{folder}' does not load: {str(error).splitlines()[0]}.") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            names = ", ".join(sorted(str(name) for name in info[kind])[:5])
            raise CheckpointError(f"The saved model in '{folder}' has {kind.replace('_', ' ')}: {names}.")
    for name, tensor in model.state_dict().items():
        if not tensor.numel():
            raise CheckpointError(f"Tensor '{name}' of the saved model in '{folder}' is empty: {tuple(tensor.shape)}.")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"Tensor '{name}' of the saved model in '{folder}' is not finite; try a lower lr.")
    return model


def publish(folder: Path, path: str) -> None:
    """Move a local folder to `path`, on any filesystem, in place of what is there."""
    fs, inner = files.filesystem(path)
    if fs.exists(inner):
        fs.rm(inner, recursive=True)
    if "://" in path:
        fs.makedirs(inner, exist_ok=True)
        fs.put(f"{folder}/", f"{inner}/", recursive=True)
    else:
        shutil.move(folder, path)


def push_to_hub(path: str, hub_id: str) -> None:
    """Upload the folder `path` to the private model repository `hub_id`, which is made when it is not there.

    Raises CheckpointError when the hub refuses; the model stays where it is.
    """
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(hub_id, private=True, exist_ok=True)
        HfApi().upload_folder(repo_id=hub_id, folder_path=local_model(path))
    except Exception as error:
        # A hub's refusal, an address that is none, a name that no repository has, no connection: each its own error.
        reason = (str(error).strip() or repr(error)).splitlines()[0].rstrip(".")
        raise CheckpointError(
            f"'{path}' could not be pushed to '{hub_id}': {reason}; it stays there, run again to push."
        ) from error
