"""A BLEURT model fitted on spoilt references."""

import json
import random
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from jobs.train_bleurt import main
from rayrm.config import build_config
from rayrm.errors import ConfigError, SchemaError
from rayrm.rows import Prompt
from rayrm.training.bleurt import BleurtJob, BleurtTraining, read_references
from rayrm.training.corruption import Reference, Spoiler, edit_distance, similarity, words_of

NOUNS = ["hund", "katze", "vogel", "mann", "frau", "kind", "baum", "auto", "haus", "boot"]
VERBS = ["sieht", "sucht", "findet", "malt", "kennt", "hört"]
ADJECTIVES = ["rote", "blaue", "alte", "neue", "kleine", "große", "leise"]


def sentences(number, seed=0):
    rng = random.Random(seed)
    found = {
        f"der {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)} {rng.choice(VERBS)} "
        f"das {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)} und {rng.choice(VERBS)} {rng.choice(NOUNS)}"
        for _ in range(number)
    }
    return sorted(found)


def write_prompts(path, texts, **changes):
    rows = [
        {
            "id": f"r{i}",
            "group": f"g{i}",
            "prompt": [{"role": "user", "content": "Übersetze"}],
            "reference": text,
            "lang": "de",
        }
        | changes
        for i, text in enumerate(texts)
    ]
    path.mkdir()
    pq.write_table(Prompt.conform(pa.Table.from_pylist(rows)), path / "rows.parquet")
    return str(path)


# --- corruption -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [("a b c", "a b c", 0), ("a b c", "a c", 1), ("a b c", "a x c", 1), ("a b", "b a", 2), ("", "a b", 2)],
)
def test_edit_distance(first, second, distance):
    assert edit_distance(first.split(), second.split()) == distance
    assert edit_distance(second.split(), first.split()) == distance


def test_similarity_by_hand():
    assert similarity("ein hund", "ein hund") == 1.0
    assert similarity("ab", "cd") == 0.0
    # Words: 1 of 2 replaced = 1/2. Characters of "abcd" and "abxy": 1-grams 2·2/8, 2-grams 2·1/6, 3- and 4-grams 0.
    assert similarity("ab cd", "ab xy") == pytest.approx((0.5 + (0.5 + 1 / 3) / 4) / 2)


def test_a_script_without_blanks_is_cut_into_characters():
    assert words_of("红色的猫") == ["红", "色", "的", "猫"]
    assert words_of("ein hund") == ["ein", "hund"]
    reference = Reference("a", "a", "zh", "红色的猫在睡觉")
    spoilt = [Spoiler([reference], 0).spoil(reference, k).candidate for k in range(50)]
    assert not any(" " in text for text in spoilt)
    assert len(set(spoilt)) > 10


def test_spoilt_pairs_are_graded_repeatable_and_of_one_language():
    references = [Reference(f"r{i}", f"g{i}", "de", text) for i, text in enumerate(sentences(200))]
    foreign = [Reference("x", "x", "fr", "le chien rouge dort")]
    spoiler = Spoiler([*references, *foreign], seed=5)
    pairs = [spoiler.spoil(reference, k) for reference in references for k in range(5)]
    again = Spoiler([*references, *foreign], seed=5)
    assert pairs[7] == again.spoil(references[1], 2)
    assert pairs != [Spoiler(references, seed=6).spoil(r, k) for r in references for k in range(5)]
    targets = np.array([pair.target for pair in pairs])
    assert targets.min() >= 0
    assert targets.max() == 1
    same = np.mean([pair.reference == pair.candidate for pair in pairs])
    assert 0.08 < same < 0.2
    assert all(pair.target == 1 for pair in pairs if pair.reference == pair.candidate)
    # Every quarter of the scale has its share.
    assert min(np.histogram(targets, bins=[0, 0.25, 0.5, 0.75, 1.01])[0]) > 0.03 * len(pairs)
    german = {word for reference in references for word in reference.text.split()}
    assert all(set(pair.candidate.split()) <= german for pair in pairs)


def test_every_operation_survives_one_word():
    spoiler = Spoiler([Reference("a", "a", "de", "hund")], seed=0)
    for operation in spoiler.operations:
        assert operation(["hund"], random.Random(0), "de")


# --- the split and the checks ---------------------------------------------------------------------------------------


def test_references_are_unique_bounded_and_split_by_group(tmp_path):
    texts = [*sentences(300), "", " ", sentences(300)[0]]
    path = write_prompts(tmp_path / "in", texts)
    train, held_out = read_references(path, BleurtTraining(held_out_fraction=0.2))
    assert len(train) + len(held_out) == len(set(texts)) - 2
    assert 0.1 < len(held_out) / len(texts) < 0.3
    assert not {r.group for r in train} & {r.group for r in held_out}
    few = read_references(path, BleurtTraining(held_out_fraction=0.2, max_rows=50))
    assert len(few[0]) + len(few[1]) == 50
    assert few != read_references(path, BleurtTraining(held_out_fraction=0.2, max_rows=50, seed=1))


def test_rows_that_cannot_be_trained_on(tmp_path):
    one_group = write_prompts(tmp_path / "one", sentences(20), group="g")
    with pytest.raises(SchemaError, match="in held-out groups; both sides need some"):
        main([f"input={one_group}", f"output={tmp_path / 'out'}"])
    nothing = write_prompts(tmp_path / "none", sentences(20), reference=None)
    with pytest.raises(SchemaError, match="0 references to train on"):
        main([f"input={nothing}", f"output={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()


def test_more_than_one_worker_is_refused():
    with pytest.raises(ConfigError, match="trains in 1 process, not in 2"):
        build_config(BleurtJob, {"input": "a", "output": "b", "workers": {"num_workers": 2}}, "a test")


# --- training -------------------------------------------------------------------------------------------------------


def test_rate_rises_and_falls():
    from rayrm.training.bleurt_loop import rate_at

    training = BleurtTraining(max_steps=9, warmup_fraction=0.5, lr=1.0)  # warmup of 4 steps
    assert [rate_at(step, training) for step in (1, 4, 7, 9)] == pytest.approx([0.25, 1.0, 0.5, 1 / 6])


def test_ranks_share_ties():
    from rayrm.training.bleurt_loop import ranks

    assert ranks(np.array([0.3, 0.1, 0.3, 0.2])).tolist() == [3.5, 1.0, 3.5, 2.0]


@pytest.mark.ray
def test_job_learns_to_grade_and_its_checkpoint_scores(tmp_path, ray_cluster):
    from rayrm.scoring.bleurt import BleurtScorer, BleurtScoring

    path = write_prompts(tmp_path / "in", sentences(600))
    words = [f"input={path}", f"output={tmp_path / 'out'}", "report_to=none", "log_steps=10"]
    words += ["training.max_steps=300", "training.vocab_size=200"]
    main(words)
    mark = json.loads((tmp_path / "out" / "model" / "rayrm.json").read_text())
    assert mark["steps"] == 300
    assert mark["metrics"]["eval_spearman"] > 0.8
    assert mark["metrics"]["eval_pearson/de"] > 0.8
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert records[0]["loss"] > 3 * records[-2]["loss"]
    assert (tmp_path / "out" / "loss.png").stat().st_size > 1000

    scorer = BleurtScorer(BleurtScoring(model=str(tmp_path / "out" / "model")))
    reference = "der rote hund sieht das kleine haus und malt boot"
    candidates = [reference, reference.replace("hund", "vogel"), "die katze", "hund und und und und und und und"]
    (outcomes,) = scorer.score([{"reference": reference, "candidates": candidates}])
    scores = [score for score, _ in outcomes]
    assert scores[0] > scores[1] > max(scores[2:])
    assert scores[0] == pytest.approx(1.0, abs=0.15)

    before = (tmp_path / "out" / "model" / "model.safetensors").stat().st_mtime_ns
    main(words)
    assert (tmp_path / "out" / "model" / "model.safetensors").stat().st_mtime_ns == before


def test_training_is_repeatable(tmp_path):
    from rayrm.training.bleurt_loop import fit, make_model, make_tokenizer, stream_batches, train_vocabulary

    path = write_prompts(tmp_path / "in", sentences(100))
    training = BleurtTraining(num_layers=1, hidden_size=32, num_heads=2, max_steps=5, vocab_size=150)
    job = BleurtJob(input=path, output=str(tmp_path / "out"), training=training, report_to="none")
    train, _ = read_references(path, training)

    def run():
        vocabulary = train_vocabulary([r.text for r in train], training.vocab_size)
        tokenizer = make_tokenizer(vocabulary)
        model = make_model(training, tokenizer)
        fit(model, stream_batches(train, tokenizer, training), job)
        return vocabulary, model.classifier.weight.detach().numpy().ravel()

    (first_vocabulary, first), (second_vocabulary, second) = run(), run()
    assert first_vocabulary == second_vocabulary
    assert first == pytest.approx(second, abs=1e-6)


def test_a_run_that_died_goes_on_from_its_last_state(tmp_path, monkeypatch):
    from ray import train as ray_train

    from rayrm.training.bleurt_loop import fit, make_model, make_tokenizer, stream_batches, train_vocabulary

    path = write_prompts(tmp_path / "in", sentences(100))
    training = BleurtTraining(num_layers=1, hidden_size=32, num_heads=2, max_steps=7, vocab_size=150, batch_tokens=256)
    given = {"output": str(tmp_path / "out"), "report_to": "none", "save_steps": 3, "log_steps": 2}
    job = BleurtJob(input=path, training=training, **given)
    references, _ = read_references(path, training)
    tokenizer = make_tokenizer(train_vocabulary([r.text for r in references], training.vocab_size))

    def report(metrics, checkpoint, checkpoint_dir_name):
        shutil.copytree(checkpoint.path, tmp_path / checkpoint_dir_name)

    monkeypatch.setattr(ray_train, "report", report)

    num_threads = torch.get_num_threads()

    def run(state):
        model = make_model(training, tokenizer)
        # How sums are shared among several hangs on how busy they are, and the results are to be the same bit by bit.
        torch.set_num_threads(1)
        history = fit(model, stream_batches(references, tokenizer, training), job, state=state)
        torch.set_num_threads(num_threads)
        return history, torch.cat([tensor.flatten() for tensor in model.state_dict().values()])

    history, weights = run(None)
    assert [record["step"] for record in history] == [2, 4, 6, 7]
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-3", "step-6"]
    shutil.rmtree(tmp_path / "step-6")
    again, resumed = run(str(tmp_path / "step-3"))
    assert again == history and torch.equal(resumed, weights)
