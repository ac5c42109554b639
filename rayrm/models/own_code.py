"""Models that bring Python code along, which runs only where a config says so."""

from __future__ import annotations

from typing import Any

from rayrm import files
from rayrm.errors import CheckpointError, ConfigError


def find_own_model(path: str) -> str | None:
    """Which of transformers' kinds of models the own code of the model at `path` makes, the one for rewards before
    others; None where it makes none."""
    kinds = ("AutoModelForSequenceClassification", "AutoModel", "AutoModelForCausalLM")
    own = read_config(path).get("auto_map") or {}
    return next((kind for kind in kinds if kind in own), None)


def check_own_code(path: str, trust_remote_code: bool) -> None:
    """Raise CheckpointError for a model of a kind that only its own code knows, unless that code may run."""
    config = read_config(path)
    if trust_remote_code or "AutoConfig" not in (config.get("auto_map") or {}):
        return
    from transformers import CONFIG_MAPPING

    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise CheckpointError(
            f"'{path}' is a '{kind}', which transformers knows only by code in the model's own files; set "
            "trust_remote_code=true to run that code, if you trust it."
        )


def read_config(path: str) -> dict[str, Any]:
    """What stands in the config.json of the model at `path`, a folder or a hub id; empty where it has none."""
    if files.is_hub_id(path):
        from huggingface_hub import hf_hub_download

        try:
            path = hf_hub_download(path, "config.json").removesuffix("/config.json")
        except (OSError, ValueError):
            # Whoever loads the model says so.
            return {}
    try:
        config: dict[str, Any] = files.read_json(files.join(path, "config.json")) or {}
    except ConfigError:
        return {}
    return config
