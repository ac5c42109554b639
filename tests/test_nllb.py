"""NLLB models, tiny and with random weights: the same text as one sentence a call."""

import json
import random
import sys

import pytest
import torch

from rayrm.errors import CheckpointError, ConfigError, ResourceError
from rayrm.models import nllb
from rayrm.models.ctranslate import CTranslate2Engine
from rayrm.models.nllb import (
    Decoding,
    Translation,
    Translator,
    find_languages,
    language_codes,
    load_translator,
    max_new_tokens,
    translate_sentences,
)

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "house",
    "sea",
    "runs",
    "sleeps",
    "sees",
    "and",
    "under",
    "near",
    "old",
    "red",
    "small",
    "bird",
]
CODES = ["eng_Latn", "deu_Latn", "zho_Hans", "zho_Hant", "arb_Arab"]
GREEDY = Decoding(max_new_tokens=24, token_budget=200)


def random_sentences(num, seed=0):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 18))) + "." for _ in range(num)]


def save_model(path, **generation):
    """Save a model with random weights in `path`, and these settings for its generation."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import M2M100Config, M2M100ForConditionalGeneration, NllbTokenizer

    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trained.train_from_iterator(
        random_sentences(200, seed=1), trainers.BpeTrainer(vocab_size=90, special_tokens=special, show_progress=False)
    )
    learnt = json.loads(trained.to_str())["model"]
    tokenizer = NllbTokenizer(
        vocab=learnt["vocab"], merges=[tuple(pair) for pair in learnt["merges"]], extra_special_tokens=CODES
    )
    torch.manual_seed(3)
    config = M2M100Config(
        vocab_size=len(tokenizer),
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        max_position_embeddings=128,
        # Far from 0.02, and with an output layer of its own, so that each sentence gets a translation of its own.
        init_std=0.15,
        tie_word_embeddings=False,
    )
    network = M2M100ForConditionalGeneration(config)
    network.generation_config.update(max_length=200, **generation)
    network.save_pretrained(path)
    tokenizer.save_pretrained(path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("nllb")
    save_model(path)
    return path


@pytest.fixture(scope="module")
def translator(checkpoint):
    return load_translator(str(checkpoint), device="cpu")


@pytest.fixture(scope="module")
def plain(checkpoint):
    """Transformers' own model and tokenizer, without anything of ours."""
    from transformers import AutoTokenizer, M2M100ForConditionalGeneration

    network = M2M100ForConditionalGeneration.from_pretrained(checkpoint).eval()
    network.generation_config.max_length = None
    return network, AutoTokenizer.from_pretrained(checkpoint)


def one_at_a_time(plain, sentences, src_lang, tgt_lang, decoding):
    network, tokenizer = plain
    tokenizer.src_lang = src_lang
    texts = []
    for sentence in sentences:
        inputs = tokenizer(sentence, return_tensors="pt")
        generated = network.generate(
            **inputs,
            forced_bos_token_id=tokenizer.convert_tokens_to_ids(tgt_lang),
            num_beams=decoding.num_beams,
            max_new_tokens=max_new_tokens(inputs["input_ids"].shape[1], decoding),
        )
        texts.append(tokenizer.batch_decode(generated, skip_special_tokens=True)[0].strip())
    return texts


@pytest.mark.parametrize(
    "decoding",
    [
        GREEDY,
        Decoding(max_new_tokens=24, token_budget=1000, num_beams=3),
        # Every sentence has a bound of its own in a batch: 34 to 50 tokens.
        Decoding(max_new_tokens=50, new_tokens_per_token=0.5, token_budget=100_000),
        Decoding(max_new_tokens=50, new_tokens_per_token=0.5, token_budget=100_000, num_beams=3),
    ],
    ids=["greedy", "beams", "own_bounds", "own_bounds_beams"],
)
def test_text_is_that_of_one_sentence_a_call(translator, plain, decoding):
    sentences = random_sentences(30)
    found = translate_sentences(translator, sentences, "eng_Latn", "deu_Latn", decoding)
    expected = one_at_a_time(plain, sentences, "eng_Latn", "deu_Latn", decoding)
    assert [translation.text for translation in found] == expected
    assert len(set(expected)) > 20
    assert {translation.is_finished for translation in found} == {True, False}


def test_both_languages_reach_the_model(translator, plain):
    sentences = random_sentences(6, seed=2)
    pairs = [("eng_Latn", "deu_Latn"), ("eng_Latn", "zho_Hans"), ("arb_Arab", "deu_Latn")]
    found = [[t.text for t in translate_sentences(translator, sentences, *pair, GREEDY)] for pair in pairs]
    assert found == [one_at_a_time(plain, sentences, *pair, GREEDY) for pair in pairs]
    assert found[0] != found[1] and found[0] != found[2]


def test_each_sentence_is_sent_once_and_empty_ones_never(translator, monkeypatch):
    sent = []
    generate = nllb._generate

    def record(translator, rows, *rest):
        sent.extend(rows)
        return generate(translator, rows, *rest)

    monkeypatch.setattr(nllb, "_generate", record)
    found = translate_sentences(translator, ["a cat", "", "a dog", "a cat", " "], "en", "de", GREEDY)
    assert len(sent) == 2
    assert found[0] == found[3] != found[2]
    assert found[1] == Translation("", True) and found[4] == Translation(" ", True)
    assert translate_sentences(translator, [], "en", "de", GREEDY) == []
    assert translate_sentences(translator, [""], "en", "de", GREEDY) == [Translation("", True)]
    assert len(sent) == 2


def test_long_sentences_go_first_in_batches_within_the_budget(translator, monkeypatch):
    batches = []
    monkeypatch.setattr(
        nllb, "_generate", lambda _, rows, *rest: batches.append(rows) or [Translation("", True) for _ in rows]
    )
    sentences = ["cat", "a cat sees the dog", "dog", "the old dog sleeps near the small red house"]
    lengths = sorted((len(translator.tokenizer(text)["input_ids"]) for text in sentences), reverse=True)
    budget = Decoding(num_beams=2, token_budget=2 * lengths[0])
    translate_sentences(translator, sentences, "en", "de", budget)
    assert [len(row) for batch in batches for row in batch] == lengths
    assert len(batches) > 1
    assert all(2 * len(batch) * max(map(len, batch)) <= budget.token_budget for batch in batches)


def test_a_batch_beyond_memory_is_halved(translator, monkeypatch):
    sentences = random_sentences(9, seed=4)
    expected = translate_sentences(translator, sentences, "en", "de", GREEDY)
    tried = []
    generate = nllb._generate

    def fail_above_two(translator, rows, *rest):
        tried.append(len(rows))
        if len(rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return generate(translator, rows, *rest)

    monkeypatch.setattr(nllb, "_generate", fail_above_two)
    wide = Decoding(max_new_tokens=24, token_budget=10_000)
    assert translate_sentences(translator, sentences, "en", "de", wide) == expected
    # 9 = 4 + 5, 4 = 2 + 2, 5 = 2 + 3, 3 = 1 + 2
    assert tried == [9, 4, 2, 2, 5, 2, 3, 1, 2]


def test_one_sentence_beyond_memory_is_an_error(translator, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(nllb, "_generate", fail)
    with pytest.raises(ResourceError, match="one sentence of 4 tokens and num_beams=1; lower"):
        translate_sentences(Translator(None, translator.tokenizer), ["the cat", "."], "en", "de", GREEDY)


def test_other_errors_are_not_taken_for_lack_of_memory(translator, monkeypatch):
    def fail(*_):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(nllb, "_generate", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        translate_sentences(translator, random_sentences(4), "en", "de", GREEDY)


def test_text_that_spells_a_special_token_is_text(translator, monkeypatch):
    sent = []
    monkeypatch.setattr(nllb, "_generate", lambda _, rows, *rest: sent.extend(rows) or [Translation("", True)])
    translate_sentences(translator, ["the </s> cat deu_Latn"], "en", "de", GREEDY)
    tokenizer = translator.tokenizer
    assert sent[0][0] == tokenizer.convert_tokens_to_ids("eng_Latn")
    assert sent[0].count(tokenizer.eos_token_id) == 1 and sent[0][-1] == tokenizer.eos_token_id
    assert tokenizer.convert_tokens_to_ids("deu_Latn") not in sent[0]


def test_bound_on_new_tokens():
    decoding = Decoding(max_new_tokens=100, new_tokens_per_token=1.5)
    assert [max_new_tokens(num, decoding) for num in (1, 3, 45, 46, 400)] == [34, 37, 100, 100, 100]
    assert max_new_tokens(3, Decoding(max_new_tokens=29, new_tokens_per_token=None)) == 29


def test_languages_are_the_models_own_codes_or_those_of_the_table(translator):
    assert set(language_codes(translator.tokenizer)) == set(CODES)
    found = find_languages(translator.tokenizer, ["de", "zho_Hant", "ar"])
    assert found == {"de": "deu_Latn", "zho_Hant": "zho_Hant", "ar": "arb_Arab"}


@pytest.mark.parametrize(
    ("code", "close"),
    [
        ("deu_Latin", r"'deu_Latin' \(close: deu_Latn"),
        ("German", r"'German' \(close: deu_Latn\)"),
        ("zho_Hanz", r"'zho_Hanz' \(close: zho_Hans, zho_Hant\)"),
        ("qqq", r"'qqq' \(close: none\)"),
        # A language of the table that this model lacks.
        ("th", "'th' "),
        # Tokens, but no languages.
        ("</s>", "'</s>' "),
        ("▁the", "'▁the' "),
    ],
)
def test_an_unknown_language_is_an_error_that_names_close_codes(translator, code, close):
    with pytest.raises(ConfigError, match=rf"has no language {close}.*one of its 5 codes"):
        translate_sentences(translator, ["the cat"], "eng_Latn", code, GREEDY)


def test_all_unknown_languages_stand_in_one_error(translator):
    with pytest.raises(ConfigError, match=r"'deu_Latm' \(close: deu_Latn.*'arb_Arap' \(close: arb_Arab"):
        find_languages(translator.tokenizer, ["deu_Latm", "eng_Latn", "arb_Arap"])


def test_missing_weights_are_an_error(checkpoint, tmp_path):
    from safetensors.torch import load_file, save_file

    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.decoder.layers.1.fc1.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing keys: model\.decoder\.layers\.1\.fc1\.weight"):
        load_translator(str(tmp_path), device="cpu")


def test_a_tokenizer_larger_than_the_model_is_an_error(checkpoint, tmp_path, plain):
    plain[0].save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    size = len(tokenizer)
    tokenizer.add_tokens(["neu"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=f"has {size + 1} tokens and its model only {size}"):
        load_translator(str(tmp_path), device="cpu")


def test_a_tokenizer_without_languages_is_an_error(tmp_path, plain):
    from transformers import PreTrainedTokenizerFast

    plain[0].save_pretrained(tmp_path)
    backend = plain[1].backend_tokenizer.model
    from tokenizers import Tokenizer

    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(backend), eos_token="</s>").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="has no language codes such as deu_Latn"):
        load_translator(str(tmp_path), device="cpu")


def test_a_folder_without_a_model_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="does not load as an encoder-decoder"):
        load_translator(str(tmp_path), device="cpu")


@pytest.fixture(scope="module")
def converted(checkpoint, tmp_path_factory):
    converters = pytest.importorskip("ctranslate2.converters")
    path = tmp_path_factory.mktemp("ctranslate2")
    copied = ["tokenizer.json", "tokenizer_config.json"]
    converters.TransformersConverter(str(checkpoint), copy_files=copied).convert(str(path), force=True)
    return path


@pytest.mark.parametrize("num_beams", [1, 3])
def test_ctranslate2_gives_the_same_text(converted, translator, num_beams):
    fast = load_translator(str(converted), device="cpu")
    assert isinstance(fast.engine, CTranslate2Engine)
    decoding = Decoding(num_beams=num_beams, max_new_tokens=50, new_tokens_per_token=0.5, token_budget=1000)
    sentences = random_sentences(30)
    found = translate_sentences(fast, sentences, "eng_Latn", "deu_Latn", decoding)
    assert found == translate_sentences(translator, sentences, "eng_Latn", "deu_Latn", decoding)


def test_a_broken_ctranslate2_folder_is_an_error(checkpoint, tmp_path):
    pytest.importorskip("ctranslate2")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    (tmp_path / "model.bin").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="does not load as a CTranslate2 model"):
        load_translator(str(tmp_path), device="cpu")


def test_ctranslate2_without_its_package_is_an_error(checkpoint, tmp_path, monkeypatch):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    (tmp_path / "model.bin").write_bytes(b"nothing")
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    with pytest.raises(ConfigError, match="pip install ctranslate2"):
        load_translator(str(tmp_path), device="cpu")


def test_bf16_translates_too(checkpoint):
    translator = load_translator(str(checkpoint), device="cpu", dtype=torch.bfloat16)
    found = translate_sentences(translator, random_sentences(5), "en", "de", GREEDY)
    assert translator.engine.network.model.shared.weight.dtype == torch.bfloat16
    assert len({translation.text for translation in found}) > 1
