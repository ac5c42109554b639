"""Score candidates by the implicit reward of a policy, such as one that was trained by DPO."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from rayrm.config import NOT_IDENTITY, TEMPLATE, Config, Workers
from rayrm.errors import CheckpointError
from rayrm.models.folders import check_model, load_tokenizer
from rayrm.models.own_code import check_own_code
from rayrm.models.rendering import load_template
from rayrm.runs import INPUT
from rayrm.scoring.base import IMPLICIT, Outcome


class ImplicitScoring(Config):
    """How much likelier a policy finds an answer than its reference does (arXiv 2305.18290, without beta).

    The log-probabilities of the answer's tokens are summed. Prompt and answer are tokenized together and split, the
    assistant's header and an end token count as answer, and texts are cut as RewardBench cuts them.
    """

    type: Literal["implicit"] = "implicit"
    name: str = Field("implicit", min_length=1)
    """Field of `scores` and `status` that holds the result."""
    model: str = Field(json_schema_extra=INPUT)  # type: ignore[arg-type]
    """Folder or hub id of the policy, a causal language model."""
    ref_model: str | None = Field(None, json_schema_extra=INPUT)  # type: ignore[arg-type]
    """Folder or hub id of the model that the policy was trained from, with the same tokens; null for none."""
    reduction: Literal["mean", "sum", "norm"] | None = None
    """Without a reference, how the log-probabilities become one number: their mean (null too), their sum, or minus
    their Euclidean norm. With one it is their sum."""
    chat_template: str | None = Field(None, json_schema_extra=TEMPLATE)  # type: ignore[arg-type]
    """A name, a .jinja file, or none; null for the tokenizer's own."""
    bos: Literal["doubled", "one"] = "doubled"
    """BOS tokens: doubled puts one before what the template writes, which makes two where it writes one too, as in
    RewardBench; one leaves the template's out. Of a tokenizer without BOS, doubled takes the end token, and one none."""
    max_length: int = Field(2048, gt=128)
    """Most tokens of a prompt with an answer, at most the models' positions. Where the longest answer of a row has no
    room, only the last 128 of the prompt stay, then only the first max_length - 128 of every answer."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the models; auto is bfloat16 on a GPU and float32 on a CPU. Probabilities are always float32."""
    attn_implementation: str | None = None
    """Attention kernel of transformers, such as sdpa or flash_attention_2; null for its own choice."""
    load_in_8bit: bool = False
    """Whether bitsandbytes holds the weights of the models in 8-bit integers."""
    trust_remote_code: bool = False
    """Whether Python files that come with the models may run."""
    token_budget: int = Field(16384, ge=1, json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Most tokens of a batch, padding included."""
    workers: Workers = Field(default_factory=Workers, json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Actors that score; each holds both models."""

    @model_validator(mode="after")
    def _fits_reference(self) -> ImplicitScoring:
        if self.ref_model is not None and self.reduction not in (None, "sum"):
            raise ValueError(f"reduction '{self.reduction}' is for rewards without a ref_model; leave it out")
        if self.ref_model == self.model:
            raise ValueError("ref_model is the model itself, and all rewards would be 0; give the one before training")
        return self


def check_implicit(config: ImplicitScoring, paths: Sequence[str] = ()) -> None:
    """Find out, before any actor starts, whether there are both models, with a template and the same tokens.

    Raises CheckpointError, and ConfigError for a template that is nowhere.
    """
    check_model(config.model)
    check_own_code(config.model, config.trust_remote_code)
    tokenizer = load_tokenizer(config.model, config.trust_remote_code)
    load_template(config.chat_template, tokenizer, config.model)
    if tokenizer.eos_token_id is None:
        raise CheckpointError(f"The tokenizer at '{config.model}' has no end token, which every answer ends with.")
    if config.ref_model is None:
        return
    check_model(config.ref_model)
    check_own_code(config.ref_model, config.trust_remote_code)
    known = tokenizer.get_vocab()
    others = load_tokenizer(config.ref_model, config.trust_remote_code).get_vocab()
    differing = sorted(token for token, number in others.items() if known.get(token, number) != number)
    if differing:
        raise CheckpointError(
            f"'{config.ref_model}' has other numbers for tokens than '{config.model}' ({', '.join(differing[:3])}); give "
            "the model that it was trained from."
        )


class ImplicitScorer:
    """A loaded policy with its reference. Raises CheckpointError when one does not load."""

    needs: ClassVar[tuple[str, ...]] = ()
    """Columns without which no row can be scored."""
    model_type: ClassVar[str] = IMPLICIT
    """What RewardBench calls such models."""
    compares: ClassVar[bool] = False
    """Every completion has a reward of its own."""

    def __init__(self, config: ImplicitScoring) -> None:
        import torch

        from rayrm.models.implicit import load_implicit_rewarder

        if not config.workers.num_gpus:
            torch.set_num_threads(max(1, int(config.workers.num_cpus)))
        self.config = config
        self.rewarder = load_implicit_rewarder(
            config.model,
            config.ref_model,
            chat_template=config.chat_template,
            max_length=config.max_length,
            bos=config.bos,
            reduction="sum" if config.ref_model is not None else config.reduction or "mean",
            device="cuda" if config.workers.num_gpus else "cpu",
            dtype=None if config.dtype == "auto" else getattr(torch, config.dtype),
            attn_implementation=config.attn_implementation,
            load_in_8bit=config.load_in_8bit,
            trust_remote_code=config.trust_remote_code,
        )

    def score(self, rows: list[dict[str, Any]]) -> list[list[Outcome]]:
        """One (reward, status) for each of a row's `candidates`; equal candidates of a row are scored once.

        A candidate without text is `empty`, one that the chat template refuses `error`, and a reward that is not finite
        `nan`: the reward is null. Where tokens were cut it is `truncated`.
        """
        from rayrm.models.implicit import Question

        texts = [list(dict.fromkeys(text or "" for text in row["candidates"] or [])) for row in rows]
        questions = [
            Question(row["prompt"], completions, row.get("tools")) for row, completions in zip(rows, texts, strict=True)
        ]
        found = self.rewarder.rewards(questions, self.config.token_budget)
        outcomes = [dict(zip(keys, values, strict=True)) for keys, values in zip(texts, found, strict=True)]
        return [
            [known[text or ""] for text in row["candidates"] or []] for row, known in zip(rows, outcomes, strict=True)
        ]
