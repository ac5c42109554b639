"""Preference sets into several languages: what is kept, what is tried again, what is quarantined and counted."""

import codecs
import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_nllb import random_sentences, save_model

from jobs import translate_preferences as job
from rayrm import files
from rayrm.config import build_config
from rayrm.errors import CheckpointError, ConfigError, EvaluationError, OutputExistsError, ServiceError
from rayrm.models.nllb import Decoding, Translation, count_tokens, load_translator, translate_sentences
from rayrm.quarantine import read_dropped
from rayrm.rows import Preference, with_hidden
from rayrm.shards import read_table
from rayrm.translation import PreferenceTranslator, TranslationConfig, check_translation, texts
from rayrm.translation.exports import name_dataset, push_translations, write_translations
from rayrm.translation.text import join_text
from rayrm.translation.texts import Outcome, TextsConfig, split_texts, translate_texts

WIDE = {
    "min_length_ratio": 0,
    "max_length_ratio": 1e9,
    "max_loop": 10**9,
    "max_copied_fraction": 1,
    "min_script_fraction": 0,
}
"""Bounds that no translation breaks."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Random weights, and every sentence ends: at its bound the end token is forced."""
    path = tmp_path_factory.mktemp("nllb")
    save_model(path, forced_eos_token_id=2)
    return str(path)


@pytest.fixture(scope="module")
def real(model):
    return load_translator(model, device="cpu")


def rot13(text):
    return codecs.encode(text, "rot13")


@pytest.fixture
def calls(monkeypatch):
    """Every sentence is "translated" by ROT13, whose round trip is the sentence itself; gives the calls."""
    made = []

    def translate(translator, sentences, src_lang, tgt_lang, decoding):
        made.append((list(sentences), src_lang, tgt_lang, decoding.num_beams))
        return [Translation(rot13(sentence), True) for sentence in sentences]

    monkeypatch.setattr(texts, "translate_sentences", translate)
    return made


def chat(text, role="assistant"):
    return [{"role": role, "content": text}]


def make_row(number, prompt="Why is it so?", chosen="It is good.", rejected="It is bad.", **fields):
    row = {"id": f"r{number}", "group": f"g{number}", "lang": "en", "subset": None, "src_lang": None, "tgt_lang": None}
    return {**row, "prompt": chat(prompt, "user"), "chosen": chat(chosen), "rejected": chat(rejected), **fields}


def as_table(rows):
    return with_hidden(Preference.conform(pa.Table.from_pylist(rows)))


def config_of(model, *languages, **fields):
    return TranslationConfig(model=model, languages=list(languages), **fields)


def contents(row):
    return [turn["content"] for name in ("prompt", "chosen", "rejected") for turn in row[name]]


def test_a_row_becomes_one_row_in_each_language(model, calls):
    rows = [make_row(1, extra=7), make_row(2, "Wo?", "Hier.", "Dort.", lang="de", extra=8)]
    found = PreferenceTranslator(config_of(model, "de", "arb_Arab", checks=WIDE))(as_table(rows)).to_pylist()
    assert [(row["id"], row["group"], row["lang"], row["extra"]) for row in found] == [
        ("r1", "g1", "de", 7),
        ("r2", "g2", "de", 8),
        ("r1", "g1", "ar", 7),
        ("r2", "g2", "ar", 8),
    ]
    assert contents(found[0]) == ["Jul vf vg fb?", "Vg vf tbbq.", "Vg vf onq."] == contents(found[2])
    assert contents(found[3]) == ["Jb?", "Uvre.", "Qbeg."]
    # German stays German.
    assert contents(found[1]) == ["Wo?", "Hier.", "Dort."]
    assert [row["translated_from"] for row in found] == ["en", None, "en", "de"]
    assert [row["translated_by"] for row in found] == [model, None, model, model]
    assert [row["num_retried"] for row in found] == [0, None, 0, 0]
    assert all(row["_kept"] and not row["_dropped"] for row in found)
    # Each language is one call for all rows of a source language.
    assert [call[1:3] for call in calls] == [("en", "de"), ("en", "arb_Arab"), ("de", "arb_Arab")]


def test_each_distinct_sentence_of_a_shard_is_sent_once(model, calls):
    rows = [make_row(i, "Same. Words.", f"Same. Answer {'ab'[i]}.", "Words.") for i in range(2)]
    PreferenceTranslator(config_of(model, "de", checks=WIDE))(as_table(rows))
    assert [sorted(call[0]) for call in calls] == [["Answer a.", "Answer b.", "Same.", "Words."]]


def test_all_turns_are_translated_and_code_and_layout_are_kept(model, calls):
    prompt = [{"role": "system", "content": "Be brief."}, *chat("Hi.", "user"), *chat("Yes?"), *chat("Code!", "user")]
    answer = "Look:\n```python\nprint('Hello world')\n```\n\n- One. Two.\n  - Three"
    row = make_row(1, chosen=answer, prompt=None) | {"prompt": prompt}
    found = PreferenceTranslator(config_of(model, "de", checks=WIDE))(as_table([row])).to_pylist()[0]
    assert [(turn["role"], turn["content"]) for turn in found["prompt"]] == [
        ("system", "Or oevrs."),
        ("user", "Uv."),
        ("assistant", "Lrf?"),
        ("user", "Pbqr!"),
    ]
    assert contents(found)[4] == "Ybbx:\n```python\nprint('Hello world')\n```\n\n- Bar. Gjb.\n  - Guerr"
    compat = PreferenceTranslator(config_of(model, "de", checks=WIDE, compat=True))(as_table([row])).to_pylist()[0]
    assert contents(compat)[4].startswith("Ybbx: ```clguba cevag('Uryyb jbeyq') ``` - Bar. Gjb.")


def test_answers_that_are_code_and_columns_that_are_not_asked_for_stay(model, calls):
    rows = [make_row(1, subset="hep-python"), make_row(2, subset="math"), make_row(3, subset="math-prm")]

    def translated(**fields):
        found = PreferenceTranslator(config_of(model, "de", checks=WIDE, **fields))(as_table(rows)).to_pylist()
        return [
            [new != old for new, old in zip(contents(a), contents(b), strict=True)]
            for a, b in zip(found, rows, strict=True)
        ]

    assert translated() == [[True, False, False], [True] * 3, [True] * 3]
    assert translated(keep_answers=[]) == [[True] * 3] * 3
    assert translated(keep_answers=["math*"]) == [[True] * 3, [True, False, False], [True, False, False]]
    assert translated(columns=["chosen"]) == [[False] * 3, [False, True, False], [False, True, False]]


def test_rows_that_cannot_be_translated_are_dropped_by_reason(model, calls):
    rows = [
        make_row(0),
        make_row(1, src_lang="en", tgt_lang="de"),
        make_row(2, chosen=" \n"),
        make_row(3, rejected="It is good."),
        make_row(4, lang="xx"),
        make_row(5) | {"rejected": []},
    ]
    found = PreferenceTranslator(config_of(model, "de", "ar", checks=WIDE))(as_table(rows)).to_pylist()
    reasons = [[], ["translation_task"], ["empty_content"], ["identical_responses"], ["unknown_language"]]
    assert [row["_dropped"] for row in found] == [*reasons, ["empty_content"]] * 2
    assert [row["_kept"] for row in found] == [True, *[False] * 5] * 2
    assert contents(found[3]) == contents(rows[3])


def test_a_translation_with_faults_is_tried_again_and_the_better_one_kept(real, monkeypatch):
    source = "The weather is nice in the old town"
    good = "Das Wetter ist schön in alten Städten"
    names = ["Ann", "Bob", "Cid", "Dan"]
    first = {"Ann": source, "Bob": good, "Cid": "x", "Dan": source}
    second = {"Ann": good, "Bob": "", "Cid": "y", "Dan": "ha" * 60}

    def translate(translator, sentences, src_lang, tgt_lang, decoding):
        answers = second if decoding.num_beams == 4 else first
        return [Translation(answers[text[-3:]], text[-3:] != "Cid") for text in sentences]

    monkeypatch.setattr(texts, "translate_sentences", translate)
    asked = [f"{source} {name}" for name in names]
    splits = split_texts(real, asked, TextsConfig())
    ann, bob, cid, dan = (translate_texts(real, splits, "en", "de", TextsConfig())[text] for text in asked)
    # The copy goes for the good one; the good one is not tried again.
    assert ann == Outcome(good, (), True) and bob == Outcome(good)
    # Both are too short and not finished, and the first of two that are equally bad stays.
    assert cid == Outcome("x", ("length_ratio", "unfinished"), True)
    # One fault is better than two: far too long and a loop.
    assert dan == Outcome(source, ("source_copy",), True)
    once = translate_texts(real, splits, "en", "de", TextsConfig(retry=None))
    assert once[asked[0]] == Outcome(source, ("source_copy",)) and once[asked[3]] == once[asked[0]]


def test_a_round_trip_is_measured_by_chrf_in_the_source_language(real, monkeypatch):
    from sacrebleu.metrics import CHRF

    def translate(translator, sentences, src_lang, tgt_lang, decoding):
        # What has a "d" comes back spoilt, but where beams are tried.
        def turn(sentence):
            spoilt = src_lang == "de" and decoding.num_beams == 1 and "d" in sentence
            return Translation("something else" if spoilt else rot13(sentence), True)

        return [turn(sentence) for sentence in sentences]

    monkeypatch.setattr(texts, "translate_sentences", translate)
    config = TextsConfig(min_round_trip_chrf=60, checks=WIDE, retry=None)
    splits = split_texts(real, ["Here we are. Go!", "A quiet house stands here.", "12 + 30"], config)
    found = translate_texts(real, splits, "en", "de", config)
    assert found["Here we are. Go!"] == Outcome("Urer jr ner. Tb!", (), False, 100.0)
    spoilt = CHRF().sentence_score("something else", ["A quiet house stands here."]).score
    assert 0 < spoilt < 60
    assert found["A quiet house stands here."] == Outcome("N dhvrg ubhfr fgnaqf urer.", ("round_trip",), False, spoilt)
    assert found["12 + 30"] == Outcome("12 + 30")


def test_sides_that_become_the_same_are_dropped_and_the_smallest_chrf_is_told(model, monkeypatch):
    def translate(translator, sentences, src_lang, tgt_lang, decoding):
        return [Translation("Es ist." if text.startswith("It") else text, True) for text in sentences]

    monkeypatch.setattr(texts, "translate_sentences", translate)
    config = config_of(model, "de", checks=WIDE, min_round_trip_chrf=0)
    rows = [make_row(1), make_row(2, chosen="So it is.")]
    found = PreferenceTranslator(config)(as_table(rows)).to_pylist()
    assert [row["_dropped"] for row in found] == [["identical_translations"], []]
    assert [turn["content"] for turn in found[0]["chosen"]] == ["Es ist."]
    assert 0 < found[1]["round_trip_chrf"] < 100


def test_a_sentence_beyond_the_model_is_cut(real):
    assert real.max_tokens == 128
    long = " ".join(["the", "old", "cat", "sleeps", "near", "a", "house"] * 40) + "."
    assert count_tokens(real, long) > 128
    for max_length in (None, 20):
        split = split_texts(real, [long], TextsConfig(max_length=max_length))[long]
        assert all(count_tokens(real, sentence) <= (max_length or 128) for sentence in split.sentences)
        assert join_text(split, split.sentences) == long
    with pytest.raises(ConfigError, match="max_length is 200, and the model takes at most 128 tokens"):
        split_texts(real, [long], TextsConfig(max_length=200))


def test_real_sentences_come_through_whole(model, calls, shared_data):
    pairs = read_table(str(shared_data / "parallel" / "test.parquet"))
    english = sorted({row["src_text"] for row in pairs.to_pylist() if row["src_lang"] == "en"})
    assert len(english) == 500
    rows = [make_row(i, *english[i : i + 3]) for i in range(0, 498, 3)]
    found = PreferenceTranslator(config_of(model, "de", checks=WIDE))(as_table(rows)).to_pylist()
    assert [contents(row) for row in found] == [[rot13(text) for text in contents(row)] for row in rows]
    for text, split in split_texts(load_translator(model), pairs["trg_text"].to_pylist(), TextsConfig()).items():
        assert join_text(split, split.sentences) == text


def test_a_model_converted_for_ctranslate2_makes_the_same_rows(tmp_path):
    converters = pytest.importorskip("ctranslate2.converters")
    save_model(tmp_path / "plain")
    copied = ["tokenizer.json", "tokenizer_config.json"]
    converters.TransformersConverter(str(tmp_path / "plain"), copy_files=copied).convert(str(tmp_path / "fast"))
    found = []
    for name in ("plain", "fast"):
        config = config_of(str(tmp_path / name), "de", checks=WIDE, decoding={"max_new_tokens": 16}, retry=None)
        check_translation(config)
        found.append(PreferenceTranslator(config)(as_table(sentence_rows(5))).drop_columns("translated_by"))
    assert found[0].equals(found[1])
    assert len({text for row in found[0].to_pylist() for text in contents(row)}) > 7


def write_rows(folder, rows):
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    return folder / "rows.parquet"


def job_words(model, source, output, **fields):
    values = {
        "input": str(source),
        "output": str(output),
        "shard_rows": 4,
        "translation.model": model,
        "translation.languages": ["de", "zho_Hant", "en"],
        "translation.checks": WIDE,
        "translation.retry": None,
        "translation.decoding": {"max_new_tokens": 12, "new_tokens_per_token": None, "token_budget": 200},
    }
    return [f"{name}={json.dumps(value)}" for name, value in {**values, **fields}.items()]


def sentence_rows(num):
    """Rows of one sentence a text; a random model may say the same to many, so the answers have numbers of their own."""
    found = random_sentences(3 * num, seed=5)
    return [make_row(i, found[3 * i], f"1. {found[3 * i + 1]}", f"2. {found[3 * i + 2]}") for i in range(num)]


@pytest.mark.ray
def test_the_job_translates_into_several_languages_and_resumes(model, real, ray_cluster, tmp_path, capsys):
    rows = sentence_rows(10)
    rows[3]["rejected"] = rows[3]["chosen"]
    words = job_words(model, write_rows(tmp_path, rows), tmp_path / "out")
    job.main(words)
    done = json.loads((tmp_path / "out" / "run.json").read_text())
    # Each dropped row would have been three.
    assert done["counts"] == {"read": 10, "written": 27, "dropped": {"identical_responses": 3}, "status": {}}
    counted = {"written": 9, "retried": 0, "dropped": {"identical_responses": 1}, "faulty": 0}
    assert done["languages"] == dict.fromkeys(["de", "zh-Hant", "en"], counted)
    assert capsys.readouterr().out.splitlines() == [
        "language  written  retried  identical_responses",
        "-----------------------------------------------",
        "de              9        0                    1",
        "zh-Hant         9        0                    1",
        "en              9        0                    1",
    ]
    first = read_table(str(tmp_path / "out"))
    Preference.check(first.schema, "out")
    made = {(row["id"], row["lang"]): row for row in first.to_pylist()}
    assert len(made) == 27
    decoding = Decoding(max_new_tokens=12, new_tokens_per_token=None)
    for code, lang in (("deu_Latn", "de"), ("zho_Hant", "zh-Hant")):
        for row in rows[:3] + rows[4:]:
            sentences = [text.removeprefix("1. ").removeprefix("2. ") for text in contents(row)]
            prompt, chosen, rejected = (
                found.text for found in translate_sentences(real, sentences, "eng_Latn", code, decoding)
            )
            assert contents(made[row["id"], lang]) == [prompt, f"1. {chosen}", f"2. {rejected}"]
    assert all(contents(made[row["id"], "en"]) == contents(row) for row in rows if row["id"] != "r3")

    shard, kept = (tmp_path / "out" / f"shard-0000{i}-of-00003.parquet" for i in (1, 2))
    before = kept.stat().st_mtime_ns
    shard.unlink()
    (tmp_path / "out" / "run.json").unlink()
    # What an attempt that was killed has left in the quarantine is replaced.
    (tmp_path / "out" / "quarantine" / "shard-00001-of-00003.json").write_text('{"half": ')
    job.main(words)
    assert read_table(str(tmp_path / "out")).equals(first) and kept.stat().st_mtime_ns == before
    assert [(row["id"], row["lang"]) for row in read_dropped(str(tmp_path / "out"))] == [
        ("r3", "de"),
        ("r3", "zh-Hant"),
        ("r3", "en"),
    ]

    job.main(job_words(model, tmp_path / "rows.parquet", tmp_path / "other", shard_rows=3, **{
        "translation.decoding": {"max_new_tokens": 12, "new_tokens_per_token": None, "token_budget": 37},
        "translation.workers": {"num_workers": 2},
    }))  # fmt: skip
    other = {(row["id"], row["lang"]): row for row in read_table(str(tmp_path / "other")).to_pylist()}
    assert other == made
    with pytest.raises(OutputExistsError, match=r"translation\.compat: False there, True here"):
        job.main([*words, "translation.compat=true"])


@pytest.mark.ray
def test_garbage_is_quarantined_and_counted(model, ray_cluster, tmp_path):
    rows = [*sentence_rows(6), make_row(6, "12?", "13 + 1", "14 + 1")]
    fields = {"translation.languages": ["de", "ar"], "translation.checks": {}, "shard_rows": 3}
    words = job_words(model, write_rows(tmp_path, rows), tmp_path / "out", **fields)
    words.append('translation.retry={"max_new_tokens": 12, "new_tokens_per_token": null, "num_beams": 2}')
    with pytest.raises(EvaluationError, match=r"(\d+) of 14 translations of '.*out' have faults; look into its quara"):
        job.main(words)
    assert not (tmp_path / "out" / "run.json").exists()
    job.main([*words, "max_failed_fraction=1"])
    done = json.loads((tmp_path / "out" / "run.json").read_text())
    kept, gone = read_table(str(tmp_path / "out")).to_pylist(), list(read_dropped(str(tmp_path / "out")))
    assert len(kept) + len(gone) == 14 and len(kept) == done["counts"]["written"]
    # Words of Latin letters are no Arabic, and numbers are the same in any language.
    assert [row["id"] for row in kept if row["lang"] == "ar"] == ["r6"]
    assert done["languages"]["ar"]["dropped"]["wrong_script"] == 6
    assert done["counts"]["dropped"]["wrong_script"] == 6
    arabic = [row for row in gone if row["lang"] == "ar"]
    assert all("wrong_script" in row["dropped"] and row["num_retried"] == 3 for row in arabic)
    assert all(row["translated_from"] == "en" and row["translated_by"] == model for row in gone)
    originals = {row["id"]: contents(row) for row in rows}
    assert all(contents(row) != originals[row["id"]] for row in arabic)
    assert not {"_kept", "_shard", "_dropped"} & set(gone[0])


def test_bad_input_is_told_before_ray_starts(model, tmp_path, monkeypatch):
    path = write_rows(tmp_path, sentence_rows(2))
    with pytest.raises(ConfigError, match=r"no language 'deu_Latin' \(close: deu_Latn.*'zho_Hanz' \(close: zho_Hans"):
        job.main(job_words(model, path, tmp_path / "out", **{"translation.languages": ["deu_Latin", "ar", "zho_Hanz"]}))
    with pytest.raises(CheckpointError, match="There is no model at '/nowhere/nllb'"):
        job.main(job_words("/nowhere/nllb", path, tmp_path / "out"))
    with pytest.raises(ConfigError, match="de stands there more than once"):
        job.main(job_words(model, path, tmp_path / "out", **{"translation.languages": ["de", "fr", "deu_Latn"]}))
    with pytest.raises(ConfigError, match="languages.*at least 1 item"):
        job.main(job_words(model, path, tmp_path / "out", **{"translation.languages": []}))
    with pytest.raises(ConfigError, match="dataset names the files of json_output; set that too"):
        job.main(job_words(model, path, tmp_path / "out", dataset="a/b"))
    assert not (tmp_path / "out").exists()
    check_translation(build_config(TranslationConfig, {"model": model, "languages": ["de", "en"]}, "the test"))
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.chrf", None)
    with pytest.raises(ConfigError, match="min_round_trip_chrf needs sacrebleu; run `pip install sacrebleu`"):
        job.main(job_words(model, path, tmp_path / "out", **{"translation.min_round_trip_chrf": 40}))


def test_json_files_are_those_of_the_original(tmp_path):
    rows = [
        make_row(1, "Warum\u2028so?", "Größe \\n", "Ü\n  b", lang="de", extra=[1, 2]),
        make_row(2, "لماذا؟", "نعم", "لا", lang="ar", extra=None),
        make_row(3, lang="de", extra=[]) | {"prompt": [*chat("Sei kurz.", "system"), *chat("Wo?", "user")]},
    ]
    output = f"memory://translated-{tmp_path.name}-json"
    with files.atomic_file(f"{output}/shard-00000-of-00001.parquet") as handle:
        pq.write_table(pa.Table.from_pylist(rows), handle)
    paths = write_translations(output, "org/the-set", "filtered", ["de", "ar", "fr"], ["chosen", "rejected"])
    assert [path.removeprefix(f"{output}/") for path in paths] == [
        "org_the-set_filtered_deu_Latn_translated.json",
        "org_the-set_filtered_arb_Arab_translated.json",
        "org_the-set_filtered_fra_Latn_translated.json",
    ]
    fs, _ = files.filesystem(output)
    german, arabic, french = (fs.cat(path).decode() for path in paths)
    expected = [
        {
            "chosen": row["chosen"][0]["content"],
            "rejected": row["rejected"][0]["content"],
            "target_language": "deu_Latn",
            "id": row["id"],
            "group": row["group"],
            "lang": "de",
            "subset": None,
            "src_lang": None,
            "tgt_lang": None,
            "prompt": prompt,
            "extra": row["extra"],
        }
        for row, prompt in ((rows[0], "Warum\u2028so?"), (rows[2], "Sei kurz.\nWo?"))
    ]
    assert german == json.dumps(expected, indent=4, ensure_ascii=False)
    assert [row["prompt"] for row in json.loads(arabic)] == ["لماذا؟"] and "لماذا" in arabic
    assert french == "[]"
    assert read_table(output).num_rows == 3, "no export is read as rows"
    assert [name_dataset(path) for path in ("/a/qa_test.jsonl", "s3://b/runs/set/", "rows")] == [
        "qa_test",
        "set",
        "rows",
    ]


@pytest.mark.ray
def test_the_job_exports_a_finished_run_too(model, ray_cluster, tmp_path, monkeypatch):
    import datasets

    pushed = []
    monkeypatch.setattr(
        datasets.Dataset, "push_to_hub", lambda rows, *args, **fields: pushed.append((rows["id"][:], args, fields))
    )
    words = job_words(model, write_rows(tmp_path, sentence_rows(2)), tmp_path / "out")
    job.main(words)
    assert not list((tmp_path / "out").glob("*_translated.json")) and not pushed
    job.main([*words, "json_output=true", "hub_id=owner/translated", "split=train"])
    names = {path.name for path in (tmp_path / "out").glob("*_translated.json")}
    assert names == {f"rows_train_{code}_translated.json" for code in ("deu_Latn", "zho_Hant", "eng_Latn")}
    texts_of = json.loads((tmp_path / "out" / "rows_train_eng_Latn_translated.json").read_text())
    assert list(texts_of[0])[:5] == ["prompt", "chosen", "rejected", "target_language", "id"]
    fields = {"split": "train", "private": True}
    assert pushed == [
        (["r0", "r1"], ("owner/translated",), {"config_name": lang, **fields}) for lang in ("de", "zh-Hant", "en")
    ]


def test_a_hub_that_refuses_is_told(tmp_path, monkeypatch):
    import datasets

    def refuse(*_, **__):
        raise OSError("401 Unauthorized\nmore")

    monkeypatch.setattr(datasets.Dataset, "push_to_hub", refuse)
    write_rows(tmp_path, [make_row(1)])
    with pytest.raises(ServiceError, match="rows of 'en' at .* not be pushed to 'a/b': 401 Unauthorized; run again"):
        push_translations(str(tmp_path), "a/b", "test")
