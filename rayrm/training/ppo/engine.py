"""What a run with rewards starts from and ends with: the engine around its policy, its prompts, its saved model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from json import JSONDecodeError
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jinja2 import TemplateError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, set_seed

from rayrm.errors import SchemaError
from rayrm.models.completing import check_first_token
from rayrm.models.folders import load_tokenizer, local_model
from rayrm.models.generating import named_ends
from rayrm.models.packing import make_packable
from rayrm.models.rendering import Renderer
from rayrm.models.vllm import max_positions
from rayrm.rows import Prompt
from rayrm.scoring import READS
from rayrm.scoring.custom import CustomClass, CustomScoring
from rayrm.seeds import seed_of
from rayrm.shards import iter_tables
from rayrm.splits import is_held_out
from rayrm.training.checkpoints import export_model
from rayrm.training.launch import deepspeed_config, start_deepspeed
from rayrm.training.policy_model import end_ids
from rayrm.training.ppo.collecting import PromptRow
from rayrm.training.ppo.network import ActorCritic
from rayrm.training.ppo.settings import PPO, RewardedJob, RewardedTraining
from rayrm.training.ppo.weights import sampler_state

OWN_LR = "own_lr"
"""Marks the optimizer's groups that do not follow the schedule."""


def make_engine(job: RewardedJob, template: str | None, micro_batch_size: int) -> tuple[Any, Renderer]:
    """DeepSpeed's engine around an `ActorCritic` of `job.training.model`, and the policy's renderer."""
    import deepspeed
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    training, parallelism = job.training, job.parallelism
    bf16 = parallelism.uses_bf16(job.workers.num_gpus)
    settings = deepspeed_config(parallelism, micro_batch_size, 1, bf16, training.max_grad_norm)
    # The last forward pass of an update is the one before `step()`, so updates may have different numbers of them.
    settings["managed_gradient_accumulation"] = False
    if not settings["zero_optimization"]["stage"]:
        settings["gradient_clipping"] = 0.0
    if parallelism.zero_stage == 3:
        # A parameter that stays whole would not follow when other weights stand in for it.
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    start_deepspeed(use_gpu=job.workers.num_gpus > 0)
    tokenizer = load_tokenizer(training.model)
    tokenizer.chat_template = template
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # While this object lives, transformers loads weights in ZeRO-3's parts.
    partitioned = HfDeepSpeedConfig(settings) if parallelism.zero_stage == 3 else None
    set_seed(training.seed)
    policy = load_network(training, torch.bfloat16 if bf16 else torch.float32, has_dropout=False)
    if partitioned is not None:
        unset_hf_deepspeed_config()
    if training.shared_prefix:
        make_packable(policy)
    if training.lora is not None:
        kind = "SEQ_2_SEQ_LM" if policy.config.is_encoder_decoder else "CAUSAL_LM"
        policy = training.lora.add_to(policy, task_type=kind)
    if parallelism.gradient_checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
        policy.enable_input_require_grads()
    network = ActorCritic(policy, training.sampling.temperature, isinstance(training, PPO))
    optimizer = training.optimizer(policy)
    if isinstance(training, PPO):
        assert network.value_head is not None
        head = {"params": list(network.value_head.parameters()), "lr": training.value_lr, "weight_decay": 0.0}
        optimizer.add_param_group({**head, OWN_LR: True})
    engine, *_ = deepspeed.initialize(model=network, optimizer=optimizer, config=settings)
    if not settings["zero_optimization"]["stage"]:
        clip_gradients(engine, training.max_grad_norm)
    return engine, Renderer(tokenizer, template)


def clip_gradients(engine: Any, max_norm: float) -> None:
    """Clip at ZeRO stage 0 as DeepSpeed's other stages do: tell the norm, and leave out a step that is not finite."""
    parameters = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]

    def clip(optimizer: Any, args: Any, kwargs: Any) -> None:
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, max_norm))
        # Where the engine looks for it.
        optimizer._global_grad_norm = norm
        if not math.isfinite(norm):
            optimizer.zero_grad()

    engine.optimizer.register_step_pre_hook(clip)


def load_network(training: RewardedTraining, dtype: torch.dtype, has_dropout: bool = True) -> Any:
    """The language model of `training.model`, decoder-only or encoder-decoder.

    Without dropout, every look at a completion sees the same policy. Raises ConfigError for a model that is told its
    first token (`forced_bos_token_id`), which nobody draws.
    """
    path = local_model(training.model)
    config = AutoConfig.from_pretrained(path)
    own = config.get_text_config(decoder=True) if not config.is_encoder_decoder else config
    for name, value in [] if has_dropout else list(own.to_dict().items()):
        if "drop" in name and isinstance(value, float):
            setattr(own, name, 0.0)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = kind.from_pretrained(path, config=config, dtype=dtype, attn_implementation=training.attn_implementation)
    check_first_token(model, training.model)
    return model


def read_prompts(job: RewardedJob, renderer: Renderer) -> tuple[list[PromptRow], list[PromptRow], dict[str, Any]]:
    """The rows to train on, those held out (at most `eval_rows`), and how many there are and were dropped by reason.

    Dropped is what `encode_prompt` refuses, and as `overlength` a prompt that leaves no room for `max_tokens` within
    `max_length` and what the sampler holds; an encoder has all of that for the prompt. Raises SchemaError when none is
    left, or two rows have the same id and language.
    """
    training = job.training
    seen: set[tuple[str, str]] = set()
    model = AutoConfig.from_pretrained(local_model(training.model))
    is_encoder, max_tokens = model.is_encoder_decoder, training.sampling.max_tokens
    room = training.max_length - (0 if is_encoder else max_tokens)
    if held := training.rollouts.settings.max_model_len or max_positions(model):
        room = min(room, held - (1 if is_encoder else max_tokens))
    read = {*READS, "id", "tools"}
    for config in training.scorers:
        if isinstance(config, CustomScoring):
            read |= set(CustomClass(config.scorer).needs)
    found: dict[bool, list[PromptRow]] = {False: [], True: []}
    dropped: dict[str, int] = {}
    for table in iter_tables(job.input, None):
        for values in Prompt.conform(table).to_pylist():
            ids = encode_prompt(values, renderer, is_encoder)
            if isinstance(ids, list) and len(ids) > room:
                ids = "overlength"
            if isinstance(ids, str):
                dropped[ids] = dropped.get(ids, 0) + 1
                continue
            key = (values["id"], values["lang"])
            if key in seen:
                raise SchemaError(f"'{job.input}' has two rows with the id '{key[0]}' and the language '{key[1]}'.")
            seen.add(key)
            kept = {name: value for name, value in values.items() if name in read}
            is_out = is_held_out(values["group"], training.held_out_fraction, training.seed)
            found[is_out].append(PromptRow(kept, ids))
    for is_out in (False, *([True] if training.held_out_fraction else [])):
        if not found[is_out]:
            raise SchemaError(
                f"'{job.input}' has no prompt to {'evaluate' if is_out else 'train'} with; dropped were {dropped or 'none'}."
            )
    # Rows often stand in the order of their languages.
    found[True].sort(key=lambda row: seed_of(training.seed, row.values["id"], row.values["lang"]))
    counts = {"train": len(found[False]), "held_out": len(found[True]), "dropped": dropped}
    return found[False], found[True][: training.eval_rows], counts


def encode_prompt(values: Mapping[str, Any], renderer: Renderer, is_encoder: bool) -> list[int] | str:
    """The token ids of a Prompt row, which a policy continues or its encoder reads, or the reason why it is no use.

    Reasons: missing_field, empty_prompt (no text, or no token), tools_not_json, not_rendered.
    """
    if any(values[name] is None for name in Prompt.columns if name not in Prompt.nullable):
        return "missing_field"
    if any(turn is None or turn["role"] is None or turn["content"] is None for turn in values["prompt"]):
        return "missing_field"
    if not any(turn["content"].strip() for turn in values["prompt"]):
        return "empty_prompt"
    try:
        own = renderer.with_tools(values.get("tools"))
        ids = own.encoder_ids(values["prompt"]) if is_encoder else own.prompt_ids(values["prompt"])
    except JSONDecodeError:
        return "tools_not_json"
    except TemplateError:
        return "not_rendered"
    return ids or "empty_prompt"


def export_learned(policy: Any, training: RewardedTraining, renderer: Renderer, output: str) -> None:
    """Gather, save and verify the policy as `<output>/model`, LoRA's updates merged. All ranks call it."""
    state = sampler_state(policy)
    if dist.get_rank() != 0:
        return
    dtype = next(iter(state.values())).dtype
    model = load_network(training, dtype)
    model.load_state_dict(state, strict=True)
    # What the policy learned to end with.
    ends = {*named_ends(model, renderer.tokenizer), *end_ids(renderer)}
    model.generation_config.eos_token_id = sorted(ends)
    model.generation_config.pad_token_id = renderer.tokenizer.pad_token_id

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        renderer.tokenizer.save_pretrained(folder)

    export_model(output, write, type(model))
