"""Whether there is a model at a path, asked before any worker starts; imports no engine."""

from __future__ import annotations

from rayrm import files
from rayrm.errors import CheckpointError


def require_model(path: str) -> None:
    """Raise CheckpointError unless `path` is a folder with a model or the hub id of one."""
    if files.exists(path):
        if not files.exists(files.join(path, "config.json")):
            hint = files.join(path, "model")
            where = f"its model is in '{hint}'" if files.exists(hint) else "give the folder of a checkpoint"
            raise CheckpointError(f"'{path}' holds no config.json and so no model; {where}.")
        return
    if not files.is_hub_id(path):
        raise CheckpointError(
            f"There is no model at '{path}'; give the folder of a checkpoint, or a hub id 'owner/name'."
        )
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(path, "config.json")
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise CheckpointError(f"There is no folder '{path}', and the hub gives no such model: {reason}.") from error
