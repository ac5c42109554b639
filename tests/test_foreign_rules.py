"""Templates and rules of models that were trained elsewhere, and models that bring their own code."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rayrm.errors import CheckpointError, ConfigError
from rayrm.models.creation import CreationConfig, create_model, train_tokenizer
from rayrm.models.loading import Loading, load_padding_tokenizer
from rayrm.models.readouts import Steps, Whole
from rayrm.models.rendering import Renderer, Rules, load_template
from rayrm.models.reward_model import NewHead, load_reward_model
from rayrm.models.rewarder import Rendering, load_rewarder
from rayrm.scoring.reward_model import RewardModelScorer, RewardModelScoring, check_reward_model

TEXTS = ["the cat sat on the mat", "der Hund schläft", "translate this text"]
SIZES = CreationConfig(
    vocab_size=320, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=2, max_length=64, chat_template="none"
)
WITH_BOS = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
USER, AGAIN = {"role": "user", "content": "Q1"}, {"role": "user", "content": "Q2"}
ANSWER, SYSTEM = {"role": "assistant", "content": "A1"}, {"role": "system", "content": "S"}
ROBIN = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions.\n"
)
# One turn, what a second question adds, and the beginning of one turn behind a system message (None: it has none).
FORMATS = {
    "tulu": ("<|user|>\nQ1\n<|assistant|>\nA1\n", "<|user|>\nQ2\n<|assistant|>\n", "S\n<|user|>\nQ1\n"),
    "pku-align": (
        "BEGINNING OF CONVERSATION: USER: Q1 ASSISTANT: A1 ",
        "USER: Q2 ASSISTANT: ",
        "S USER: Q1 ",
    ),
    "oasst_pythia": (
        "<|prompter|>Q1<|endoftext|><|assistant|>A1<|endoftext|>",
        "<|prompter|>Q2<|endoftext|><|assistant|>",
        None,
    ),
    "Ziya": ("\n\nHuman: Q1\n\nAssistant: A1\n\n", "Human: Q2\n\nAssistant: ", "S\n\nHuman: Q1\n\n"),
    "mistral": ("[INST] Q1 [/INST] A1</s>", "[INST] Q2 [/INST]", "[INST] S\nQ1 "),
    "openbmb": ("User: Q1\n\nAssistant: A1\n\n", "User: Q2\n\nAssistant: ", None),
    "raw": ("Q1A1", "Q2", "SQ1"),
    "Robin": (
        ROBIN + "###Human:\nQ1\n###Assistant:\nA1\n",
        "###Human:\nQ2\n###Assistant:\n",
        "S\n###Human:\nQ1\n",
    ),
    "llama-2": (
        "[INST] Q1 [/INST] A1 </s><s>",
        "[INST] Q2 [/INST]",
        "[INST] <<SYS>>\nS\n<</SYS>>\n\nQ1 ",
    ),
    "Yi-34b-chat": (
        "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n",
        "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n",
    ),
}


@pytest.fixture(scope="module")
def tokenizer():
    """A tokenizer that puts a BOS before every text, and has no template."""
    return train_tokenizer(TEXTS, CreationConfig(vocab_size=320, chat_template="none"))


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    """A reward model as another trainer leaves it: plain files, a template that writes a BOS, no mark."""
    folder = tmp_path_factory.mktemp("foreign")
    create_model(TEXTS, SIZES, f"{folder}/policy")
    tokenizer = load_padding_tokenizer(f"{folder}/policy")
    tokenizer.chat_template = WITH_BOS
    network = load_reward_model(f"{folder}/policy", new_head=NewHead(3)).network
    network.score.weight.data *= 40
    network.config.pad_token_id = tokenizer.pad_token_id
    network.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return str(folder / "model")


@pytest.mark.parametrize("name", FORMATS)
def test_named_templates_write_their_formats(tokenizer, name):
    view = Renderer(tokenizer, load_template(name, tokenizer, "here"))
    answered, question, with_system = FORMATS[name]
    assert view.turn_text([USER, ANSWER]) == answered
    assert view.prompt_text([USER, ANSWER, AGAIN]) == answered + question
    assert view.prompt_text([USER]) + view.completion_text([USER], "A1") == answered.rstrip()
    whole = view.turn_text([USER, ANSWER, AGAIN, ANSWER])
    assert whole.startswith(answered + question) and whole.rstrip().endswith(view.completion_text([USER], "A1"))
    view.check()
    if with_system is None:
        from jinja2 import TemplateError

        with pytest.raises(TemplateError, match="has no turn of a system"):
            view.turn_text([SYSTEM, USER])
    else:
        assert view.turn_text([SYSTEM, USER]) == with_system
        assert view.turn_text([SYSTEM, USER, ANSWER]).startswith(with_system)


def test_templates_are_found_in_any_spelling_of_their_names(tokenizer):
    spellings = ("oasst_pythia", "oasst-pythia", "OASST_Pythia")
    assert len({load_template(name, tokenizer, "here") for name in spellings}) == 1


PAIRS = [
    ([{"role": "user", "content": "the cat"}], "on the mat"),
    ([{"role": "user", "content": "der Hund schläft " * 3}], "translate this text"),
    (
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
        "x y",
    ),
]


def reference(path, truncation, max_length, is_masked):
    """Rewards by transformers' tokenizer, classifier and pooling, padded on the left."""
    tokenizer = load_padding_tokenizer(path)
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer.padding_side = "left"
    if truncation != "none":
        tokenizer.truncation_side = truncation
    texts = [
        tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": answer}], tokenize=False)
        for prompt, answer in PAIRS
    ]
    lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    cut = {"truncation": True, "max_length": max_length} if truncation != "none" else {}
    batch = tokenizer(texts, padding=True, return_tensors="pt", **cut)
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        start = mask.nonzero()[0].item()
        if is_masked and ids[start] == ids[start + 1] == tokenizer.bos_token_id:
            mask[start] = 0
    with torch.inference_mode():
        rewards = model(**batch).logits[:, 0].tolist()
    return rewards, ["truncated" if length > max_length else "ok" for length in lengths]


@pytest.mark.parametrize("bos", ["masked", "doubled"])
@pytest.mark.parametrize(("truncation", "max_length"), [("left", 30), ("right", 30), ("left", 60), ("none", 60)])
def test_rules_of_others_give_the_rewards_of_plain_transformers(model_path, truncation, max_length, bos):
    rewarder = load_rewarder(model_path, Rendering(max_length=max_length, truncation=truncation, bos=bos))
    expected, statuses = reference(model_path, truncation, max_length, bos == "masked")
    assert statuses == (["ok", "truncated", "truncated"] if max_length == 30 else ["ok"] * 3)
    for found in (rewarder.rewards(PAIRS), [rewarder.rewards([pair])[0] for pair in PAIRS]):
        assert [reward for reward, _ in found] == pytest.approx(expected, abs=1e-5)
        assert [status for _, status in found] == statuses


def test_the_three_rules_on_bos_differ_where_there_are_two(model_path):
    found = {
        bos: load_rewarder(model_path, Rendering(max_length=60, truncation="left", bos=bos)).rewards(PAIRS)[0][0]
        for bos in ("one", "masked", "doubled")
    }
    # Rotary positions are relative, so a masked token is as good as none.
    assert found["masked"] == pytest.approx(found["one"], abs=1e-5)
    assert abs(found["doubled"] - found["one"]) > 1e-3


def test_bos_rules_hold_with_prompt_left_too(tokenizer):
    prompt, bos = PAIRS[0][0], tokenizer.bos_token_id
    one, masked, doubled = (
        Renderer(tokenizer, WITH_BOS, None, Rules(bos=rule)) for rule in ("one", "masked", "doubled")
    )
    ids = one.pair_ids(prompt, "sat").ids
    assert ids[:2] != [bos, bos]
    assert masked.pair_ids(prompt, "sat").ids == doubled.pair_ids(prompt, "sat").ids == [bos, *ids]
    assert (one.num_masked(ids), masked.num_masked([bos, *ids]), doubled.num_masked([bos, *ids])) == (0, 1, 0)
    cut = Renderer(tokenizer, WITH_BOS, len(ids), Rules(bos="doubled")).pair_ids(prompt, "sat")
    assert cut.ids == [bos, *ids[:1], *ids[2:]] and cut.status == "truncated"


def test_left_and_right_cut_the_conversation_and_none_refuses_it(tokenizer):
    prompt, bos = [{"role": "user", "content": "the cat"}], tokenizer.bos_token_id
    template = "{% for m in messages %}{{ m['content'] }} . {% endfor %}"

    def view(truncation, max_length=None):
        return Renderer(tokenizer, template, max_length, Rules(truncation))

    whole = view("none").pair_ids(prompt, "sat on").ids
    body = tokenizer("the cat . sat on . ", add_special_tokens=False)["input_ids"]
    assert whole == [bos, *body, tokenizer.eos_token_id]
    length = len(whole) - 3
    left, right = (view(side, length).pair_ids(prompt, "sat on") for side in ("left", "right"))
    assert left.ids == [bos, *body[3:], tokenizer.eos_token_id] and left.status == "truncated"
    assert right.ids == [bos, *body[:-3], tokenizer.eos_token_id] and right.status == "truncated"
    assert view("none", length).pair_ids(prompt, "sat on") == ([], 0, "overlength")
    assert view("none", len(whole)).pair_ids(prompt, "sat on").status == "ok"


def test_one_text_keeps_what_stands_behind_it_and_knows_where_the_prompt_ends():
    chat, prompt = train_tokenizer(TEXTS, CreationConfig(vocab_size=320)), [{"role": "user", "content": "the cat"}]
    apart = Renderer(chat, chat.chat_template).pair_ids(prompt, "on the mat")
    whole = Renderer(chat, chat.chat_template, None, Rules("left")).pair_ids(prompt, "on the mat")
    assert chat.decode(whole.ids) == chat.decode(apart.ids) + "\n"
    assert whole.ids[: whole.num_prompt] == apart.ids[: apart.num_prompt]
    shorter = [Renderer(chat, chat.chat_template, len(whole.ids) - 3, Rules(side)) for side in ("left", "right")]
    left, right = (view.pair_ids(prompt, "on the mat") for view in shorter)
    assert (left.num_prompt, right.num_prompt) == (whole.num_prompt - 3, whole.num_prompt)
    assert (left.ids, right.ids) == (whole.ids[3:], whole.ids[:-3])


def test_a_template_that_rewrites_the_prompt_is_scored_as_one_text(tokenizer):
    template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    found = Renderer(tokenizer, template, None, Rules("left")).pair_ids(PAIRS[0][0], "sat")
    assert tokenizer.decode(found.ids, skip_special_tokens=True) == "2the catsat"


def test_masked_rows_are_padded_and_never_packed(model_path):
    rewarder = load_rewarder(model_path, Rendering(max_length=60, bos="masked"))
    before = rewarder.rewards(PAIRS)
    rewarder.pack()
    assert not rewarder.is_packed and rewarder.rewards(PAIRS) == before
    doubled = load_rewarder(model_path, Rendering(max_length=60, bos="doubled"))
    before = [reward for reward, _ in doubled.rewards(PAIRS)]
    doubled.pack()
    encoded = [doubled.readout.encode(doubled.renderer, *pair) for pair in PAIRS]
    packed = [outputs[0][0] for (outputs,) in doubled.read_trees([[row] for row in encoded])]
    assert doubled.is_packed and packed == pytest.approx(before, abs=1e-5)


def test_a_marked_checkpoint_refuses_other_rules_and_costs(served_model):
    assert load_rewarder(served_model, Rendering(truncation="prompt_left", bos="one")).renderer.rules == Rules()
    with pytest.raises(CheckpointError, match="truncation: 'prompt_left' there, 'left' here"):
        load_rewarder(served_model, Rendering(truncation="left"))
    with pytest.raises(CheckpointError, match="bos: None there, 'masked' here"):
        load_rewarder(served_model, Rendering(bos="masked"))
    with pytest.raises(CheckpointError, match="gives rewards, not costs; set negate=false"):
        load_rewarder(served_model, is_cost=True)


def test_rules_that_a_readout_has_no_use_for_are_refused(model_path):
    with pytest.raises(ConfigError, match="truncation is 'left', .* set truncation=prompt_left"):
        load_rewarder(model_path, Rendering(truncation="left"), readout=Steps())


def row(*candidates, prompt="the cat"):
    return {"prompt": [{"role": "user", "content": prompt}], "candidates": list(candidates)}


def test_scorer_hands_rules_and_sign_on(model_path):
    rules = {"max_length": 60, "truncation": "left", "bos": "masked"}
    plain = RewardModelScorer(RewardModelScoring(model=model_path, **rules))
    assert plain.rewarder.renderer.rules == Rules("left", "masked")
    ((reward, status),) = plain.score([row("on the mat")])[0]
    assert reward == pytest.approx(reference(model_path, "left", 60, True)[0][0], abs=1e-5) and status == "ok"
    negated = RewardModelScorer(RewardModelScoring(model=model_path, negate=True, **rules))
    assert negated.score([row("on the mat")]) == [[(-reward, "ok")]]


def test_8_bit_weights_give_nearly_the_same_rewards_and_leave_the_head(model_path):
    pytest.importorskip("bitsandbytes")
    exact = load_rewarder(model_path, Rendering(max_length=60))
    short = load_rewarder(model_path, Rendering(max_length=60), load_in_8bit=True)
    kinds = {type(module).__name__ for module in short.model.network.base_model.modules()}
    assert "Linear8bitLt" in kinds and "Linear" not in kinds and "OneDnnLinear" not in kinds
    assert torch.equal(short.model.network.score.weight, exact.model.network.score.weight)
    expected, found = ([reward for reward, _ in view.rewards(PAIRS)] for view in (exact, short))
    spread = max(expected) - min(expected)
    assert found == pytest.approx(expected, abs=0.05 * spread) and found != expected


def test_4_and_8_bit_at_once_are_refused():
    with pytest.raises(ConfigError, match="load_in_4bit and load_in_8bit are both true"):
        Loading(load_in_4bit=True, load_in_8bit=True).settings()


CODE = """
import torch
from transformers import LlamaConfig, LlamaModel, LlamaPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

class OwnConfig(LlamaConfig):
    model_type = "rayrm_own"

class OwnModel(LlamaPreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.judge = torch.nn.Linear(config.hidden_size, 1)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, **other):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        given = 3 * self.judge(hidden[:, -1]).tanh()
        KIND
"""
LOGITS = "return SequenceClassifierOutputWithPast(logits=given)"


@pytest.fixture
def own(model_path, tmp_path):
    """A function that makes a model whose code stands in its folder; it reads its last column, whatever it holds."""

    def make(returned=LOGITS, model_type="rayrm_own", **config):
        folder = tmp_path / "own"
        shutil.copytree(model_path, folder)
        from safetensors.torch import load_file, save_file

        weights = load_file(folder / "model.safetensors")
        weights["judge.weight"], weights["judge.bias"] = weights.pop("score.weight"), torch.tensor([0.5])
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        (folder / "own_model.py").write_text(CODE.replace("KIND", returned))
        written = json.loads((folder / "config.json").read_text())
        kinds = {"AutoModelForSequenceClassification": "own_model.OwnModel"}
        if model_type == "rayrm_own":
            kinds["AutoConfig"] = "own_model.OwnConfig"
        written |= {"model_type": model_type, "architectures": ["OwnModel"], "auto_map": kinds} | config
        (folder / "config.json").write_text(json.dumps(written))
        return str(folder)

    return make


def by_hand(path, pairs, last_token=None):
    """3 tanh(judge · state + 0.5) at the last token of each pair, by a plain decoder."""
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaModel

    weights = load_file(f"{path}/model.safetensors")
    fields = json.loads(Path(path, "config.json").read_text())
    decoder = LlamaModel(LlamaConfig(**{k: v for k, v in fields.items() if k not in ("auto_map", "model_type")})).eval()
    decoder.load_state_dict({k.removeprefix("model."): v for k, v in weights.items() if k.startswith("model.")})
    tokenizer = load_padding_tokenizer(path)
    view, found = Renderer(tokenizer, tokenizer.chat_template, 60), []
    for pair in pairs:
        ids = view.pair_ids(*pair).ids + ([] if last_token is None else [last_token])
        with torch.inference_mode():
            state = decoder(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
            found.append(3 * (state @ weights["judge.weight"][0] + 0.5).tanh().item())
    return found


RETURNS = {
    "logits": LOGITS,
    "end_scores": "from types import SimpleNamespace as N; return N(end_scores=given, scores=None)",
    "score": "from types import SimpleNamespace as N; return N(score=given[:, 0], logits=None)",
    "tensor": "return given",
    "tuple": "return (given[:, 0],)",
}


@pytest.mark.parametrize("returned", RETURNS)
def test_a_model_with_its_own_code_gives_its_own_numbers(own, returned):
    path = own(RETURNS[returned])
    rewarder = load_rewarder(path, Rendering(max_length=60), trust_remote_code=True)
    assert rewarder.readout == Whole()
    found = [reward for reward, _ in rewarder.rewards([*PAIRS, PAIRS[0]])]
    expected = by_hand(path, PAIRS)
    assert found == pytest.approx([*expected, expected[0]], abs=1e-5)
    rewarder.pack()
    assert not rewarder.is_packed


def test_a_reward_token_of_the_config_is_put_behind(own):
    path = own(reward_token_id=7)
    rewarder = load_rewarder(path, Rendering(max_length=60), trust_remote_code=True)
    assert rewarder.readout == Whole(last_token=7)
    assert [reward for reward, _ in rewarder.rewards(PAIRS)] == pytest.approx(by_hand(path, PAIRS, 7), abs=1e-5)


def test_a_model_that_gives_no_single_number_is_refused(own):
    path = own("return SequenceClassifierOutputWithPast(logits=hidden[:, -1])")
    rewarder = load_rewarder(path, Rendering(max_length=60), trust_remote_code=True)
    with pytest.raises(CheckpointError, match=r"OwnModel has to give one number .* gives numbers of shape \[1, 64\]"):
        rewarder.rewards(PAIRS[:1])


@pytest.mark.parametrize("model_type", ["rayrm_own", "llama"])
def test_own_code_does_not_run_unless_it_is_asked_for(own, tmp_path, model_type):
    path = own(f"open({str(tmp_path / 'ran')!r}, 'w'); {LOGITS}", model_type)
    (tmp_path / "own/own_model.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    config = RewardModelScoring(model=path, max_length=60)
    with pytest.raises(CheckpointError, match="trust_remote_code=true"):
        load_rewarder(path, Rendering(max_length=60))
    with pytest.raises(CheckpointError, match="trust_remote_code=true"):
        RewardModelScorer(config)
    if model_type == "rayrm_own":
        with pytest.raises(CheckpointError, match="is a 'rayrm_own', .*set trust_remote_code=true"):
            check_reward_model(config)
    assert not (tmp_path / "ran").exists()


def test_scorer_runs_own_code_where_it_is_asked_to(own):
    path = own()
    config = RewardModelScoring(model=path, max_length=60, trust_remote_code=True, negate=True)
    check_reward_model(config)
    expected = by_hand(path, PAIRS[:1])[0]
    (((reward, status),),) = RewardModelScorer(config).score([row("on the mat")])
    assert (reward, status) == (pytest.approx(-expected, abs=1e-5), "ok")


def test_own_code_with_missing_weights_is_refused(own):
    from safetensors.torch import load_file, save_file

    path = own()
    weights = load_file(f"{path}/model.safetensors")
    del weights["judge.weight"]
    save_file(weights, f"{path}/model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="lacks judge.weight"):
        load_rewarder(path, Rendering(max_length=60), trust_remote_code=True)
