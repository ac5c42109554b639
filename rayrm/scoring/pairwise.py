"""Compare two completions with published models that see both at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from rayrm.config import NOT_IDENTITY, Config, Workers
from rayrm.models.folders import check_model, load_tokenizer
from rayrm.runs import INPUT
from rayrm.scoring.base import CUSTOM, Outcome
from rayrm.scoring.reward_model import log_p


class PairwiseScoring(Config):
    """Which of two completions is better, by a model that sees both; each pair is asked in both orders.

    The input formats follow public model cards; `rayrm.models.pairwise` says which details of them are not published.
    """

    type: Literal["pairwise"] = "pairwise"
    name: str = Field("pairwise", min_length=1)
    """Field of `status` that holds the result."""
    model: str = Field(json_schema_extra=INPUT)  # type: ignore[arg-type]
    """Folder or hub id of the model."""
    format: Literal["pair_rm", "better_pair_rm", "slic", "steam_shp"]
    """How the model is asked: as llm-blender/PairRM-hf, mightbe/Better-PairRM, RLHFlow/pair-preference-model-LLaMA3-8B,
    or stanfordnlp/SteamSHP-flan-t5-xl."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the network; auto is bfloat16 on a GPU and float32 on a CPU."""
    token_budget: int = Field(16384, ge=1, json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Most tokens of a batch, padding included."""
    workers: Workers = Field(default_factory=Workers, json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Actors that compare."""


def check_pairwise(config: PairwiseScoring, paths: Sequence[str] = ()) -> None:
    """Find out, before any actor starts, whether there is a model with a tokenizer. Raises CheckpointError."""
    check_model(config.model)
    load_tokenizer(config.model)


class PairwiseScorer:
    """A loaded model. Raises CheckpointError when it does not load, or is none of the format."""

    needs: ClassVar[tuple[str, ...]] = ()
    """Columns without which no row can be compared."""
    model_type: ClassVar[str] = CUSTOM
    """What RewardBench calls such models."""
    compares: ClassVar[bool] = True
    """A single completion has no reward."""

    def __init__(self, config: PairwiseScoring) -> None:
        import torch

        from rayrm.models.pairwise import load_pair_model

        if not config.workers.num_gpus:
            torch.set_num_threads(max(1, int(config.workers.num_cpus)))
        self.config = config
        self.model = load_pair_model(
            config.model,
            config.format,
            device="cuda" if config.workers.num_gpus else "cpu",
            dtype=None if config.dtype == "auto" else getattr(torch, config.dtype),
        )

    def compare(self, pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> list[tuple[Outcome, Outcome]]:
        """(log p, status) of each of two rows with one candidate, as `PreferenceScorer.compare` says.

        Both are `empty` where one has no text, `overlength` where they have no room together, `truncated` where texts
        were cut, `nan` where the gap is not finite, and `error` where the rows have not the same prompt.
        """
        from rayrm.models.pairwise import Question, compare_all

        places = [index for index, (first, second) in enumerate(pairs) if first["prompt"] == second["prompt"]]
        asked = [
            Question(first["prompt"], first["candidates"][0] or "", second["candidates"][0] or "")
            for first, second in (pairs[index] for index in places)
        ]
        found: list[tuple[Outcome, Outcome]] = [((None, "error"), (None, "error"))] * len(pairs)
        gaps = compare_all(self.model, asked, self.config.token_budget)
        for index, (gap, status) in zip(places, gaps, strict=True):
            found[index] = ((None, status),) * 2 if gap is None else ((log_p(gap), status), (log_p(-gap), status))
        return found
