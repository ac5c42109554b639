"""BLEURT checkpoints under transformers 5, tiny and with random weights."""

import json
import sys

import pytest
import torch
from transformers import pytorch_utils

from rayrm.errors import CheckpointError
from rayrm.models.bleurt import (
    EncodedPair,
    _join,
    bleurt_classes,
    collate,
    encode_pairs,
    load_bleurt,
    save_bleurt,
    score_encoded,
)

WORDS = ["ein", "das", "haus", "hund", "katze", "rot", "blau", "läuft", "steht", "am", "see", "und", "der"]
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "##s", "##e", "[", "]", "SEP"]
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 48,
    # Far from BERT's 0.02, so that different pairs get clearly different scores.
    "initializer_range": 0.4,
}
PAIRS = [
    ("ein hund läuft am see", "der hund steht am see"),
    ("das haus", "das haus und der hund und die katze läuft am see und das haus steht"),
    ("rot", "blau"),
    ("", "ein"),
]


def make_model(vocab_size, **sizes):
    config_class, model_class, _ = bleurt_classes()
    torch.manual_seed(1)
    return model_class(config_class(vocab_size=vocab_size, **(SIZES | sizes))).eval()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("bleurt")
    save_bleurt(make_model(len(VOCAB)), VOCAB, str(path))
    return path


@pytest.fixture(scope="module")
def sentencepiece_checkpoint(tmp_path_factory):
    import sentencepiece

    path = tmp_path_factory.mktemp("bleurt_sp")
    (path / "text.txt").write_text("\n".join([" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))] * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(path / "text.txt"),
        model_prefix=str(path / "spm"),
        vocab_size=60,
        control_symbols=["[CLS]", "[SEP]"],
        hard_vocab_limit=False,
        minloglevel=2,
    )
    size = sentencepiece.SentencePieceProcessor(model_file=str(path / "spm.model")).GetPieceSize()
    make_model(size, embedding_size=16).save_pretrained(path)
    return path


def eager_scores(path, encoded):
    """The package's own eager model, its weights read without `from_pretrained`, one pair at a time."""
    from safetensors.torch import load_file

    config_class, model_class, _ = bleurt_classes()
    model = model_class(config_class(**json.loads((path / "config.json").read_text())))
    model.load_state_dict(load_file(path / "model.safetensors"))
    model.eval()
    with torch.no_grad():
        return [model(**collate([pair], 0)).logits.item() for pair in encoded]


@pytest.mark.parametrize("kind", ["checkpoint", "sentencepiece_checkpoint"])
def test_scores_equal_the_packages_own_eager_model(kind, request):
    path = request.getfixturevalue(kind)
    model, tokenizer = load_bleurt(str(path), device="cpu")
    encoded = encode_pairs(tokenizer, PAIRS, 48)
    expected = eager_scores(path, encoded)
    assert score_encoded(model, encoded, 64, 0) == pytest.approx(expected, abs=1e-5)
    assert score_encoded(model, encoded, 100_000, 0) == pytest.approx(expected, abs=1e-5)
    assert len({round(score, 3) for score in expected}) == len(PAIRS)


def test_bin_weights_without_positions_load_with_whole_buffers(checkpoint, tmp_path):
    """Checkpoints of the hub hold `pytorch_model.bin`, and some lack the position buffer."""
    model, _ = load_bleurt(str(checkpoint), device="cpu")
    for name in ("config.json", "vocab.txt", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    state = {k: v for k, v in model.state_dict().items() if "position_ids" not in k}
    torch.save(state, tmp_path / "pytorch_model.bin")
    again, tokenizer = load_bleurt(str(tmp_path), device="cpu")
    assert again.bleurt.embeddings.position_ids[0].tolist() == list(range(48))
    assert not again.bleurt.embeddings.token_type_ids.any()
    encoded = encode_pairs(tokenizer, PAIRS, 48)
    assert score_encoded(again, encoded, 64, 0) == pytest.approx(score_encoded(model, encoded, 64, 0), abs=1e-5)


def test_bf16_keeps_the_score_in_fp32(checkpoint):
    model, tokenizer = load_bleurt(str(checkpoint), device="cpu", dtype=torch.bfloat16)
    full, _ = load_bleurt(str(checkpoint), device="cpu")
    encoded = encode_pairs(tokenizer, PAIRS, 48)
    scores = score_encoded(model, encoded, 64, 0)
    assert model.bleurt.encoder.layer[0].attention.self.query.weight.dtype == torch.bfloat16
    assert model.classifier.weight.dtype == torch.float32
    assert scores == pytest.approx(score_encoded(full, encoded, 64, 0), abs=0.1)
    assert any(score != torch.tensor(score).bfloat16().item() for score in scores)


def test_pair_layout(checkpoint):
    _, tokenizer = load_bleurt(str(checkpoint), device="cpu")
    ids = {word: index for index, word in enumerate(VOCAB)}
    (pair,) = encode_pairs(tokenizer, [("das haus", "rot")], 48)
    assert pair == EncodedPair([2, ids["das"], ids["haus"], 3, ids["rot"], 3], 4, False)
    inputs = collate([pair, EncodedPair([2, 3, 3], 2, False)], 0)
    assert inputs["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, 1, 0, 0, 0]]
    assert inputs["attention_mask"].tolist() == [[1] * 6, [1, 1, 1, 0, 0, 0]]


def test_text_that_spells_a_special_token_is_text(checkpoint):
    _, tokenizer = load_bleurt(str(checkpoint), device="cpu")
    assert tokenizer.sep_id not in tokenizer.encode(["das [SEP] haus"])[0]


def test_sentencepiece_ids_are_those_of_the_model_file(sentencepiece_checkpoint):
    import sentencepiece

    _, tokenizer = load_bleurt(str(sentencepiece_checkpoint), device="cpu")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_checkpoint / "spm.model"))
    # Full width letters and double blanks are what the normaliser inside the file is for.
    texts = ["ｈａｕｓ  und hund", " am see", ""]
    assert tokenizer.encode(texts) == [pieces.encode(text) for text in texts]
    assert tokenizer.encode(["haus und hund"]) == tokenizer.encode(["ｈａｕｓ  und hund"])


@pytest.mark.parametrize(
    ("first", "second", "room", "kept"),
    [
        (4, 2, 4, (2, 2)),  # the longer side loses its end until both fit
        (3, 3, 5, (3, 2)),  # on a tie the candidate loses one
        (3, 3, 4, (2, 2)),
        (2, 5, 7, (2, 5)),  # exactly full
    ],
)
def test_truncation_pops_from_the_longer_side(checkpoint, first, second, room, kept):
    _, tokenizer = load_bleurt(str(checkpoint), device="cpu")
    pair = _join(tokenizer, [7] * first, [8] * second, room + 3)
    assert pair.ids == [2, *[7] * kept[0], 3, *[8] * kept[1], 3]
    assert pair.num_first == kept[0] + 2
    assert pair.is_truncated == (kept != (first, second))


def test_nothing_to_score(checkpoint):
    model, tokenizer = load_bleurt(str(checkpoint), device="cpu")
    assert score_encoded(model, encode_pairs(tokenizer, [], 48), 64, 0) == []


def test_the_borrowed_names_are_taken_away_again():
    bleurt_classes()
    assert not hasattr(pytorch_utils, "find_pruneable_heads_and_indices")
    assert "transformers.models.bert.tokenization_bert_fast" not in sys.modules


def test_a_missing_head_is_an_error(checkpoint, tmp_path):
    from safetensors.torch import load_file, save_file

    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing keys: classifier\.weight"):
        load_bleurt(str(tmp_path), device="cpu")


def test_a_folder_without_a_tokenizer_is_an_error(checkpoint, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        load_bleurt(str(tmp_path), device="cpu")


def test_a_tokenizer_larger_than_the_model_is_an_error(checkpoint, tmp_path):
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with (tmp_path / "vocab.txt").open("a") as handle:
        handle.write("neu\n")
    with pytest.raises(CheckpointError, match=f"has {len(VOCAB) + 1} tokens"):
        load_bleurt(str(tmp_path), device="cpu")


def test_a_folder_without_a_model_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="does not load as a BLEURT checkpoint"):
        load_bleurt(str(tmp_path), device="cpu")
