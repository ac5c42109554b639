"""Judges: language models behind an endpoint that is there, or brought up on the cluster for the run."""

from __future__ import annotations

import logging
import re
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Annotated, Any, Literal

from pydantic import Field

from rayrm import cluster, files
from rayrm.config import NOT_IDENTITY, Config
from rayrm.errors import CheckpointError
from rayrm.evaluation.answers import Prices
from rayrm.models.folders import check_model
from rayrm.models.vllm import CPU_BLOCK, GIB, EngineConfig, check_build, is_cpu_build
from rayrm.runs import INPUT
from rayrm.scoring.endpoint import EndpointConfig, read_key

log = logging.getLogger("rayrm")
NAME = r"^\w[\w.-]*$"
"""What a judge may be called: its name names files."""


class OutsideJudge(EndpointConfig):
    """A language model behind an OpenAI-compatible endpoint: an outside one, or our own service."""

    type: Literal["endpoint"] = "endpoint"
    name: str = Field(pattern=NAME)
    """What results and files call it."""
    prompt_price: float | None = Field(None, ge=0, json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Of a million prompt tokens, in any currency; null where nobody knows."""
    completion_price: float | None = Field(None, ge=0, json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Of a million completion tokens."""

    @property
    def prices(self) -> Prices:
        """Both prices."""
        return Prices(self.prompt_price, self.completion_price)

    def check(self) -> None:
        """Raise ConfigError when the key of the endpoint is not set."""
        read_key(self, f"judge {self.name}")

    def serve(self, output: str) -> AbstractContextManager[EndpointConfig]:
        """The endpoint, which is there already."""
        return nullcontext(self)


class LocalJudge(Config):
    """A language model that vLLM runs on the cluster while it is asked, and no longer."""

    type: Literal["local"] = "local"
    name: str = Field(pattern=NAME)
    """What results and files call it."""
    model: str = Field(json_schema_extra=INPUT)  # type: ignore[arg-type]
    """Hub id, or folder that every node sees, of a model with a chat template."""
    engine: EngineConfig = EngineConfig()
    """How vLLM runs it; a replica takes `tensor_parallel_size` GPUs, or CPUs where vLLM is built for CPUs."""
    num_replicas: int = Field(1, ge=1, json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Copies of the model."""
    max_in_flight: int = Field(128, ge=1, json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Requests at the same time, to all copies together."""

    @property
    def prices(self) -> Prices:
        """It costs what the cluster costs."""
        return Prices(None, None)

    def check(self) -> None:
        """Raise CheckpointError when there is no model, and ConfigError when no vLLM is installed."""
        check_model(self.model)
        check_build(0 if is_cpu_build() else self.engine.tensor_parallel_size)

    def serve(self, output: str) -> AbstractContextManager[EndpointConfig]:
        """Bring it up; a run into the same `output` replaces what a killed one left standing."""
        return _serving(self, f"judge-{self.name}-{files.digest(output)}")


Judge = Annotated[OutsideJudge | LocalJudge, Field(discriminator="type")]
"""The config of any judge, told apart by `type`."""


@contextmanager
def _serving(judge: LocalJudge, application: str) -> Iterator[EndpointConfig]:
    """An application of Ray Serve while the block runs, on the Serve that is there or on one of its own.

    Raises ResourceError when the cluster can never hold it, and CheckpointError when vLLM cannot load the model.
    """
    is_cpu, num = is_cpu_build(), judge.engine.tensor_parallel_size
    cluster.require(judge.num_replicas, num if is_cpu else 1, 0 if is_cpu else num, f"Judge '{judge.name}'")
    from ray import serve
    from ray.serve.llm import build_openai_app

    was_there = bool(serve.status().proxies)
    if not was_there:
        options = {"host": "127.0.0.1", "port": _free_port()}
        serve.start(http_options=options, logging_config={"enable_access_log": False})
    try:
        log.info("bringing up judge %s with vLLM", judge.name)
        try:
            serve.run(build_openai_app(_arguments(judge, is_cpu)), name=application, route_prefix=f"/{application}")
        except RuntimeError as error:
            reason = _reason(application, error)
            raise CheckpointError(f"vLLM cannot serve judge '{judge.name}' from '{judge.model}': {reason}.") from error
        url = f"{_root_url()}/{application}/v1"
        yield EndpointConfig(url=url, model=judge.name, max_in_flight=judge.max_in_flight)
    finally:
        serve.delete(application)
        # Others may have come to a Serve that this run has started.
        if not was_there and not serve.status().applications:
            serve.shutdown()


def _arguments(judge: LocalJudge, is_cpu: bool) -> dict[str, Any]:
    """What `ray.serve.llm` builds the application from."""
    engine = judge.engine
    settings: dict[str, Any] = {
        "tensor_parallel_size": engine.tensor_parallel_size,
        "max_model_len": engine.max_model_len,
        "dtype": engine.dtype,
        "quantization": engine.quantization,
        "trust_remote_code": engine.trust_remote_code,
        # No blanks between the words of a constrained verdict, of which a weak model may never stop.
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
    }
    model: dict[str, Any] = {"model_loading_config": {"model_id": judge.name, "model_source": judge.model}}
    scaling = {"min_replicas": judge.num_replicas, "max_replicas": judge.num_replicas}
    model["deployment_config"] = {"autoscaling_config": scaling}
    arguments: dict[str, Any] = {"llm_configs": [model]}
    if is_cpu:
        settings |= {"dtype": "float32" if engine.dtype == "auto" else engine.dtype, "enforce_eager": True}
        # A prompt that is computed in pieces can kill the engine on a CPU.
        settings["enable_chunked_prefill"] = False
        if engine.max_model_len is not None:
            settings["max_num_batched_tokens"] = max(8192, engine.max_model_len)
        model["accelerator_config"] = {"kind": "cpu"}
        settings |= {"kv_cache_memory_bytes": int((engine.kv_cache_gib or 1) * GIB), "block_size": CPU_BLOCK}
        # The engine reserves CPUs of its own; where there are two, nothing is left for what stands before it.
        model["deployment_config"]["ray_actor_options"] = {"num_cpus": 0}
        arguments["ingress_deployment_config"] = {"ray_actor_options": {"num_cpus": 0}}
    else:
        settings["gpu_memory_utilization"] = engine.gpu_memory_utilization
        settings["kv_cache_memory_bytes"] = int(engine.kv_cache_gib * GIB) if engine.kv_cache_gib else None
    model["engine_kwargs"] = {name: value for name, value in settings.items() if value is not None}
    return arguments


def _reason(application: str, error: RuntimeError) -> str:
    """The error of a deployment that did not start, which Serve tells at the end of a trace; else `error` itself."""
    from ray import serve

    there = serve.status().applications.get(application)
    texts = [deployment.message for deployment in there.deployments.values()] if there else []
    told = [
        line for text in texts for line in re.findall(r"^[\w.]*(?:Error|Exception): .+|^ *Value error, .+", text, re.M)
    ]
    return str(told[-1] if told else str(error).splitlines()[0]).strip().rstrip(".")


def _root_url() -> str:
    from ray.serve.context import _get_global_client

    return str(_get_global_client().root_url).rstrip("/")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
