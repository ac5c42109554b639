"""Typed configs, filled from YAML files and `dotted.field=value` words."""

from __future__ import annotations

import logging
import os
import re
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from rayrm import errors
from rayrm.errors import ConfigError, RayRMError, ServiceError

NOT_IDENTITY = {"identity": False}
"""`json_schema_extra` of a field that changes how work is done, but not what comes out."""
TEMPLATE = {"input": ".jinja"}
"""`json_schema_extra` of a field that names a chat template: a name, or a file whose content decides what comes out."""


class Config(BaseModel):
    """A frozen value without unknown keys; field docstrings are its help."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )

    def further_inputs(self) -> dict[str, str]:
        """Paths that no field names and whose content decides what comes out, each with a name for it."""
        return {}


class Loader(yaml.SafeLoader):
    """YAML 1.2's booleans: `no` is a language."""


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if tag != "tag:yaml.org,2002:bool"]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
ConfigT = TypeVar("ConfigT", bound=Config)


class Workers(Config):
    """How many actors run a model stage, and what each of them reserves."""

    num_workers: int = Field(1, ge=1)
    """Actors at the least; the stage starts with this many."""
    max_workers: int | None = Field(None, ge=1)
    """Actors at the most when rows queue up; left out, the pool has a fixed size."""
    num_cpus: float = Field(1, ge=0)
    """Logical CPUs that each actor reserves."""
    num_gpus: float = Field(0, ge=0)
    """GPUs that each actor reserves."""

    @model_validator(mode="after")
    def _in_order(self) -> Workers:
        if self.max_workers is not None and self.max_workers < self.num_workers:
            raise ValueError(f"max_workers {self.max_workers} is less than num_workers {self.num_workers}")
        return self

    def pool(self) -> dict[str, Any]:
        """Arguments of `Dataset.map_batches` for an actor pool of this size."""
        from ray.data import ActorPoolStrategy

        strategy = ActorPoolStrategy(
            min_size=self.num_workers,
            max_size=self.max_workers or self.num_workers,
            max_tasks_in_flight_per_actor=2,
        )
        return {"compute": strategy, "num_cpus": self.num_cpus, "num_gpus": self.num_gpus or None}


def identity(config: BaseModel) -> dict[str, Any]:
    """The fields that decide what comes out, without those marked `NOT_IDENTITY`, ready for JSON."""
    values: dict[str, Any] = {}
    for name, field in type(config).model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("identity") is False:
            continue
        value = getattr(config, name)
        values[name] = _plain(value)
    return values


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return identity(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def load_config(cls: type[ConfigT], path: str | Path | None = None, overrides: Sequence[str] = ()) -> ConfigT:
    """Build `cls` from a YAML file and `dotted.field=value` words, later words winning.

    A value is read as YAML (`a=1`, `a=[x,y]`, `a=null`). Raises ConfigError.
    """
    values: dict[str, Any] = {}
    if path is not None:
        values = _read_yaml(path)
    for word in overrides:
        key, _, text = word.partition("=")
        try:
            value = yaml.load(text, Loader)
        except yaml.YAMLError as error:
            raise ConfigError(f"The value in '{word}' is not YAML: {error}.") from error
        _put(values, key, value)
    return build_config(cls, values, where=str(path) if path else "the command line")


def build_config(cls: type[ConfigT], values: dict[str, Any], where: str) -> ConfigT:
    """Validate plain values as `cls`, with local paths made absolute. Raises ConfigError with a sentence a fault."""
    try:
        return _with_absolute_paths(cls.model_validate(values))
    except ValidationError as error:
        faults = " ".join(_sentence(fault, cls) for fault in error.errors())
        raise ConfigError(f"{cls.__name__} from {where}: {faults}") from error


def _with_absolute_paths(config: ConfigT) -> ConfigT:
    """Local paths of `config` made absolute, because workers run in other folders than the driver.

    A path is a field `output`, or a field marked as an input whose path is there.
    """
    update: dict[str, Any] = {}
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, Config):
            update[name] = _with_absolute_paths(value)
        elif isinstance(value, list) and value and isinstance(value[0], Config):
            update[name] = [_with_absolute_paths(part) for part in value]
        elif name == "output" or is_input(field, value):
            update[name] = _absolute(value, must_exist=name != "output")
    return config.model_copy(update=update)


def is_input(field: FieldInfo, value: Any) -> bool:
    """Whether `value` names content that decides what comes out, as `field` is marked."""
    kind = field.json_schema_extra.get("input") if isinstance(field.json_schema_extra, dict) else None
    return value is not None and (kind is True or (isinstance(kind, str) and str(value).endswith(kind)))


def _absolute(value: Any, must_exist: bool) -> Any:
    if isinstance(value, dict):
        return {key: _absolute(path, must_exist) for key, path in value.items()}
    if isinstance(value, list):
        return [_absolute(path, must_exist) for path in value]
    if isinstance(value, str) and "://" not in value and (os.path.exists(value) or not must_exist):
        return os.path.abspath(value)
    return value


def _sentence(fault: Any, cls: type[BaseModel]) -> str:
    field = ".".join(str(part) for part in fault["loc"]) or "the config"
    found = fault["input"]
    if fault["type"] == "missing":
        return f"'{field}' is missing; set {field}=…."
    if fault["type"] == "extra_forbidden":
        return f"'{field}' is not a field; `--help` lists the fields of {cls.__name__}."
    if fault["type"] == "union_tag_not_found":
        return f"'{field}.type' is missing; `--help` lists the types."
    if fault["type"] == "union_tag_invalid":
        expected = fault["ctx"]["expected_tags"]
        return f"'{field}.type' is '{fault['ctx']['tag']}', and only {expected} exist."
    return f"'{field}' is {found!r}: {fault['msg'][0].lower()}{fault['msg'][1:]}."


def _read_yaml(path: str | Path) -> dict[str, Any]:
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader)
    except FileNotFoundError as error:
        raise ConfigError(f"There is no config file at '{path}'.") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"The config file '{path}' cannot be read as YAML: {error}.") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"The config file '{path}' holds a {type(values).__name__}, where a mapping is needed.")
    return values


def _put(values: Any, key: str, value: Any) -> None:
    """Set a field by its dotted key; a number is a place of a list, the first free one included."""
    *parents, last = key.split(".")
    for parent, inner in zip(parents, [*parents, last][1:], strict=True):
        empty: Any = [] if inner.isdigit() else {}
        values = _step(values, parent, key, empty)
        if not isinstance(values, list if inner.isdigit() else dict):
            raise ConfigError(f"'{key}' reaches into '{parent}', which is {values!r} and has no '{inner}'.")
    if isinstance(values, list):
        _step(values, last, key, value)
        values[int(last)] = value
    else:
        values[last] = value


def _step(values: Any, part: str, key: str, empty: Any) -> Any:
    if isinstance(values, dict):
        return values.setdefault(part, empty)
    place = int(part)
    if place > len(values):
        raise ConfigError(f"'{key}' names place {place} of a list of {len(values)}; the first one is 0.")
    if place == len(values):
        values.append(empty)
    return values[place]


def parse_args(cls: type[ConfigT], argv: Sequence[str] | None = None) -> ConfigT:
    """`[config.yaml] field=value …` as a `cls`; `--help` prints its fields and exits. Raises ConfigError."""
    words = list(sys.argv[1:] if argv is None else argv)
    if any(word in ("-h", "--help") for word in words):
        from rayrm.help import describe

        print(describe(cls))
        raise SystemExit(0)
    files = [word for word in words if "=" not in word]
    if len(files) > 1:
        raise ConfigError(f"Give at most one config file and words 'field=value'; found {' '.join(files)}.")
    return load_config(cls, files[0] if files else None, [word for word in words if "=" in word])


def run_job(main: Callable[[], object]) -> None:
    """Run a job's `main`; an error that the user can act on is one sentence and exit code 1."""
    load_env()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    for noisy in ("httpx", "urllib3", "filelock", "fsspec"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # It warns of a kernel that CPUs do not need, whether or not anything is held in 4 bits.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        main()
    except Exception as error:
        told = find_told(error)
        if told is None:
            raise
        print(f"{type(told).__name__}: {told}", file=sys.stderr)
        raise SystemExit(1) from error


def find_told(error: BaseException | None) -> RayRMError | None:
    """The outermost RayRMError in a chain of causes, without what Ray wraps around it; None where there is none."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        # Ray keeps what an actor raised as `cause`, in an error that is of the cause's class and holds a whole trace.
        cause = getattr(error, "cause", None)
        if isinstance(error, RayRMError) and not isinstance(cause, BaseException):
            return error
        # Of an actor that dies while it starts only the text of its trace is left.
        traced = re.findall(r"^rayrm\.(?:errors|client\.sending)\.(\w+): (.+)", str(error), re.MULTILINE)
        if traced and not isinstance(cause, BaseException):
            name, message = traced[-1]
            # The client's own kinds are no more than that to others.
            return typing.cast(RayRMError, getattr(errors, name, ServiceError)(message))
        error = cause if isinstance(cause, BaseException) else error.__cause__
    return None


def load_env() -> None:
    """Read secrets from a `.env` file of the working folder; what the environment already holds wins."""
    if os.path.exists(".env"):
        from dotenv import load_dotenv

        load_dotenv(".env", override=False)
