"""How the files of a network are loaded: its precision, its kernels, its own code, and what must not be missing."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from rayrm.errors import CheckpointError, ConfigError
from rayrm.models.folders import load_tokenizer, local_folder, local_model
from rayrm.models.own_code import find_own_model

log = logging.getLogger("rayrm")
HEAD = "score"
"""Name of the head in the decoders of transformers; its only tensor is `score.weight` [outputs, hidden size]."""
PAD_TOKENS = (
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_0|>",
    "<|fim_pad|>",
    "<|vision_pad|>",
    "<pad>",
    "[PAD]",
    "<unk>",
)
"""Tokens that serve as padding, best first, where a tokenizer has no pad token of its own."""


class Loading(NamedTuple):
    """How a network is loaded."""

    dtype: torch.dtype = torch.float32
    """Number format of the weights, the head's left out."""
    attn_implementation: str | None = None
    """Attention kernel of transformers; null for its own choice."""
    load_in_4bit: bool = False
    """Whether bitsandbytes holds all linear layers but the head in NF4."""
    load_in_8bit: bool = False
    """Whether bitsandbytes holds all linear layers but the head in 8-bit integers."""
    trust_remote_code: bool = False
    """Whether Python files that come with the checkpoint may run."""

    def settings(self) -> dict[str, Any]:
        """Arguments of `from_pretrained`. Raises ConfigError for 4 and 8 bit at once."""
        settings: dict[str, Any] = {
            "dtype": self.dtype,
            "attn_implementation": self.attn_implementation,
            "trust_remote_code": self.trust_remote_code,
        }
        if self.load_in_4bit and self.load_in_8bit:
            raise ConfigError("load_in_4bit and load_in_8bit are both true; set one of them.")
        if self.load_in_4bit or self.load_in_8bit:
            settings["quantization_config"] = self._quantization()
            if torch.cuda.is_available():
                settings["device_map"] = {"": torch.cuda.current_device()}
        return settings

    def _quantization(self) -> Any:
        from transformers import BitsAndBytesConfig

        if self.load_in_8bit:
            return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=[HEAD, "lm_head"])
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=self.dtype,
            llm_int8_skip_modules=[HEAD, "lm_head"],
        )


def load_network(
    path: str,
    model_class: Any,
    settings: dict[str, Any],
    prepare: Callable[[Any], None] = lambda config: None,
) -> tuple[Any, dict[str, Any]]:
    """The network at `path` without dropout, and transformers' account of what was missing or left over.

    `prepare` changes the config before. Raises CheckpointError when nothing loads.
    """
    from transformers import AutoConfig
    from transformers.utils import logging

    # What they would print is found and said by `check_loaded`.
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        folder = local_folder(path)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=settings["trust_remote_code"])
        prepare(config)
        _turn_off_dropout(config)
        network, loaded = model_class.from_pretrained(folder, config=config, output_loading_info=True, **settings)
        for module in network.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                # Without a gradient, bitsandbytes would round the scales of a CPU's weights to bf16 for good.
                module.support_avx512bf16_for_cpu = False
    except CheckpointError:
        raise
    except Exception as error:
        raise _not_loading(path, error) from error
    return network, loaded


def _turn_off_dropout(config: Any) -> None:
    for name, value in vars(config).items():
        if isinstance(value, float) and ("dropout" in name or name.endswith("_pdrop")):
            setattr(config, name, 0.0)


def _not_loading(path: str, error: Exception) -> CheckpointError:
    reason = (str(error).strip() or repr(error)).splitlines()[0].rstrip(".")
    return CheckpointError(f"'{path}' does not load as a reward model: {reason}.")


def check_loaded(path: str, loaded: dict[str, Any], may_lack_head: bool) -> None:
    """Raise CheckpointError where weights are missing, left over or of another shape, and where there is no head,
    unless it `may_lack_head`."""
    missing = sorted(str(name) for name in loaded["missing_keys"])
    foreign = sorted(str(name) for name in loaded["unexpected_keys"] if "lm_head" not in str(name))
    if missing == [f"{HEAD}.weight"]:
        if may_lack_head and not foreign:
            return
        named = f" (it holds {', '.join(foreign[:3])}, which is none)" if foreign else ""
        raise CheckpointError(f"The checkpoint at '{path}' has no reward head '{HEAD}.weight'{named}; {_advice(path)}.")
    faults = [f"lacks {', '.join(missing[:3])}"] if missing else []
    faults += [f"holds {', '.join(foreign[:3])}"] if foreign else []
    faults += [f"has other shapes in {loaded['mismatched_keys']}"] if loaded["mismatched_keys"] else []
    if faults:
        raise CheckpointError(f"The weights at '{path}' are not those of its config: the file {'; '.join(faults)}.")


def _advice(path: str) -> str:
    if find_own_model(path) is not None:
        return "it has code of its own, which trust_remote_code=true runs, if you trust it"
    return "train a reward model first"


def outline_network(path: str, is_language_model: bool) -> Any:
    """The network at `path` without its weights, on no device. Raises CheckpointError when transformers knows none."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    model_class: Any = AutoModelForCausalLM if is_language_model else AutoModelForSequenceClassification
    try:
        config = AutoConfig.from_pretrained(local_model(path), trust_remote_code=False)
        with torch.device("meta"):
            return model_class.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise _not_loading(path, error) from error


def load_padding_tokenizer(path: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer at `path`, padding on the right, with a token that never ends a conversation where it has one.

    With the end token as padding, which is the last choice, rewards are still read by the attention mask; `pad_id_of`
    keeps that token out of the model's config. Raises CheckpointError when nothing loads.
    """
    tokenizer = load_tokenizer(path, trust_remote_code)
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        known = tokenizer.get_vocab()
        choices = [t for t in (*PAD_TOKENS, tokenizer.unk_token, tokenizer.bos_token) if t in known]
        choices = [token for token in choices if known[token] != tokenizer.eos_token_id]
        tokenizer.pad_token = choices[0] if choices else tokenizer.eos_token
    return tokenizer


def pad_id_of(tokenizer: Any) -> int | None:
    """The pad id for the config of a model that others will load; None where padding is the token that ends a turn.

    Plain transformers looks for the last token that is no padding. Without a pad id it refuses batches; with the end
    token's it would read rewards one token early.
    """
    if tokenizer.pad_token_id != tokenizer.eos_token_id:
        return int(tokenizer.pad_token_id)
    log.warning(
        "The tokenizer has no token for padding but '%s', which ends a turn: the saved model names no pad token, and "
        "plain transformers will take one row at a time; give the tokenizer a pad_token for batches.",
        tokenizer.eos_token,
    )
    return None
