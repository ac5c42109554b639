import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rayrm.errors import CheckpointError
from rayrm.models.creation import CreationConfig, create_model
from rayrm.models.inputs import padded_batch
from rayrm.models.loading import load_padding_tokenizer
from rayrm.models.reward_model import NewHead, load_reward_model
from rayrm.models.rewarder import Rendering, load_rewarder
from rayrm.scoring.reward_model import RewardModelScorer, RewardModelScoring

TEXTS = ["the cat sat on the mat", "der Hund schläft", "translate this text"]
SIZES = CreationConfig(vocab_size=320, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=2, max_length=64)
PROMPT = [{"role": "user", "content": "the cat"}]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("policy"))
    create_model(TEXTS, SIZES, path)
    return path


@pytest.fixture(scope="module")
def reward_path(policy, tmp_path_factory):
    """A reward model as training saves it, without the completion mark."""
    path = str(tmp_path_factory.mktemp("reward"))
    tokenizer = load_padding_tokenizer(policy)
    network = load_reward_model(policy, new_head=NewHead(3)).network
    network.config.pad_token_id = tokenizer.pad_token_id
    network.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def mark(path, **changes):
    rewarder = load_rewarder(str(path), Rendering(max_length=32))
    rendering = {"chat_template": None, "max_length": 32, "fingerprint": rewarder.renderer.fingerprint() | changes}
    (path / "rayrm.json").write_text(json.dumps({"rendering": rendering}))


@pytest.fixture
def copy(reward_path, tmp_path):
    import shutil

    return shutil.copytree(reward_path, tmp_path / "copy")


def test_plain_transformers_gives_the_same_rewards(reward_path):
    plain = AutoModelForSequenceClassification.from_pretrained(reward_path, dtype=torch.float32).eval()
    ours, tokenizer = load_reward_model(reward_path), load_padding_tokenizer(reward_path)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(5, 300, (n,), generator=generator).tolist() for n in (1, 3, 17, 40, 9)]
    batch = padded_batch(rows, [[len(row) - 1] for row in rows], tokenizer.pad_token_id, "cpu")
    with torch.inference_mode():
        expected = plain(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        found = ours(**batch)[0][:, 0]
    assert found.dtype == torch.float32 and found.shape == (5, 1)
    assert plain.config.num_labels == 1 and plain.config.problem_type == "regression"
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert found.std() > 0.01


def test_reward_is_read_at_the_last_attended_token_whatever_its_id(reward_path):
    model, pad = load_reward_model(reward_path), load_padding_tokenizer(reward_path).pad_token_id
    row = [9, 10, 11, pad]

    def read(rows, reads):
        with torch.inference_mode():
            return model(**padded_batch(rows, reads, pad, "cpu"))[0][0]

    alone = read([row], [[3]])
    torch.testing.assert_close(read([row, [9] * 12], [[3], [11]]), alone, atol=1e-6, rtol=0)
    torch.testing.assert_close(read([row, [9] * 12], [[3], [0, 5, 11]])[:1], alone, atol=1e-6, rtol=0)
    assert abs(read([row[:3]], [[2]]) - alone) > 1e-3
    both = read([row], [[2, 3]])
    torch.testing.assert_close(both, torch.cat([read([row[:3]], [[2]]), alone]), atol=1e-6, rtol=0)


def test_head_is_drawn_from_its_seed_and_computes_in_fp32(policy):
    heads = [load_reward_model(policy, new_head=NewHead(seed)).network.score.weight for seed in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert 0.015 < heads[0].std() < 0.025
    inits = {"inverse_width": 1 / (heads[0].shape[1] + 1), "zero": 0.0}
    for init, std in inits.items():
        head = load_reward_model(policy, new_head=NewHead(0, init)).network.score.weight
        assert head.std().item() == pytest.approx(std, rel=0.25)
    half = load_reward_model(policy, new_head=NewHead(0), dtype=torch.bfloat16)
    assert half(torch.tensor([[5, 6]]), torch.tensor([[1]]))[0].dtype == torch.float32


def test_a_trained_head_stays_fp32_in_a_network_of_bf16(reward_path):
    whole, half = (load_reward_model(reward_path, dtype=dtype).network for dtype in (torch.float32, torch.bfloat16))
    assert half.score.weight.dtype == torch.float32 and half.model.embed_tokens.weight.dtype == torch.bfloat16
    assert torch.equal(half.score.weight, whole.score.weight)


def test_checkpoint_without_a_head_is_refused(policy):
    with pytest.raises(CheckpointError, match=r"no reward head 'score.weight'.*train a reward model first"):
        load_rewarder(policy)


def test_head_of_a_name_that_nobody_uses_is_refused_even_where_a_new_head_is_welcome(copy):
    weights = load_file(copy / "model.safetensors")
    weights["my_head.weight"] = weights.pop("score.weight")
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"it holds my_head.weight"):
        load_reward_model(str(copy), new_head=NewHead(0))


def test_head_of_another_trainer_gives_its_rewards_and_its_constant_is_left_out_of_training(copy, reward_path):
    expected = load_rewarder(reward_path).rewards([(PROMPT, "on the mat")])[0][0]
    weights = load_file(copy / "model.safetensors")
    head = {"v_head.summary.weight": weights.pop("score.weight"), "v_head.summary.bias": torch.tensor([0.5])}
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    save_file(head, copy / "value_head.safetensors", {"format": "pt"})
    assert load_rewarder(str(copy)).rewards([(PROMPT, "on the mat")])[0][0] == pytest.approx(expected + 0.5, abs=1e-5)
    trained = load_reward_model(str(copy), new_head=NewHead(7)).network
    assert trained.score.bias is None and torch.equal(trained.score.weight, head["v_head.summary.weight"])
    with pytest.raises(CheckpointError, match="has 1 outputs; a reward model of this kind has 2"):
        load_reward_model(str(copy), num_outputs=2)


def test_files_of_a_hub_model_are_fetched_once_with_torch_files_only_where_there_are_no_others(tmp_path, monkeypatch):
    import huggingface_hub

    from rayrm.models.folders import local_folder

    asked = []

    def fetch(path, allow_patterns):
        asked.append("*.bin" in allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert local_folder("owner/name") == str(tmp_path) and asked == [False, True]
    (tmp_path / "model.safetensors").touch()
    assert local_folder("owner/name") == str(tmp_path) and asked == [False, True, False]


def test_missing_weights_two_labels_and_broken_files_are_refused(copy, tmp_path):
    weights = load_file(copy / "model.safetensors")
    lacking = {name: tensor for name, tensor in weights.items() if "layers.1.mlp.up_proj" not in name}
    save_file(lacking, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks model.layers.1.mlp.up_proj.weight"):
        load_reward_model(str(copy), new_head=NewHead(0))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"id2label": {"0": "a", "1": "b"}}))
    with pytest.raises(CheckpointError, match="has 2 outputs; a reward model of this kind has 1"):
        load_reward_model(str(copy))
    (copy / "model.safetensors").write_bytes((copy / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="does not load as a reward model"):
        load_reward_model(str(copy))
    with pytest.raises(CheckpointError, match="does not load as a reward model"):
        load_reward_model(str(tmp_path / "nowhere"))


def test_pad_token_is_never_the_token_that_ends_a_turn(policy, tmp_path):
    tokenizer = load_padding_tokenizer(policy)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path)
    assert load_padding_tokenizer(str(tmp_path)).pad_token == "<pad>"


def test_a_spare_token_of_the_vocabulary_pads_where_there_is_no_other(policy, tmp_path):
    tokenizer = load_padding_tokenizer(policy)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|vision_pad|>"]})
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path)
    assert load_padding_tokenizer(str(tmp_path)).pad_token == "<|vision_pad|>"


def test_a_turns_end_pads_where_there_is_nothing_else_and_no_model_says_so(policy, caplog):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    from rayrm.models.loading import pad_id_of

    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0, "<end>": 1}, "a")), eos_token="<end>")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rayrm.models.loading.load_tokenizer", lambda path, trust_remote_code: words)
        tokenizer = load_padding_tokenizer("here")
    assert tokenizer.pad_token == "<end>" and pad_id_of(tokenizer) is None and "one row at a time" in caplog.text
    assert pad_id_of(load_padding_tokenizer(policy)) == load_padding_tokenizer(policy).pad_token_id


def test_the_mark_of_a_model_on_the_hub_is_read(copy, monkeypatch):
    from huggingface_hub.errors import EntryNotFoundError

    from rayrm.models.folders import read_mark

    asked = []

    def download(hub_id, name):
        asked.append((hub_id, name))
        if not (copy / name).exists():
            raise EntryNotFoundError("no such file")
        return str(copy / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert read_mark("owner/model") == {}
    mark(copy)
    assert read_mark("owner/model") == read_mark(str(copy)) != {}
    assert asked == [("owner/model", "rayrm.json")] * 2


def test_tools_of_a_row_are_shown_when_it_is_scored(copy):
    template = "{{ tools }}{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    (copy / "chat_template.jinja").write_text(template)
    scorer = RewardModelScorer(RewardModelScoring(model=str(copy)))
    row = {"prompt": PROMPT, "candidates": ["sat"], "anchor": None, "tgt_lang": None}
    given = [row, row | {"tools": '[{"name": "a"}]'}, row | {"tools": "{"}]
    (plain,), (shown,), (broken,) = scorer.score(given)
    assert plain[1] == shown[1] == "ok" and plain[0] != shown[0] and broken == (None, "error")


def test_a_marked_checkpoint_is_rendered_as_it_was_trained(copy, caplog):
    mark(copy)
    caplog.clear()
    rewarder = load_rewarder(str(copy))
    assert rewarder.renderer.max_length == 32
    assert load_rewarder(str(copy), Rendering(max_length=32)).renderer.max_length == 32
    assert not caplog.records
    with pytest.raises(CheckpointError, match="max_length: 32 there, 16 here"):
        load_rewarder(str(copy), Rendering(max_length=16))
    mark(copy, template="0123456789abcdef")
    with pytest.raises(CheckpointError, match="template: '0123456789abcdef' there"):
        load_rewarder(str(copy))


def test_an_unmarked_checkpoint_takes_its_rendering_from_the_config(reward_path, caplog):
    rewarder = load_rewarder(reward_path, Rendering("none", 48))
    assert "does not say how its texts were rendered" in caplog.text
    assert rewarder.renderer.template is None and rewarder.renderer.max_length == 48
    assert load_rewarder(reward_path).renderer.max_length == SIZES.max_length


def test_rewards_do_not_hang_on_batches_and_failures_are_null(reward_path):
    rewarder = load_rewarder(reward_path, Rendering(max_length=40))
    pairs = [(PROMPT, "on the mat"), (PROMPT, " "), (PROMPT, "x " * 60), (PROMPT * 4, "sat"), (PROMPT, "der Hund")]
    found = rewarder.rewards(pairs)
    assert [status for _, status in found] == ["ok", "empty", "overlength", "truncated", "ok"]
    assert [reward is None for reward, _ in found] == [False, True, True, False, False]
    for alone, together in zip([rewarder.rewards([pair])[0] for pair in pairs], found, strict=True):
        assert alone[1] == together[1] and (alone[0] or 0.0) == pytest.approx(together[0] or 0.0, abs=1e-5)
    assert rewarder.rewards(pairs, token_budget=1)[4][0] == pytest.approx(found[4][0], abs=1e-5)


def test_a_reward_that_is_not_a_number_is_null(copy):
    weights = load_file(copy / "model.safetensors")
    weights["score.weight"][0, 0] = float("nan")
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    assert load_rewarder(str(copy)).rewards([(PROMPT, "sat")]) == [(None, "nan")]


def row(**changes):
    base = {"prompt": PROMPT, "source": "die Katze", "reference": "r", "anchor": "the cat", "src_lang": "de"}
    return base | {"tgt_lang": "fr", "candidates": ["le chat", "", "le chat", "un chien"]} | changes


def test_scorer_keeps_the_order_of_candidates(reward_path):
    scorer = RewardModelScorer(RewardModelScoring(model=reward_path))
    first, second, third = scorer.score([row(), row(candidates=[]), row(candidates=["un chien"])])
    assert [status for _, status in first] == ["ok", "empty", "ok", "ok"]
    assert first[0] == first[2] and first[0][0] != first[3][0]
    assert second == [] and third[0][0] == pytest.approx(first[3][0], abs=1e-5)


def test_scorer_from_anchor_asks_to_translate_the_anchor(reward_path):
    scorer = RewardModelScorer(RewardModelScoring(model=reward_path, prompt="from_anchor"))
    own = load_rewarder(reward_path)
    asked = "Translate the following text from English into French:\nEnglish: the cat\nFrench:"
    expected = own.rewards([([{"role": "user", "content": asked}], "le chat")])[0]
    found, missing = scorer.score([row(), row(anchor=None, candidates=["le chat"])])
    assert found[0][1] == expected[1]
    assert found[0][0] == pytest.approx(expected[0], abs=1e-5)
    assert missing == [(None, "error")]


def test_a_reward_model_is_a_language_model_with_another_head(policy, reward_path):
    language_model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).state_dict()
    for name, tensor in load_file(f"{reward_path}/model.safetensors").items():
        assert name == "score.weight" or torch.equal(tensor, language_model[name])
