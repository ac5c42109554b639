"""The translation job: sets, two policies, resume, one run with a real vLLM and BLEURT, bad input."""

import csv
import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
import types
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sacrebleu.metrics import BLEU, CHRF

from jobs import evaluate_translation, prepare_prompts
from jobs.evaluate_translation import EvaluateTranslation
from rayrm import cluster, files
from rayrm.config import build_config
from rayrm.errors import CheckpointError, ConfigError, EvaluationError, OutputExistsError, SchemaError
from rayrm.evaluation.translation import comet, entropy, policies
from rayrm.evaluation.translation.bleurt import TranslationScorer
from rayrm.evaluation.translation.comet import CometConfig, check_comet, score_comet
from rayrm.evaluation.translation.entropy import match_temperature
from rayrm.evaluation.translation.policies import Policy
from rayrm.evaluation.translation.sets import TranslatedRows, write_rows
from rayrm.models.bleurt import EncodedPair, score_encoded
from rayrm.models.creation import CreationConfig, create_model
from rayrm.models.folders import load_tokenizer
from rayrm.models.rendering import Renderer
from rayrm.prompts import direct_prompt
from rayrm.rows import TEXTS, set_column
from rayrm.scoring.bleurt import BleurtScorer, BleurtScoring
from rayrm.shards import list_files, read_table
from rayrm.sources.flores import find_languages, make_directions, read_flores
from rayrm.splits import is_held_out

TEXTS_BY_LANGUAGE = {
    "eng_Latn": ["a dog runs over the grass", "two children play at the river", "a red house", "the old man sleeps"],
    "deu_Latn": ["ein Hund läuft über das Gras", "zwei Kinder spielen am Fluss", "ein rotes Haus", "der Alte schläft"],
    "fra_Latn": ["un chien court sur l'herbe", "deux enfants jouent au bord", "une maison rouge", "le vieux dort"],
}
DIRECTIONS = {("en", "de"), ("en", "fr"), ("de", "en"), ("de", "fr"), ("fr", "en"), ("fr", "de")}


def make_flores(folder, split="devtest", texts=TEXTS_BY_LANGUAGE):
    (folder / split).mkdir(parents=True, exist_ok=True)
    for code, lines in texts.items():
        (folder / split / f"{code}.{split}").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder)


def make_parallel(path):
    english, german, french = TEXTS_BY_LANGUAGE.values()
    sides = [(e, g, "en", "de") for e, g in zip(english, german, strict=True)]
    sides += [(f, e, "fr", "en") for e, f in zip(english[:3], french, strict=False)]
    rows = [dict(zip(("src_text", "trg_text", "src_lang", "trg_lang"), row, strict=True)) for row in sides]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def rows_of(output, **fields):
    config = build_config(TranslatedRows, {"output": str(output), **fields}, "the test")
    counts = write_rows(config)
    return read_table(config.output).to_pylist(), counts


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("policy") / "model")
    sizes = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_layers": 2, "num_heads": 2}
    texts = [line for lines in TEXTS_BY_LANGUAGE.values() for line in lines]
    create_model(texts, CreationConfig.model_validate({**sizes, "max_length": 256}), path)
    return path


@pytest.fixture(scope="module")
def bleurt(tmp_path_factory):
    import torch

    from rayrm.models.bleurt import bleurt_classes, save_bleurt

    config_class, model_class, _ = bleurt_classes()
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", "haus", "hund"]
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    path = str(tmp_path_factory.mktemp("bleurt"))
    config = config_class(vocab_size=len(vocab), max_position_embeddings=48, initializer_range=0.4, **sizes)
    save_bleurt(model_class(config).eval(), vocab, path)
    return path


class Translator:
    """A stage in place of vLLM that gives references back, more or less spoiled by the policy's seed."""

    def __init__(self, seed):
        self.seed = seed

    def __call__(self, table):
        references = table["reference"].to_pylist()
        texts = [[text if i % 4 >= self.seed else "Haus Haus"] for i, text in enumerate(references)]
        table = set_column(table, "candidates", pa.array(texts, TEXTS))
        table = set_column(table, "num_unfinished", pa.array([0] * table.num_rows, pa.int64()))
        dropped = ["short" in text for text in references]
        reasons = [["overlength"] if gone else [] for gone in dropped]
        table = set_column(table, "_kept", pa.array([not gone for gone in dropped], pa.bool_()))
        return set_column(table, "_dropped", pa.array(reasons, TEXTS))


@pytest.fixture
def translated(monkeypatch):
    """Policies without vLLM; gives the names of those that were asked for rows, and of those that are to fail."""
    asked, failing = [], set()

    def sample(prompts, config):
        asked.append(config.name)
        if config.name in failing:
            raise CheckpointError("this policy does not load")
        return prompts.map_batches(Translator(config.seed), batch_format="pyarrow", batch_size=None)

    monkeypatch.setattr(policies, "sample_candidates", sample)
    return asked, failing


def test_a_flores_folder_gives_every_direction(tmp_path):
    root = make_flores(tmp_path)
    assert find_languages(root, "devtest") == ["en", "de", "fr"]
    rows = make_directions(read_flores(root, "devtest", ["en", "de", "fr"])).to_pylist()
    assert len(rows) == 4 * 6 and {(row["src_lang"], row["tgt_lang"]) for row in rows} == DIRECTIONS
    assert len({row["id"] for row in rows}) == 24 and len({row["group"] for row in rows}) == 4
    (row,) = [row for row in rows if row["id"] == "devtest-2/de-fr"]
    assert (row["source"], row["reference"], row["lang"]) == ("ein rotes Haus", "une maison rouge", "fr")
    assert row["prompt"][0]["content"] == direct_prompt("ein rotes Haus", "de", "fr")
    # A caption is in the group of its English text, in whichever languages it is read: those of training rows.
    assert row["group"] == files.digest("a red house")
    assert [sentence.group for sentence in read_flores(root, "devtest", ["fr", "de"])][2] == row["group"]


def test_a_broken_flores_folder_is_named(tmp_path):
    root = make_flores(tmp_path)
    with pytest.raises(ConfigError, match="0 files 'dev/<code>.dev'"):
        find_languages(root, "dev")
    with pytest.raises(ConfigError, match=r"no file '.*/ita_Latn.devtest'"):
        read_flores(root, "devtest", ["en", "it"])
    make_flores(tmp_path, texts={"ita_Latn": ["una casa"], "nld_Latn": ["een", "", "drie", "vier"]})
    with pytest.raises(SchemaError, match="has 1 lines and another file of the split 4"):
        read_flores(root, "devtest", ["en", "it"])
    with pytest.raises(SchemaError, match=r"Line 2 of '.*nld_Latn.devtest' is empty"):
        read_flores(root, "devtest", ["en", "nl"])


def test_a_parallel_file_goes_by_its_rows_or_through_english(tmp_path):
    part = {"type": "parallel", "input": make_parallel(tmp_path / "rows.parquet")}
    rows, _ = rows_of(tmp_path / "as_is", sets=[part])
    assert [(row["src_lang"], row["tgt_lang"]) for row in rows] == [("en", "de")] * 4 + [("fr", "en")] * 3
    rows, counts = rows_of(tmp_path / "all", sets=[{**part, "directions": "all"}])
    # Three captions are in three languages, and one in two.
    assert len(rows) == counts["parallel"]["written"] == 3 * 6 + 2
    assert {(row["src_lang"], row["tgt_lang"]) for row in rows} == DIRECTIONS
    found = {(row["source"], row["reference"]) for row in rows if row["src_lang"] == "de" and row["tgt_lang"] == "fr"}
    german, french = TEXTS_BY_LANGUAGE["deu_Latn"], TEXTS_BY_LANGUAGE["fra_Latn"]
    assert found == set(zip(german[:3], french[:3], strict=True))


def test_held_out_groups_and_a_limit_choose_the_same_captions_in_every_pair(tmp_path):
    texts = {code: [f"{lines[i % 4]} {i}" for i in range(40)] for code, lines in TEXTS_BY_LANGUAGE.items()}
    flores = {"type": "flores", "input": make_flores(tmp_path / "flores", texts=texts)}
    how = {"split": "held_out", "held_out_fraction": 0.4, "held_out_seed": 5}
    rows, counts = rows_of(tmp_path / "held", sets=[flores], **how)
    groups = {files.digest(text) for text in texts["eng_Latn"]}
    held = {group for group in groups if is_held_out(group, 0.4, 5)}
    assert {row["group"] for row in rows} == held and len(rows) == 6 * len(held)
    assert counts["flores"]["dropped"] == {"trained_on": 6 * (40 - len(held))}
    rows, counts = rows_of(tmp_path / "few", sets=[flores], max_rows_per_lang_pair=7)
    assert counts["flores"]["dropped"] == {"over_limit": 6 * 33}
    by_pair = {}
    for row in rows:
        by_pair.setdefault((row["src_lang"], row["tgt_lang"]), set()).add(row["group"])
    assert set(by_pair) == DIRECTIONS and {len(found) for found in by_pair.values()} == {7}
    assert len(set().union(*by_pair.values())) == 7


def words(tmp_path, model, *more):
    root = make_flores(tmp_path / "flores")
    inputs = ["sets.0.type=flores", f"sets.0.input={root}", f"output={tmp_path / 'out'}", "shard_rows=10"]
    return [*inputs, f"policies.0.model={model}", "policies.0.name=first", "bootstrap.num_resamples=50", *more]


def second(model, *more):
    return [f"policies.1.model={model}", "policies.1.name=second", *more]


@pytest.mark.ray
def test_two_policies_are_compared_and_nothing_is_done_twice(policy, translated, ray_cluster, tmp_path, capsys):
    asked, failing = translated
    given = [*words(tmp_path, policy, "policies.0.seed=2", "shard_rows=30"), *second(policy)]
    texts = {code: [f"{lines[i % 4]} {i}" for i in range(12)] for code, lines in TEXTS_BY_LANGUAGE.items()}
    # Every policy drops what is too long for it, here one caption into English.
    texts["eng_Latn"][7] = "too short to answer"
    make_flores(tmp_path / "flores", texts=texts)
    failing.add("second")
    with pytest.raises(CheckpointError, match="does not load"):
        evaluate_translation.main(given)
    shards = {path: os.stat(path).st_mtime_ns for path in list_files(str(tmp_path / "out/first"))}
    assert len(shards) == 3 and asked == ["first", "second"] and not (tmp_path / "out/run.json").exists()
    asked.clear()
    failing.clear()
    evaluate_translation.main(given)
    assert asked == ["second"] and {path: os.stat(path).st_mtime_ns for path in shards} == shards
    found = files.read_json(str(tmp_path / "out/run.json"))["results"]["flores"]
    first, other = found["metrics"]["first"], found["metrics"]["second"]
    assert other["bleu/en-de"] == pytest.approx(100) and first["bleu/en-de"] < 60
    assert found["differences"][0]["chrf_interval/en-x"][0] > 0
    assert first["dropped"] == first["empty"] == pytest.approx(2 / 72) and first["dropped/en-de"] == 0
    assert read_table(str(tmp_path / "out/second/candidates"))["unanswered"].to_pylist().count("overlength") == 2
    assert other["bleu/de-en"] < 100
    shown = capsys.readouterr().out
    assert "second − first" in shown and "en → x" in shown and "dropped" in shown
    page = (tmp_path / "out/report.html").read_text()
    assert "chrF: second − first" in page and "tok:13a" in page
    with (tmp_path / "out/matrices/flores/first/bleu.csv").open(encoding="utf-8-sig") as handle:
        rows = list(csv.reader(handle))
    assert rows[0] == ["source", "en", "de", "fr"] and [row[0] for row in rows[1:]] == ["en", "de", "fr"]
    assert rows[1][1] == "" and float(rows[1][2]) == pytest.approx(first["bleu/en-de"], abs=1e-3)
    asked.clear()
    evaluate_translation.main(given)
    assert asked == [] and capsys.readouterr().out == shown
    with pytest.raises(OutputExistsError, match="max_tokens"):
        evaluate_translation.main([*given, "policies.1.max_tokens=5"])
    # As a kill leaves it: one policy is done, of the other one a shard is missing, and nothing is measured.
    paths = list_files(str(tmp_path / "out/second/candidates"))
    for path in (paths[1], tmp_path / "out/second/candidates/run.json", tmp_path / "out/run.json"):
        os.remove(path)
    before = {path: os.stat(path).st_mtime_ns for path in [*shards, paths[0], paths[2]]}
    evaluate_translation.main(given)
    assert asked == ["second"] and capsys.readouterr().out == shown
    assert {path: os.stat(path).st_mtime_ns for path in before} == before and os.path.exists(paths[1])


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.ray
def test_a_policy_draws_where_it_is_as_undecided_as_another(policy, ray_cluster, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    from rayrm.models.generating import TransformersEngine
    from rayrm.models.vllm import DecodingConfig, EngineConfig
    from rayrm.sampling import prompt_ids

    model, path = AutoModelForCausalLM.from_pretrained(policy), str(tmp_path / "sharp")
    # Next tokens that are far from equally likely.
    model.lm_head.weight.data *= 3
    model.save_pretrained(path)
    load_tokenizer(policy).save_pretrained(path)
    rows, _ = rows_of(tmp_path / "rows", sets=[{"type": "flores", "input": make_flores(tmp_path / "flores")}])
    how = {"model": path, "chat_template": "none", "max_tokens": 24, "engine": {"kv_cache_gib": 0.25}}
    other = Policy(name="other", temperature=0.5, **how)
    own = Policy(name="own", temperature=2.0, entropy_of="other", **how)
    found = match_temperature(own, other, str(tmp_path / "rows"), str(tmp_path / "out"))
    assert found["temperature"] == pytest.approx(0.5, abs=0.02) and found["entropy"] == pytest.approx(
        found["wanted"], abs=0.1
    )
    # The distributions that are drawn from, the temperature in them: not those of temperature 1.
    engine, renderer = TransformersEngine(path, EngineConfig(), 1), Renderer(load_tokenizer(path), None)
    prompts = [prompt_ids(row, renderer, other, engine)[0] for row in rows]
    drawn = engine.draw(prompts, list(range(24)), DecodingConfig(num_candidates=8, max_tokens=24, temperature=0.5))
    wanted = -np.mean([logprob for group in drawn for item in group for logprob in item.logprobs])
    plain = []
    for ids, item in ((ids, item) for ids, group in zip(prompts, drawn, strict=True) for item in group):
        logits = engine.network(torch.tensor([[*ids, *item.ids]])).logits[0, len(ids) - 1 : -1].detach()
        plain += (-logits.log_softmax(-1)[torch.arange(len(item.ids)), item.ids]).tolist()
    assert found["wanted"] == pytest.approx(wanted, abs=0.35) and np.mean(plain) > wanted + 0.8
    monkeypatch.setattr(entropy, "_measure", None)
    assert match_temperature(own, other, str(tmp_path / "rows"), str(tmp_path / "out")) == found


@pytest.mark.ray
def test_a_matched_temperature_is_that_of_the_draws(policy, translated, ray_cluster, tmp_path, monkeypatch):
    temperatures = {}
    sample = policies.sample_candidates

    def watched(prompts, config):
        temperatures[config.name] = config.temperature
        return sample(prompts, config)

    monkeypatch.setattr(policies, "sample_candidates", watched)
    monkeypatch.setattr(entropy, "_measure", lambda policy, rows, use: use(lambda temperature: temperature**2))
    evaluate_translation.main(
        [
            *words(tmp_path, policy, "policies.0.temperature=1.5", "policies.0.entropy_of=second"),
            *second(policy, "policies.1.temperature=0.8"),
        ]
    )
    assert temperatures == {"first": pytest.approx(0.8, abs=2e-3), "second": 0.8}
    found = files.read_json(str(tmp_path / "out/run.json"))["temperatures"]
    assert found == {
        "first": {"temperature": temperatures["first"], "entropy": pytest.approx(0.64, abs=4e-3), "wanted": 0.8**2}
    }
    assert ", where its entropy is 0.64 nats a token (0.64 wanted)" in (tmp_path / "out/report.html").read_text()


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.ray
def test_samples_of_a_real_policy_are_measured_one_by_one(policy, bleurt, ray_cluster, tmp_path, monkeypatch):
    sampled = ["num_candidates=2", "temperature=1", "max_tokens=12", "workers.num_cpus=1"]
    more = [f"policies.0.{word}" for word in sampled] + [f"metrics.bleurt.model={bleurt}"]
    given = words(tmp_path, policy, *more)
    evaluate_translation.main(given)
    found = files.read_json(str(tmp_path / "out/run.json"))["results"]["flores"]["metrics"]["first"]
    rows = read_table(str(tmp_path / "out/first/scored")).to_pylist()
    assert len(rows) == 24 and all(len(row["candidates"]) == 2 for row in rows)
    german = [row for row in rows if row["tgt_lang"] == "de" and row["src_lang"] == "en"]
    references = [[row["reference"] for row in german]]
    for name, metric in (("bleu", BLEU(effective_order=True)), ("chrf", CHRF())):
        texts = [[" ".join(row["candidates"][sample].split()) for row in german] for sample in (0, 1)]
        scores = [metric.corpus_score(own, references).score for own in texts]
        assert found[f"{name}/en-de"] == pytest.approx(np.mean(scores))
    scores = [np.mean(row["scores"]["bleurt"]) for row in german]
    assert found["bleurt/en-de"] == pytest.approx(np.mean(scores))
    assert found["unfinished"] == sum(row["num_unfinished"] for row in rows) / 48 > 0
    # What is complete needs neither engine nor model again.
    monkeypatch.setattr(evaluate_translation, "check_policy", None)
    monkeypatch.setattr(evaluate_translation, "translate_rows", None)
    evaluate_translation.main(given)


def make_candidates(folder, num=3):
    rows = []
    for index in range(num):
        row = {"set": "s", "id": f"r{index}", "lang": "de", "source": f"text\n{index}", "reference": "ein Text"}
        rows.append({**row, "candidates": ["ein  Text", " "]})
    folder.mkdir(parents=True, exist_ok=True)
    for index, row in enumerate(rows):
        pq.write_table(pa.Table.from_pylist([row]), folder / f"shard-{index}.parquet")
    return str(folder)


def test_comet_scores_every_text_and_tells_what_failed(tmp_path, monkeypatch):
    loaded, seen = [], []

    def predict(texts, batch_size, gpus, progress_bar, num_workers):
        seen.extend(texts)
        # What is empty is scored, and the model fails on one source.
        scores = [len(text["mt"]) / 10 if text["src"] != "text 2" else float("nan") for text in texts]
        return types.SimpleNamespace(scores=scores)

    def load(path):
        loaded.append(path)
        return types.SimpleNamespace(predict=predict)

    fake = types.SimpleNamespace(download_model=lambda name: f"{name}.ckpt", load_from_checkpoint=load)
    monkeypatch.setitem(sys.modules, "comet", fake)
    monkeypatch.setattr(comet, "_run", lambda config, function, *arguments: function(*arguments))
    candidates, output = make_candidates(tmp_path / "candidates"), str(tmp_path / "comet")
    check_comet(CometConfig())
    config = CometConfig(model="owner/comet")
    with pytest.raises(EvaluationError, match=r"2 of 6 scores of .* failed .*unscored: 2 nan.* allows 0\.05"):
        score_comet(config, candidates, output, 0.05)
    assert loaded == ["owner/comet.ckpt"] and len(seen) == 6 and not files.exists(f"{output}/run.json")
    assert seen[0] == {"src": "text 0", "mt": "ein Text", "ref": "ein Text"} and seen[1]["mt"] == ""
    # Only a shard without scores is scored again.
    (tmp_path / "comet/shard-1.parquet").unlink()
    score_comet(config, candidates, output, 0.5)
    assert len(seen) == 8
    rows = read_table(output).to_pylist()
    assert [row["scores"] for row in rows] == [{"comet": [0.8, 0.0]}] * 2 + [{"comet": [None, None]}]
    assert [row["status"] for row in rows] == [{"comet": ["ok", "ok"]}] * 2 + [{"comet": ["nan", "nan"]}]
    score_comet(config, candidates, output, 0.5)
    assert len(seen) == 8


def test_bleurt_scores_a_text_of_nothing_as_the_model_does(bleurt):
    scoring = BleurtScoring(model=bleurt)
    rows = [
        {"reference": "ein rotes haus", "candidates": ["das haus", "", "  "]},
        {"reference": "der hund", "candidates": [""]},
    ]
    scorer, usual = TranslationScorer(scoring), BleurtScorer(scoring)
    assert usual.score(rows)[0][1:] == [(None, "empty")] * 2
    (text, nothing, blank), (other,) = scorer.score(rows)
    assert text[0] == pytest.approx(usual.score(rows)[0][0][0], abs=1e-5)
    ids = scorer.tokenizer.encode(["ein rotes haus"])[0]
    pair = EncodedPair([scorer.tokenizer.cls_id, *ids, *[scorer.tokenizer.sep_id] * 2], len(ids) + 2, False)
    (expected,) = score_encoded(scorer.model, [pair], 64, scorer.tokenizer.pad_id)
    assert nothing == blank and nothing[1] == other[1] == "ok" and nothing[0] != other[0]
    assert nothing[0] == pytest.approx(expected, abs=1e-5)


def test_what_a_policy_cannot_answer_is_an_empty_text():
    table = pa.table({"candidates": pa.array([["a", "b"], None], TEXTS), "num_unfinished": pa.array([1, None])})
    table = set_column(table, "_kept", pa.array([True, False]))
    table = policies.answer_dropped(set_column(table, "_dropped", pa.array([[], ["overlength"]], TEXTS)), 2)
    assert table["candidates"].to_pylist() == [["a", "b"], ["", ""]]
    assert table["unanswered"].to_pylist() == [None, "overlength"] and table["num_unfinished"].to_pylist() == [1, 0]
    assert table["_kept"].to_pylist() == [True, True] and table["_dropped"].to_pylist() == [[], []]


def test_what_pip_says_is_told_in_one_sentence(monkeypatch):
    import ray
    from ray.exceptions import RuntimeEnvSetupError

    def fail(**options):
        trace = (
            "Traceback:\n  raise Error(\nLast 50 lines of stdout:\n  ERROR: No matching distribution found for x==9\n"
        )
        raise RuntimeEnvSetupError(f"Failed to set up runtime environment.\n{trace}  Hint: none.")

    monkeypatch.setattr(cluster, "require", lambda *arguments: None)
    monkeypatch.setattr(ray, "remote", lambda function: types.SimpleNamespace(options=fail))
    with pytest.raises(ConfigError, match=r"\(pip: x==9\) cannot be made: ERROR: No .* for x==9; give packages that"):
        check_comet(CometConfig(pip=["x==9"]))


@pytest.mark.slow
@pytest.mark.ray
def test_an_environment_that_cannot_be_made_is_told_in_one_sentence(ray_cluster, tmp_path):
    missing = tmp_path / "no_such_package"
    with pytest.raises(
        ConfigError, match=r"COMET's environment \(pip: .*no_such_package\) cannot be made: .*comet\.pip"
    ):
        check_comet(CometConfig(pip=[str(missing)]))


def test_a_policy_that_answers_nothing_is_told(policy, tmp_path):
    own = policies.Policy(model=policy, name="mute")
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"unanswered": pa.array(["overlength", None])}), path)
    assert policies._count_unanswered(str(tmp_path), own) == {"unanswered": {"overlength": 1}}
    pq.write_table(pa.table({"unanswered": ["overlength", "no_anchor", "overlength"]}), path)
    with pytest.raises(EvaluationError, match=r"'mute' could answer none of the 3 rows \(2 overlength, 1 no_anchor\)"):
        policies._count_unanswered(str(tmp_path), own)


STAND_IN = """
import json, os, sys
from types import SimpleNamespace

class Network:
    def __init__(self, path):
        self.path = path

    def predict(self, texts, batch_size, gpus, progress_bar, num_workers):
        with open(self.path + ".told", "a") as handle:
            print(json.dumps({"pid": os.getpid(), "prefix": sys.prefix, "package": __file__}), file=handle)
        return SimpleNamespace(scores=[len(text["mt"]) / 8 for text in texts])

load_from_checkpoint = Network
download_model = None
"""


def make_wheel(folder, name, code):
    """A wheel of one module, which pip installs without asking any registry or building anything."""
    path, info = folder / f"{name}-0.1-py3-none-any.whl", f"{name}-0.1.dist-info"
    held = {
        f"{name}/__init__.py": code,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(path, "w") as wheel:
        for inner, text in {**held, f"{info}/RECORD": "".join(f"{inner},,\n" for inner in held)}.items():
            wheel.writestr(inner, text)
    return str(path)


RUN_COMET = """
import os, sys
import ray
from rayrm.evaluation.translation.comet import CometConfig, check_comet, score_comet

model, wheel, candidates, output = sys.argv[1:]
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
config = CometConfig(model=model, pip=[wheel])
check_comet(config)
score_comet(config, candidates, output, 0)
print(os.getpid(), sys.prefix)
"""


def make_environment(path):
    """A virtual environment with all packages of this one, and small: Ray copies the one that it runs in."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", path], check=True)
    (site,) = path.glob("lib/*/site-packages")
    (site / "all.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return str(path / "bin/python")


@pytest.mark.slow
@pytest.mark.ray
def test_comet_scores_come_from_an_environment_of_its_own(tmp_path):
    assert importlib.util.find_spec("comet") is None
    model, output = tmp_path / "model.ckpt", str(tmp_path / "comet_scores")
    model.touch()
    candidates, wheel = make_candidates(tmp_path / "candidates"), make_wheel(tmp_path, "comet", STAND_IN)
    ran = subprocess.run(
        [make_environment(tmp_path / "own"), "-c", RUN_COMET, str(model), wheel, candidates, output],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    pid, prefix = ran.stdout.split()
    assert read_table(output)["scores"].to_pylist() == [{"comet": [1.0, 0.0]}] * 3
    calls = [json.loads(line) for line in (tmp_path / "model.ckpt.told").read_text().splitlines()]
    # One task loads the model once for all three files, in a process of another Python than the job's.
    assert len(calls) == 3 and len({call["pid"] for call in calls}) == 1 and calls[0]["pid"] != int(pid)
    assert "runtime_resources/pip" in calls[0]["prefix"] and calls[0]["prefix"] != prefix
    assert calls[0]["package"].startswith(calls[0]["prefix"])


def test_bad_configs_are_told(policy, tmp_path):
    root = make_flores(tmp_path / "flores")
    good = {
        "output": str(tmp_path / "out"),
        "sets": [{"type": "flores", "input": root}],
        "policies": [{"model": policy}],
    }

    def fault(**changes):
        with pytest.raises(ConfigError) as told:
            build_config(EvaluateTranslation, {**good, **changes}, "the test")
        return str(told.value)

    build_config(EvaluateTranslation, good, "the test")
    assert "several policies are called 'policy'" in fault(policies=good["policies"] * 2)
    sharp = {**good["policies"][0], "name": "sharp", "temperature": 1.0, "entropy_of": "policy"}
    assert "the policies with a temperature of their own are none" in fault(policies=[*good["policies"], sharp])
    assert "set the one to begin the search with" in fault(policies=[{**sharp, "temperature": 0}])
    assert "the folder prompts of the output" in fault(policies=[{"model": policy, "name": "prompts"}])
    assert "should match pattern" in fault(policies=[{"model": policy, "name": ".."}])
    assert "several sets are called 'flores'" in fault(sets=good["sets"] * 2)
    unknown = fault(sets=[{**good["sets"][0], "languages": ["en", "xx"]}])
    assert "there is no language xx; the codes are en, de" in unknown
    assert "the language en is named twice" in fault(sets=[{**good["sets"][0], "languages": ["en", "en"]}])
    assert "set both or neither" in fault(split="held_out")
    assert "nothing to measure" in fault(metrics={"corpus": []})
    assert "temperature 0 gives 4 equal" in fault(policies=[{"model": policy, "num_candidates": 4}])


def test_rows_that_cannot_be_measured_are_named_and_leave_nothing_behind(policy, tmp_path):
    source = make_parallel(tmp_path / "rows.parquet")
    anchored = str(tmp_path / "anchored")
    prepare_prompts.main([f"input={source}", f"output={anchored}", "prompts.type=anchored"])
    given = [f"output={tmp_path / 'out'}", f"policies.0.model={policy}", "sets.0.type=prompts"]
    with pytest.raises(SchemaError, match="rows of .* have no reference, the first one is"):
        evaluate_translation.main([*given, f"sets.0.input={anchored}"])
    assert not (tmp_path / "out/started.json").exists()
    direct = str(tmp_path / "direct")
    prepare_prompts.main([f"input={source}", f"output={direct}"])
    rows, _ = rows_of(tmp_path / "again", sets=[{"type": "prompts", "input": direct}])
    assert len(rows) == 7 and {row["set"] for row in rows} == {"prompts"}
    twice = tmp_path / "twice.jsonl"
    lines = [json.dumps({key: value for key, value in rows[0].items() if key != "set"})] * 2
    twice.write_text("\n".join(lines))
    with pytest.raises(SchemaError, match="stands twice in de"):
        evaluate_translation.main([*given, f"sets.0.input={twice}"])
    with pytest.raises(SchemaError, match="No row of .* is left to translate: 7 trained_on"):
        how = {"split": "held_out", "held_out_fraction": 1e-9}
        rows_of(tmp_path / "none", sets=[{"type": "prompts", "input": direct}], **how)
    with pytest.raises(CheckpointError, match="There is no model at"):
        evaluate_translation.main([*given, f"sets.0.input={direct}", "policies.0.model=/nowhere"])
