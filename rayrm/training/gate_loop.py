"""The loop that fits heads and a gate to a frozen backbone, as each Ray Train worker runs it.

The workers share the backbone's passes, and commit the embeddings of a shard of rows when they are whole; a run that is
started again embeds only what is missing. The first worker then fits heads, transform and gate, which takes minutes
and hangs on nothing but the embeddings and the seed.
"""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from transformers import AutoModelForSequenceClassification

from rayrm import files
from rayrm.models.gating import GatedHead, save_gate
from rayrm.models.inputs import padded_batch
from rayrm.models.loading import pad_id_of
from rayrm.models.reward_model import NewHead, RewardModel, load_reward_model, set_head
from rayrm.training.batches import micro_batches
from rayrm.training.checkpoints import export_model
from rayrm.training.curves import write_curves
from rayrm.training.gating import GatePairs, find_transform, fit_gate
from rayrm.training.launch import prepare_worker
from rayrm.training.memory import fitting_micro_batch, halved_when_out_of_memory
from rayrm.training.objectives.base import Measured
from rayrm.training.objectives.gated import GatedRatings
from rayrm.training.probes import encode_probe
from rayrm.training.rendered import RENDERED, RenderedRows, make_renderer, read_rendered, render_rows
from rayrm.training.reward_model import RewardModelJob
from rayrm.training.ridge import fit_heads
from rayrm.training.tracking import TRACKERS

EMBEDDINGS = "embeddings"
RATINGS, REFERENCE = "rendered-ratings.parquet", "rendered-reference.parquet"
SHARD_ROWS = 512
"""Rows whose embeddings are committed together."""

Floats = NDArray[np.float32]


def render_ratings(job: RewardModelJob) -> None:
    """Render the Rated rows of the objective beside the preferences."""
    objective = job.training.objective
    assert isinstance(objective, GatedRatings)
    training = job.training.model_copy(update={"objective": objective.on_ratings, "held_out_fraction": 0.0})
    for path, name in ((objective.ratings, RATINGS), (objective.reference, REFERENCE)):
        if path is not None:
            render_rows(path, job.output, training, name)


def train_loop(given: dict[str, Any]) -> dict[str, Any]:
    """Embed what is missing, fit heads and gate, save the model, and return its facts."""
    job = RewardModelJob.model_validate(given["job"])
    prepare_worker(job.workers.num_cpus, job.workers.num_gpus > 0)
    micro_batch = fitting_micro_batch(job.output, job.training.micro_batch_size)
    with halved_when_out_of_memory(job.output, micro_batch, micro_batch):
        trainer = GateTrainer(job, micro_batch)
        trainer.embed(given["show_progress"])
    dist.barrier()
    facts = trainer.fit() if dist.get_rank() == 0 else {}
    dist.barrier()
    return facts


class GateTrainer:
    """One worker's share of the embeddings, and on the first worker the rest."""

    def __init__(self, job: RewardModelJob, micro_batch_size: int) -> None:
        objective = job.training.objective
        assert isinstance(objective, GatedRatings)
        self.job, self.objective, self.micro_batch_size = job, objective, micro_batch_size
        self.renderer = make_renderer(job.training.model, job.training.chat_template, job.training.max_length)
        self.pairs, self.rendered = read_rendered(job.output, objective.num_sides)
        self.sets = {RENDERED: self.pairs, RATINGS: read_rendered(job.output, 1, RATINGS)[0]}
        if objective.reference is not None:
            self.sets[REFERENCE] = read_rendered(job.output, 1, REFERENCE)[0]
        use_gpu = job.workers.num_gpus > 0
        self.device = torch.device("cuda", torch.cuda.current_device()) if use_gpu else torch.device("cpu")
        dtype = torch.bfloat16 if job.parallelism.uses_bf16(job.workers.num_gpus) else torch.float32
        self.model = load_reward_model(
            job.training.model,
            num_outputs=len(objective.objectives),
            new_head=NewHead(job.training.seed),
            keeps_head=False,
            dtype=dtype,
            attn_implementation=job.training.attn_implementation,
        ).to(self.device)

    def embed(self, show_progress: bool) -> None:
        """Write the embeddings of this worker's share of the shards, but for those that are there."""
        from ray.experimental.tqdm_ray import tqdm

        wanted = [
            (name, start) for name, rows in self.sets.items() for start in range(0, len(rows.lengths), SHARD_ROWS)
        ]
        mine = wanted[dist.get_rank() :: dist.get_world_size()]
        bar = tqdm(total=len(mine), desc="embedding") if show_progress and dist.get_rank() == 0 else None
        for name, start in mine:
            path = self._shard_path(name, start)
            if not files.exists(path):
                rows = self.sets[name]
                found = self.embed_rows(rows, range(start, min(start + SHARD_ROWS, len(rows.lengths))))
                with files.atomic_file(path) as handle:
                    np.save(handle, found)
            if bar is not None:
                bar.update(1)
        if bar is not None:
            bar.close()

    @torch.inference_mode()
    def embed_rows(self, rows: RenderedRows, numbers: range) -> Floats:
        """Last hidden states of some rows where they are read, fp32 [rows, sides, reads, hidden size]."""
        num_sides = len(rows.sides)
        size = self.model.network.config.get_text_config().hidden_size
        found = np.empty((len(numbers), num_sides, rows.most_reads, size), np.float32)
        pad_id = self.renderer.tokenizer.pad_token_id
        for micro in micro_batches(numbers, rows.lengths, self.micro_batch_size, 0, 1):
            sides = [rows.sides[side][row] for side in range(num_sides) for row in micro]
            reads = [rows.reads[side][row].tolist() for side in range(num_sides) for row in micro]
            batch = padded_batch(sides, reads, pad_id, self.device)
            positions = batch.pop("reads")
            output = self.model.network.base_model(use_cache=False, **batch).last_hidden_state
            hidden = output.flatten(0, 1)[positions].unflatten(0, (num_sides, len(micro)))
            found[[row - numbers.start for row in micro]] = hidden.transpose(0, 1).float().cpu().numpy()
        return found

    def fit(self) -> dict[str, Any]:
        """Fit heads, transform and gate to all embeddings, save the model whole, and return the facts of the run."""
        objective, training = self.objective, self.job.training
        with TemporaryDirectory() as folder:
            ratings = self._read(RATINGS, folder)[:, 0, 0]
            heads = fit_heads(ratings, self.sets[RATINGS].targets, objective.objectives, objective.fit, training.seed)
            reference = self._read(REFERENCE, folder)[:, 0, 0] if REFERENCE in self.sets else ratings
            transform = find_transform(reference @ heads.weights.T, objective.objectives, objective.fit)
            pairs = self._read(RENDERED, folder)
            scores = [pairs[:, side, 1] @ heads.weights.T for side in range(2)]
            is_held_out = np.zeros(len(pairs), bool)
            is_held_out[self.pairs.held_out] = True
            given = GatePairs(pairs[:, 0, 0], scores[0], scores[1], is_held_out, self.pairs.weights)
            began = time.monotonic()
            tracker = TRACKERS[self.job.report_to](self.job.output, training.model_dump(), 0)
            fitted = fit_gate(
                given,
                transform,
                objective.fit,
                training.seed,
                lambda record: tracker.log(record, int(record["step"])),
            )
            tracker.close()
            head = GatedHead(fitted.gate, torch.from_numpy(transform), objective.objectives)
            metrics = {**fitted.history[-1], "fit_s": time.monotonic() - began}
            if self.pairs.held_out:
                metrics |= self._measure(head, given)
        write_curves(fitted.history, self.job.output)
        model = self._save(head, torch.from_numpy(heads.weights))
        found = zip(objective.objectives, heads.alphas.tolist(), heads.errors.tolist(), strict=True)
        return {
            "steps": objective.fit.num_steps,
            "metrics": metrics,
            "heads": {name: {"alpha": alpha, "mse": error} for name, alpha, error in found},
            "transform": transform.tolist(),
            "micro_batch_size": self.micro_batch_size,
            "probe": self._read_probe(model),
        }

    def _shard_path(self, name: str, start: int) -> str:
        return files.join(self.job.output, EMBEDDINGS, f"{name.removesuffix('.parquet')}-{start:09d}.npy")

    def _read(self, name: str, folder: str) -> Floats:
        """All embeddings of a set, in a file of this machine that is read where it is needed."""
        num_rows = len(self.sets[name].lengths)
        whole: Floats | None = None
        for start in range(0, num_rows, SHARD_ROWS):
            fs, inner = files.filesystem(self._shard_path(name, start))
            with fs.open(inner, "rb") as handle:
                part = np.load(handle)
            if whole is None:
                target = Path(folder) / f"{name}.npy"
                shape = (num_rows, *part.shape[1:])
                whole = np.lib.format.open_memmap(target, "w+", np.float32, shape)
            whole[start : start + len(part)] = part
        assert whole is not None
        return whole

    @torch.inference_mode()
    def _measure(self, head: GatedHead, pairs: GatePairs) -> dict[str, float]:
        rows = self.pairs.held_out
        prompts = torch.from_numpy(pairs.prompts[rows])
        scores = np.stack([pairs.chosen[rows], pairs.rejected[rows]])
        rewards = head(torch.from_numpy(scores), prompts[None]).rewards[..., None, None]
        targets = torch.from_numpy(self.pairs.targets[rows])
        losses = torch.from_numpy(self.pairs.weights[rows]) * self.objective.losses(rewards, targets)
        found = self.pairs
        return self.objective.measure(
            Measured(
                rewards.double().numpy(),
                targets.double().numpy(),
                losses.double().numpy(),
                found.side_lengths[:, rows],
                found.languages[rows],
                found.subsets[rows],
            )
        )

    def _save(self, head: GatedHead, weights: torch.Tensor) -> RewardModel:
        network, tokenizer = self.model.network, self.renderer.tokenizer
        network.config.pad_token_id = pad_id_of(tokenizer)
        # The heads are fitted in fp64; in bf16 they would be others.
        network.score.float()
        set_head(network, weights)
        tokenizer.chat_template = self.renderer.template

        def write(folder: Path) -> None:
            network.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            save_gate(folder, head)

        export_model(self.job.output, write, AutoModelForSequenceClassification)
        return RewardModel(network, gate=head.to(self.device)).eval()

    @torch.no_grad()
    def _read_probe(self, model: RewardModel) -> list[dict[str, Any]]:
        found = []
        for row in self.rendered["probe"]:
            sides = encode_probe(row, self.objective, self.renderer)
            ids, reads = [side.ids for side in sides], [side.reads for side in sides]
            outputs, _ = model(**padded_batch(ids, reads, self.renderer.tokenizer.pad_token_id, self.device))
            found.append(row | {"outputs": outputs.tolist()})
        return found
