"""An NLLB model trained on parallel rows."""

import itertools
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from jobs.train_translator import main
from rayrm.config import build_config
from rayrm.errors import CheckpointError, ConfigError, SchemaError
from rayrm.rows import Prompt
from rayrm.training import translator
from rayrm.training.translator import (
    Pair,
    TranslatorJob,
    TranslatorTraining,
    describe_metrics,
    read_pairs,
    train_translator,
)

NOUNS = {"dog": "Hund", "man": "Mann", "tree": "Baum", "hat": "Hut", "table": "Tisch", "boat": "Kahn"}
ADJECTIVES = {"old": "alte", "new": "neue", "small": "kleine", "big": "große", "red": "rote"}
VERBS = {"sleeps": "schläft", "waits": "wartet", "falls": "fällt"}
TINY = TranslatorTraining(vocab_size=120, hidden_size=32, intermediate_size=32, num_layers=1, num_heads=2, max_steps=4)


def sentences():
    """All 90 pairs of an English and a German sentence, such as "The old dog sleeps." """
    return [
        (f"The {a} {n} {v}.", f"Der {ADJECTIVES[a]} {NOUNS[n]} {VERBS[v]}.")
        for a, n, v in itertools.product(ADJECTIVES, NOUNS, VERBS)
    ]


def write_prompts(path, changes=(), **everywhere):
    """Both directions of every sentence; `changes` are columns of the first rows."""
    rows = []
    for number, (english, german) in enumerate(sentences()):
        for source, reference, src_lang, tgt_lang in ((english, german, "en", "de"), (german, english, "de", "en")):
            rows.append(
                {
                    "id": f"r{len(rows)}",
                    "group": f"g{number}",
                    "prompt": [{"role": "user", "content": f"Translate: {source}"}],
                    "source": source,
                    "reference": reference,
                    "src_lang": src_lang,
                    "tgt_lang": tgt_lang,
                    "lang": tgt_lang,
                }
                | everywhere
            )
    for row, change in zip(rows, changes, strict=False):
        row.update(change)
    path.mkdir()
    pq.write_table(Prompt.conform(pa.Table.from_pylist(rows)), path / "rows.parquet")
    return str(path)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return write_prompts(tmp_path_factory.mktemp("translator") / "in")


@pytest.fixture(scope="module")
def pairs(prompts):
    return read_pairs(prompts, TINY)


@pytest.fixture(scope="module")
def tokenizer(pairs):
    from rayrm.training.translator_loop import make_tokenizer

    return make_tokenizer([*pairs[0], *pairs[1]], pairs[0], TINY.vocab_size)


# --- the split and the checks ---------------------------------------------------------------------------------------


def test_both_directions_of_a_sentence_are_on_one_side(pairs):
    train, held_out = pairs
    assert len(train) + len(held_out) == 180
    assert 6 < len(held_out) < 36
    assert not {pair.group for pair in train} & {pair.group for pair in held_out}
    for side in pairs:
        assert {(p.source, p.reference) for p in side if p.src_lang == "en"} == {
            (p.reference, p.source) for p in side if p.src_lang == "de"
        }


def test_rows_are_used_once_bounded_and_only_whole(tmp_path):
    gaps = [{"source": None}, {"reference": " "}, {"src_lang": None}, {"tgt_lang": ""}]
    twice = {"source": "Twice.", "reference": "Zweimal.", "src_lang": "en", "tgt_lang": "de"}
    path = write_prompts(tmp_path / "in", [*gaps, twice, twice])
    train, held_out = read_pairs(path, TINY)
    assert len(train) + len(held_out) == 180 - 4 - 1
    few = [read_pairs(path, TINY.model_copy(update={"max_rows": 60, "seed": seed})) for seed in (0, 0, 1)]
    assert len(few[0][0]) + len(few[0][1]) == 60
    assert few[0] == few[1] != few[2]


def test_rows_that_cannot_be_trained_on(tmp_path):
    out = f"output={tmp_path / 'out'}"
    with pytest.raises(SchemaError, match="in held-out groups; both sides need some"):
        main([f"input={write_prompts(tmp_path / 'one', group='g')}", out])
    with pytest.raises(SchemaError, match="0 pairs to train on"):
        main([f"input={write_prompts(tmp_path / 'none', reference=None)}", out])
    with pytest.raises(SchemaError, match="rows in 'German', which is no language of the table"):
        main([f"input={write_prompts(tmp_path / 'unknown', tgt_lang='German')}", out])
    path = tmp_path / "columns"
    path.mkdir()
    table = pq.read_table(tmp_path / "one" / "rows.parquet").drop_columns(["source", "src_lang"])
    pq.write_table(table, path / "rows.parquet")
    with pytest.raises(SchemaError, match="lacks source, src_lang, and a translator is trained on"):
        main([f"input={path}", out])
    assert not (tmp_path / "out").exists()


def test_settings_that_cannot_be(prompts, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="trains in 1 process, not in 2"):
        build_config(TranslatorJob, {"input": "a", "output": "b", "workers": {"num_workers": 2}}, "a test")
    with pytest.raises(ConfigError, match="hidden_size 36 is no even multiple of num_heads 4"):
        build_config(TranslatorTraining, {"hidden_size": 36}, "a test")
    monkeypatch.setattr(translator.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs sacrebleu; pip install"):
        train_translator(TranslatorJob(input=prompts, output=str(tmp_path), report_to="none"))


# --- tokens and batches ---------------------------------------------------------------------------------------------


def test_ids_are_the_tokenizers_own_for_both_sides(pairs, tokenizer):
    from rayrm.training.translator_loop import encode_pairs

    code = {lang: tokenizer.convert_tokens_to_ids(own) for lang, own in (("en", "eng_Latn"), ("de", "deu_Latn"))}
    for pair, encoded in zip(pairs[0][:20], encode_pairs(tokenizer, pairs[0]), strict=False):
        tokenizer.src_lang, tokenizer.tgt_lang = (
            "eng_Latn" if lang == "en" else "deu_Latn" for lang in (pair.src_lang, pair.tgt_lang)
        )
        own = tokenizer(pair.source, text_target=pair.reference)
        assert encoded == (own["input_ids"], own["labels"])
        assert (encoded.source[0], encoded.target[0]) == (code[pair.src_lang], code[pair.tgt_lang])
        assert encoded.source[-1] == encoded.target[-1] == tokenizer.eos_token_id
        assert tokenizer.unk_token_id not in encoded.source + encoded.target
        assert tokenizer.decode(encoded.target, skip_special_tokens=True) == pair.reference


def test_text_that_spells_a_special_token_is_text(tokenizer):
    from rayrm.training.translator_loop import encode_pairs

    (encoded,) = encode_pairs(tokenizer, [Pair("a", "a", "The </s> dog deu_Latn", "Der Hund", "en", "de")])
    assert encoded.source.count(tokenizer.eos_token_id) == 1
    assert tokenizer.convert_tokens_to_ids("deu_Latn") not in encoded.source


def test_every_language_of_the_rows_has_a_code_and_the_vocabulary_repeats(pairs, tokenizer):
    from rayrm.models.nllb import language_codes
    from rayrm.training.translator_loop import make_tokenizer

    held_out = [*pairs[1], Pair("a", "a", "The dog", "狗", "eng_Latn", "zh-Hant")]
    again = make_tokenizer([*pairs[0], *held_out], pairs[0][::-1], TINY.vocab_size)
    assert set(language_codes(again)) == {"eng_Latn", "deu_Latn", "zho_Hant"}
    assert set(language_codes(tokenizer)) == {"eng_Latn", "deu_Latn"}
    words = [{t: i for t, i in each.get_vocab().items() if i < TINY.vocab_size} for each in (tokenizer, again)]
    assert words[0] == words[1]
    # At most 120, two codes and <mask>.
    assert len(tokenizer) <= 123
    assert again.convert_ids_to_tokens([0, 1, 2, 3]) == ["<s>", "<pad>", "</s>", "<unk>"]


def test_a_pass_has_every_pair_once_in_batches_within_the_budget(pairs, tokenizer):
    from rayrm.training.translator_loop import encode_pairs, stream_batches

    encoded = encode_pairs(tokenizer, pairs[0])
    batches = stream_batches(encoded, TINY.model_copy(update={"batch_tokens": 100}))
    passes = []
    for _ in range(2):
        found = []
        while len(found) < len(encoded):
            batch = next(batches)
            assert len(batch) * max(len(side) for pair in batch for side in pair) <= 100
            found += batch
        assert sorted(found) == sorted(encoded)
        passes.append(found)
    assert passes[0] != passes[1]


def test_loss_is_the_mean_over_target_tokens_of_a_decoder_that_starts_from_the_end_token(pairs, tokenizer):
    from rayrm.training.translator_loop import EncodedPair, collate, make_model

    model = make_model(TINY, len(tokenizer)).eval()
    batch = [EncodedPair([5, 6, 7, 2], [8, 9, 2]), EncodedPair([5, 9, 2], [8, 6, 9, 10, 11, 2])]
    loss = model(**collate(batch, tokenizer.pad_token_id, "cpu")).loss.item()
    costs = []
    for source, target in batch:
        logits = model(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([[2, *target[:-1]]])).logits[0]
        costs += [-logits.double().log_softmax(-1)[place, token].item() for place, token in enumerate(target)]
    assert len(costs) == 9
    assert loss == pytest.approx(sum(costs) / 9, rel=1e-5)


def test_rate_rises_and_falls():
    from rayrm.training.translator_loop import share_of_rate

    training = TranslatorTraining(max_steps=9, warmup_fraction=0.5)  # warmup of 4 steps
    assert [share_of_rate(done, training) for done in (0, 3, 6, 8)] == pytest.approx([0.25, 1.0, 0.5, 1 / 6])


# --- training -------------------------------------------------------------------------------------------------------


def test_training_is_repeatable(prompts, pairs, tokenizer, tmp_path):
    from rayrm.training.translator_loop import encode_pairs, fit, make_model, stream_batches

    job = TranslatorJob(input=prompts, output=str(tmp_path), training=TINY, report_to="none", log_steps=2)
    encoded = encode_pairs(tokenizer, pairs[0])

    def run(seed):
        training = TINY.model_copy(update={"seed": seed})
        model = make_model(training, len(tokenizer))
        return fit(model, stream_batches(encoded, training), job), model.model.shared.weight.detach()

    (history, first), (again, second), (_, other) = run(0), run(0), run(1)
    assert [record["step"] for record in history] == [2, 4]
    assert history == again
    assert torch.equal(first, second)
    assert not torch.allclose(first, other, atol=0.01)


def test_a_loss_that_is_not_finite_is_an_error(prompts, pairs, tokenizer, tmp_path):
    from rayrm.training.translator_loop import encode_pairs, fit, make_model, stream_batches

    job = TranslatorJob(input=prompts, output=str(tmp_path), training=TINY, report_to="none")
    model = make_model(TINY, len(tokenizer))
    model.model.shared.weight.data.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="The loss is nan at step 1; try a lower lr"):
        fit(model, stream_batches(encode_pairs(tokenizer, pairs[0]), TINY), job)


def test_exact_match_and_chrf_are_measured_by_direction(monkeypatch):
    from rayrm.models.nllb import Translation
    from rayrm.training import translator_loop

    def shout(_translator, texts, src_lang, tgt_lang, _decoding):
        return [Translation(text.upper() if tgt_lang == "de" else "", True) for text in texts]

    monkeypatch.setattr(translator_loop, "translate_sentences", shout)
    texts = [("abcdefg", "ABCDEFG"), ("abcdefg", "abcdefg"), ("hijklmn", "HIJKLMN"), ("opqrstu", "OPQRSTU")]
    held_out = [Pair(f"r{i}", "g", *text, "en", "de") for i, text in enumerate(texts)]
    found = translator_loop.measure(None, [*held_out, Pair("f", "g", "abc", "abc", "de", "en")])
    assert found == {
        "eval_exact_match/de-en": 0.0,
        "eval_chrf/de-en": 0.0,
        "eval_exact_match/en-de": 0.75,
        # Three of four texts share all of their n-grams, and the fourth none, in texts of one length.
        "eval_chrf/en-de": pytest.approx(75.0),
    }
    assert describe_metrics({"loss": 1.0, **found}).splitlines()[1:] == [
        "de-en            0.000    0.0",
        "en-de            0.750   75.0",
    ]


def test_pairs_beyond_the_longest_are_left_out(prompts, tmp_path):
    from rayrm.training.translator_loop import train_loop

    def run(path, **changes):
        training = TINY.model_copy(update={"max_steps": 1, **changes})
        job = TranslatorJob(input=path, output=str(tmp_path / "out"), training=training, report_to="none")
        return train_loop({"job": job.model_dump(), "show_progress": False})

    whole, cut = run(prompts), run(prompts, vocab_size=60, max_length=16)
    assert whole["num_overlength"] == 0
    assert 0 < cut["num_overlength"] < whole["num_pairs"] == cut["num_pairs"] + cut["num_overlength"]
    with pytest.raises(CheckpointError, match=r"Each of the \d+ pairs has more than 16 tokens; raise max_length"):
        run(write_prompts(tmp_path / "long", reference="Der Hund " * 10), max_length=16)


@pytest.mark.ray
def test_job_learns_to_translate_and_its_model_loads(prompts, tmp_path, ray_cluster, capsys):
    from rayrm.models.nllb import Decoding, load_translator, translate_sentences

    out = tmp_path / "out"
    words = [f"input={prompts}", f"output={out}", "report_to=none", "log_steps=20"]
    words += ["training.max_steps=160", "training.vocab_size=120", "training.num_layers=1", "training.hidden_size=64"]
    words += ["training.batch_tokens=400"]
    main(words)
    mark = json.loads((out / "model" / "rayrm.json").read_text())
    assert (mark["steps"], mark["num_pairs"] + mark["num_held_out"], mark["num_overlength"]) == (160, 180, 0)
    assert mark["metrics"]["eval_exact_match/en-de"] > 0.8
    assert mark["metrics"]["eval_exact_match/de-en"] > 0.8
    assert mark["metrics"]["eval_chrf/en-de"] > 90
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert records[0]["loss"] > 5 * records[-2]["loss"]
    assert (out / "loss.png").stat().st_size > 1000
    assert "en-de " in capsys.readouterr().out

    model = load_translator(str(out / "model"), device="cpu")
    _, held_out = read_pairs(prompts, TranslatorTraining())
    english = [pair for pair in held_out if pair.src_lang == "en"]
    found = translate_sentences(model, [pair.source for pair in english], "en", "deu_Latn", Decoding(num_beams=2))
    assert sum(text == pair.reference for (text, _), pair in zip(found, english, strict=True)) > 0.8 * len(english)

    before = (out / "model" / "model.safetensors").stat().st_mtime_ns
    main(words)
    assert (out / "model" / "model.safetensors").stat().st_mtime_ns == before
    assert "en-de " in capsys.readouterr().out
