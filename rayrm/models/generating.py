"""Sampling with transformers, for models that vLLM does not serve: token ids in, sampled completions out.

Chance is one number a token, drawn ahead from the prompt's own seed, so a completion does not hang on the prompts that
run beside it; only rounding does, as everywhere in batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rayrm.batching import token_batches
from rayrm.errors import CheckpointError, ConfigError
from rayrm.models.completing import (
    DecoderRows,
    EncoderDecoderRows,
    check_first_token,
    complete,
    decoder_start,
    uniform_numbers,
)
from rayrm.models.folders import load_tokenizer, local_folder
from rayrm.models.vllm import GIB, Completion, Drawn, check_room, max_positions

if TYPE_CHECKING:
    from rayrm.models.vllm import DecodingConfig, EngineConfig

NO_LIMIT = 1 << 20
"""Tokens that a model without a limit of positions may get."""
VOCABULARY_BYTES = 24
"""Bytes for each token of the vocabulary and row while one token is drawn: fp32 logits and their copies, fp64 sums."""


class TransformersEngine:
    """A decoder-only or encoder-decoder model, on a GPU where this process sees one or on `num_threads` cores.

    `model` is a local folder or a hub id. `kv_cache_gib` bounds a batch, with room for its longest completions. Raises
    CheckpointError when the model does not load, and ConfigError for settings that only vLLM has.
    """

    def __init__(self, model: str, config: EngineConfig, num_threads: int = 1) -> None:
        check_settings(config)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.device == "cpu":
            torch.set_num_threads(num_threads)
        self.network = _load(model, config, self.device)
        self.is_encoder_decoder: bool = self.network.config.is_encoder_decoder
        positions = max_positions(self.network.config) or NO_LIMIT
        self.max_model_len = config.max_model_len or positions
        """Most tokens of a prompt with its completion; of each of them for an encoder-decoder."""
        if self.max_model_len > positions:
            raise ConfigError(f"max_model_len is {self.max_model_len}, and '{model}' holds {positions}; lower it.")
        self.tokenizer = load_tokenizer(model, config.trust_remote_code)
        self.ends = named_ends(self.network, self.tokenizer)
        """Tokens that end a completion."""
        self._batch_bytes = _batch_bytes(config, self.device)

    def draw(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], config: DecodingConfig) -> list[list[Drawn]]:
        """`num_candidates` completions for each prompt as token ids with their log-probabilities.

        A prompt's completions depend on its own seed alone, not on the prompts that run beside it. `stop` texts do not
        end a completion. Raises ConfigError for a prompt without room.
        """
        check_room(prompts, self.max_model_len)
        found: dict[int, list[Drawn]] = {}
        costs = [config.num_candidates * self._row_bytes(len(ids) + config.max_tokens) for ids in prompts]
        for batch in token_batches(costs, self._batch_bytes):
            groups = self._draw_batch([prompts[i] for i in batch], [seeds[i] for i in batch], config)
            found |= dict(zip(batch, groups, strict=True))
        return [found[place] for place in range(len(prompts))]

    def generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], config: DecodingConfig
    ) -> list[list[Completion]]:
        """The texts of `draw`."""
        decode = partial(self.tokenizer.decode, skip_special_tokens=True)
        drawn = self.draw(prompts, seeds, config)
        return [[Completion(decode(item.ids), item.is_finished) for item in group] for group in drawn]

    def load_weights(self, state: Mapping[str, np.ndarray | torch.Tensor]) -> None:
        """Take all weights of the model from `state`, by the names of its Hugging Face files; tied ones may be absent.

        Raises CheckpointError where `state` has foreign names, other shapes or not all of the weights.
        """
        own = self.network.state_dict()
        foreign = sorted(set(state) - set(own))
        filled = {own[name].data_ptr() for name in state if name in own}
        missing = sorted(name for name, tensor in own.items() if tensor.data_ptr() not in filled)
        if foreign or missing:
            faults = [f"lack {', '.join(missing[:3])}"] if missing else []
            faults += [f"hold {', '.join(foreign[:3])}, which the model has not"] if foreign else []
            raise CheckpointError(f"The new weights are not those of the model: they {' and '.join(faults)}.")
        with torch.no_grad():
            for name, value in state.items():
                if tuple(own[name].shape) != tuple(value.shape):
                    shapes = f"{list(value.shape)}, and the model's has {list(own[name].shape)}"
                    raise CheckpointError(f"The new '{name}' has the shape {shapes}.")
                own[name].copy_(torch.as_tensor(value))

    def _row_bytes(self, num_tokens: int) -> int:
        config = self.network.config.get_text_config(decoder=True)
        heads = getattr(config, "num_attention_heads", 1)
        shared = (getattr(config, "num_key_value_heads", None) or heads) / heads
        token = 2 * config.num_hidden_layers * config.hidden_size * shared * self.network.dtype.itemsize
        return int(token * num_tokens + VOCABULARY_BYTES * config.vocab_size)

    @torch.inference_mode()
    def _draw_batch(self, prompts: list[Sequence[int]], seeds: list[int], config: DecodingConfig) -> list[list[Drawn]]:
        used = [0 if self.is_encoder_decoder else len(ids) for ids in prompts]
        bounds = [
            min(config.max_tokens, self.max_model_len - num) for num in used for _ in range(config.num_candidates)
        ]
        noise = np.concatenate([uniform_numbers(seed, config.num_candidates, config.max_tokens) for seed in seeds])
        rows: EncoderDecoderRows | DecoderRows
        if self.is_encoder_decoder:
            rows = EncoderDecoderRows(self.network, prompts, config.num_candidates)
        else:
            rows = DecoderRows(self.network, prompts, config.num_candidates, self.max_model_len)
        drawn = complete(rows, torch.from_numpy(noise).to(self.device), bounds, config, self.ends)
        num = config.num_candidates
        return [drawn[start : start + num] for start in range(0, len(drawn), num)]


def check_settings(config: EngineConfig) -> None:
    """Raise ConfigError for settings of an engine that act in vLLM alone."""
    if config.tensor_parallel_size > 1 or config.quantization is not None:
        raise ConfigError("tensor_parallel_size and quantization are vLLM's; leave them out where transformers draws.")


def _load(path: str, config: EngineConfig, device: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    dtype = config.dtype if config.dtype != "auto" or device == "cuda" else "float32"
    try:
        folder = local_folder(path)
        own = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
        model_class: Any = AutoModelForSeq2SeqLM if own.is_encoder_decoder else AutoModelForCausalLM
        network, loaded = model_class.from_pretrained(
            folder, dtype=dtype, trust_remote_code=config.trust_remote_code, output_loading_info=True
        )
    except CheckpointError:
        raise
    except Exception as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0].rstrip(".")
        raise CheckpointError(f"'{path}' does not load as a language model: {reason}.") from error
    faults = sorted(str(name) for kind in ("missing_keys", "mismatched_keys") for name in loaded[kind])
    if faults:
        raise CheckpointError(
            f"The weights at '{path}' are not whole: {', '.join(faults[:3])} are not as they should be."
        )
    if own.is_encoder_decoder:
        decoder_start(network)
    check_first_token(network, path)
    return network.to(device).eval()


def named_ends(network: Any, tokenizer: Any) -> list[int]:
    """Tokens that end a completion, as vLLM takes them: the tokenizer's, and those of the generation config."""
    ends = network.generation_config.eos_token_id
    found = [ends] if isinstance(ends, int) else list(ends or [])
    return sorted({*found, tokenizer.eos_token_id} - {None})


def _batch_bytes(config: EngineConfig, device: str) -> int:
    if config.kv_cache_gib is not None or device == "cpu":
        return int((config.kv_cache_gib or 1) * GIB)
    room = torch.cuda.mem_get_info()[1] * config.gpu_memory_utilization - torch.cuda.memory_allocated()
    # The other half is for a prompt's activations and for copies of a cache that grows.
    return int(room / 2)
