"""Where a model's files are: a local folder, any fsspec URL, or the hub."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from rayrm import files
from rayrm.errors import CheckpointError
from rayrm.runs import STARTED

PICKLED = {"pytorch_model": "model", "value_head": "value_head"}
"""How the names of pickled weights begin, and of the safetensors files in their place."""


def check_model(path: str) -> None:
    """Raise CheckpointError unless `path` is a finished model with all of its weights, or the hub id of a model."""
    if files.is_hub_id(path):
        _check_hub(path)
        return
    if not files.exists(path):
        raise CheckpointError(f"There is no model at '{path}'; give a folder with a model, or a hub id 'owner/name'.")
    fs, inner = files.filesystem(path)
    if fs.exists(f"{inner.rpartition('/')[0]}/{STARTED}") and not fs.exists(f"{inner}/{files.CHECKPOINT_MARK}"):
        raise CheckpointError(f"'{path}' is the checkpoint of a run that has not finished; finish that run first.")
    names = {Path(name).name for name in fs.find(inner, maxdepth=1)} if fs.isdir(inner) else set()
    if "config.json" not in names:
        deeper = files.join(path, "model")
        hint = f"'{deeper}' holds one" if files.exists(files.join(deeper, "config.json")) else "give a model's folder"
        raise CheckpointError(f"'{path}' holds no model, for it has no config.json; {hint}.")
    index = next(
        (name for name in sorted(names) if name.endswith((".safetensors.index.json", ".bin.index.json"))), None
    )
    if index:
        wanted = set(files.read_json(files.join(path, index))["weight_map"].values())
    else:
        wanted = {name for name in names if name.endswith((".safetensors", ".bin"))} or {"model.safetensors"}
    if missing := sorted(wanted - names):
        raise CheckpointError(f"The model at '{path}' is not whole: it lacks {', '.join(missing[:3])}.")


def _check_hub(path: str) -> None:
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(path, "config.json")
    except (OSError, ValueError) as error:
        raise _no_such_model(path, error) from error


def read_mark(path: str) -> dict[str, Any]:
    """The completion mark of the model at `path`, a folder or a hub id; empty where it was not trained here.

    Raises CheckpointError when the hub cannot be asked.
    """
    if files.is_hub_id(path):
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        try:
            path = str(Path(hf_hub_download(path, files.CHECKPOINT_MARK)).parent)
        except EntryNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise _no_such_model(path, error) from error
    mark: dict[str, Any] = files.read_json(files.join(path, files.CHECKPOINT_MARK)) or {}
    return mark


def _no_such_model(path: str, error: Exception) -> CheckpointError:
    reason = str(error).strip().splitlines()[0].rstrip(".:")
    return CheckpointError(
        f"There is neither a folder '{path}' nor a model of that name on the hub that can be reached: {reason}."
    )


def local_model(path: str) -> str:
    """What transformers and vLLM can load for `path`: a local folder or hub id as it is, else a copy on this machine.

    The copy stands in the temporary folder under the content's fingerprint, and is made once a machine.
    """
    if "://" not in path:
        return path
    fs, inner = files.filesystem(path)
    folder = Path(tempfile.gettempdir()) / "rayrm_models" / files.digest([path, files.fingerprint(path)])
    if not folder.exists():
        folder.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            fs.get(f"{inner}/", f"{scratch}/model/", recursive=True)
            try:
                os.rename(Path(scratch) / "model", folder)
            except OSError:
                # Another process of this machine was faster, and its copy is the same.
                if not folder.exists():
                    raise
    return str(folder)


def is_encoder_decoder(path: str) -> bool:
    """Whether the config of the model at `path`, a folder or hub id, says so; not where it has none."""
    from transformers import PretrainedConfig

    try:
        config, _ = PretrainedConfig.get_config_dict(local_model(path))
    except OSError:
        return False
    return bool(config.get("is_encoder_decoder"))


def local_folder(path: str) -> str:
    """`local_model`, and for a hub id the folder of the hub's cache with its files, which are fetched once a machine.

    Raises CheckpointError when there is no such model.
    """
    folder = local_model(path)
    if os.path.isdir(folder) or not files.is_hub_id(path):
        return folder
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.jinja", "*.model", "*.txt", "*.safetensors"]
    try:
        found = snapshot_download(path, allow_patterns=wanted)
        if not any(Path(found).glob("*.safetensors")):
            found = snapshot_download(path, allow_patterns=[*wanted, "*.bin"])
    except (OSError, ValueError) as error:
        raise _no_such_model(path, error) from error
    return str(found)


def load_tokenizer(path: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer of the model at `path`. Raises CheckpointError when there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(local_model(path), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0].rstrip(".")
        raise CheckpointError(f"There is no tokenizer that loads at '{path}': {reason}.") from error


def check_safetensors(path: str) -> None:
    """Raise CheckpointError for a model in a folder whose weights are pickled, for pickles may hold programs."""
    folder = Path(local_folder(path))
    names = {each.name for each in folder.iterdir()} if folder.is_dir() else set()
    for pickled, safe in PICKLED.items():
        found = sorted(name for name in names if name.startswith(pickled) and name.endswith(".bin"))
        if found and not any(name.startswith(safe) and name.endswith(".safetensors") for name in names):
            raise CheckpointError(
                f"'{path}' holds pickled weights ({found[0]}) and no safetensors files, and a server reads no others; save "
                "it again with transformers."
            )
