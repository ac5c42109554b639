"""Sample candidates for every prompt from a policy, by vLLM; from an encoder-decoder by transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
from pydantic import Field, model_validator

from rayrm.config import NOT_IDENTITY, TEMPLATE, Workers
from rayrm.errors import ConfigError
from rayrm.models.folders import check_model, is_encoder_decoder, load_tokenizer, local_model
from rayrm.models.rendering import Renderer, load_template
from rayrm.models.vllm import DecodingConfig, Engine, EngineConfig, check_build
from rayrm.prompts import anchored_prompt, direct_prompt
from rayrm.rows import TEXTS, on_kept, set_column
from rayrm.runs import INPUT
from rayrm.seeds import seed_of

if TYPE_CHECKING:
    from ray.data import Dataset

    from rayrm.models.generating import TransformersEngine

READS = ("id", "lang", "prompt", "source", "anchor", "src_lang", "tgt_lang")


class SamplingConfig(DecodingConfig):
    """Which policy answers which prompt, and how its answers are drawn."""

    model: str = Field(json_schema_extra=INPUT)  # type: ignore[arg-type]
    """Folder or hub id of a language model; vLLM runs those without an encoder, transformers those with one."""
    prompt: Literal["as_is", "direct", "anchored"] = "as_is"
    """What the policy reads: the row's prompt, or an instruction made of its source, without or with its English
    anchor. The row's own prompt stays as it is, so that what was sampled with an anchor can be learned without."""
    chat_template: str | None = Field(None, json_schema_extra=TEMPLATE)  # type: ignore[arg-type]
    """Name or path of a chat template, or none to continue plain text; null for the tokenizer's own."""
    seed: int = 0
    """Seed of all draws; a row's draws hang on its id and language alone."""
    engine: EngineConfig = EngineConfig()
    """How the model is held and run; with transformers, `kv_cache_gib` bounds its batches."""
    workers: Workers = Field(default_factory=Workers, json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Actors that sample, one engine in each."""

    @model_validator(mode="after")
    def _one_gpu_a_rank(self) -> SamplingConfig:
        ranks, num_gpus = self.engine.tensor_parallel_size, self.workers.num_gpus
        if ranks > 1 and num_gpus != ranks:
            raise ValueError(
                f"tensor_parallel_size is {ranks} and num_gpus {num_gpus:g}; an engine needs a GPU for each rank"
            )
        return self


def sample_candidates(prompts: Dataset, config: SamplingConfig) -> Dataset:
    """`num_candidates` candidates for each prompt, in the order of their seeds.

    Adds `candidates`, and `num_unfinished`: how many of them were cut at `max_tokens` or at the model's limit.
    Dropped and counted: a prompt that leaves no room for `min_tokens` (`overlength`), one without a token
    (`empty_prompt`), and a row that lacks what `prompt` needs (`no_source`, `no_anchor`).
    """
    return prompts.map_batches(
        CandidateSampler,
        fn_constructor_args=(config,),
        batch_format="pyarrow",
        batch_size=None,
        **config.workers.pool(),
    )


def check_sampling(config: SamplingConfig) -> None:
    """Check on the driver what would fail in the actors: the model's files, its chat template, what transformers can do.

    Raises ConfigError or CheckpointError. The build of vLLM is that of the actors' nodes, and is checked there.
    """
    check_model(config.model)
    if is_encoder_decoder(config.model):
        from rayrm.models.generating import check_settings

        check_settings(config.engine)
        if config.stop:
            raise ConfigError(f"stop is {config.stop}, and texts of an encoder-decoder end at end tokens alone.")
    load_template(config.chat_template, load_tokenizer(config.model, config.engine.trust_remote_code), config.model)


def load_engine(config: SamplingConfig, with_logprobs: bool = False) -> Engine | TransformersEngine:
    """What draws from the policy; `draw` of vLLM's needs `with_logprobs`. Raises as `CandidateSampler` does."""
    model, num_threads = local_model(config.model), max(1, int(config.workers.num_cpus))
    if is_encoder_decoder(model):
        from rayrm.models.generating import TransformersEngine

        return TransformersEngine(model, config.engine, num_threads)
    check_build(config.workers.num_gpus)
    return Engine(model, config.engine, num_threads, with_logprobs)


class CandidateSampler:
    """A loaded policy. Raises CheckpointError when it or its tokenizer does not load, and ConfigError when the vLLM of
    this node is of another kind than the config asks for."""

    def __init__(self, config: SamplingConfig) -> None:
        self.config = config
        self.engine = load_engine(config)
        tokenizer = load_tokenizer(config.model, config.engine.trust_remote_code)
        self.renderer = Renderer(tokenizer, load_template(config.chat_template, tokenizer, config.model))

    def __call__(self, table: pa.Table) -> pa.Table:
        """Prompt rows of whole shards → the same rows with candidates."""
        return on_kept(table, self._sample)

    def _sample(self, table: pa.Table) -> pa.Table:
        rows = table.select(READS).to_pylist()
        found = [prompt_ids(row, self.renderer, self.config, self.engine) for row in rows]
        todo = [(i, ids) for i, (ids, _) in enumerate(found) if ids is not None]
        seeds = [seed_of(self.config.seed, rows[i]["id"], rows[i]["lang"]) for i, _ in todo]
        completions = self.engine.generate([ids for _, ids in todo], seeds, self.config)
        texts: list[Any] = [None] * len(rows)
        unfinished: list[Any] = [None] * len(rows)
        for (i, _), group in zip(todo, completions, strict=True):
            texts[i] = [item.text for item in group]
            unfinished[i] = sum(not item.is_finished for item in group)
        reasons = [[reason] if reason else [] for _, reason in found]
        dropped = [old + new for old, new in zip(table["_dropped"].to_pylist(), reasons, strict=True)]
        table = set_column(table, "candidates", pa.array(texts, TEXTS))
        table = set_column(table, "num_unfinished", pa.array(unfinished, pa.int64()))
        table = set_column(table, "_kept", pa.array([ids is not None for ids, _ in found], pa.bool_()))
        return set_column(table, "_dropped", pa.array(dropped, TEXTS))


def prompt_ids(
    row: dict[str, Any], renderer: Renderer, config: SamplingConfig, engine: Engine | TransformersEngine
) -> tuple[list[int] | None, str | None]:
    """What the policy continues, or its encoder reads, for a row; or None and the reason why the row is dropped."""
    messages = row["prompt"]
    if config.prompt != "as_is":
        if not (row["source"] and row["src_lang"] and row["tgt_lang"]):
            return None, "no_source"
        if config.prompt == "direct":
            text = direct_prompt(row["source"], row["src_lang"], row["tgt_lang"])
        elif not row["anchor"]:
            return None, "no_anchor"
        else:
            text = anchored_prompt(row["source"], row["anchor"], row["src_lang"], row["tgt_lang"])
        messages = [{"role": "user", "content": text}]
    is_encoder = engine.is_encoder_decoder
    ids = renderer.encoder_ids(messages) if is_encoder else renderer.prompt_ids(messages)
    if not ids:
        return None, "empty_prompt"
    if len(ids) + (1 if is_encoder else max(1, config.min_tokens)) > engine.max_model_len:
        return None, "overlength"
    return ids, None
