"""Completions of the policy that learns, drawn by actors that take its weights from Ray's object store."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from rayrm.config import NOT_IDENTITY, Config, Workers, find_told
from rayrm.errors import ConfigError, RayRMError
from rayrm.models.vllm import DecodingConfig, Drawn, Engine, EngineConfig, check_build, max_positions

if TYPE_CHECKING:
    import torch

log = logging.getLogger("rayrm")
MAX_CHUNK = 64
"""Most prompts that an actor gets at once where there are several actors."""
MIN_CHUNK = 8
"""Fewest of them, as far as there are as many: an engine is slow with one prompt at a time."""
CHUNKS_PER_WORKER = 2
"""Pieces of work for each actor, so that a quick one helps a slow one."""


class RolloutConfig(Config):
    """What draws the policy's completions, and where."""

    engine: Literal["vllm", "transformers"] = "vllm"
    """What draws: vllm for decoder-only policies, transformers for encoder-decoders too."""
    settings: EngineConfig = EngineConfig()
    """How the engine holds and runs the policy; with transformers, `kv_cache_gib` bounds its batches."""
    workers: Workers = Field(default_factory=Workers, json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Actors that draw, one engine in each; `max_workers` stays null."""
    max_failures: int = Field(3, ge=0, json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """How many actors may die before a whole draw succeeds, after which they are counted anew; a scorer's likewise,
    before it gives an answer."""

    @model_validator(mode="after")
    def _fits(self) -> RolloutConfig:
        ranks, num_gpus = self.settings.tensor_parallel_size, self.workers.num_gpus
        if self.workers.max_workers is not None:
            raise ValueError("max_workers is set, and rollouts have a fixed number of workers; set num_workers alone")
        if self.engine == "transformers" and (ranks > 1 or self.settings.quantization is not None):
            raise ValueError("tensor_parallel_size and quantization are vLLM's; leave them out with transformers")
        if ranks > 1 and num_gpus != ranks:
            raise ValueError(
                f"tensor_parallel_size is {ranks} and num_gpus {num_gpus:g}; an engine needs a GPU for each rank"
            )
        return self


class Request(NamedTuple):
    """A prompt that asks for completions."""

    id: str
    """Names the prompt to who asked; draws do not hang on it."""
    prompt_ids: list[int]
    """Tokens that the policy continues, or that its encoder reads."""
    seed: int
    """Seed of this prompt's draws."""


Chunk = tuple[list[Request], list[list[Drawn]], int]
"""Requests, the completions of each, and the version of the weights that drew them, as the engine knows it."""


class Weights(NamedTuple):
    """Weights that were pushed: where they lie in the object store, and their version."""

    reference: Any = None
    """None for those of the model's own files."""
    version: int = 0
    number: int = 0
    """How many weights were pushed before and with these."""


class RolloutPool:
    """Actors that draw completions of a policy, and are started again when they die.

    `model` is a folder or hub id, and `max_model_len` what a prompt with its completion has at the most, for engines
    whose settings leave that open. Completions end at the tokens `ends`, and at those that the model's files name.
    Nothing is started before the first draw. An actor that is being started gets work once it is there, and the
    others go on meanwhile. Draws hang on a request's seed and on the weights alone, so a chunk that died with its
    actor comes out the same when another one draws it. The actors end with the process that made them. Raises
    ConfigError for `stop` texts, which do not end these completions.
    """

    def __init__(
        self,
        model: str,
        config: RolloutConfig,
        decoding: DecodingConfig,
        max_model_len: int | None = None,
        ends: Sequence[int] = (),
    ) -> None:
        if decoding.stop:
            raise ConfigError(
                f"stop is {decoding.stop}, and completions that are learned from end at end tokens alone."
            )
        if config.settings.max_model_len is None:
            settings = config.settings.model_copy(update={"max_model_len": max_model_len})
            config = config.model_copy(update={"settings": settings})
        self.model, self.config, self.decoding, self.ends = model, config, decoding, list(ends)
        self.num_failures = 0
        """Deaths since the last whole draw."""
        self._weights = Weights()
        self._actors: dict[Any, int] = {}
        """The number of the weights that each was sent last."""
        self._starting: dict[Any, Any] = {}
        """Actors that are not there yet, by what Ray answers with once they are."""
        self._is_closed = False

    def push(self, state: Mapping[str, torch.Tensor], version: int) -> None:
        """Hand over all weights of the policy, by the names of its Hugging Face files; tied ones may be absent.

        They are copied once, into Ray's object store. Every actor takes them before its part of the next `draw`; a
        `draw` that is under way keeps those it began with.
        """
        import ray

        reference = ray.put({name: _pack(tensor) for name, tensor in state.items()})
        self._weights = Weights(reference, version, self._weights.number + 1)

    def draw(self, requests: Sequence[Request]) -> Iterator[Chunk]:
        """Completions of all requests, in chunks as they are done, drawn with the weights that were pushed last.

        One draw at a time; it may run in another thread than `push`. Raises what an engine raises as it is, and
        RayRMError when more than `max_failures` actors have died since the last whole draw.
        """
        return self._draw(list(requests), self._weights)

    def close(self) -> None:
        """End all actors; a draw that is under way ends with an error of Ray's."""
        import ray

        self._is_closed = True
        for actor in list(self._actors):
            ray.kill(actor)

    def _draw(self, requests: list[Request], weights: Weights) -> Iterator[Chunk]:
        import ray

        if not self._actors:
            self._start_all()
        chunks = split_requests(requests, len(self._actors))[::-1]
        late = set(self._starting.values())
        free = [actor for actor in self._actors if actor not in late]
        running: dict[Any, tuple[Any, list[Request]]] = {}
        while chunks or running:
            while chunks and free:
                actor, chunk = free.pop(0), chunks.pop()
                running[self._ask(actor, chunk, weights)] = actor, chunk
            (done,), _ = ray.wait([*self._starting, *running])
            answer = self._result(done)
            actor, chunk = running.pop(done) if done in running else (self._starting.pop(done), [])
            if answer is None:
                self._replace(actor)
                chunks += [chunk] if chunk else []
                continue
            free.append(actor)
            if chunk:
                version, drawn = answer
                if version != weights.version:
                    raise RayRMError(
                        f"A rollout actor drew with the weights of step {version}, where those of step "
                        f"{weights.version} were pushed."
                    )
                yield chunk, drawn, version
        self.num_failures = 0

    def _ask(self, actor: Any, chunk: list[Request], weights: Weights) -> Any:
        # An actor that holds these weights already is sent none.
        is_new = self._actors[actor] != weights.number
        self._actors[actor] = weights.number
        return actor.draw.remote(chunk, self.decoding, weights.version, weights.reference if is_new else None)

    def _result(self, reference: Any) -> Any:
        """What an actor answers; None where it died."""
        import ray
        from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, RayError

        try:
            return ray.get(reference)
        except RayError as error:
            told = find_told(error)
            if told is not None:
                raise told from None
            if self._is_closed or not isinstance(error, RayActorError | ObjectLostError | OutOfMemoryError):
                raise
            self.num_failures += 1
            reason = str(error).strip().splitlines()[0].rstrip(".")
            if self.num_failures > self.config.max_failures:
                raise RayRMError(
                    f"{self.num_failures} rollout actors died since the last whole draw, and max_failures is "
                    f"{self.config.max_failures}; the last one with: {reason}."
                ) from error
            log.warning("A rollout actor died and is started again: %s.", reason)
            return None

    def _start_all(self) -> None:
        for _ in range(self.config.workers.num_workers):
            self._start()

    def _start(self) -> None:
        import ray

        workers = self.config.workers
        # Not inside the placement group that a training worker lives in, whose resources are all taken.
        actor_class: Any = ray.remote(
            num_cpus=workers.num_cpus, num_gpus=workers.num_gpus, scheduling_strategy="DEFAULT"
        )(RolloutActor)
        actor = actor_class.remote(self.model, self.config, self.ends)
        self._actors[actor] = 0
        self._starting[actor.__ray_ready__.remote()] = actor
        # Closed by another thread meanwhile.
        if self._is_closed:
            ray.kill(actor)

    def _replace(self, dead: Any) -> None:
        import ray

        # It may be out of reach only, and must not hold its resources then.
        ray.kill(dead)
        del self._actors[dead]
        self._start()


class RolloutActor:
    """One engine with the policy, whose completions end at `ends` too. Raises CheckpointError when the policy does not
    load, and ConfigError when the vLLM of this node is of another kind than the config asks for."""

    def __init__(self, model: str, config: RolloutConfig, ends: list[int]) -> None:
        self.version = 0
        num_threads = max(1, int(config.workers.num_cpus))
        if config.engine == "vllm":
            from rayrm.models.folders import local_model

            check_build(config.workers.num_gpus)
            self.engine: Any = Engine(local_model(model), config.settings, num_threads, with_logprobs=True)
        else:
            from rayrm.models.generating import TransformersEngine

            self.engine = TransformersEngine(model, config.settings, num_threads)
        self.engine.ends = sorted({*self.engine.ends, *ends})

    def draw(
        self, requests: list[Request], decoding: DecodingConfig, version: int, state: dict[str, Any] | None
    ) -> tuple[int, list[list[Drawn]]]:
        """The version of the weights that are held, and the completions of each request by them.

        Where there is a `state`, of `version`, its weights are taken first.
        """
        if state is not None:
            self.engine.load_weights({name: _unpack(*packed) for name, packed in state.items()})
            self.version = version
        prompts, seeds = [request.prompt_ids for request in requests], [request.seed for request in requests]
        return self.version, self.engine.draw(prompts, seeds, decoding)


def split_requests(requests: list[Request], num_workers: int) -> list[list[Request]]:
    """Chunks of requests in their order: all in one for a single actor, else a few of like size for each actor."""
    size = len(requests)
    if num_workers > 1:
        wanted = -(-size // (num_workers * CHUNKS_PER_WORKER))
        size = min(MAX_CHUNK, max(MIN_CHUNK, wanted))
    return [requests[start : start + size] for start in range(0, len(requests), size or 1)]


def tokens_needed(config: Any, max_length: int) -> int | None:
    """The `max_model_len` with which a sampler of the model with this `config` holds `max_length` tokens and no more.

    None for an encoder-decoder, whose prompts and completions do not share a limit.
    """
    if config.is_encoder_decoder:
        return None
    return min(max_length, max_positions(config) or max_length)


def _pack(tensor: torch.Tensor) -> tuple[Any, torch.dtype, torch.Size]:
    """A tensor as bytes that Ray shares without a copy; numpy has no bf16."""
    import torch

    plain = tensor.detach().cpu().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy(), tensor.dtype, tensor.shape


def _unpack(data: Any, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
    import torch

    with warnings.catch_warnings():
        # The object store's memory is read-only, and is only read.
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(data).view(dtype).reshape(shape)
