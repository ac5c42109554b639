"""Score candidates with a trained reward model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from rayrm import files
from rayrm.config import NOT_IDENTITY, TEMPLATE, Config, Workers, build_config
from rayrm.errors import CheckpointError, ConfigError
from rayrm.models.folders import check_model, load_tokenizer, read_mark
from rayrm.models.own_code import check_own_code
from rayrm.models.readouts import Comparison, parse_readout
from rayrm.models.rendering import BosRule, Truncation, load_template
from rayrm.prompts import direct_prompt
from rayrm.rows import Message
from rayrm.runs import INPUT
from rayrm.scoring.base import REWARD_MODEL, Outcome
from rayrm.shards import iter_tables

ANCHOR_LANG = "en"
LANGUAGES = ("src_lang", "tgt_lang", "lang")
"""Columns that say which language's calibration a row has."""
OWN_UNIT = (0.0, 1.0)
"""Zero and size of the unit of raw rewards."""


class Spread(Config):
    """How raw rewards lie; with them, a reward is told in standard deviations from the mean."""

    mean: float
    """Mean of the rewards."""
    std: float = Field(gt=0)
    """Standard deviation of the rewards themselves: the root of their mean squared distance from the mean."""
    num: int = Field(ge=2)
    """How many rewards there were."""


class Calibration(Spread):
    """How a reward model's raw rewards lie on some rows: all of them, and those of each language."""

    languages: dict[str, Spread]
    """By `en-de` for rows that have both languages, else by the completion's language, `de`."""
    rows: str
    """Fingerprint of the rows that were rewarded."""


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
    truncation: Truncation = "prompt_left"
    """Where a conversation over max_length is cut. prompt_left cuts the prompt's left and keeps the candidate whole.
    For checkpoints that were trained elsewhere, left, right and none take the conversation as one text, as plain
    transformers does: left and right cut it at that side, and with none it is overlength."""
    bos: BosRule = "one"
    """For checkpoints that were trained elsewhere, what becomes of a second BOS, where the tokenizer adds one to a text
    whose template has written one: one leaves it out, doubled keeps both, masked hides the first from attention."""
    negate: bool = False
    """Whether the model gives costs, which are lower for better candidates; rewards are then costs times -1."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the network; auto is bfloat16 on a GPU and float32 on a CPU. The head is always float32."""
    calibration: Literal["none", "overall", "language"] = "none"
    """Unit of the rewards: the model's own, or standard deviations from the mean that calibrate_reward_model found,
    over all rows or over those of the row's language."""
    attn_implementation: str | None = None
    """Attention kernel of transformers, such as sdpa or flash_attention_2; null for its own choice."""
    load_in_8bit: bool = False
    """Whether bitsandbytes holds the network's weights in 8-bit integers; the head is left as it is."""
    trust_remote_code: bool = False
    """Whether Python files that come with the model may run."""
    token_budget: int = Field(16384, ge=1, json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Most tokens of a batch, padding included."""
    workers: Workers = Field(default_factory=Workers, json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Actors that score."""

    def further_inputs(self) -> dict[str, str]:
        """The completion mark whose calibration is used: a model that is calibrated again gives other rewards."""
        return {} if self.calibration == "none" else {"calibration": files.join(self.model, files.CHECKPOINT_MARK)}


def check_reward_model(config: RewardModelScoring, paths: Iterable[str] = ()) -> None:
    """Find out, before any actor starts, whether there is a model, a way to render texts for it, and its calibration.

    `paths` hold the rows that are to be rewarded. Raises CheckpointError, and ConfigError for a calibration that is
    not there or has no numbers for a language of those rows.
    """
    check_model(config.model)
    check_own_code(config.model, config.trust_remote_code)
    stored = read_mark(config.model).get("rendering", {})
    tokenizer = load_tokenizer(config.model, config.trust_remote_code)
    load_template(config.chat_template or stored.get("chat_template"), tokenizer, config.model)
    calibration = find_calibration(config)
    if calibration is None or config.calibration == "overall":
        return
    known = calibration.languages
    for path in paths:
        if unknown := sorted(list_languages(path) - known.keys()):
            raise ConfigError(
                f"calibration is 'language', '{path}' has rows of {', '.join(unknown)}, and '{config.model}' is "
                f"calibrated for {', '.join(known) or 'no language'}; calibrate it on rows of these languages too, or "
                "set calibration=overall."
            )


def check_gives_rewards(model: str) -> None:
    """Raise CheckpointError for a model that compares two completions: a single one has no reward of its own."""
    if compares(model):
        raise CheckpointError(
            f"'{model}' compares two completions and gives a single one no reward; take a reward model of another "
            "objective, or evaluate this one on preferences."
        )


def compares(model: str) -> bool:
    """Whether the reward model at `model` was trained to compare two completions."""
    stored = read_mark(model).get("readout")
    return stored is not None and isinstance(parse_readout(stored), Comparison)


def find_calibration(config: RewardModelScoring) -> Calibration | None:
    """What rewards are told in; None for the model's own unit.

    Raises ConfigError when the model has no calibration, and CheckpointError when it compares and can have none.
    """
    if config.calibration == "none":
        return None
    check_gives_rewards(config.model)
    where = files.join(config.model, files.CHECKPOINT_MARK)
    stored = read_mark(config.model).get("calibration")
    if stored is None:
        raise ConfigError(
            f"calibration is '{config.calibration}', and '{where}' holds none; run calibrate_reward_model on this "
            "model first, or set calibration=none."
        )
    return build_config(Calibration, stored, where)


def language_of(row: dict[str, Any]) -> str:
    """`en-de` for a row that has both languages, else the language of its completion, `de`."""
    src, tgt, lang = (row.get(name) for name in LANGUAGES)
    return f"{src}-{tgt}" if src and tgt else str(lang)


def list_languages(path: str) -> set[str]:
    """The languages of the rows at `path`, each as `language_of` calls it."""
    found: set[str] = set()
    for table in iter_tables(path, list(LANGUAGES)):
        distinct = table.group_by(table.column_names).aggregate([]).to_pylist() if table.column_names else []
        # A row without `lang` is dropped where it is read, and a file without it refused.
        found.update(language_of(row) for row in distinct if row.get("lang") is not None)
    return found


class RewardModelScorer:
    """A loaded reward model. Raises CheckpointError when it does not load or was trained on other renderings."""

    needs: ClassVar[tuple[str, ...]] = ()
    """Columns without which no row can be scored."""
    model_type: ClassVar[str] = REWARD_MODEL
    """What RewardBench calls such models, where they do not compare."""

    def __init__(self, config: RewardModelScoring) -> None:
        import torch

        from rayrm.models.rewarder import Rendering, load_rewarder

        if not config.workers.num_gpus:
            torch.set_num_threads(max(1, int(config.workers.num_cpus)))
        self.config = config
        self.calibration = find_calibration(config)
        self.rewarder = load_rewarder(
            config.model,
            Rendering(config.chat_template, config.max_length, config.truncation, config.bos),
            device="cuda" if config.workers.num_gpus else "cpu",
            dtype=None if config.dtype == "auto" else getattr(torch, config.dtype),
            attn_implementation=config.attn_implementation,
            is_cost=config.negate,
            load_in_8bit=config.load_in_8bit,
            trust_remote_code=config.trust_remote_code,
        )

    @property
    def compares(self) -> bool:
        """Whether the model compares two completions and gives a single one no reward."""
        return isinstance(self.rewarder.readout, Comparison)

    def score(self, rows: list[dict[str, Any]]) -> list[list[Outcome]]:
        """One (reward, status) for each of a row's `candidates`; equal candidates of a row are scored once.

        A candidate without text is `empty`, one that is too long by itself `overlength`, one of a row whose anchor
        is wanted and missing or whose language is wanted and not calibrated `error`, and a reward that is not finite
        `nan`: the reward is null. A pair whose prompt was cut is `truncated`. Raises CheckpointError for a model that
        compares.
        """
        prompts = [self._prompt(row) for row in rows]
        units = [self._unit(row) for row in rows]
        keys = [
            (index, text)
            for index, row in enumerate(rows)
            if prompts[index] is not None and units[index] is not None
            for text in dict.fromkeys(row["candidates"] or [])
        ]
        pairs = [(prompts[index] or [], text or "", self._tools(rows[index])) for index, text in keys]
        found: dict[tuple[int, str | None], Outcome] = {}
        for key, (reward, status) in zip(keys, self.rewarder.rewards(pairs, self.config.token_budget), strict=True):
            mean, std = units[key[0]] or OWN_UNIT
            found[key] = (None if reward is None else (reward - mean) / std), status
        return [
            [found.get((index, text), (None, "error")) for text in row["candidates"] or []]
            for index, row in enumerate(rows)
        ]

    def compare(self, pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> list[tuple[Outcome, Outcome]]:
        """(log p, status) of each of two rows with one candidate, where p is the chance that it is the better one.

        The gap of the two is the log-odds, and is 0 for a tie. Both are null where `Rewarder.compare` finds no gap, and
        `error` where the rows have not the same prompt, or lack the anchor that is wanted. Raises CheckpointError for a
        model that rewards single completions.
        """
        asked: list[tuple[list[Message], str, str]] = []
        places: list[int] = []
        for index, (first, second) in enumerate(pairs):
            prompt = self._prompt(first)
            if prompt is not None and prompt == self._prompt(second):
                asked.append((prompt, first["candidates"][0] or "", second["candidates"][0] or ""))
                places.append(index)
        found: list[tuple[Outcome, Outcome]] = [((None, "error"), (None, "error"))] * len(pairs)
        for index, (gap, status) in zip(places, self.rewarder.compare(asked, self.config.token_budget), strict=True):
            found[index] = ((None, status),) * 2 if gap is None else ((log_p(gap), status), (log_p(-gap), status))
        return found

    def _unit(self, row: dict[str, Any]) -> tuple[float, float] | None:
        """Zero and size of the unit that the rewards of a row are told in; None where its language has none."""
        if self.calibration is None:
            return OWN_UNIT
        by_language = self.config.calibration == "language"
        spread = self.calibration.languages.get(language_of(row)) if by_language else self.calibration
        return None if spread is None else (spread.mean, spread.std)

    def _tools(self, row: dict[str, Any]) -> str | None:
        return row.get("tools") if self.config.prompt == "as_is" else None

    def _prompt(self, row: dict[str, Any]) -> list[Message] | None:
        if self.config.prompt == "as_is":
            prompt: list[Message] = row["prompt"]
            return prompt
        if not row["anchor"] or not row["tgt_lang"]:
            return None
        return [{"role": "user", "content": direct_prompt(row["anchor"], ANCHOR_LANG, row["tgt_lang"])}]


def log_p(gap: float) -> float:
    """log σ(gap), without overflow: the log of a chance from its log-odds."""
    return min(gap, 0.0) - math.log1p(math.exp(-abs(gap)))
