"""Translation by NLLB: our batches against plain transformers with one sentence a call, as published scripts do it.

Both sides translate the same sentences with the same weights, threads and bounds on new tokens, in fp32. The model has
random weights and an NLLB tokenizer that is trained on the sentences. It hardly ever ends a sentence by itself, so both
sides go on to the published script's bound of 30 tokens. Loading is left out, tokenisation is not.

    python benchmarks/translation.py [parallel file] [threads]
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from rayrm.models.nllb import Decoding, load_translator, max_new_tokens, translate_sentences
from rayrm.shards import read_table
from rayrm.sources.grammar import GrammarConfig, write_sentences

PARALLEL = Path(__file__).resolve().parents[2] / "shared" / "data" / "parallel" / "test.parquet"
NUM_SENTENCES = 300
SIZES: dict[str, Any] = {
    "d_model": 192,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_ffn_dim": 768,
    "decoder_ffn_dim": 768,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
}
VOCABULARY = 4000
CODES = ("eng_Latn", "deu_Latn")
DECODING = Decoding(max_new_tokens=30, new_tokens_per_token=None)
ROUNDS = 2
REQUIRED = 12.0


def main() -> None:
    """Make the model, run both sides in turn, keep the best time of each, print the ratio."""
    sentences = read_sentences(sys.argv[1] if len(sys.argv) > 1 else None)
    torch.set_num_threads(int(sys.argv[2]) if len(sys.argv) > 2 else 2)
    with tempfile.TemporaryDirectory() as folder:
        num_parameters = make_model(sentences, folder)
        translator = load_translator(folder, device="cpu")
        baseline = load_baseline(folder)
    print(f"{len(sentences)} sentences, {num_parameters / 1e6:.1f}M parameters, {torch.get_num_threads()} threads")
    ours_s, theirs_s = [], []
    for _ in range(ROUNDS):
        seconds, found = timed(lambda: translate_sentences(translator, sentences, *CODES, DECODING))
        ours_s.append(seconds)
        seconds, expected = timed(lambda: baseline(sentences, DECODING))
        theirs_s.append(seconds)
    ours = [translation.text for translation in found]
    num_different = sum(first != second for first, second in zip(ours, expected, strict=True))
    print(f"  one sentence a call {len(ours) / min(theirs_s):8,.1f} sentences/s")
    print(f"  ours                {len(ours) / min(ours_s):8,.1f} sentences/s")
    print(f"  ratio {min(theirs_s) / min(ours_s):.1f} (at least {REQUIRED:g} is asked)")
    print(f"  {num_different} of {len(ours)} texts differ (0 are asked); {len(set(ours))} are distinct")


def read_sentences(path: str | None) -> list[str]:
    """The first distinct English sentences of a parallel file, or of made ones where there is no file."""
    if path is not None or PARALLEL.exists():
        rows = read_table(path or str(PARALLEL)).to_pylist()
    else:
        rows = write_sentences(GrammarConfig()).to_pylist()
    sides = [(row[f"{side}_lang"], row[f"{side}_text"]) for row in rows for side in ("src", "trg")]
    return list(dict.fromkeys(text for lang, text in sides if lang == "en"))[:NUM_SENTENCES]


def make_model(sentences: Sequence[str], folder: str) -> int:
    """Save a small model with random weights; give the number of its parameters."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import M2M100Config, M2M100ForConditionalGeneration, NllbTokenizer

    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
    trained.train_from_iterator(sentences, trainer)
    learnt = json.loads(trained.to_str())["model"]
    merges: Any = [tuple(pair) for pair in learnt["merges"]]
    tokenizer = NllbTokenizer(vocab=learnt["vocab"], merges=merges, extra_special_tokens=list(CODES))
    torch.manual_seed(0)
    # Far from 0.02, and with an output layer of its own, so that each sentence gets a translation of its own.
    spread: dict[str, Any] = {"init_std": 0.15, "tie_word_embeddings": False}
    network = M2M100ForConditionalGeneration(M2M100Config(vocab_size=len(tokenizer), **SIZES, **spread))
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return int(network.num_parameters())


def load_baseline(folder: str) -> Callable[[Sequence[str], Decoding], list[str]]:
    """Transformers' own model and tokenizer, one sentence a call."""
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    network, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    network.generation_config.max_length = None
    tokenizer.src_lang = CODES[0]
    target = tokenizer.convert_tokens_to_ids(CODES[1])

    def translate(sentences: Sequence[str], decoding: Decoding) -> list[str]:
        texts = []
        for sentence in sentences:
            inputs = tokenizer(sentence, return_tensors="pt")
            bound = max_new_tokens(inputs["input_ids"].shape[1], decoding)
            generated = network.generate(
                **inputs, forced_bos_token_id=target, max_new_tokens=bound, num_beams=decoding.num_beams
            )
            texts.append(tokenizer.batch_decode(generated, skip_special_tokens=True)[0].strip())
        return texts

    return translate


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Wall-clock seconds of a call, and what it returns."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


if __name__ == "__main__":
    main()
