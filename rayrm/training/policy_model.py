"""The model and tokenizer of a policy: loaded for training, saved when trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from rayrm.models.folders import local_model
from rayrm.models.rendering import Renderer
from rayrm.training.checkpoints import export_model, gather_state

if TYPE_CHECKING:
    from rayrm.training.policy import PolicyTraining


def load_tokenizer(training: PolicyTraining, template: str | None) -> Any:
    """The model's tokenizer with the tokens and the chat template that it is saved with."""
    tokenizer = AutoTokenizer.from_pretrained(local_model(training.model))
    new = [token for token in training.new_tokens if token not in tokenizer.get_vocab()]
    if new:
        tokenizer.add_special_tokens({"extra_special_tokens": new}, replace_extra_special_tokens=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = template
    return tokenizer


def load_policy(training: PolicyTraining, tokenizer: Any, bf16: bool, load_in_8bit: bool = False) -> Any:
    """The model to train, with room for the tokenizer's tokens and with LoRA updates where they are asked for."""
    set_seed(training.seed)
    quantized: dict[str, Any] = {}
    if load_in_8bit:
        quantized["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
        quantized["device_map"] = {"": torch.cuda.current_device()}
    model = AutoModelForCausalLM.from_pretrained(
        local_model(training.model),
        dtype=torch.bfloat16 if bf16 else torch.float32,
        attn_implementation=training.attn_implementation,
        **quantized,
    )
    if len(tokenizer) > model.config.get_text_config().vocab_size:
        model.resize_token_embeddings(len(tokenizer))
    if training.lora is None:
        return model
    # A token that nothing was trained on needs embeddings of its own.
    own = _embeddings(model) if training.new_tokens else None
    return training.lora.add_to(model, task_type="CAUSAL_LM", modules_to_save=own, ensure_weight_tying=True)


def export_policy(training: PolicyTraining, trainer: Any, renderer: Renderer, output: str) -> None:
    """Gather, save and verify the trained policy as `<output>/model`; LoRA updates are merged. All ranks call it."""
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    model, tokenizer = trainer.model, renderer.tokenizer
    state = gather_state(model, (lambda name: name in trained) if training.lora else (lambda name: True))
    if dist.get_rank() != 0:
        return
    if training.lora is not None:
        # From here on rank 0 is alone, and what it loads must be whole.
        unset_hf_deepspeed_config()
        model = load_policy(training, tokenizer, trainer.args.bf16)
        model.load_state_dict(state, strict=False)
        model = model.merge_and_unload()
        state = model.state_dict()
    model.config.use_cache = True
    model.generation_config.eos_token_id = end_ids(renderer)
    model.generation_config.pad_token_id = tokenizer.pad_token_id

    def write(folder: Path) -> None:
        model.save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)

    export_model(output, write, AutoModelForCausalLM)


def end_ids(renderer: Renderer) -> list[int]:
    """Tokens at which generation ends: the one that ends the assistant's turn, where it is no plain text, and EOS."""
    tokenizer, word = renderer.tokenizer, "Answer"
    ends = []
    if renderer.template is not None:
        text = renderer.turn_text([{"role": "user", "content": "Question"}, {"role": "assistant", "content": word}])
        _, found, behind = text.rpartition(word)
        own = set(tokenizer.added_tokens_decoder) - {tokenizer.bos_token_id, tokenizer.unk_token_id}
        ids = tokenizer(behind, add_special_tokens=False)["input_ids"] if found else []
        ends = [token for token in ids if token in own][:1]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends.append(tokenizer.eos_token_id)
    return ends


def _embeddings(model: Any) -> list[str]:
    """Module names of the input embeddings, and of the output embeddings where they have a matrix of their own."""
    modules = [model.get_input_embeddings()]
    if not model.config.get_text_config().tie_word_embeddings:
        modules.append(model.get_output_embeddings())
    return [name.rsplit(".", 1)[-1] for name, module in model.named_modules() if any(module is m for m in modules)]
