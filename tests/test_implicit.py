"""The implicit reward of a policy: token splitting and cutting by hand, numbers against plain transformers in fp64."""

import json
import math
import shutil
from functools import cache

import pytest
import torch
from pydantic import ValidationError

from rayrm.errors import CheckpointError, ConfigError
from rayrm.models.rendering import Renderer
from rayrm.scoring.implicit import ImplicitScorer, ImplicitScoring, check_implicit

LETTERS = "abcdefghijklmnopqrstuvwxyz <>/.:\n"
BOS, EOS = 1, 2
TURNS = "<s>{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


def make_tokenizer(template=TURNS, bos="<s>"):
    """One token a character, but for `a ` (an a and the space behind it), which grow together."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocab = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *LETTERS, "a "])}
    tokenizer = Tokenizer(models.BPE(vocab, [("a", " ")], unk_token="<unk>"))
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", **({"bos_token": bos} if bos else {})}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.chat_template = template
    return fast


def ids_of(text):
    return make_tokenizer()(text, add_special_tokens=False)["input_ids"]


def user(text):
    return [{"role": "user", "content": text}]


def encode(prompt, *completions, template=None, max_length=2048, bos="doubled", tokenizer=None):
    from rayrm.models.implicit import AnswerEncoder, Question

    renderer = Renderer(tokenizer or make_tokenizer(), template)
    return AnswerEncoder(renderer, max_length, bos).encode(Question(user(prompt), completions))


# Tokens.


def test_the_answer_begins_where_the_prompt_alone_ends():
    (found,) = encode("hi", "no")
    assert found == ([BOS, *ids_of("hi no"), EOS], 3, "ok")


def test_a_token_that_grew_together_with_the_answer_belongs_to_it():
    assert len(ids_of("xa b")) == 3 and ids_of("xa") == ids_of("xa b")[:1] + ids_of("a")
    (found,) = encode("xa", "b")
    assert found == ([BOS, *ids_of("xa b"), EOS], 2, "ok")


def test_an_answer_that_repeats_the_prompt_is_kept_whole():
    (found,) = encode("hi", "hi hi")
    assert found.ids[found.start :] == [*ids_of(" hi hi"), EOS]


def test_the_header_of_the_answer_and_what_follows_it_count_as_answer():
    (found,) = encode("hi", "no", template=TURNS)
    assert found.ids == [BOS, BOS, *ids_of("<user>hi</>"), *ids_of("<assistant>no</>"), EOS]
    assert found.start == 2 + len("<user>hi</>")


def test_bos_tokens():
    (one,) = encode("hi", "no", template=TURNS, bos="one")
    assert one.ids[:2] == [BOS, *ids_of("<")] and one.start == 1 + len("<user>hi</>")
    bare = TURNS.removeprefix("<s>")
    assert encode("hi", "no", template=bare, bos="one")[0] == encode("hi", "no", template=bare)[0] == one
    without = make_tokenizer(bare, bos=None)
    assert encode("hi", "no", template=bare, tokenizer=without)[0].ids == [EOS, *one.ids[1:]]
    assert encode("hi", "no", template=bare, tokenizer=without, bos="one")[0] == (one.ids[1:], one.start - 1, "ok")


def test_only_the_end_of_a_prompt_stays_when_the_longest_answer_has_no_room():
    prompt = "b" * 130  # 131 tokens with BOS; an answer has a space before it and EOS behind it
    fits, short = encode(prompt, "c" * 17, "c", max_length=150)
    assert (len(fits.ids), fits.status, short.status, short.start) == (150, "ok", "ok", 131)
    cut, short = encode(prompt, "c" * 18, "c", max_length=150)
    assert cut == ([*ids_of("b" * 128 + " " + "c" * 18), EOS], 128, "truncated")
    assert short == ([*ids_of("b" * 128 + " c"), EOS], 128, "truncated")


def test_answers_are_cut_when_a_cut_prompt_does_not_do():
    long, short = encode("b" * 130, "c" * 30, "c" * 5, max_length=150)
    assert long == (ids_of("b" * 128 + " " + "c" * 21), 128, "truncated")
    assert short == ([*ids_of("b" * 128 + " " + "c" * 5), EOS], 128, "truncated")
    # Also after a prompt that is short itself.
    (found,) = encode("b" * 10, "c" * 150, max_length=150)
    assert found == ([BOS, *ids_of("b" * 10 + " " + "c" * 21)], 11, "truncated")


def test_what_cannot_be_read_has_a_status():
    from rayrm.models.implicit import AnswerEncoder, Question

    picky = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}{% endfor %}"
    encoder = AnswerEncoder(Renderer(make_tokenizer(), picky), 2048)
    system = [{"role": "system", "content": "be kind"}]
    assert [a.status for a in encoder.encode(Question(system, ["x", " "]))] == ["error", "empty"]
    # One that writes the prompt in another way once an answer follows.
    rewrites = "{{ messages | length }}{{ messages[0].content }}"
    assert [a.status for a in encode("hi", "x", "", template=rewrites)] == ["error", "empty"]
    encoder = AnswerEncoder(Renderer(make_tokenizer(), TURNS), 2048)
    assert [a.status for a in encoder.encode(Question(user("hi"), ["x"], "no JSON"))] == ["error"]


# Numbers.


def save_model(folder, kind, seed):
    from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.15,
        "pad_token_id": 0,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False))
    else:
        # Of the caps, transformers' sdpa knows that of the last logits only.
        caps = {"final_logit_softcapping": 3.0, "attn_logit_softcapping": None}
        model = Gemma2ForCausalLM(Gemma2Config(**sizes, **caps, head_dim=32, sliding_window=64))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def models(request, tmp_path_factory):
    """A policy and its reference."""
    folder = tmp_path_factory.mktemp(request.param)
    return save_model(folder / "policy", request.param, 1), save_model(folder / "reference", request.param, 2)


@pytest.fixture(scope="module")
def llamas(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llamas")
    return save_model(folder / "policy", "llama", 1), save_model(folder / "reference", "llama", 2)


ROWS = [
    {"prompt": user("tell me a story"), "candidates": ["once upon a time", "no", "no"]},
    {"prompt": [*user("hi"), {"role": "assistant", "content": "ho"}, *user("and")], "candidates": ["a b c a d", None]},
    {"prompt": user("so " * 50), "candidates": ["yes " * 20, "never"]},
    {"prompt": user("why"), "candidates": ["because " * 30, "x"]},
    {"prompt": user("none"), "candidates": []},
]


@cache
def load_reference(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, attn_implementation="eager")


def logs_of(path, ids, start):
    model = load_reference(path)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return [logits[place - 1, ids[place]].item() for place in range(start, len(ids))]


def expected_of(rows, max_length, number):
    """`number` of the answer's ids and its first place, for each candidate with a text."""
    from rayrm.models.implicit import AnswerEncoder, Question

    encoder = AnswerEncoder(Renderer(make_tokenizer(), TURNS), max_length)
    found = []
    for row in rows:
        answers = encoder.encode(Question(row["prompt"], [text or "" for text in row["candidates"]]))
        found.append([(number(a.ids, a.start), a.status) if a.ids else (None, a.status) for a in answers])
    return found


def assert_same(found, expected, places=2e-4):
    assert [[status for _, status in row] for row in found] == [[status for _, status in row] for row in expected]
    for row, others in zip(found, expected, strict=True):
        assert [r for r, _ in row] == [None if e is None else pytest.approx(e, abs=places) for e, _ in others]


@pytest.mark.parametrize("max_length", [2048, 200])
def test_rewards_are_those_of_plain_transformers(models, max_length):
    policy, reference = models
    scorer = ImplicitScorer(ImplicitScoring(model=policy, ref_model=reference, max_length=max_length, token_budget=300))

    def reward(ids, start):
        return math.fsum(logs_of(policy, ids, start)) - math.fsum(logs_of(reference, ids, start))

    # The models have 512 positions, which is less than 2048.
    expected = expected_of(ROWS, min(max_length, 512), reward)
    words = [status for row in expected for _, status in row]
    assert words.count("truncated") == (4 if max_length == 200 else 0) and words.count("empty") == 1
    assert_same(scorer.score(ROWS), expected)


def test_without_a_reference_log_probabilities_become_one_number(llamas):
    policy, _ = llamas
    for reduction in (None, "mean", "sum", "norm"):
        scorer = ImplicitScorer(ImplicitScoring(model=policy, reduction=reduction))

        def number(ids, start, reduction=reduction):
            logs = logs_of(policy, ids, start)
            if reduction == "norm":
                return -math.sqrt(sum(log * log for log in logs))
            return sum(logs) / (1 if reduction == "sum" else len(logs))

        assert_same(scorer.score(ROWS[:2]), expected_of(ROWS[:2], 512, number))


def test_rewards_do_not_hang_on_batches_and_parts_of_logits(llamas, monkeypatch):
    from rayrm.models import implicit

    config = {"model": llamas[0], "ref_model": llamas[1]}
    alone = ImplicitScorer(ImplicitScoring(**config, token_budget=1)).score(ROWS)
    monkeypatch.setattr(implicit, "MAX_LOGITS", 100)
    assert_same(ImplicitScorer(ImplicitScoring(**config)).score(ROWS), alone, 1e-4)


def test_a_policy_that_is_its_reference_gets_zero(llamas, tmp_path):
    shutil.copytree(llamas[0], tmp_path / "copy")
    scorer = ImplicitScorer(ImplicitScoring(model=llamas[0], ref_model=str(tmp_path / "copy")))
    assert {reward for row in scorer.score(ROWS) for reward, _ in row} == {0.0, None}


def test_logits_are_computed_for_answers_alone(llamas):
    scorer = ImplicitScorer(ImplicitScoring(model=llamas[0]))
    seen = []
    hook = scorer.rewarder.policy.lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    scorer.score(ROWS[:1])
    hook.remove()
    # Two different answers with their header, the end of the turn and EOS, of a prompt of 30 tokens and more.
    assert sum(seen) == sum(len(ids_of(f"<assistant>{text}</>")) + 1 for text in ("once upon a time", "no"))


def test_both_models_may_be_held_in_8_bits(llamas):
    config = {"model": llamas[0], "ref_model": llamas[1]}
    scorer = ImplicitScorer(ImplicitScoring(**config, load_in_8bit=True))
    for network in (scorer.rewarder.policy, scorer.rewarder.reference):
        assert type(network.model.layers[0].mlp.up_proj).__name__ == "Linear8bitLt"
    (found,), (whole,) = (each.score(ROWS[:1]) for each in (scorer, ImplicitScorer(ImplicitScoring(**config))))
    assert [reward for reward, _ in found] == pytest.approx([reward for reward, _ in whole], abs=0.5)
    assert found != whole


def test_both_sides_of_a_preference_are_cut_alike(llamas):
    """By the longer one, whose prompt keeps its end only."""
    import pyarrow as pa

    from rayrm.evaluation.rewarding import RewardStage
    from rayrm.rows import Preference

    policy, reference = llamas
    row = {"id": "a", "group": "a", "lang": "en", "prompt": user("so " * 50)}
    row |= {
        side: [{"role": "assistant", "content": text}] for side, text in (("chosen", "ha" * 40), ("rejected", "no"))
    }
    config = ImplicitScoring(model=policy, ref_model=reference, max_length=240)
    (found,) = RewardStage(config, None)(Preference.conform(pa.Table.from_pylist([row]))).to_pylist()

    def reward(ids, start):
        return sum(logs_of(policy, ids, start)) - sum(logs_of(reference, ids, start))

    (both,) = expected_of([{"prompt": row["prompt"], "candidates": ["ha" * 40, "no"]}], 240, reward)
    (alone,) = expected_of([{"prompt": row["prompt"], "candidates": ["no"]}], 240, reward)
    assert found["status"] == {"implicit": ["truncated", "truncated"]} and alone[0][1] == "ok"
    rewards = [found["chosen_reward"], found["rejected_reward"]]
    assert rewards == pytest.approx([r for r, _ in both], abs=2e-4)
    assert abs(alone[0][0] - rewards[1]) > 1e-2


# What is wrong.


def test_configs_that_mean_nothing_are_refused():
    with pytest.raises(ValidationError, match="reduction 'norm' is for rewards without a ref_model"):
        ImplicitScoring(model="a", ref_model="b", reduction="norm")
    with pytest.raises(ValidationError, match="ref_model is the model itself"):
        ImplicitScoring(model="a", ref_model="a")
    with pytest.raises(ValidationError, match="greater than 128"):
        ImplicitScoring(model="a", max_length=128)


def test_models_are_checked_before_the_start(llamas, tmp_path):
    policy, reference = llamas
    check_implicit(ImplicitScoring(model=policy, ref_model=reference))
    with pytest.raises(CheckpointError, match="There is no model at"):
        check_implicit(ImplicitScoring(model=policy, ref_model=str(tmp_path / "nothing")))
    with pytest.raises(ConfigError, match=r"chat_template 'nowhere' is no \.jinja file"):
        check_implicit(ImplicitScoring(model=policy, chat_template="nowhere"))
    other = tmp_path / "other"
    shutil.copytree(reference, other)
    text = json.loads((other / "tokenizer.json").read_text())
    vocab = text["model"]["vocab"]
    vocab["x"], vocab["y"] = vocab["y"], vocab["x"]
    (other / "tokenizer.json").write_text(json.dumps(text))
    with pytest.raises(CheckpointError, match=r"other numbers for tokens than .* \(x, y\)"):
        check_implicit(ImplicitScoring(model=policy, ref_model=str(other)))


def test_a_reference_that_knows_fewer_tokens_is_found_out(llamas, tmp_path):
    from transformers import AutoModelForCausalLM

    small = AutoModelForCausalLM.from_pretrained(llamas[1])
    small.resize_token_embeddings(10)
    small.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="knows 10 tokens; give a ref_model with"):
        ImplicitScorer(ImplicitScoring(model=llamas[0], ref_model=str(tmp_path))).score(ROWS[:1])
