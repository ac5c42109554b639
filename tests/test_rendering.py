import pytest

from rayrm.errors import CheckpointError, ConfigError
from rayrm.models.creation import CreationConfig, train_tokenizer
from rayrm.models.rendering import Renderer, load_template

TEXTS = ["the cat sat on the mat", "der Hund schläft", "translate this text"]
PROMPT = [{"role": "user", "content": "the cat"}]


@pytest.fixture(scope="module")
def chat():
    return train_tokenizer(TEXTS, CreationConfig(vocab_size=320))


@pytest.fixture(scope="module")
def plain():
    return train_tokenizer(TEXTS, CreationConfig(vocab_size=320, chat_template="none"))


def renderer(tokenizer, max_length=None, template=None):
    return Renderer(tokenizer, load_template(template, tokenizer, "here"), max_length)


def test_chatml_ends_with_the_token_that_ends_a_turn_and_has_no_bos(chat):
    found = renderer(chat).pair_ids(PROMPT, "on the mat")
    assert chat.decode(found.ids) == (
        "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\non the mat<|im_end|>"
    )
    assert found.ids[-1] == chat.convert_tokens_to_ids("<|im_end|>")
    assert chat.bos_token_id not in found.ids
    assert found.status == "ok"


def test_prompt_of_a_pair_is_what_a_policy_continues(chat):
    view = renderer(chat)
    found = view.pair_ids(PROMPT, "on the mat")
    assert found.ids[: found.num_prompt] == view.prompt_ids(PROMPT)
    assert chat.decode(view.prompt_ids(PROMPT)).endswith("<|im_start|>assistant\n")


def test_without_a_template_there_is_one_bos_one_space_and_eos(plain):
    found = renderer(plain, template="none").pair_ids(PROMPT, "sat")
    assert plain.decode(found.ids) == "<s>the cat sat</s>"
    assert found.ids.count(plain.bos_token_id) == 1
    assert found.ids[-1] == plain.eos_token_id


def test_a_template_that_writes_bos_itself_gives_one_bos(plain):
    template = "{{ bos_token }}{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    ids = Renderer(plain, template).pair_ids(PROMPT, "sat").ids
    assert ids.count(plain.bos_token_id) == 1 and ids[0] == plain.bos_token_id


def test_a_bos_in_a_text_adds_none_to_that_of_the_template(plain):
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    prompt = [{"role": "user", "content": f"{plain.bos_token}the cat"}]
    ids = Renderer(plain, template).pair_ids(prompt, "sat").ids
    assert ids.count(plain.bos_token_id) == 1 and ids[0] == plain.bos_token_id


def test_truncation_keeps_a_bos_that_only_the_template_writes(chat):
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    whole = Renderer(chat, template).pair_ids(PROMPT, "sat")
    cut = Renderer(chat, template, len(whole.ids) - 1).pair_ids(PROMPT, "sat")
    assert cut.status == "truncated" and cut.ids == [chat.bos_token_id, *whole.ids[2:]]


def test_truncation_cuts_the_prompts_left_and_keeps_bos_and_completion(plain):
    whole = renderer(plain, template="none").pair_ids(PROMPT, "sat")
    cut = renderer(plain, len(whole.ids) - 2, "none").pair_ids(PROMPT, "sat")
    assert cut.ids == [plain.bos_token_id, *whole.ids[3:]]
    assert (cut.status, cut.num_prompt) == ("truncated", whole.num_prompt - 2)


def test_a_completion_that_is_too_long_by_itself_is_overlength(plain):
    view = renderer(plain, template="none")
    tail = len(view.pair_ids(PROMPT, "sat").ids) - len(view.prompt_ids(PROMPT))
    assert renderer(plain, tail + 1, "none").pair_ids(PROMPT, "sat").status == "truncated"
    assert renderer(plain, tail, "none").pair_ids(PROMPT, "sat") == ([], 0, "overlength")


def test_white_space_behind_the_last_turn_is_cut(chat):
    template = "{% for m in messages %}{{ m['content'] }}<|im_end|>\n\n{% endfor %}"
    assert Renderer(chat, template).pair_ids(PROMPT, "sat").ids[-1] == chat.eos_token_id


def test_a_template_that_rewrites_the_prompt_is_refused(chat):
    template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ConfigError, match="changes the prompt"):
        Renderer(chat, template).pair_ids(PROMPT, "sat")


def test_fingerprint_tells_templates_lengths_and_tokenizers_apart(chat, plain):
    views = [renderer(chat), renderer(chat, 8), renderer(chat, template="none"), renderer(plain, template="none")]
    prints = [view.fingerprint() for view in views]
    assert all(a != b for i, a in enumerate(prints) for b in prints[:i])
    assert renderer(chat).fingerprint() == prints[0]


def test_unknown_template_and_tokenizer_without_one_are_errors(plain):
    with pytest.raises(
        ConfigError,
        match="chat_template 'chatmal' is no .jinja file that is there, and none of chatml, llama-2, .*, none",
    ):
        load_template("chatmal", plain, "here")
    with pytest.raises(CheckpointError, match="'here' has no chat template"):
        load_template(None, plain, "here")
