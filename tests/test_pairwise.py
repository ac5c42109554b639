"""Models that see two answers at once: input formats by hand, numbers against loops over single questions."""

import math

import pytest
import torch

from rayrm.errors import CheckpointError
from rayrm.scoring.pairwise import PairwiseScorer, PairwiseScoring, check_pairwise

SENTENCES = ("which one is it", "the first another longer", "good bad no yes a b c", "hi there how are you")
WORDS = [word for sentence in SENTENCES for word in sentence.split()]
SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
PROMPT = [{"role": "user", "content": "which one is it"}]
TURNS = [*PROMPT, {"role": "assistant", "content": "good"}, {"role": "user", "content": "how are you"}]
QUESTIONS = [
    (PROMPT, "the first", "another one which is longer"),
    (TURNS, "yes", "no no no"),
    (PROMPT, "good", "good"),
    ([{"role": "user", "content": "hi " * 40}], "bad " * 9, "there"),
]


def pairs_of(questions):
    return [tuple({"prompt": p, "candidates": [text]} for text in (a, b)) for p, a, b in questions]


def gaps_of(scorer, questions, budget=16384):
    from rayrm.models.pairwise import Question, compare_all

    return compare_all(scorer.model, [Question(*question) for question in questions], budget)


# The small models.


def save_pair_rm(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import DebertaV2Config, PreTrainedTokenizerFast

    from rayrm.models.pairwise import MARKS, PairRanker

    marks = [*MARKS, "<|candidate|>"]
    vocab = {word: n for n, word in enumerate(dict.fromkeys([*SPECIAL, *WORDS, *"UuSsEeRrAaTtNnIi<>:.-[]0123456789"]))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.add_tokens(marks)
    torch.manual_seed(4)
    config = DebertaV2Config(
        vocab_size=len(fast),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        relative_attention=True,
        position_biased_input=False,
        position_buckets=16,
        pos_att_type=["p2c", "c2p"],
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        initializer_range=0.2,
        n_tasks=2,
    )
    PairRanker(config).save_pretrained(folder)
    fast.save_pretrained(folder)


def save_slic(folder):
    from rayrm.models.creation import CreationConfig, create_model

    sizes = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_layers": 2, "num_heads": 2}
    create_model([" ".join(WORDS)] * 9, CreationConfig.model_validate({**sizes, "max_length": 512}), str(folder))
    from transformers import AutoModelForCausalLM

    torch.manual_seed(6)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0.0, 0.2)
    model.save_pretrained(folder)


def save_steam_shp(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    words = [
        "<pad>",
        "</s>",
        "<unk>",
        "A",
        "B",
        "POST:",
        "RESPONSE",
        "A:",
        "B:",
        "Which",
        "response",
        "better?",
        *WORDS,
    ]
    vocab = {word: n for n, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    torch.manual_seed(5)
    config = T5Config(
        vocab_size=len(fast),
        d_model=64,
        d_kv=32,
        d_ff=96,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
        initializer_factor=1.0,
    )
    model = T5ForConditionalGeneration(config)
    # So that the letters are neither sure nor the same for all questions.
    model.lm_head.weight.data *= 0.1
    model.save_pretrained(folder)
    fast.save_pretrained(folder)


SAVE = {"pair_rm": save_pair_rm, "better_pair_rm": save_pair_rm, "slic": save_slic, "steam_shp": save_steam_shp}


@pytest.fixture(scope="module")
def scorers(tmp_path_factory):
    found = {}
    for kind, save in SAVE.items():
        folder = tmp_path_factory.mktemp(kind)
        save(folder)
        found[kind] = PairwiseScorer(PairwiseScoring(model=str(folder), format=kind))
    return found


# What holds for all of them.


@pytest.mark.parametrize("kind", SAVE)
def test_the_gap_changes_its_sign_with_the_order(scorers, kind):
    gaps = [gap for gap, _ in gaps_of(scorers[kind], QUESTIONS)]
    turned = [gap for gap, _ in gaps_of(scorers[kind], [(p, b, a) for p, a, b in QUESTIONS])]
    assert turned == pytest.approx([-gap for gap in gaps], abs=1e-4)
    # Equal answers tie; the others differ.
    assert gaps[2] == pytest.approx(0.0, abs=1e-5) and all(abs(gaps[n]) > 1e-3 for n in (0, 1, 3))


@pytest.mark.parametrize("kind", SAVE)
def test_gaps_do_not_hang_on_the_company(scorers, kind):
    together = gaps_of(scorers[kind], QUESTIONS)
    alone = [found for question in QUESTIONS for found in gaps_of(scorers[kind], [question], 1)]
    assert [gap for gap, _ in together] == pytest.approx([gap for gap, _ in alone], abs=1e-4)


@pytest.mark.parametrize("kind", SAVE)
def test_each_side_gets_the_log_of_its_chance(scorers, kind):
    scorer = scorers[kind]
    ((first, second),) = scorer.compare(pairs_of(QUESTIONS[:1]))
    ((gap, _),) = gaps_of(scorer, QUESTIONS[:1])
    assert first[0] - second[0] == pytest.approx(gap, abs=1e-4)
    assert math.exp(first[0]) + math.exp(second[0]) == pytest.approx(1.0)
    assert (first[1], second[1]) == ("ok", "ok")


@pytest.mark.parametrize("kind", SAVE)
def test_what_cannot_be_compared_has_a_status(scorers, kind):
    good, empty = pairs_of([QUESTIONS[0], (PROMPT, " ", "yes")])
    other = (good[0], {**good[1], "prompt": TURNS})
    found = scorers[kind].compare([empty, other, good])
    assert found[:2] == [((None, "empty"),) * 2, ((None, "error"),) * 2]
    assert found[2][0][1] == "ok" and found[2] == scorers[kind].compare([good])[0]


def test_preferences_are_evaluated(scorers):
    import pyarrow as pa

    from rayrm.evaluation.rewarding import RewardStage
    from rayrm.rows import Preference

    rows = [
        {"id": "a", "group": "a", "lang": "en", "prompt": p}
        | {side: [{"role": "assistant", "content": text}] for side, text in (("chosen", a), ("rejected", b))}
        for p, a, b in QUESTIONS
    ]
    config = scorers["pair_rm"].config
    found = RewardStage(config, None)(Preference.conform(pa.Table.from_pylist(rows))).to_pylist()
    gaps = [row["chosen_reward"] - row["rejected_reward"] for row in found]
    assert gaps == pytest.approx([gap for gap, _ in gaps_of(scorers["pair_rm"], QUESTIONS)], abs=1e-4)
    assert [row["status"] for row in found] == [{"pairwise": ["ok", "ok"]}] * 4


def test_batches_hold_many_rows(scorers):
    for name in ("pair_rm", "slic", "steam_shp"):
        model, sizes = scorers[name].model, []
        read = type(model).read
        model.read = lambda rows, m=model, r=read, s=sizes: s.append(len(rows)) or r(m, rows)
        gaps_of(scorers[name], QUESTIONS[:3])
        del model.read
        assert sizes == [6]


# PairRM.


def encode(scorers, kind, *question):
    from rayrm.models.pairwise import Question

    return scorers[kind].model.encode(Question(*question))


def read_back(scorer, ids):
    return " ".join(scorer.model.tokenizer.convert_ids_to_tokens(ids))


def test_pair_rm_reads_a_source_and_two_answers(scorers):
    from rayrm.models.pairwise import _numbered_turns

    found = encode(scorers, "pair_rm", PROMPT, "yes", "no")
    text = read_back(scorers["pair_rm"], found.ids)
    assert text.startswith("[CLS] <|source|> ") and text.endswith("[CLS] <|candidate2|> [UNK] [UNK] no [SEP]")
    assert "one is it [UNK] [UNK] [UNK] [SEP] [CLS] <|candidate1|> [UNK] [UNK] yes [SEP]" in text
    tokens = scorers["pair_rm"].model.tokenizer.convert_ids_to_tokens(found.ids)
    assert [tokens[place] for place in found.reads] == ["<|source|>", "<|candidate1|>", "<|candidate2|>"]
    source, before = _numbered_turns([{"role": "system", "content": "be kind"}, *TURNS])
    lines = source.split("response.")[-1].splitlines()
    assert lines == [
        "USER: be kind",
        "which one is it",
        "Assistant: <Response 1>",
        "USER: how are you",
        "Assistant: <Response 2>",
    ]
    assert before == "<Response 1>: good\n<Response 2>: "


def test_better_pair_rm_names_who_speaks(scorers):
    from rayrm.models.pairwise import _named_turns

    assert _named_turns(TURNS) == "USER: which one is it\n\nASSISTANT: good\n\nUSER: how are you\n\nASSISTANT:"
    text = read_back(scorers["better_pair_rm"], encode(scorers, "better_pair_rm", PROMPT, " yes ", "no").ids)
    assert text == (
        "[CLS] <|source|> [SEP] [CLS] [UNK] which one is it [UNK] [SEP] "
        "[CLS] <|candidate1|> yes [SEP] [CLS] <|candidate2|> no [SEP]"
    )


def test_long_texts_are_cut_where_the_published_models_cut_them(scorers):
    long = [{"role": "user", "content": "first " + "hi " * 3000 + "there"}]
    found = encode(scorers, "pair_rm", long, "yes " * 900, "no")
    # 1224 of the source, and (2048 - 1224) / 2 = 412 for each answer.
    assert (len(found.ids), found.status) == (1224 + 412 + 5 + 1, "truncated")
    assert found.reads == (1, 1225, 1224 + 412 + 1)
    assert "there" not in read_back(scorers["pair_rm"], found.ids)
    short = encode(scorers, "pair_rm", PROMPT, "yes " * 900, "no " * 900)
    size = short.ids.index(2) + 1
    assert len(short.ids) == 2048 - (2048 - size) % 2 - 2 * max(0, (2048 - size) // 2 - 905)
    found = encode(scorers, "better_pair_rm", long, "yes " * 900, "no " * 900)
    # 2030 of the source, cut at its left, and 670 with a mark, [CLS] and [SEP] of each answer, as far as 3370 go.
    assert len(found.ids) == 2030 + 670 + 670
    assert "first" not in read_back(scorers["better_pair_rm"], found.ids).split()
    short = encode(scorers, "better_pair_rm", PROMPT, "yes " * 900, "no")
    assert short.reads[2] - short.reads[1] == 670 + 3


def test_pair_rm_is_logit_ab_less_logit_ba(scorers):
    """Against the formula of the published model, written out for one row in fp64."""
    scorer = scorers["pair_rm"]
    from safetensors.torch import load_file
    from transformers import DebertaV2Config, DebertaV2Model

    folder = scorer.config.model
    tensors = {name: tensor.double() for name, tensor in load_file(f"{folder}/model.safetensors").items()}
    encoder = DebertaV2Model(DebertaV2Config.from_pretrained(folder)).double().eval()
    prefix = "pretrained_model."
    encoder.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
    marks = scorer.model.marks

    def logit(question):
        ids = torch.tensor([encode(scorers, "pair_rm", *question).ids])
        with torch.no_grad():
            hidden = encoder(ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
        source, first, second = (hidden[(ids[0] == mark).nonzero().item()] for mark in marks)
        scores = []
        for answer in (first, second):
            inner = torch.tanh(
                tensors["head_layer.1.weight"] @ torch.cat([source, answer]) + tensors["head_layer.1.bias"]
            )
            scores.append(tensors["head_layer.4.weight"] @ inner + tensors["head_layer.4.bias"])
        return (scores[0] - scores[1]).mean().item()

    for question, (gap, _) in zip(QUESTIONS, gaps_of(scorer, QUESTIONS), strict=True):
        prompt, first, second = question
        assert gap == pytest.approx(logit(question) - logit((prompt, second, first)), abs=1e-4)


# Language models.


def test_slic_is_the_mean_share_of_the_letters(scorers):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = scorers["slic"].config.model
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    letters = [tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "AB"]
    plain = AutoTokenizer.from_pretrained(folder)
    # The template of the model's card, in Jinja as transformers reads it.
    plain.chat_template = (
        "\n{% for message in messages %}{% if loop.index0 % 2 == 0 %}\n\n<turn> user\n {{ message['content'] }}"
        "{% else %}\n\n<turn> assistant\n {{ message['content'] }}{% endif %}{% endfor %}\n\n\n"
    )

    def share(prompt, first, second):
        context = plain.apply_chat_template(prompt, tokenize=False)
        text = f"[CONTEXT] {context} [RESPONSE A] {first} [RESPONSE B] {second} \n"
        asked = [{"role": "user", "content": text}]
        whole = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(
            whole.replace(tokenizer.bos_token or "<none>", ""), add_special_tokens=False, return_tensors="pt"
        )
        with torch.no_grad():
            return model(ids["input_ids"]).logits[0, -1][letters].double().softmax(0)[0].item()

    for question, (gap, status) in zip(QUESTIONS, gaps_of(scorers["slic"], QUESTIONS), strict=True):
        prompt, first, second = question
        chance = (share(prompt, first, second) + 1 - share(prompt, second, first)) / 2
        assert 1 / (1 + math.exp(-gap)) == pytest.approx(chance, abs=1e-5) and status == "ok"


def test_slic_has_no_room_for_texts_beyond_the_models_positions(scorers):
    question = ([{"role": "user", "content": "hi " * 600}], "yes", "no")
    assert gaps_of(scorers["slic"], [question]) == [(None, "overlength")]


def test_steam_shp_is_the_mean_share_of_the_letters(scorers):
    from transformers import AutoTokenizer, T5ForConditionalGeneration

    folder = scorers["steam_shp"].config.model
    model, tokenizer = T5ForConditionalGeneration.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    letters = [tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "AB"]

    def share(post, first, second):
        text = f"POST: {post} \n\n RESPONSE A: {first}\n\n RESPONSE B: {second}\n\n Which response is better? RESPONSE"
        ids = tokenizer([text], return_tensors="pt").input_ids
        made = model.generate(ids, max_new_tokens=1, return_dict_in_generate=True, output_logits=True, do_sample=False)
        return made.logits[0][0][letters].double().softmax(0)[0].item()

    posts = ["which one is it", "which one is it good how are you", "which one is it", "hi " * 40]
    for post, question, (gap, _) in zip(posts, QUESTIONS, gaps_of(scorers["steam_shp"], QUESTIONS), strict=True):
        _, first, second = question
        chance = (share(post, first, second) + 1 - share(post, second, first)) / 2
        assert 1 / (1 + math.exp(-gap)) == pytest.approx(chance, abs=1e-5)


def test_a_post_that_is_too_long_loses_its_beginning(scorers):
    prompt = [{"role": "user", "content": "first\n" + "hi " * 600 + "there"}]
    found = encode(scorers, "steam_shp", prompt, "yes", "no")
    text = read_back(scorers["steam_shp"], found.ids)
    assert (len(found.ids), found.status) == (512, "truncated")
    assert text.startswith("POST: hi hi") and text.endswith(
        "hi there RESPONSE A: yes RESPONSE B: no Which response is better? RESPONSE </s>"
    )
    assert encode(scorers, "steam_shp", PROMPT, "yes " * 600, "no") == ([], "overlength", ())


# What is wrong.


def test_a_model_of_another_format_is_refused(scorers, tmp_path):
    paths = {kind: scorer.config.model for kind, scorer in scorers.items()}
    with pytest.raises(CheckpointError, match="is no model of this format|does not load"):
        PairwiseScorer(PairwiseScoring(model=paths["slic"], format="pair_rm"))
    with pytest.raises(CheckpointError, match="does not load"):
        PairwiseScorer(PairwiseScoring(model=paths["slic"], format="steam_shp"))
    with pytest.raises(CheckpointError, match="does not load|writes the words"):
        PairwiseScorer(PairwiseScoring(model=paths["steam_shp"], format="slic"))
    with pytest.raises(CheckpointError, match="There is no model at"):
        check_pairwise(PairwiseScoring(model=str(tmp_path / "nothing"), format="slic"))
    check_pairwise(PairwiseScoring(model=paths["pair_rm"], format="pair_rm"))
