"""NLLB and models of its kind: sentences from one language into another, in batches of like length."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from math import ceil
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from pydantic import Field

from rayrm.batching import token_batches
from rayrm.config import NOT_IDENTITY, Config
from rayrm.errors import CheckpointError, ConfigError, ResourceError
from rayrm.languages import LANGUAGES, flores_code
from rayrm.models.ctranslate import CTranslate2Engine, is_converted
from rayrm.models.folders import load_tokenizer, local_model

if TYPE_CHECKING:
    import torch

EXTRA_NEW_TOKENS = 32
"""New tokens that even the shortest sentence may get."""
MAX_TOKENS = 512
"""Longest sentences that NLLB was trained with."""
_LANGUAGE_CODE = re.compile(r"[a-z]{2,3}_[A-Z][A-Za-z]{1,3}")


class Decoding(Config):
    """How a translation is searched. What is not here is the model's own generation config's."""

    num_beams: int = Field(1, ge=1)
    """Beams of the search; 1 is greedy."""
    max_new_tokens: int = Field(512, ge=2)
    """Most tokens of a sentence's translation, its language code included."""
    new_tokens_per_token: float | None = Field(3.0, gt=0)
    """New tokens for each token of the sentence, and 32 more; null for `max_new_tokens` whatever its length."""
    token_budget: int = Field(4096, ge=1, json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Most tokens of a batch's sentences, padding included, times `num_beams`."""


class Engine(Protocol):
    """A model that is ready to translate."""

    def generate(self, rows: list[list[int]], target: int, bounds: list[int], num_beams: int) -> list[list[int]]:
        """The best translation of each row of token ids: at most its bound of ids.

        The first is `target`, and the last is the end token where the model ended the sentence.
        """


class Translator(NamedTuple):
    """A loaded model and its tokenizer, which keeps the source language: for one thread at a time."""

    engine: Engine
    tokenizer: Any
    max_tokens: int = MAX_TOKENS
    """Most tokens of a sentence, special ones included, that the model was made for."""


class Translation(NamedTuple):
    """A sentence in another language."""

    text: str
    is_finished: bool
    """Whether the model ended it, and not the bound on new tokens."""


def load_translator(path: str, device: str | None = None, dtype: torch.dtype | None = None) -> Translator:
    """An encoder-decoder with language codes in evaluation mode, from a folder, a bucket or a hub id.

    A folder that CTranslate2's converter has written is run by that package. `device` is the GPU when there is one;
    `dtype` is bf16 on a GPU and fp32 on a CPU, or what a converted model has. Raises CheckpointError when files are
    missing or unreadable, when weights are missing or of another shape, or when the tokenizer has no language codes
    or more tokens than the model.
    """
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    folder = local_model(path)
    network = None if is_converted(folder) else _load_network(path, folder, device, dtype)
    tokenizer = load_tokenizer(path)
    if not language_codes(tokenizer):
        raise CheckpointError(f"The tokenizer of '{path}' has no language codes such as deu_Latn; give an NLLB model.")
    if network is None:
        return Translator(CTranslate2Engine(folder, tokenizer, device, dtype), tokenizer)
    if len(tokenizer) > network.config.vocab_size:
        raise CheckpointError(
            f"The tokenizer of '{path}' has {len(tokenizer)} tokens and its model only {network.config.vocab_size}."
        )
    positions = getattr(network.config, "max_position_embeddings", MAX_TOKENS)
    return Translator(TransformersEngine(network, tokenizer), tokenizer, min(MAX_TOKENS, positions))


def _load_network(path: str, folder: str, device: str, dtype: torch.dtype | None) -> Any:
    import torch
    from transformers import AutoModelForSeq2SeqLM

    from rayrm.models.cpu import keep_freed_memory, use_onednn

    dtype = dtype or (torch.bfloat16 if device.startswith("cuda") else torch.float32)
    try:
        network, loaded = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    except Exception as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0].rstrip(".")
        raise CheckpointError(f"'{path}' does not load as an encoder-decoder: {reason}.") from error
    # Unexpected ones are no fault: old checkpoints hold the positions, which are computed.
    faults = [
        f"{kind.replace('_', ' ')}: {', '.join(map(str, sorted(loaded[kind])[:4]))}"
        for kind in ("missing_keys", "mismatched_keys")
        if loaded[kind]
    ]
    if faults:
        raise CheckpointError(f"The weights at '{path}' are not whole ({'; '.join(faults)}).")
    # `Decoding` bounds the length, and transformers warns of two bounds.
    network.generation_config.max_length = None
    network.to(device).eval()
    if device == "cpu":
        for part in (network.get_encoder(), network.get_decoder()):
            use_onednn(part)
        keep_freed_memory()
    return network


def language_codes(tokenizer: Any) -> list[str]:
    """The codes that a tokenizer has tokens for, such as `deu_Latn`."""
    names = [token for token in tokenizer.all_special_tokens if _LANGUAGE_CODE.fullmatch(token)]
    # A token that is not in the vocabulary has the id of the unknown one.
    return [name for name in names if tokenizer.convert_tokens_to_ids(name) not in (None, tokenizer.unk_token_id)]


def find_languages(tokenizer: Any, codes: Iterable[str]) -> dict[str, str]:
    """The model's own code for each of `codes`, which are its own or ISO codes of the table.

    Raises ConfigError that names all codes which the model has not, and for each the closest ones that it has.
    """
    known = language_codes(tokenizer)
    found = {code: flores_code(code) for code in codes}
    missing = [code for code, own in found.items() if own not in known]
    if missing:
        told = ", ".join(f"'{code}' (close: {', '.join(_close_codes(code, known)) or 'none'})" for code in missing)
        raise ConfigError(f"The model has no language {told}; give one of its {len(known)} codes, such as {known[0]}.")
    return found


def _close_codes(code: str, known: Sequence[str]) -> list[str]:
    spellings = {own.casefold(): own for own in known}
    for language in LANGUAGES.values():
        if language.flores in known:
            spellings |= {language.code: language.flores, language.name.casefold(): language.flores}
    folded = code.casefold().replace("-", "_")
    same_language = [own for own in known if own.split("_")[0] == folded.split("_")[0]]
    near = map(spellings.__getitem__, get_close_matches(folded, spellings))
    return list(dict.fromkeys([*same_language, *near]))[:5]


def translate_sentences(
    translator: Translator, sentences: Sequence[str], src_lang: str, tgt_lang: str, decoding: Decoding
) -> list[Translation]:
    """The translation of each sentence from one of the model's languages into another, in the order of `sentences`.

    Each distinct sentence is translated once; one without text stays as it is. The text is that of one sentence a call,
    but where the model's generation config has `early_stopping="never"`, which looks at the whole batch. A batch that
    does not fit into memory is halved. Raises ConfigError for a language that the model has not, and ResourceError
    when one sentence alone does not fit.
    """
    own = find_languages(translator.tokenizer, (src_lang, tgt_lang))
    distinct = list(dict.fromkeys(sentence for sentence in sentences if sentence.strip()))
    done = {sentence: Translation(sentence, True) for sentence in sentences if not sentence.strip()}
    if distinct:
        translator.tokenizer.src_lang = own[src_lang]
        # A sentence that spells "</s>" or a language code must stay a sentence.
        ids = translator.tokenizer(distinct, truncation=False, split_special_tokens=True, verbose=False)["input_ids"]
        target = translator.tokenizer.convert_tokens_to_ids(own[tgt_lang])
        for batch in token_batches([len(row) * decoding.num_beams for row in ids], decoding.token_budget):
            found = _translate_batch(translator, [ids[index] for index in batch], target, decoding)
            done |= {distinct[index]: translation for index, translation in zip(batch, found, strict=True)}
    return [done[sentence] for sentence in sentences]


def count_tokens(translator: Translator, sentence: str) -> int:
    """Tokens of a sentence as the model reads it, its language code and end included."""
    return len(translator.tokenizer(sentence, truncation=False, split_special_tokens=True, verbose=False)["input_ids"])


def _translate_batch(
    translator: Translator, rows: list[list[int]], target: int, decoding: Decoding
) -> list[Translation]:
    from accelerate.utils.memory import should_reduce_batch_size

    try:
        return _generate(translator, rows, target, decoding)
    except RuntimeError as error:
        if not should_reduce_batch_size(error) and "out of memory" not in str(error):
            raise
        if len(rows) == 1:
            raise ResourceError(
                f"Memory runs out with one sentence of {len(rows[0])} tokens and num_beams={decoding.num_beams}; lower "
                "num_beams, max_new_tokens or the longest sentence."
            ) from error
    # Outside of the handler, whose error holds the tensors of the failed batch.
    half = len(rows) // 2
    return [
        *_translate_batch(translator, rows[:half], target, decoding),
        *_translate_batch(translator, rows[half:], target, decoding),
    ]


def _generate(translator: Translator, rows: list[list[int]], target: int, decoding: Decoding) -> list[Translation]:
    engine, tokenizer = translator.engine, translator.tokenizer
    bounds = [max_new_tokens(len(row), decoding) for row in rows]
    generated = engine.generate(rows, target, bounds, decoding.num_beams)
    texts = tokenizer.batch_decode(generated, skip_special_tokens=True)
    return [
        Translation(text.strip(), row[-1] == tokenizer.eos_token_id) for text, row in zip(texts, generated, strict=True)
    ]


class _OwnBounds:
    """Stops each sentence of a batch at its own bound, as if it were alone."""

    def __init__(self, bounds: Sequence[int], device: Any) -> None:
        import torch

        # The decoder's first token is no new one.
        self.lengths = torch.tensor(bounds, device=device) + 1

    def __call__(self, input_ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        # A beam search asks for several rows a sentence.
        return (input_ids.shape[1] >= self.lengths).repeat_interleave(len(input_ids) // len(self.lengths))


class TransformersEngine:
    """An encoder-decoder of transformers."""

    def __init__(self, network: Any, tokenizer: Any) -> None:
        self.network = network
        self.pad_id, self.end_id = tokenizer.pad_token_id, tokenizer.eos_token_id

    def generate(self, rows: list[list[int]], target: int, bounds: list[int], num_beams: int) -> list[list[int]]:
        """As `Engine.generate`. Rows are padded on the right, and the padding is masked."""
        import torch

        longest = max(map(len, rows))
        ids = torch.tensor([row + [self.pad_id] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        with torch.inference_mode():
            generated = self.network.generate(
                input_ids=ids.to(self.network.device),
                attention_mask=mask.to(self.network.device),
                forced_bos_token_id=target,
                max_new_tokens=max(bounds),
                num_beams=num_beams,
                do_sample=False,
                stopping_criteria=[_OwnBounds(bounds, self.network.device)],
            )
        # NLLB's decoder starts from the end token.
        return [self._cut(row[1 : bound + 1]) for row, bound in zip(generated.tolist(), bounds, strict=True)]

    def _cut(self, row: list[int]) -> list[int]:
        return row[: row.index(self.end_id) + 1] if self.end_id in row else row


def max_new_tokens(num_tokens: int, decoding: Decoding) -> int:
    """The bound on new tokens for a sentence of `num_tokens` tokens, special ones included."""
    if decoding.new_tokens_per_token is None:
        return decoding.max_new_tokens
    return min(decoding.max_new_tokens, EXTRA_NEW_TOKENS + ceil(decoding.new_tokens_per_token * num_tokens))
