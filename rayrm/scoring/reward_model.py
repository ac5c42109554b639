"""Score candidates with a trained reward model."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from rayrm import files
from rayrm.config import NOT_IDENTITY, TEMPLATE, Config, Workers
from rayrm.models.folders import check_model, load_tokenizer
from rayrm.models.rendering import load_template
from rayrm.prompts import direct_prompt
from rayrm.rows import Message
from rayrm.runs import INPUT

Outcome = tuple[float | None, str]
ANCHOR_LANG = "en"


class RewardModelScoring(Config):
    """The reward of each candidate as an answer to its row's prompt, by a reward model; rewards have no fixed range."""

    type: Literal["reward_model"] = "reward_model"
    name: str = Field("reward_model", min_length=1)
    """Field of `scores` and `status` that holds the result."""
    model: str = Field(json_schema_extra=INPUT)  # type: ignore[arg-type]
    """Folder or hub id of a reward model."""
    prompt: Literal["as_is", "from_anchor"] = "as_is"
    """The prompt that a candidate answers: the row's own, or "translate the row's English anchor" into its target."""
    chat_template: str | None = Field(None, json_schema_extra=TEMPLATE)  # type: ignore[arg-type]
    """For checkpoints that do not say how they are rendered: a template's name or path, or none."""
    max_length: int | None = Field(None, ge=8)
    """For checkpoints that do not say: most tokens of a prompt with its candidate; null for the model's positions."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the network; auto is bfloat16 on a GPU and float32 on a CPU. The head is always float32."""
    attn_implementation: str | None = None
    """Attention kernel of transformers, such as sdpa or flash_attention_2; null for its own choice."""
    token_budget: int = Field(16384, ge=1, json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Most tokens of a batch, padding included."""
    workers: Workers = Field(default_factory=Workers, json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Actors that score."""


def find_mark(model: str) -> dict[str, Any]:
    """The completion mark of the reward model at `model`; empty where it was not trained here."""
    mark: dict[str, Any] = files.read_json(files.join(model, files.CHECKPOINT_MARK)) or {}
    return mark


def check_reward_model(config: RewardModelScoring) -> None:
    """Find out, before any actor starts, whether there is a model and a way to render texts for it.

    Raises CheckpointError or ConfigError.
    """
    check_model(config.model)
    stored = find_mark(config.model).get("rendering", {})
    load_template(config.chat_template or stored.get("chat_template"), load_tokenizer(config.model), config.model)


class RewardModelScorer:
    """A loaded reward model. Raises CheckpointError when it does not load or was trained on other renderings."""

    needs: ClassVar[tuple[str, ...]] = ()
    """Columns without which no row can be scored."""

    def __init__(self, config: RewardModelScoring) -> None:
        import torch

        from rayrm.models.rewarder import Rendering, load_rewarder

        if not config.workers.num_gpus:
            torch.set_num_threads(max(1, int(config.workers.num_cpus)))
        self.config = config
        self.rewarder = load_rewarder(
            config.model,
            Rendering(config.chat_template, config.max_length),
            device="cuda" if config.workers.num_gpus else "cpu",
            dtype=None if config.dtype == "auto" else getattr(torch, config.dtype),
            attn_implementation=config.attn_implementation,
        )

    def score(self, rows: list[dict[str, Any]]) -> list[list[Outcome]]:
        """One (reward, status) for each of a row's `candidates`; equal candidates of a row are scored once.

        A candidate without text is `empty`, one that is too long by itself `overlength`, one of a row whose anchor
        is wanted and missing `error`, and a reward that is not finite `nan`: the reward is null. A pair whose prompt
        was cut is `truncated`.
        """
        prompts = [self._prompt(row) for row in rows]
        keys = [
            (index, text)
            for index, (row, prompt) in enumerate(zip(rows, prompts, strict=True))
            for text in dict.fromkeys(row["candidates"] or [])
            if prompt is not None
        ]
        pairs = [(prompts[index] or [], text or "") for index, text in keys]
        found = dict(zip(keys, self.rewarder.rewards(pairs, self.config.token_budget), strict=True))
        return [
            [found.get((index, text), (None, "error")) for text in row["candidates"] or []]
            for index, row in enumerate(rows)
        ]

    def _prompt(self, row: dict[str, Any]) -> list[Message] | None:
        if self.config.prompt == "as_is":
            prompt: list[Message] = row["prompt"]
            return prompt
        if not row["anchor"] or not row["tgt_lang"]:
            return None
        return [{"role": "user", "content": direct_prompt(row["anchor"], ANCHOR_LANG, row["tgt_lang"])}]
