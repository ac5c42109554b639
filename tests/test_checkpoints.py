"""Models that are written whole, or not at all; and the pictures beside them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from rayrm.errors import CheckpointError
from rayrm.training.checkpoints import export_model, gather_state, publish, push_to_hub, verify_model
from rayrm.training.curves import draw_loss, write_curves


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, tie_word_embeddings=True, **sizes))


def spoil(folder, change):
    """Rewrite the saved tensors with `change(tensors)`."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_tied_tensors_are_gathered_once_and_saved_whole(model, tmp_path):
    state = gather_state(model)
    assert state.keys() == model.state_dict().keys()
    assert state["lm_head.weight"] is state["model.embed_tokens.weight"]
    assert state["model.norm.weight"] is not model.model.norm.weight
    export_model(str(tmp_path), lambda folder: model.save_pretrained(folder, state_dict=state), AutoModelForCausalLM)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_only_the_wanted_tensors_are_gathered(model):
    assert list(gather_state(model, lambda name: name.endswith("norm.weight") and "layers" not in name)) == [
        "model.norm.weight"
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "missing keys: model.norm.weight"),
        (lambda tensors: tensors.update(extra=torch.ones(2)), "unexpected keys: extra"),
        (lambda tensors: tensors["model.norm.weight"].fill_(float("nan")), "'model.norm.weight'.* is not finite"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.ones(0)}), "does not load|mismatched|empty"),
    ],
)
def test_a_model_with_a_bad_tensor_is_refused(model, tmp_path, change, message):
    model.save_pretrained(tmp_path)
    assert verify_model(tmp_path, AutoModelForCausalLM).config.vocab_size == 40
    spoil(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        verify_model(tmp_path, AutoModelForCausalLM)


def test_a_refused_model_leaves_the_old_one_in_place(model, tmp_path):
    write = model.save_pretrained
    export_model(str(tmp_path), write, AutoModelForCausalLM)
    before = (tmp_path / "model/model.safetensors").read_bytes()

    def write_badly(folder):
        write(folder)
        spoil(folder, lambda tensors: tensors.pop("model.norm.weight"))

    with pytest.raises(CheckpointError):
        export_model(str(tmp_path), write_badly, AutoModelForCausalLM)
    assert (tmp_path / "model/model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("url", [False, True])
def test_a_folder_takes_the_place_of_another(tmp_path, url):
    source, target = tmp_path / "new", tmp_path / "there"
    (source / "deep").mkdir(parents=True)
    (source / "deep/file").write_text("new")
    target.mkdir()
    (target / "old").write_text("old")
    publish(source, f"file://{target}" if url else str(target))
    assert [str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()] == ["deep/file"]
    assert (target / "deep/file").read_text() == "new"


def test_curves_hold_every_record_and_replace_older_ones(tmp_path):
    history = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "eval_loss": 1.5}]
    write_curves(history[:1], str(tmp_path))
    first = (tmp_path / "loss.png").read_bytes()
    write_curves(history, str(tmp_path))
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == history
    assert first[:4] == b"\x89PNG" and (tmp_path / "loss.png").read_bytes() != first
    assert draw_loss([])[:4] == b"\x89PNG"


class Hub:
    """The hub's API; it takes note of its calls, or refuses."""

    def __init__(self, calls, refusal=None):
        self.calls, self.refusal = calls, refusal

    def create_repo(self, repo_id, private, exist_ok):
        if self.refusal is not None:
            raise self.refusal
        self.calls.append((repo_id, private, exist_ok))

    def upload_folder(self, repo_id, folder_path):
        self.calls.append((repo_id, folder_path))


def test_a_model_is_pushed_to_a_private_repository_or_stays_where_it_is(tmp_path, monkeypatch):
    import huggingface_hub

    calls = []
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: Hub(calls))
    push_to_hub(str(tmp_path), "owner/name")
    assert calls == [("owner/name", True, True), ("owner/name", str(tmp_path))]
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: Hub(calls, OSError("401 Unauthorized\nmore")))
    with pytest.raises(CheckpointError, match="could not be pushed to 'owner/name': 401 Unauthorized; it stays there"):
        push_to_hub(str(tmp_path), "owner/name")
    assert len(calls) == 2
