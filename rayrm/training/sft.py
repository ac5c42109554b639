"""Supervised fine-tuning by TRL's SFTTrainer, as each Ray Train worker runs it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import pyarrow.compute as pc
import torch
from trl.data_utils import pack_dataset
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from rayrm.models.rendering import Renderer
from rayrm.training.examples import IGNORED, read_examples
from rayrm.training.policy import SupervisedFinetuning
from rayrm.training.policy_model import load_policy
from rayrm.training.policy_trainer import InOrder, run_training

if TYPE_CHECKING:
    from rayrm.training.policy import PolicyJob


class PolicyTrainer(InOrder, SFTTrainer):  # type: ignore[misc]
    """TRL's trainer with our order of rows and, on a CPU, an output layer that sees only tokens that bear loss.

    TRL leaves the other tokens out on GPUs only, and computes the output layer twice.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._bears_loss: torch.Tensor | None = None
        if self.args.use_cpu:
            model: Any = self.model
            model.get_output_embeddings().register_forward_pre_hook(self._select)

    def _select(self, module: Any, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
        if self._bears_loss is None:
            return None
        return (inputs[0][:, :-1][self._bears_loss].unsqueeze(0),)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The summed cross-entropy of all tokens that bear loss, over their number in the whole step."""
        if return_outputs or not self.args.use_cpu:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        targets = inputs["labels"][:, 1:]
        self._bears_loss = targets != IGNORED
        targets = targets[self._bears_loss]
        try:
            logits = model(**{name: x for name, x in inputs.items() if name != "labels"}, use_cache=False).logits[0]
        finally:
            self._bears_loss = None
        loss = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
        if num_items_in_batch is None:
            return loss / max(1, len(targets))
        # DeepSpeed averages over workers, and the number counts the tokens of all of them.
        return loss / num_items_in_batch * self.accelerator.num_processes

    def row_lengths(self) -> list[int]:
        """Tokens of each row."""
        lengths: list[int] = pc.list_value_length(cast(Any, self.train_dataset).data["input_ids"]).to_pylist()
        return lengths


def train_loop(config: dict[str, Any]) -> dict[str, Any]:
    """Train, evaluate and export on one worker; the facts of the run on rank 0."""
    return run_training(config, build_trainer)


def build_trainer(job: PolicyJob, settings: dict[str, Any], renderer: Renderer) -> tuple[PolicyTrainer, dict[str, Any]]:
    """The trainer with its model and rows, and how many rows went where."""
    training = cast(SupervisedFinetuning, job.training)
    args = SFTConfig(
        **settings,
        max_length=training.max_length,
        packing=training.packing,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    train, held_out, counts = read_examples(job.input, renderer, training.held_out_fraction, training.seed)
    if training.packing:
        train = pack_dataset(train, training.max_length)
        held_out = pack_dataset(held_out, training.max_length) if held_out is not None else None
    trainer = PolicyTrainer(
        model=load_policy(training, renderer.tokenizer, bool(args.bf16), training.load_in_8bit),
        args=args,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=renderer.tokenizer,
    )
    return trainer, counts
