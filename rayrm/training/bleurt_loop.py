"""The loop that fits a small BLEURT model, as its Ray Train worker runs it.

All chance hangs on the seed, so a run that dies and goes on from its last state ends with the same model.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from rayrm.batching import token_batches
from rayrm.errors import CheckpointError
from rayrm.models.bleurt import (
    BleurtTokenizer,
    EncodedPair,
    bleurt_classes,
    collate,
    encode_pairs,
    load_wordpiece,
    new_bleurt,
    save_bleurt,
    save_vocabulary,
    score_encoded,
)
from rayrm.training.bleurt import BleurtJob, BleurtTraining, read_references
from rayrm.training.checkpoints import export_model
from rayrm.training.corruption import Reference, Spoiler
from rayrm.training.curves import write_curves
from rayrm.training.launch import prepare_worker
from rayrm.training.states import WORLD, last_state
from rayrm.training.tracking import TRACKERS

PROGRESS = "progress.pt"
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WINDOW = 2048
"""References that are spoilt together; batches are made within a window."""
MAX_HELD_OUT = 1000
PAIRS_PER_HELD_OUT = 2
MEAN_TARGET = 0.6
"""About what the targets of `Spoiler` are on average: where an untrained model starts."""


def train_loop(given: dict[str, Any]) -> dict[str, Any]:
    """Train, measure, save the model, and return its facts."""
    job = BleurtJob.model_validate(given["job"])
    training = job.training
    prepare_worker(job.workers.num_cpus, job.workers.num_gpus > 0)
    train, held_out = read_references(job.input, training)
    vocabulary = train_vocabulary([reference.text for reference in train], training.vocab_size)
    tokenizer = make_tokenizer(vocabulary)
    model = make_model(training, tokenizer).to("cuda" if job.workers.num_gpus else "cpu")
    with last_state(1) as state:
        history = fit(model, stream_batches(train, tokenizer, training), job, given["show_progress"], state)
    metrics = measure(model, tokenizer, held_out, training)
    write_curves([*history, {"step": training.max_steps, **metrics}], job.output)
    export_model(job.output, lambda folder: save_bleurt(model, vocabulary, str(folder)), bleurt_classes()[1])
    return {
        "steps": training.max_steps,
        "num_references": len(train),
        "num_held_out": len(held_out),
        "num_parameters": sum(tensor.numel() for tensor in model.parameters()),
        "metrics": {"loss": history[-1]["loss"], **metrics},
    }


def train_vocabulary(texts: Sequence[str], size: int) -> list[str]:
    """A cased WordPiece vocabulary of at most `size` entries, special tokens first; the same for the same texts."""
    from tokenizers import BertWordPieceTokenizer

    counts = Counter(character for text in texts for word in text.split() for character in word)
    letters = sorted(counts, key=lambda letter: (-counts[letter], letter))[: size // 4]
    tokenizer = BertWordPieceTokenizer(lowercase=False, strip_accents=False)
    # Left to itself, the trainer numbers inner letters in the order of a hash table, and its ties follow the numbers.
    tokenizer.train_from_iterator(
        texts,
        vocab_size=size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[*SPECIAL_TOKENS, *(f"##{letter}" for letter in letters)],
        initial_alphabet=letters,
        limit_alphabet=len(letters),
    )
    ids = tokenizer.get_vocab()
    return sorted(ids, key=lambda token: ids[token])


def make_tokenizer(vocabulary: Sequence[str]) -> BleurtTokenizer:
    """The tokenizer that a saved checkpoint with this vocabulary has."""
    with TemporaryDirectory() as folder:
        save_vocabulary(vocabulary, folder)
        return load_wordpiece(folder, vocabulary.index("[PAD]"))


def make_model(training: BleurtTraining, tokenizer: BleurtTokenizer) -> Any:
    """A model with random weights whose attention starts by looking for the same word.

    Queries and keys are the identity plus noise (as in mimetic initialisation, arXiv 2305.09828), and the word counts
    for more than its place. From plain random weights, the model has to find out first that it is to compare at all,
    which takes longer than all that follows.
    """
    torch.manual_seed(training.seed)
    model = new_bleurt(
        vocab_size=tokenizer.vocab_size,
        hidden_size=training.hidden_size,
        intermediate_size=training.intermediate_size,
        num_hidden_layers=training.num_layers,
        num_attention_heads=training.num_heads,
        max_position_embeddings=training.max_length,
        pad_token_id=tokenizer.pad_id,
        initializer_range=training.hidden_size**-0.5,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    with torch.no_grad():
        model.bleurt.embeddings.word_embeddings.weight.mul_(3)
        model.bleurt.embeddings.position_embeddings.weight.mul_(0.3)
        for layer in model.bleurt.encoder.layer:
            for part in (layer.attention.self.query, layer.attention.self.key):
                part.weight.add_(torch.eye(training.hidden_size))
        model.classifier.weight.zero_()
        model.classifier.bias.fill_(MEAN_TARGET)
    return model


def stream_batches(
    references: Sequence[Reference], tokenizer: BleurtTokenizer, training: BleurtTraining
) -> Iterator[tuple[list[EncodedPair], list[float]]]:
    """Pairs and their targets, without end: every pass over the references spoils them in another way."""
    spoiler = Spoiler(references, training.seed)
    for epoch in itertools.count():
        rng: Any = np.random.default_rng([training.seed, epoch])
        order = rng.permutation(len(references))
        for start in range(0, len(order), WINDOW):
            pairs = [spoiler.spoil(references[index], epoch) for index in order[start : start + WINDOW]]
            encoded = encode_pairs(tokenizer, [pair[:2] for pair in pairs], training.max_length)
            batches = list(token_batches([len(pair.ids) for pair in encoded], training.batch_tokens))
            for index in rng.permutation(len(batches)):
                yield [encoded[i] for i in batches[index]], [pairs[i].target for i in batches[index]]


def fit(
    model: Any,
    batches: Iterator[tuple[list[EncodedPair], list[float]]],
    job: BleurtJob,
    show_progress: bool = False,
    state: str | None = None,
) -> list[dict[str, float]]:
    """Take AdamW's steps on the squared error up to `max_steps`; return the records of the loss.

    It goes on from the folder `state`, where there is one. Raises CheckpointError for a loss that is not finite.
    """
    training = job.training
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.lr, weight_decay=0.01)
    done, history, losses = 0, list[dict[str, float]](), list[float]()
    if state is not None:
        kept = torch.load(Path(state) / PROGRESS, map_location=model.device, weights_only=True)
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        done, history, losses = kept["step"], kept["history"], kept["losses"]
    tracker = TRACKERS[job.report_to](job.output, training.model_dump(), done)
    model.train()
    from ray.experimental.tqdm_ray import tqdm

    shown = tqdm(total=training.max_steps, desc="training") if show_progress else None
    if shown is not None:
        shown.update(done)
    for step, (pairs, targets) in enumerate(itertools.islice(batches, done, training.max_steps), start=done + 1):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, training)
        scores = model(**collate(pairs, model.config.pad_token_id, model.device)).logits[:, 0]
        loss = torch.nn.functional.mse_loss(scores, torch.tensor(targets, device=scores.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise CheckpointError(f"The loss is {losses[-1]} at step {step}; try a lower lr.")
        if step % job.log_steps == 0 or step == training.max_steps:
            record = {"loss": sum(losses) / len(losses), "lr": rate_at(step, training)}
            history.append({"step": step, **record})
            tracker.log(record, step)
            losses.clear()
        if step % job.save_steps == 0 and step < training.max_steps:
            progress = {"step": step, "history": history, "losses": losses}
            save_state(progress | {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        if shown is not None:
            shown.update(1)
    if shown is not None:
        shown.close()
    tracker.close()
    model.eval()
    return history


def save_state(progress: dict[str, Any]) -> None:
    """Report what `fit` goes on from to Ray Train."""
    from ray import train

    with TemporaryDirectory() as folder:
        torch.save(progress, Path(folder) / PROGRESS)
        (Path(folder) / WORLD).write_text(json.dumps({"num_workers": 1}))
        state = train.Checkpoint.from_directory(folder)
        train.report({"step": progress["step"]}, state, checkpoint_dir_name=f"step-{progress['step']}")


def rate_at(step: int, training: BleurtTraining) -> float:
    """The learning rate of a step, the first being 1: up to `lr` in the warmup, then down towards 0."""
    warmup = max(1, round(training.max_steps * training.warmup_fraction))
    return training.lr * min(step / warmup, (training.max_steps + 1 - step) / (training.max_steps + 1 - warmup))


def measure(
    model: Any, tokenizer: BleurtTokenizer, held_out: Sequence[Reference], training: BleurtTraining
) -> dict[str, float]:
    """Correlation of scores with targets on spoilt references of held-out groups, also by language.

    A language without spread in scores or targets has none.
    """
    references = held_out[:MAX_HELD_OUT]
    spoiler = Spoiler(references, training.seed + 1)
    owners = [reference for reference in references for _ in range(PAIRS_PER_HELD_OUT)]
    pairs = [spoiler.spoil(owner, index % PAIRS_PER_HELD_OUT) for index, owner in enumerate(owners)]
    encoded = encode_pairs(tokenizer, [pair[:2] for pair in pairs], training.max_length)
    scores = np.array(score_encoded(model, encoded, training.batch_tokens, tokenizer.pad_id))
    targets = np.array([pair.target for pair in pairs])
    languages = np.array([owner.lang for owner in owners])
    found = {}
    slices = {"": np.full(len(pairs), True)} | {f"/{lang}": languages == lang for lang in sorted(set(languages))}
    for suffix, mask in slices.items():
        for name, prepare in (("pearson", np.asarray), ("spearman", ranks)):
            first, second = prepare(scores[mask]), prepare(targets[mask])
            if first.std() and second.std():
                found[f"eval_{name}{suffix}"] = float(np.corrcoef(first, second)[0, 1])
    return found


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1 in rising order; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    means: np.ndarray = np.cumsum(counts) - (counts - 1) / 2
    return means[inverse]
