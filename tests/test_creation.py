"""A model from nothing loads in plain transformers, with its special tokens whole."""

import json

import pytest

from jobs import create_model
from rayrm.errors import ConfigError, OutputExistsError, SchemaError
from rayrm.models.creation import CreationConfig, train_tokenizer
from rayrm.models.rendering import Renderer, load_template

SMALL = ["model.vocab_size=320", "model.hidden_size=64", "model.intermediate_size=96", "model.num_layers=2"]
SMALL += ["model.num_heads=2", "model.max_length=64"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [
        {
            "id": str(i),
            "group": str(i),
            "prompt": [{"role": "user", "content": f"Say it in German: a red house {i}"}],
            "source": f"a red house {i}",
            "reference": f"ein rotes Haus {i}",
            "src_lang": "en",
            "tgt_lang": "de",
            "lang": "de",
        }
        for i in range(40)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def made(prompts, tmp_path_factory):
    output = tmp_path_factory.mktemp("made")
    create_model.main([f"input={prompts}", f"output={output}", *SMALL])
    return output


def test_transformers_loads_a_model_of_the_given_size(made):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(made / "model")
    model = AutoModelForCausalLM.from_pretrained(made / "model")
    # One layer: four 64×64 projections, three 64×96 matrices, two norms; beside them the embeddings and a last norm.
    expected = 2 * (4 * 64 * 64 + 3 * 64 * 96 + 2 * 64) + 320 * 64 + 64
    assert model.num_parameters() == expected
    assert model.config.eos_token_id == tokenizer.eos_token_id
    ids = torch.tensor([tokenizer("a red house")["input_ids"]])
    assert torch.isfinite(model(ids).logits).all()
    done = json.loads((made / "model" / "rayrm.json").read_text())
    assert (done["num_parameters"], done["vocab_size"]) == (expected, 320)


def test_chatml_turns_end_with_one_token(made):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(made / "model")
    renderer = Renderer(tokenizer, load_template(None, tokenizer, "here"))
    rendered = renderer.pair_ids([{"role": "user", "content": "a house"}], "ein Haus")
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert rendered.ids[0] == start
    assert rendered.ids.count(start) == 2
    assert rendered.ids[-1] == end == tokenizer.eos_token_id
    assert tokenizer.decode(rendered.ids[rendered.num_prompt :], skip_special_tokens=True) == "ein Haus"


def test_tokenizer_gives_any_text_back():
    tokenizer = train_tokenizer(["a red house"] * 3, CreationConfig())
    for text in ("ein Haus", "дом 🏠", " two  spaces\n"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_without_a_template_there_is_one_bos():
    tokenizer = train_tokenizer(["a red house"], CreationConfig(chat_template="none"))
    renderer = Renderer(tokenizer, None)
    ids = renderer.prompt_ids([{"role": "user", "content": "a house"}])
    assert tokenizer.chat_template is None
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    assert "<|im_end|>" not in tokenizer.get_vocab()


def test_same_seed_same_files(made, prompts, tmp_path):
    create_model.main([f"input={prompts}", f"output={tmp_path / 'again'}", *SMALL])
    create_model.main([f"input={prompts}", f"output={tmp_path / 'other'}", *SMALL, "model.seed=1"])
    read = {path: (path / "model" / "model.safetensors").read_bytes() for path in (made, *tmp_path.iterdir())}
    assert read[made] == read[tmp_path / "again"]
    assert read[made] != read[tmp_path / "other"]
    for name in ("tokenizer.json", "config.json"):
        assert (made / "model" / name).read_bytes() == (tmp_path / "again" / "model" / name).read_bytes()


def test_a_finished_model_stays(made, prompts):
    before = (made / "model" / "model.safetensors").stat().st_mtime_ns
    create_model.main([f"input={prompts}", f"output={made}", *SMALL])
    assert (made / "model" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(OutputExistsError, match=r"model\.seed: 0 there, 5 here"):
        create_model.main([f"input={prompts}", f"output={made}", *SMALL, "model.seed=5"])


def test_bad_input(tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "a"}\n')
    with pytest.raises(SchemaError, match="not a file of Prompt rows"):
        create_model.main([f"input={other}", f"output={tmp_path / 'out'}"])
    with pytest.raises(ConfigError, match="no text to train"):
        train_tokenizer(["", ""], CreationConfig())
    with pytest.raises(ConfigError, match="no even multiple"):
        create_model.main([f"input={other}", f"output={tmp_path / 'out'}", "model.num_heads=3"])
