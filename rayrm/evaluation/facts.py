"""What a page tells of the run that made it."""

from __future__ import annotations

from typing import Any

from rayrm.config import Config
from rayrm.runs import versions


def list_facts(config: Config) -> dict[str, str]:
    """Every field of the config by its dotted name, then the versions."""
    return {**_dotted(config.model_dump(mode="json")), **versions()}


def _dotted(values: Any, prefix: str = "") -> dict[str, str]:
    items = values.items() if isinstance(values, dict) else enumerate(values)
    found: dict[str, str] = {}
    for name, value in items:
        nested = isinstance(value, dict) or (isinstance(value, list) and any(isinstance(each, dict) for each in value))
        found |= _dotted(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": str(value)}
    return found
