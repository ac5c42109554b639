"""BLEURT: bleurt-pytorch's model and checkpoints under transformers 5, and scores for pairs of texts.

bleurt-pytorch 0.0.1 was written for transformers 4. Five things stand between it and transformers 5, and this module
is the only place that knows them:

- two names that its imports look for are gone; they are there while it is imported, and taken away again;
- two methods of `PreTrainedModel` are gone; its own model class gets them;
- `from_pretrained` leaves buffers that are not in the checkpoint uninitialised; they are filled after loading;
- its WordPiece tokenizer "loads" from a folder without a vocabulary, as five tokens; the files decide the kind here;
- its SentencePiece tokenizer gives other ids than the checkpoint was trained with; the `.model` file is read by
  sentencepiece itself, as the original BLEURT does.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from rayrm import files
from rayrm.batching import token_batches
from rayrm.errors import CheckpointError
from rayrm.models.cpu import keep_freed_memory, use_onednn
from rayrm.models.folders import local_model

SENTENCEPIECE_FILE = "spm.model"
WORDPIECE_FILES = ("tokenizer.json", "vocab.txt")
NUM_SPECIAL = 3
"""`[CLS]` and two `[SEP]`."""


class BleurtTokenizer(NamedTuple):
    """Texts → token ids without special tokens, and the special tokens that a pair needs."""

    encode: Callable[[list[str]], list[list[int]]]
    cls_id: int
    sep_id: int
    pad_id: int
    vocab_size: int


class EncodedPair(NamedTuple):
    """`[CLS] reference [SEP] candidate [SEP]`."""

    ids: list[int]
    num_first: int
    """How many of the ids are in segment 0; the others are in segment 1."""
    is_truncated: bool


@contextmanager
def _names_of_transformers_4() -> Iterator[None]:
    """The two names that bleurt-pytorch's import statements need and its model never uses."""
    from transformers import BertTokenizer, pytorch_utils

    fast = types.ModuleType("transformers.models.bert.tokenization_bert_fast")
    vars(fast)["BertTokenizerFast"] = BertTokenizer
    sys.modules[fast.__name__] = fast
    vars(pytorch_utils)["find_pruneable_heads_and_indices"] = None
    try:
        yield
    finally:
        del sys.modules[fast.__name__], vars(pytorch_utils)["find_pruneable_heads_and_indices"]


@cache
def bleurt_classes() -> tuple[Any, Any, Any]:
    """bleurt-pytorch's config, sequence classifier and WordPiece tokenizer, fit to run."""
    with _names_of_transformers_4():
        from bleurt_pytorch import BleurtConfig, BleurtForSequenceClassification
        from bleurt_pytorch.bleurt.modeling_bleurt import BleurtModel
        from bleurt_pytorch.bleurt.tokenization_bleurt_fast import BleurtTokenizerFast
    BleurtModel.get_extended_attention_mask = _extended_attention_mask
    BleurtModel.get_head_mask = _head_mask
    return BleurtConfig, BleurtForSequenceClassification, BleurtTokenizerFast


def _extended_attention_mask(model: Any, mask: torch.Tensor, _shape: Any) -> torch.Tensor:
    return (1.0 - mask[:, None, None, :].to(model.dtype)) * torch.finfo(model.dtype).min


def _head_mask(_model: Any, head_mask: Any, num_layers: int) -> Any:
    return [None] * num_layers if head_mask is None else head_mask


def _sdpa_forward(
    self: Any, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, *_: Any, **__: Any
) -> tuple[torch.Tensor]:
    """What bleurt-pytorch's self-attention computes, by PyTorch's fused kernel; attention weights are not returned."""
    query, key, value = (self.transpose_for_scores(part(hidden_states)) for part in (self.query, self.key, self.value))
    dropout = self.dropout.p if self.training else 0.0
    mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, dropout_p=dropout)
    return (mixed.transpose(1, 2).flatten(2),)


def use_sdpa(model: Any) -> Any:
    """Replace the eager self-attention of a BLEURT model, in place."""
    for layer in model.bleurt.encoder.layer:
        attention = layer.attention.self
        attention.forward = types.MethodType(_sdpa_forward, attention)
    return model


def new_bleurt(**sizes: Any) -> Any:
    """A BLEURT model with random weights; `sizes` are fields of bleurt-pytorch's config."""
    config_class, model_class, _ = bleurt_classes()
    return use_sdpa(model_class(config_class(**sizes)))


def load_bleurt(path: str, device: str | None = None, dtype: torch.dtype | None = None) -> tuple[Any, BleurtTokenizer]:
    """A BLEURT checkpoint in evaluation mode, and its tokenizer, from a folder, a bucket or a hub id.

    `device` is the GPU when there is one; `dtype` is bf16 on a GPU and fp32 on a CPU. Pooler and classifier stay in
    fp32, because bf16 cannot tell scores apart that differ by less than 0.004. Raises CheckpointError when files are
    missing or unreadable, or when weights are missing, unexpected or of another shape.
    """
    _, model_class, _ = bleurt_classes()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or (torch.bfloat16 if device.startswith("cuda") else torch.float32)
    try:
        folder = local_model(path)
        model, loaded = model_class.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    except Exception as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0].rstrip(".")
        raise CheckpointError(f"'{path}' does not load as a BLEURT checkpoint: {reason}.") from error
    faults = [
        f"{kind.replace('_', ' ')}: {', '.join(map(str, sorted(loaded[kind])[:4]))}" for kind in loaded if loaded[kind]
    ]
    if faults:
        raise CheckpointError(f"The weights at '{path}' are not those of a BLEURT scorer ({'; '.join(faults)}).")
    _fill_buffers(model)
    tokenizer = load_tokenizer(folder, model.config)
    use_sdpa(model).to(device).eval()
    if device == "cpu":
        use_onednn(model.bleurt.encoder)
        keep_freed_memory()
    for head in (model.bleurt.pooler, model.classifier):
        head.float()
    model.bleurt.pooler.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    return model, tokenizer


def _fill_buffers(model: Any) -> None:
    embeddings = model.bleurt.embeddings
    embeddings.position_ids = torch.arange(model.config.max_position_embeddings).expand((1, -1))
    embeddings.token_type_ids = torch.zeros_like(embeddings.position_ids)


def save_bleurt(model: Any, vocabulary: Sequence[str], folder: str) -> None:
    """Write a checkpoint with a cased WordPiece vocabulary, as `load_bleurt` and bleurt-pytorch read it."""
    model.save_pretrained(folder)
    save_vocabulary(vocabulary, folder)


def save_vocabulary(vocabulary: Sequence[str], folder: str) -> None:
    """Write a cased WordPiece vocabulary, as `load_wordpiece` reads it."""
    Path(folder, "vocab.txt").write_text("".join(f"{token}\n" for token in vocabulary), encoding="utf-8")
    settings = {"tokenizer_class": "BleurtTokenizer", "do_lower_case": False, "strip_accents": False}
    files.write_json(files.join(folder, "tokenizer_config.json"), settings)


def load_tokenizer(path: str, config: Any) -> BleurtTokenizer:
    """The tokenizer of a BLEURT checkpoint, of the kind whose files are there. Raises CheckpointError."""
    from transformers.utils.hub import cached_file

    def find(name: str) -> str | None:
        return cached_file(path, name, _raise_exceptions_for_missing_entries=False)

    try:
        sentencepiece_file = find(SENTENCEPIECE_FILE)
        if sentencepiece_file is not None:
            tokenizer = _load_sentencepiece(sentencepiece_file, config.pad_token_id)
        elif any(find(name) for name in WORDPIECE_FILES):
            tokenizer = load_wordpiece(path, config.pad_token_id)
        else:
            known = ", ".join((SENTENCEPIECE_FILE, *WORDPIECE_FILES))
            raise CheckpointError(f"'{path}' has no tokenizer; a BLEURT checkpoint needs one of {known}.")
    except OSError as error:
        raise CheckpointError(f"The tokenizer of '{path}' cannot be read: {error}.") from error
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"The tokenizer of '{path}' has {tokenizer.vocab_size} tokens and its model only {config.vocab_size}."
        )
    return tokenizer


def _load_sentencepiece(file: str, pad_id: int) -> BleurtTokenizer:
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_file=file)
    cls_id, sep_id = (pieces.PieceToId(token) for token in ("[CLS]", "[SEP]"))
    if pieces.unk_id() in (cls_id, sep_id):
        raise CheckpointError(f"'{file}' has no pieces '[CLS]' and '[SEP]', which a BLEURT pair needs.")
    return BleurtTokenizer(pieces.encode, cls_id, sep_id, pad_id, pieces.GetPieceSize())


def load_wordpiece(path: str, pad_id: int) -> BleurtTokenizer:
    """bleurt-pytorch's WordPiece tokenizer from a folder or hub id that is known to hold its files."""
    tokenizer = bleurt_classes()[2].from_pretrained(path)

    def encode(texts: list[str]) -> list[list[int]]:
        # A text that spells "[SEP]" must not end its segment.
        rest = {"truncation": False, "padding": False, "verbose": False, "split_special_tokens": True}
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, **rest)
        return list(encoded["input_ids"])

    return BleurtTokenizer(encode, tokenizer.cls_token_id, tokenizer.sep_token_id, pad_id, len(tokenizer))


def encode_pairs(tokenizer: BleurtTokenizer, pairs: Sequence[tuple[str, str]], max_length: int) -> list[EncodedPair]:
    """Encode (reference, candidate) pairs; every text is tokenised once.

    A pair that is longer than `max_length` tokens loses tokens from the end of its longer side, and of the candidate
    when both are equally long, as in the original BLEURT.
    """
    texts = list(dict.fromkeys(text for pair in pairs for text in pair))
    ids = dict(zip(texts, tokenizer.encode(texts), strict=True)) if texts else {}
    return [_join(tokenizer, ids[first], ids[second], max_length) for first, second in pairs]


def _join(tokenizer: BleurtTokenizer, first: list[int], second: list[int], max_length: int) -> EncodedPair:
    num_first, num_second = len(first), len(second)
    room = max_length - NUM_SPECIAL
    while num_first + num_second > room:
        if num_first > num_second:
            num_first -= 1
        else:
            num_second -= 1
    ids = [tokenizer.cls_id, *first[:num_first], tokenizer.sep_id, *second[:num_second], tokenizer.sep_id]
    return EncodedPair(ids, num_first + 2, num_first + num_second < len(first) + len(second))


def collate(pairs: Sequence[EncodedPair], pad_id: int, device: Any = None) -> dict[str, torch.Tensor]:
    """Model inputs of shape (pairs, longest pair), padded on the right."""
    shape = (len(pairs), max(len(pair.ids) for pair in pairs))
    ids = np.full(shape, pad_id, dtype=np.int64)
    segments = np.zeros(shape, dtype=np.int64)
    mask = np.zeros(shape, dtype=np.int64)
    for row, pair in enumerate(pairs):
        ids[row, : len(pair.ids)] = pair.ids
        segments[row, pair.num_first : len(pair.ids)] = 1
        mask[row, : len(pair.ids)] = 1
    arrays = {"input_ids": ids, "token_type_ids": segments, "attention_mask": mask}
    return {name: torch.from_numpy(array).to(device, non_blocking=True) for name, array in arrays.items()}


@torch.inference_mode()
def score_encoded(model: Any, pairs: Sequence[EncodedPair], token_budget: int, pad_id: int) -> list[float]:
    """BLEURT's score of each pair, in the order of `pairs`, by batches of at most `token_budget` padded tokens."""
    order: list[int] = []
    scores = []
    for batch in token_batches([len(pair.ids) for pair in pairs], token_budget):
        inputs = collate([pairs[index] for index in batch], pad_id, model.device)
        scores.append(model(**inputs).logits[:, 0])
        order += batch
    result = [0.0] * len(pairs)
    # One transfer at the end, so that a GPU is never waited for between batches.
    for index, score in zip(order, torch.cat(scores).tolist() if scores else [], strict=True):
        result[index] = score
    return result
