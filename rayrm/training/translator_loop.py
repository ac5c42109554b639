"""The loop that trains a small NLLB model, as its Ray Train worker runs it.

All chance hangs on the seed, so a run that dies is simply begun again and ends with the same model.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from rayrm import files
from rayrm.batching import token_batches
from rayrm.errors import CheckpointError
from rayrm.languages import flores_code
from rayrm.models.nllb import Decoding, Translator, load_translator, translate_sentences
from rayrm.training.checkpoints import export_model
from rayrm.training.curves import write_curves
from rayrm.training.launch import MODEL, prepare_worker
from rayrm.training.tracking import TRACKERS
from rayrm.training.translator import Pair, TranslatorJob, TranslatorTraining, read_pairs

SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>"]
"""In NLLB's order."""
WINDOW = 2048
"""Pairs of like length are sought within a window."""
MAX_HELD_OUT = 200
"""Pairs of a direction that are translated at the most."""
IGNORED = -100
"""The label of padding."""


class EncodedPair(NamedTuple):
    """Token ids of both sides, each `[language code] … [end]`."""

    source: list[int]
    target: list[int]


def train_loop(given: dict[str, Any]) -> dict[str, Any]:
    """Train, save the model, measure what was saved, and return its facts."""
    from transformers import M2M100ForConditionalGeneration

    job = TranslatorJob.model_validate(given["job"])
    training = job.training
    prepare_worker(job.workers.num_cpus, job.workers.num_gpus > 0)
    device = "cuda" if job.workers.num_gpus else "cpu"
    train, held_out = read_pairs(job.input, training)
    tokenizer = make_tokenizer([*train, *held_out], train, training.vocab_size)
    encoded = [pair for pair in encode_pairs(tokenizer, train) if max(map(len, pair)) <= training.max_length]
    if not encoded:
        raise CheckpointError(
            f"Each of the {len(train)} pairs has more than {training.max_length} tokens; raise max_length."
        )
    model = make_model(training, len(tokenizer)).to(device)
    history = fit(model, stream_batches(encoded, training), job, given["show_progress"])

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    export_model(job.output, save, M2M100ForConditionalGeneration)
    metrics = measure(load_translator(files.join(job.output, MODEL), device), held_out)
    write_curves([*history, {"step": training.max_steps, **metrics}], job.output)
    return {
        "steps": training.max_steps,
        "num_pairs": len(encoded),
        "num_overlength": len(train) - len(encoded),
        "num_held_out": len(held_out),
        "vocab_size": len(tokenizer),
        "num_parameters": int(model.num_parameters()),
        "metrics": {"loss": history[-1]["loss"], **metrics},
    }


def make_tokenizer(all_pairs: Sequence[Pair], train: Sequence[Pair], vocab_size: int) -> Any:
    """An NLLB tokenizer with a BPE vocabulary of `train` and the codes of all languages; the same for the same rows.

    The vocabulary has at most `vocab_size` entries, language codes and `<mask>` not counted.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import NllbTokenizer

    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    # What NllbTokenizer does before BPE.
    trained.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, show_progress=False)
    # A sentence stands in several directions and counts once.
    texts = sorted({(lang, text) for pair in train for lang, text in sides_of(pair)})
    trained.train_from_iterator([text for _, text in texts], trainer)
    learnt = json.loads(trained.to_str())["model"]
    codes = sorted({flores_code(lang) for pair in all_pairs for lang, _ in sides_of(pair)})
    merges: Any = [tuple(merge) for merge in learnt["merges"]]
    return NllbTokenizer(vocab=learnt["vocab"], merges=merges, src_lang=codes[0], extra_special_tokens=codes)


def sides_of(pair: Pair) -> tuple[tuple[str, str], tuple[str, str]]:
    """Language and text of the source, and of the reference."""
    return (pair.src_lang, pair.source), (pair.tgt_lang, pair.reference)


def encode_pairs(tokenizer: Any, pairs: Sequence[Pair]) -> list[EncodedPair]:
    """Token ids of each pair, whole. A text that spells a special token is still a text."""
    texts = [text for pair in pairs for _, text in sides_of(pair)]
    plain = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    codes = [tokenizer.convert_tokens_to_ids(flores_code(lang)) for pair in pairs for lang, _ in sides_of(pair)]
    rows = [[code, *ids, tokenizer.eos_token_id] for code, ids in zip(codes, plain, strict=True)]
    return [EncodedPair(*both) for both in zip(rows[::2], rows[1::2], strict=True)]


def make_model(training: TranslatorTraining, vocab_size: int) -> Any:
    """A model of NLLB's architecture with random weights, whose embeddings and positions begin equally strong."""
    from transformers import M2M100Config, M2M100ForConditionalGeneration

    torch.manual_seed(training.seed)
    config = M2M100Config(
        vocab_size=vocab_size,
        d_model=training.hidden_size,
        encoder_layers=training.num_layers,
        decoder_layers=training.num_layers,
        encoder_attention_heads=training.num_heads,
        decoder_attention_heads=training.num_heads,
        encoder_ffn_dim=training.intermediate_size,
        decoder_ffn_dim=training.intermediate_size,
        encoder_layerdrop=0.0,
        decoder_layerdrop=0.0,
        max_position_embeddings=training.max_length,
        init_std=training.hidden_size**-0.5,
        dropout=training.dropout,
        attention_dropout=0.0,
    )
    return M2M100ForConditionalGeneration(config)


def stream_batches(pairs: Sequence[EncodedPair], training: TranslatorTraining) -> Iterator[list[EncodedPair]]:
    """Batches of pairs, without end: every pass over them is in another order."""
    for epoch in itertools.count():
        rng: Any = np.random.default_rng([training.seed, epoch])
        order = rng.permutation(len(pairs))
        for start in range(0, len(order), WINDOW):
            window = [pairs[index] for index in order[start : start + WINDOW]]
            batches = list(token_batches([max(map(len, pair)) for pair in window], training.batch_tokens))
            for index in rng.permutation(len(batches)):
                yield [window[i] for i in batches[index]]


def collate(batch: Sequence[EncodedPair], pad_id: int, device: Any) -> dict[str, torch.Tensor]:
    """Tensors [pairs, longest] of sources, their mask and labels, padded on the right.

    The model shifts the labels itself: its decoder reads `[end] [language code] …` and is to write `[language code] …
    [end]`.
    """
    sources = _pad([pair.source for pair in batch], pad_id)
    labels = _pad([pair.target for pair in batch], IGNORED)
    found = {"input_ids": sources, "attention_mask": (sources != pad_id).long(), "labels": labels}
    return {name: tensor.to(device) for name, tensor in found.items()}


def _pad(rows: Sequence[list[int]], value: int) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


def fit(
    model: Any, batches: Iterator[list[EncodedPair]], job: TranslatorJob, show_progress: bool = False
) -> list[dict[str, float]]:
    """Take `max_steps` steps of AdamW on the cross-entropy of target tokens; return the records of the loss.

    The language code is a target token too, and a source that has several keeps the loss above 0. Raises
    CheckpointError when the loss is not finite.
    """
    training = job.training
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: share_of_rate(done, training))
    tracker = TRACKERS[job.report_to](job.output, training.model_dump(), 0)
    history: list[dict[str, float]] = []
    losses: list[float] = []
    model.train()
    from ray.experimental.tqdm_ray import tqdm

    shown = tqdm(total=training.max_steps, desc="training") if show_progress else None
    for step, batch in enumerate(itertools.islice(batches, training.max_steps), start=1):
        loss = model(**collate(batch, model.config.pad_token_id, model.device), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise CheckpointError(f"The loss is {losses[-1]} at step {step}; try a lower lr.")
        if step % job.log_steps == 0 or step == training.max_steps:
            record = {"loss": sum(losses) / len(losses), "lr": float(schedule.get_last_lr()[0])}
            history.append({"step": step, **record})
            tracker.log(record, step)
            losses.clear()
        schedule.step()
        if shown is not None:
            shown.update(1)
    if shown is not None:
        shown.close()
    tracker.close()
    model.eval()
    return history


def share_of_rate(done: int, training: TranslatorTraining) -> float:
    """The share of `lr` of the step after `done` steps: up to 1 in the warmup, then down towards 0."""
    warmup = max(1, round(training.max_steps * training.warmup_fraction))
    return min((done + 1) / warmup, (training.max_steps - done) / (training.max_steps + 1 - warmup))


def measure(translator: Translator, held_out: Sequence[Pair]) -> dict[str, float]:
    """Exact match (0 to 1) and chrF (0 to 100) of greedy translations of held-out pairs, by direction."""
    from sacrebleu.metrics.chrf import CHRF

    directions: dict[tuple[str, str], list[Pair]] = {}
    for pair in held_out:
        directions.setdefault((pair.src_lang, pair.tgt_lang), []).append(pair)
    found = {}
    for (src_lang, tgt_lang), pairs in sorted(directions.items()):
        pairs = pairs[:MAX_HELD_OUT]
        translations = translate_sentences(translator, [pair.source for pair in pairs], src_lang, tgt_lang, Decoding())
        texts = [translation.text for translation in translations]
        references = [pair.reference for pair in pairs]
        num_same = sum(text == reference for text, reference in zip(texts, references, strict=True))
        found[f"eval_exact_match/{src_lang}-{tgt_lang}"] = num_same / len(pairs)
        found[f"eval_chrf/{src_lang}-{tgt_lang}"] = float(CHRF().corpus_score(texts, [references]).score)
    return found
