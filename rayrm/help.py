"""What `--help` prints of a job's config."""

from __future__ import annotations

import types
import typing
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined


def describe(cls: type[BaseModel]) -> str:
    """The help text of a job's config: a line for each field with its type, default and docstring."""
    lines = ["usage: python -m jobs.<name> [config.yaml] [field=value …]", "", (cls.__doc__ or "").strip(), ""]
    lines += _describe_fields(cls, "")
    return "\n".join(lines)


def _describe_fields(cls: type[BaseModel], prefix: str) -> list[str]:
    lines = []
    for name, field in cls.model_fields.items():
        nested = [t for t in _members(field.annotation) if isinstance(t, type) and issubclass(t, BaseModel)]
        text = " ".join((field.description or "").split())
        parts = typing.get_args(field.annotation) if typing.get_origin(field.annotation) is list else ()
        items = [t for part in parts for t in _members(part) if isinstance(t, type) and issubclass(t, BaseModel)]
        if items:
            lines.append(f"  {prefix}{name}: list  {text}")
            for variant in items:
                if len(items) > 1:
                    about = " ".join((variant.__doc__ or "").split())
                    lines.append(f"  {prefix}{name}[].* (type={_tag(variant)})  {about}")
                lines += _describe_fields(variant, f"{prefix}{name}[].")
            continue
        if nested:
            for variant in nested:
                tag = f" (type={_tag(variant)})" if len(nested) > 1 else ""
                about = text or " ".join((variant.__doc__ or "").split())
                lines += [f"  {prefix}{name}.*{tag}  {about}", *_describe_fields(variant, f"{prefix}{name}.")]
            continue
        required = field.default is PydanticUndefined and field.default_factory is None
        default = "required" if required else f"default {field.get_default(call_default_factory=True)!r}"
        lines.append(f"  {prefix}{name}: {_type_name(field.annotation)}  [{default}]  {text}")
    return lines


def _members(annotation: Any) -> list[Any]:
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _members(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [member for part in typing.get_args(annotation) for member in _members(part)]
    return [annotation]


def _tag(cls: type[BaseModel]) -> str:
    return str(cls.model_fields["type"].default) if "type" in cls.model_fields else cls.__name__


def _type_name(annotation: Any) -> str:
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return annotation.__name__
    if typing.get_origin(annotation) is typing.Literal:
        return "|".join(str(value) for value in typing.get_args(annotation))
    return str(annotation).replace("typing.", "").replace("NoneType", "null").replace("None", "null")
