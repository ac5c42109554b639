"""A Serve config file that is up while a block runs, on the Ray that this process uses."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from rayrm import cluster
from rayrm.errors import ConfigError, ServiceError

log = logging.getLogger("rayrm")
KEYS, KEY = "RAYRM_API_KEYS", "RAYRM_API_KEY"
START_S, STOP_S = 600.0, 60.0
"""Seconds that a service may take to come up, and to go."""


@contextmanager
def running(config: str, log_path: str) -> Iterator[None]:
    """`serve run config` while the block runs; what it prints goes to the local file `log_path`.

    Without keys in the environment, it gets one of its own, which clients in this process and its Ray know too. Raises
    ConfigError when there is no such file, or it names no port or one that is taken, and ServiceError when the service
    does not come up.
    """
    if not Path(config).is_file():
        raise ConfigError(f"There is no Serve config at '{config}'; give a file such as serve_configs/reward.yaml.")
    options = (yaml.safe_load(Path(config).read_text()) or {}).get("http_options", {})
    if "port" not in options:
        raise ConfigError(f"'{config}' sets no http_options.port, at which clients would find it; set one.")
    with socket.socket() as probe:
        if not probe.connect_ex(("127.0.0.1", options["port"])):
            raise ConfigError(
                f"'{config}' wants port {options['port']}, and another server listens there; stop it, or set another port."
            )
    prepare_keys()
    cluster.connect()
    import ray

    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    Path(log_path).parent.mkdir(parents=True, exist_ok=True)
    command = [str(Path(sys.executable).parent / "serve"), "run", config]
    with open(log_path, "wb") as handle:
        # A group of its own: Ctrl-C is for this process, which then ends the service.
        server = subprocess.Popen(command, env=environment, stdout=handle, stderr=handle, start_new_session=True)
    try:
        log.info("bringing up the service of %s", config)
        _wait(f"http://127.0.0.1:{options['port']}", server, config, log_path)
        yield
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(STOP_S)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


def prepare_keys() -> None:
    """Make a key for the service and its clients, unless the environment has some; before Ray starts, whose workers
    have the environment that it is started in."""
    if KEYS not in os.environ:
        os.environ[KEYS] = f"recipe={os.environ.setdefault(KEY, secrets.token_hex(16))}"


def _wait(address: str, server: subprocess.Popen[bytes], config: str, log_path: str) -> None:
    import httpx

    until = time.monotonic() + START_S
    while time.monotonic() < until and server.poll() is None:
        try:
            if httpx.get(f"{address}/ready", timeout=5).status_code == httpx.codes.OK:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise ServiceError(f"The service of '{config}' did not come up; '{log_path}' says why.")
