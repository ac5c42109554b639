"""Make a small causal language model from nothing: a Llama-style network and a byte-level tokenizer of its own."""

from __future__ import annotations

from collections.abc import Iterable
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from rayrm import files
from rayrm.config import Config
from rayrm.errors import ConfigError
from rayrm.models.rendering import NO_TEMPLATE, load_template

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"


class CreationConfig(Config):
    """Sizes of a model that starts from random weights. The defaults give about 5 million parameters."""

    vocab_size: int = Field(8192, ge=300)
    """Most entries of the tokenizer, its 256 bytes and special tokens included; little text may give fewer."""
    hidden_size: int = Field(256, ge=32)
    """Width of the residual stream."""
    intermediate_size: int = Field(688, ge=32)
    """Width of the feed-forward layers."""
    num_layers: int = Field(4, ge=1)
    """Transformer layers."""
    num_heads: int = Field(4, ge=1)
    """Attention heads; vLLM on a CPU wants hidden_size / num_heads to be 32, 64, 80, 96, 112, 128 or more."""
    num_key_value_heads: int | None = Field(None, ge=1)
    """Heads that keys and values have; null for as many as `num_heads`."""
    max_length: int = Field(1024, ge=16)
    """Longest sequence in tokens."""
    tie_embeddings: bool = True
    """Use one matrix for the input and the output embeddings."""
    chat_template: Literal["chatml", "none"] = "chatml"
    """Template saved with the tokenizer: chatml ends a turn with `<|im_end|>` and has no BOS; none has a BOS."""
    seed: int = 0
    """Seed of the weights."""

    @model_validator(mode="after")
    def _divides(self) -> CreationConfig:
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(f"hidden_size {self.hidden_size} is no even multiple of num_heads {self.num_heads}")
        if self.num_heads % (self.num_key_value_heads or self.num_heads):
            raise ValueError(f"num_heads {self.num_heads} is no multiple of num_key_value_heads")
        return self


def create_model(texts: Iterable[str], config: CreationConfig, path: str) -> dict[str, int]:
    """Train a tokenizer on `texts`, draw a model's weights, and save both to the folder `path`.

    Plain transformers and vLLM load it. Returns the facts `num_parameters` and `vocab_size`. Raises
    ConfigError when there is no text.
    """
    tokenizer = train_tokenizer(texts, config)
    model = build_model(tokenizer, config)
    fs, inner = files.filesystem(path)
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
        fs.makedirs(inner, exist_ok=True)
        fs.put(f"{folder}/", f"{inner}/", recursive=True)
    return {"num_parameters": model.num_parameters(), "vocab_size": len(tokenizer)}


def train_tokenizer(texts: Iterable[str], config: CreationConfig) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text goes in and comes out again. Raises ConfigError when there is no text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    kept = [text for text in texts if text]
    if not kept:
        raise ConfigError("There is no text to train a tokenizer on; give rows with a source, reference or prompt.")
    is_chat = config.chat_template != NO_TEMPLATE
    special = [PAD, BOS, EOS, *([TURN_START, TURN_END] if is_chat else [])]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(kept, trainer)
    if not is_chat:
        bos = (BOS, tokenizer.token_to_id(BOS))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[bos]
        )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=TURN_END if is_chat else EOS,
        model_max_length=config.max_length,
        padding_side="right",
    )
    wrapped.chat_template = load_template(config.chat_template, wrapped, "this package")
    return wrapped


def build_model(tokenizer: Any, config: CreationConfig) -> LlamaForCausalLM:
    """A Llama of the config's sizes with weights drawn from its seed; its end token is the tokenizer's."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    llama = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_key_value_heads or config.num_heads,
        max_position_embeddings=config.max_length,
        tie_word_embeddings=config.tie_embeddings,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return LlamaForCausalLM(llama)
