"""Files on any fsspec path: atomic writes, small JSON, fingerprints of what a job reads."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import fsspec

from rayrm.errors import ConfigError

RUN_MARK = "run.json"
CHECKPOINT_MARK = "rayrm.json"


def filesystem(path: str) -> tuple[Any, str]:
    """The fsspec filesystem of a URL and the path inside it. Raises ConfigError for a protocol without a driver."""
    try:
        fs, inner = fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"'{path}' cannot be opened: {error}.") from error
    return fs, inner.rstrip("/") or "/"


def join(path: str, *names: str) -> str:
    """`path/name/…` for local paths and URLs."""
    return "/".join([path.rstrip("/"), *names])


def exists(path: str) -> bool:
    """Whether there is a file or folder at `path`."""
    fs, inner = filesystem(path)
    return bool(fs.exists(inner))


@contextmanager
def atomic_file(path: str) -> Iterator[IO[bytes]]:
    """Open a file for writing that appears at `path` whole, when the block ends well, or not at all."""
    fs, inner = filesystem(path)
    folder, _, name = inner.rpartition("/")
    fs.makedirs(folder or ".", exist_ok=True)
    temporary = f"{folder or '.'}/.{name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with fs.open(temporary, "wb") as handle:
            yield handle
        if getattr(fs, "protocol", None) in ("file", ("file", "local")):
            os.replace(temporary, inner)
        else:
            fs.mv(temporary, inner)
    except BaseException:
        if fs.exists(temporary):
            fs.rm(temporary)
        raise


def write_json(path: str, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_file(path) as handle:
        handle.write(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n")


def read_json(path: str) -> Any:
    """The JSON at `path`, or None when there is no such file. Raises ConfigError for a file that is not JSON."""
    fs, inner = filesystem(path)
    if not fs.exists(inner):
        return None
    try:
        with fs.open(inner, "rb") as handle:
            return json.loads(handle.read())
    except ValueError as error:
        raise ConfigError(f"'{path}' is not JSON: {error}.") from error


def remove(path: str) -> None:
    """Remove a file, where there is one."""
    fs, inner = filesystem(path)
    if fs.exists(inner):
        fs.rm(inner)


def digest(value: Any) -> str:
    """Sixteen hex digits that stand for a JSON value."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def is_hub_id(path: str) -> bool:
    """Whether `path` reads like `owner/name` on the model hub and nothing local stands there."""
    parts = path.split("/")
    return len(parts) == 2 and all(parts) and parts[0] not in (".", "..", "~") and not exists(path)


def fingerprint(path: str) -> str:
    """What stands for the content of a file, a folder, a finished run, a checkpoint or a hub id.

    Finished runs and checkpoints carry their own digest; other local files are hashed whole, remote ones by the
    identity that their store gives them. Raises ConfigError when nothing is there.
    """
    for mark in (RUN_MARK, CHECKPOINT_MARK):
        done = read_json(join(path, mark))
        if done and "digest" in done:
            return f"{mark}:{done['digest']}"
    fs, inner = filesystem(path)
    if not fs.exists(inner):
        if is_hub_id(path):
            return f"hub:{path}"
        raise ConfigError(f"There is nothing at '{path}'; give the path of a file or folder, or a hub id 'owner/name'.")
    names = sorted(fs.find(inner)) if fs.isdir(inner) else [inner]
    return "content:" + digest([[name[len(inner) :], _content(fs, name)] for name in names])


def _content(fs: Any, name: str) -> str:
    if "file" not in fs.protocol:
        return str(fs.ukey(name))
    state = hashlib.blake2b(digest_size=8)
    with Path(name).open("rb") as handle:
        while chunk := handle.read(1 << 22):
            state.update(chunk)
    return state.hexdigest()
