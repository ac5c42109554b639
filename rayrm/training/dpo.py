"""Preference optimization by TRL's DPOTrainer, as each Ray Train worker runs it."""

from __future__ import annotations

import gc
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from json import JSONDecodeError
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from jinja2 import TemplateError
from peft import PeftModel
from torch.utils.data import DataLoader
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from rayrm.models.rendering import Renderer
from rayrm.shards import read_table
from rayrm.sources.validation import is_in_order
from rayrm.splits import is_held_out
from rayrm.training.examples import to_datasets
from rayrm.training.objectives.base import check_pair
from rayrm.training.policy import PreferenceOptimization
from rayrm.training.policy_model import load_policy
from rayrm.training.policy_trainer import InOrder, run_training

if TYPE_CHECKING:
    from rayrm.training.policy import PolicyJob

COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
"""What TRL's collator lays together."""
READS = ["group", "prompt", "chosen", "rejected", "tools"]
BATCH_ROWS = 1024


class PairTrainer(InOrder, DPOTrainer):  # type: ignore[misc]
    """TRL's trainer on rows of token ids, with our order of rows, and with a term that fine-tunes on chosen sides.

    TRL's own such term is a mean over the tokens of a micro batch, which hangs on how a step is cut into micro batches;
    here it is a mean over rows of the mean over a row's tokens, as the loss of pairs is a mean over rows.
    """

    def __init__(self, *args: Any, sft_weight: float, precompute: bool, **kwargs: Any) -> None:
        self.sft_weight = sft_weight
        self._num_rows: dict[str, list[int]] = defaultdict(list)
        super().__init__(*args, **kwargs)
        if isinstance(self.model, PeftModel):
            # TRL has copied the updates to compare with; they are zero, and switched off give the same.
            self.model.delete_adapter("ref")
        if precompute:
            self.train_dataset = self._with_reference(cast(Dataset, self.train_dataset))
            if self.eval_dataset is not None:
                self.eval_dataset = self._with_reference(cast(Dataset, self.eval_dataset))
            self.precompute_ref_logps, self.ref_model = True, None
            gc.collect()
            torch.cuda.empty_cache()

    def row_lengths(self) -> list[int]:
        """Tokens of each row's prompt with its longer side."""
        return pair_lengths(cast(Dataset, self.train_dataset))

    def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
        return dataset

    def _with_reference(self, rows: Dataset) -> Dataset:
        """The rows with what the reference gives to both sides; all ranks ask it together."""
        order = np.argsort(pair_lengths(rows), kind="stable")
        batches = DataLoader(
            cast(Any, rows),
            batch_size=self.args.per_device_train_batch_size,
            sampler=order.tolist(),
            collate_fn=self.data_collator,
        )
        found: list[torch.Tensor] = []
        for batch in self.accelerator.prepare_data_loader(batches):
            sides = torch.stack(self.compute_ref_log_probs(self.ref_model, batch), dim=1)
            found.append(self.accelerator.gather_for_metrics(sides).float().cpu())
        logps = np.empty((len(rows), 2), np.float32)
        logps[order] = torch.cat(found).numpy()
        for side, name in enumerate(("ref_chosen_logps", "ref_rejected_logps")):
            rows = rows.add_column(name, logps[:, side], new_fingerprint=f"{rows._fingerprint}-{name}")
        return rows

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        outputs: list[Any] = []

        def forward(**kwargs: Any) -> Any:
            outputs.append(model(**kwargs))
            return outputs[-1]

        accelerator: Any = self.accelerator
        gather = accelerator.gather
        # TRL's metrics would count the rows again that fill up the last batch.
        accelerator.gather = partial(self._gather_rows, gather)
        try:
            loss = super()._compute_loss(forward, inputs, return_outputs)
            chosen, _ = outputs[0].log_probs.chunk(2)
            mask, _ = inputs["completion_mask"][:, 1:].chunk(2)
            sft_losses = -chosen.sum(1) / mask.sum(1)
            gathered = accelerator.gather(sft_losses.detach())
        finally:
            accelerator.gather = gather
        mode = "train" if cast(Any, self.model).training else "eval"
        self._num_rows[mode].append(len(gathered))
        if not self.sft_weight or return_outputs:
            return loss
        self._metrics[mode]["sft_loss"].append(gathered.mean().item())
        return loss + self.sft_weight * sft_losses.mean()

    def _gather_rows(self, gather: Callable[[torch.Tensor], torch.Tensor], values: torch.Tensor) -> torch.Tensor:
        found, state = gather(values), self.accelerator.gradient_state
        return found[: state.remainder] if state.end_of_dataloader and state.remainder > 0 else found

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log means over rows; TRL's are means over micro batches, the last of which may be smaller."""
        mode = "train" if cast(Any, self.model).training else "eval"
        num_rows = self._num_rows.pop(mode, [])
        for values in self._metrics[mode].values():
            if len(values) == len(num_rows):
                values[:] = [float(np.average(values, weights=num_rows))]
        super().log(logs, start_time)


def train_loop(config: dict[str, Any]) -> dict[str, Any]:
    """Train, evaluate and export on one worker; the facts of the run on rank 0."""
    return run_training(config, build_trainer)


def build_trainer(job: PolicyJob, settings: dict[str, Any], renderer: Renderer) -> tuple[PairTrainer, dict[str, Any]]:
    """The trainer with its models and rows, and how many rows went where."""
    training = cast(PreferenceOptimization, job.training)
    args = DPOConfig(
        **settings,
        max_length=None,
        beta=training.beta,
        loss_type=[training.loss],
        label_smoothing=training.label_smoothing,
    )
    train, held_out, counts = read_pairs(job.input, renderer, training.held_out_fraction, training.seed)
    models = [load_policy(training, renderer.tokenizer, bool(args.bf16), training.load_in_8bit)]
    if training.lora is None:
        models.append(load_policy(training, renderer.tokenizer, bool(args.bf16)).requires_grad_(False))
    trainer = PairTrainer(
        *models,
        args=args,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=renderer.tokenizer,
        sft_weight=training.sft_weight,
        precompute=training.precompute_reference,
    )
    return trainer, counts


class Texts(NamedTuple):
    """A rendered pair."""

    prompt: str
    chosen: str
    rejected: str


def read_pairs(
    path: str, renderer: Renderer, held_out_fraction: float, seed: int
) -> tuple[Dataset, Dataset | None, dict[str, Any]]:
    """Rows to train on, rows held out by group (None when there are none), and how many went where.

    Both have `prompt_ids`, `chosen_ids` and `rejected_ids`; a prompt that is too long with its longer side has lost its
    beginning. Dropped and counted: the reasons of `render_pair`, and `overlength`, a side that is too long alone.
    Raises SchemaError when none stays to train on, or none to hold out with a `held_out_fraction` above 0.
    """
    table = read_table(path, READS)
    parts: dict[bool, list[pa.Table]] = {False: [], True: []}
    reasons: Counter[str] = Counter()
    for start in range(0, table.num_rows, BATCH_ROWS):
        rows = table.slice(start, BATCH_ROWS).to_pylist()
        texts = [render_pair(row, renderer) for row in rows]
        kept = [(row, text) for row, text in zip(rows, texts, strict=True) if isinstance(text, Texts)]
        encoded = encode_pairs([text for _, text in kept], renderer)
        held = [is_held_out(row["group"], held_out_fraction, seed) for row, _ in kept]
        for side, tables in parts.items():
            taken = [ids for (ids, _), h in zip(encoded, held, strict=True) if h == side and ids is not None]
            tables.append(_to_table(taken))
        reasons.update(text for text in texts if isinstance(text, str))
        reasons.update(status for _, status in encoded if status != "ok")
    return to_datasets(parts, reasons, table.num_rows, held_out_fraction, path)


def render_pair(row: dict[str, Any], renderer: Renderer) -> Texts | str:
    """The texts of a Preference row, or the reason why it is no use.

    Reasons: missing_field, bad_role_order, empty_content, not_ending_in_assistant, identical_responses,
    different_prompts (sides of several turns that part before the last), tools_not_json, not_rendered.
    """
    if any(row[name] is None for name in ("group", "prompt", "chosen", "rejected")):
        return "missing_field"
    sides = check_pair(row)
    if isinstance(sides, str):
        return sides
    (prompt, chosen), (other, rejected) = sides
    if prompt != other:
        return "different_prompts"
    if not is_in_order([*prompt, *row["chosen"][-1:]]):
        return "bad_role_order"
    if not all((turn["content"] or "").strip() for turn in prompt):
        return "empty_content"
    try:
        view = renderer.with_tools(row.get("tools"))
        return Texts(view.prompt_text(prompt), *(view.completion_text(prompt, side) for side in (chosen, rejected)))
    except JSONDecodeError:
        return "tools_not_json"
    except TemplateError:
        return "not_rendered"


def encode_pairs(texts: list[Texts], renderer: Renderer) -> list[tuple[list[list[int]] | None, str]]:
    """Ids of prompt, chosen and rejected of each pair, None where a side is too long; and `Rendered.status`."""
    if not texts:
        return []
    heads = renderer.encode_all([text.prompt for text in texts])
    tails = renderer.tokenizer([side for text in texts for side in text[1:]], add_special_tokens=False)["input_ids"]
    found: list[tuple[list[list[int]] | None, str]] = []
    for head, chosen, rejected in zip(heads, tails[::2], tails[1::2], strict=True):
        longer = renderer.join_ids(head, list(chosen if len(chosen) > len(rejected) else rejected))
        ids = [longer.ids[: longer.num_prompt], list(chosen), list(rejected)]
        found.append((ids if longer.ids else None, longer.status))
    return found


def pair_lengths(rows: Dataset) -> list[int]:
    """Tokens of each row's prompt with its longer side."""
    prompt, chosen, rejected = (pc.list_value_length(cast(Any, rows).data[name]) for name in COLUMNS)
    lengths: list[int] = pc.add(prompt, pc.max_element_wise(chosen, rejected)).to_pylist()
    return lengths


def _to_table(pairs: list[list[list[int]]]) -> pa.Table:
    columns = zip(*pairs, strict=True) if pairs else [()] * len(COLUMNS)
    kind = pa.list_(pa.int32())
    return pa.table({name: pa.array(ids, kind) for name, ids in zip(COLUMNS, columns, strict=True)})
