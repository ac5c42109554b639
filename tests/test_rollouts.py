"""Completions with log-probabilities: those of the model, the same in any company, by weights that were pushed."""

import os
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from rayrm.errors import CheckpointError, ConfigError, RayRMError
from rayrm.models.completing import choose_tokens, uniform_numbers
from rayrm.models.creation import CreationConfig, create_model, train_tokenizer
from rayrm.models.generating import TransformersEngine
from rayrm.models.vllm import CPU_BLOCK, DecodingConfig, Drawn, Engine, EngineConfig
from rayrm.training.ppo import rollouts
from rayrm.training.ppo.rollouts import Request, RolloutConfig, RolloutPool, split_requests

TEXTS = ["a red house stands near the old river where two small dogs run across wet grass"] * 3
SIZES = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_layers": 2, "num_heads": 2}
DRAWS = DecodingConfig(num_candidates=4, max_tokens=12)


def make_policy(folder, seed, scale=6.0):
    """A small causal model whose next tokens are far from equally likely."""
    from transformers import AutoModelForCausalLM

    config = CreationConfig.model_validate({**SIZES, "max_length": 160, "seed": seed})
    create_model(TEXTS, config, str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.lm_head.weight.data *= scale
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return make_policy(tmp_path_factory.mktemp("rollouts") / "first", 0)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return make_policy(tmp_path_factory.mktemp("rollouts") / "second", 1)


@pytest.fixture(scope="module")
def engine(policy):
    return TransformersEngine(policy, EngineConfig(), 1)


@pytest.fixture(scope="module")
def seq2seq(tmp_path_factory):
    """A random T5 with a vocabulary of 8, whose tokens 1 and 2 end a completion."""
    from transformers import T5Config, T5ForConditionalGeneration

    folder = tmp_path_factory.mktemp("rollouts") / "t5"
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "vocab_size": 8}
    torch.manual_seed(3)
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1))
    model.lm_head.weight.data *= 30
    model.generation_config.eos_token_id = [1, 2]
    model.save_pretrained(folder)
    tokenizer = train_tokenizer(TEXTS, CreationConfig.model_validate({**SIZES, "chat_template": "none"}))
    tokenizer.eos_token = "<s>"
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_prompts(num, longest=30):
    numbers = np.random.default_rng(1)
    return [numbers.integers(5, 250, size=3 + i * 7 % longest).tolist() for i in range(num)]


def load(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path).eval()


def state_of(path):
    return load(path).state_dict()


def model_logprobs(model, prompt, ids):
    """The log-probability of each of `ids` behind `prompt` by a plain forward pass."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[torch.arange(len(ids)), ids].tolist()


def ids_of(groups):
    return [[item.ids for item in group] for group in groups]


def check_whole(groups, end, max_tokens):
    """End tokens stand last and nowhere else, and what is not finished has `max_tokens`."""
    for item in (item for group in groups for item in group):
        assert len(item.ids) == len(item.logprobs) >= 1
        assert end not in item.ids[:-1]
        assert item.is_finished == (item.ids[-1] == end)
        assert item.is_finished or len(item.ids) == max_tokens
    assert {item.is_finished for group in groups for item in group} == {True, False}


def start_vllm(path):
    import ray

    return ray.remote(num_cpus=1)(Engine).remote(path, EngineConfig(), with_logprobs=True)


@pytest.mark.vllm
@pytest.mark.ray
def test_vllm_draws_with_the_models_logprobs_and_takes_new_weights(policy, other, ray_cluster):
    import ray

    first, fresh = start_vllm(policy), start_vllm(other)
    prompts, seeds = [*make_prompts(6), list(range(20, 20 + 3 * CPU_BLOCK))], list(range(100, 170, 10))
    greedy = DecodingConfig(num_candidates=1, max_tokens=12, temperature=0)

    def draw(actor, config=DRAWS):
        return ray.get(actor.draw.remote(prompts, seeds, config))

    groups, model = draw(first), load(policy)
    for prompt, group in zip(prompts, groups, strict=True):
        for item in group:
            assert item.logprobs == pytest.approx(model_logprobs(model, prompt, item.ids), abs=1e-4)
    # The last prompt's blocks are in the cache now, by the old weights.
    ray.get(first.load_weights.remote(state_of(other)))
    for config in (DRAWS, greedy):
        found, wanted = draw(first, config), draw(fresh, config)
        assert ids_of(found) == ids_of(wanted)
        pairs = [
            (a.logprobs, b.logprobs) for x, y in zip(found, wanted, strict=True) for a, b in zip(x, y, strict=True)
        ]
        assert all(a == pytest.approx(b, abs=1e-4) for a, b in pairs)
    assert ids_of(draw(first)) != ids_of(groups)
    # What was taken once can be taken again, and without the tied matrix.
    state = state_of(policy)
    del state["lm_head.weight"]
    ray.get(first.load_weights.remote(state))
    assert ids_of(draw(first)) == ids_of(groups)

    with pytest.raises(ConfigError, match="Prompt 1 of 2 has 160 tokens"):
        ray.get(first.draw.remote([[5], [5] * 160], [0, 0], DRAWS))
    del state["model.norm.weight"]
    with pytest.raises(CheckpointError, match=r"not whole: nothing fills vLLM's model\.norm\.weight"):
        ray.get(fresh.load_weights.remote(state))
    for actor in (first, fresh):
        ray.kill(actor)


def test_transformers_draws_with_the_models_logprobs(engine, policy):
    prompts, model = make_prompts(7), load(policy)
    groups = engine.draw(prompts, list(range(7)), DRAWS)
    for prompt, group in zip(prompts, groups, strict=True):
        for item in group:
            assert item.logprobs == pytest.approx(model_logprobs(model, prompt, item.ids), abs=1e-5)


def test_a_prompts_draws_do_not_hang_on_its_batch(engine, policy):
    prompts, seeds = make_prompts(9), [5, 6, 7, 8, 9, 10, 11, 12, 5]
    together = engine.draw(prompts, seeds, DRAWS)
    alone = [engine.draw([prompt], [seed], DRAWS)[0] for prompt, seed in zip(prompts, seeds, strict=True)]
    assert ids_of(together) == ids_of(alone)
    assert all(len({tuple(item.ids) for item in group}) > 1 for group in together)
    assert ids_of(engine.draw(prompts[:1], [6], DRAWS)) != ids_of(together[:1])
    # A cache with room for a few rows only makes many batches of one prompt.
    narrow = TransformersEngine(policy, EngineConfig(kv_cache_gib=1e-6), 1)
    assert ids_of(narrow.draw(prompts, seeds, DRAWS)) == ids_of(together)


def test_completions_end_with_their_end_token_or_are_cut(tmp_path):
    from transformers import AutoModelForCausalLM

    path = make_policy(tmp_path / "model", 0, 0.0)
    model = AutoModelForCausalLM.from_pretrained(path)
    engine = TransformersEngine(path, EngineConfig(max_model_len=40), 1)
    end = model.config.eos_token_id
    assert engine.ends == [end]
    # All tokens are equally likely, so one in eight completions of 40 tokens holds the end token.
    groups = engine.draw([[7, 8]] * 10, list(range(10)), DecodingConfig(num_candidates=16, max_tokens=38))
    check_whole(groups, end, 38)
    assert groups[0][0].logprobs[0] == pytest.approx(-np.log(model.config.vocab_size), abs=1e-5)
    late = engine.draw([[7]] * 10, list(range(10)), DecodingConfig(num_candidates=16, max_tokens=39, min_tokens=39))
    assert {len(item.ids) for group in late for item in group} == {39}
    assert all(end not in item.ids for group in late for item in group)
    assert late[0][0].logprobs[0] == pytest.approx(-np.log(model.config.vocab_size - 1), abs=1e-5)
    # The model's limit cuts too.
    (((cut,),)) = engine.draw([[7] * 35], [0], DecodingConfig(num_candidates=1, max_tokens=30, min_tokens=30))
    assert (len(cut.ids), cut.is_finished) == (5, False)


def test_tokens_come_as_often_as_they_are_likely():
    logits = torch.tensor([2.0, -1.0, 0.5, 0.5, -30.0, 1.0])
    noise = torch.from_numpy(uniform_numbers(3, 1, 40_000)[0])
    for config in (
        DecodingConfig(),
        DecodingConfig(temperature=0.5),
        DecodingConfig(top_k=2),
        DecodingConfig(top_p=0.75),
        DecodingConfig(temperature=2.0, top_k=5, top_p=0.9),
    ):
        expected = torch.softmax(logits.double() / config.temperature, 0)
        if config.top_k:
            expected[expected < expected.sort(descending=True).values[config.top_k - 1]] = 0
            expected /= expected.sum()
        total, order = 0.0, expected.sort(descending=True).indices.tolist()
        for token in order:
            total, before = total + float(expected[token]), total
            if before >= config.top_p:
                expected[token] = 0
        expected /= expected.sum()
        tokens, logprobs = choose_tokens(logits.expand(len(noise), 6), noise, config)
        shares = torch.bincount(tokens, minlength=6) / len(noise)
        # Four standard deviations of a share of 40 000 draws are at most 0.01.
        assert shares.tolist() == pytest.approx(expected.tolist(), abs=0.01)
        assert ((shares > 0) <= (expected > 0)).all()
        assert logprobs.tolist() == pytest.approx(expected.log()[tokens].tolist(), abs=1e-5)
    tokens, logprobs = choose_tokens(logits[None], noise[:1], DecodingConfig(temperature=0, num_candidates=1))
    assert (tokens.tolist(), logprobs.tolist()) == ([0], pytest.approx([float(logits.log_softmax(0)[0])]))


def test_an_encoder_decoder_draws_from_its_own_distribution(seq2seq):
    from transformers import AutoModelForSeq2SeqLM

    engine = TransformersEngine(seq2seq, EngineConfig(), 1)
    assert engine.ends == [1, 2]
    prompts = [[3, 4, 5], [6, 7, 3, 3, 5, 4, 1]]
    config = DecodingConfig(num_candidates=3000, max_tokens=5)
    groups = engine.draw(prompts, [1, 2], config)
    model = AutoModelForSeq2SeqLM.from_pretrained(seq2seq).eval()
    for prompt, group in zip(prompts, groups, strict=True):
        first = torch.bincount(torch.tensor([item.ids[0] for item in group]), minlength=8) / 3000
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[0]])).logits[0, 0]
        assert first.tolist() == pytest.approx(logits.softmax(-1).tolist(), abs=0.04)
        for item in group[:20]:
            decoder_ids = torch.tensor([[0, *item.ids[:-1]]])
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=decoder_ids).logits[0]
            wanted = logits.log_softmax(-1)[torch.arange(len(item.ids)), item.ids]
            assert item.logprobs == pytest.approx(wanted.tolist(), abs=1e-5)
            assert item.is_finished == (item.ids[-1] in (1, 2))
            assert not {1, 2} & set(item.ids[:-1])
    few = config.model_copy(update={"num_candidates": 4})
    assert ids_of(engine.draw(prompts[1:], [2], few)) == ids_of(engine.draw(prompts, [1, 2], few))[1:]


def test_a_model_that_forces_its_first_token_is_refused(seq2seq, tmp_path):
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    model = AutoModelForSeq2SeqLM.from_pretrained(seq2seq)
    model.generation_config.forced_bos_token_id = 3
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(seq2seq).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="forces its first token \\(forced_bos_token_id\\), which nobody draws"):
        TransformersEngine(str(tmp_path), EngineConfig(), 1)


def test_transformers_takes_new_weights_or_says_what_is_wrong(policy, other):
    engine = TransformersEngine(policy, EngineConfig(), 1)
    prompts, seeds = make_prompts(3), [1, 2, 3]
    state = state_of(other)
    del state["lm_head.weight"]
    engine.load_weights({name: tensor.numpy() for name, tensor in state.items()})
    fresh = TransformersEngine(other, EngineConfig(), 1)
    assert engine.draw(prompts, seeds, DRAWS) == fresh.draw(prompts, seeds, DRAWS)
    with pytest.raises(CheckpointError, match=r"they hold foreign\.weight, which the model has not"):
        engine.load_weights({**state, "foreign.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' has the shape \[3\], and the model's has \[64\]"):
        engine.load_weights({**state, "model.norm.weight": torch.zeros(3)})
    del state["model.norm.weight"]
    with pytest.raises(CheckpointError, match=r"they lack model\.norm\.weight"):
        engine.load_weights(state)


def test_settings_that_cannot_act_are_refused(policy):
    with pytest.raises(ConfigError, match=r"stop is \['x'\]"):
        RolloutPool(policy, RolloutConfig(), DecodingConfig(stop=["x"]))
    with pytest.raises(ValueError, match="are vLLM's"):
        RolloutConfig(engine="transformers", settings=EngineConfig(quantization="fp8"))
    with pytest.raises(ValueError, match="a fixed number of workers"):
        RolloutConfig.model_validate({"workers": {"max_workers": 2}})
    with pytest.raises(ValueError, match="needs a GPU for each rank"):
        RolloutConfig(settings=EngineConfig(tensor_parallel_size=2))
    with pytest.raises(ConfigError, match="max_model_len is 500"):
        TransformersEngine(policy, EngineConfig(max_model_len=500), 1)
    with pytest.raises(ConfigError, match="Prompt 0 of 1 has 0 tokens"):
        TransformersEngine(policy, EngineConfig(), 1).draw([[]], [0], DRAWS)


def test_requests_are_split_for_the_actors():
    requests = [Request(str(i), [1], i) for i in range(300)]

    def sizes(num, workers):
        chunks = split_requests(requests[:num], workers)
        assert [request for chunk in chunks for request in chunk] == requests[:num]
        return [len(chunk) for chunk in chunks]

    assert sizes(300, 1) == [300]
    assert sizes(300, 2) == [64, 64, 64, 64, 44]
    assert sizes(100, 2) == [25, 25, 25, 25]
    assert sizes(20, 4) == [8, 8, 4]
    assert sizes(0, 1) == sizes(0, 2) == []


def make_pool(model, ends=(), **fields):
    settings = {"engine": "transformers", "workers": {"num_workers": 2}, **fields}
    return RolloutPool(model, RolloutConfig.model_validate(settings), DRAWS, ends=ends)


def drawn(chunks, version):
    """Tokens of the completions by request id, all of which were drawn with weights of `version`."""
    found = {}
    for requests, groups, given in chunks:
        assert given == version
        for request, group in zip(requests, groups, strict=True):
            assert request.id not in found
            found[request.id] = [item.ids for item in group]
    return found


@pytest.mark.ray
def test_a_killed_actor_loses_nothing_and_changes_nothing(engine, policy, other, ray_cluster):
    import ray

    prompts = make_prompts(40)
    requests = [Request(f"p{i}", ids, 50 + i) for i, ids in enumerate(prompts)]
    seeds = [request.seed for request in requests]
    state = {name: tensor.bfloat16() for name, tensor in state_of(other).items()}
    fresh = TransformersEngine(policy, EngineConfig(), 1)
    fresh.load_weights(state)
    wanted = dict(zip([request.id for request in requests], ids_of(fresh.draw(prompts, seeds, DRAWS)), strict=True))
    before = dict(zip(wanted, ids_of(engine.draw(prompts, seeds, DRAWS)), strict=True))
    assert all(wanted[name] != before[name] for name in before)
    pool = make_pool(policy, max_failures=1)
    try:
        assert drawn(pool.draw(requests), 0) == before
        # bf16 tensors come through the object store as they are.
        pool.push(state, 7)
        chunks = pool.draw(requests)
        first = next(chunks)
        # A push does not touch the draw that is under way; the new actor takes the weights of that draw.
        pool.push({"strange": torch.zeros(2)}, 8)
        ray.kill(next(iter(pool._actors)))
        assert drawn([first, *chunks], 7) == wanted
        with pytest.raises(CheckpointError, match=r"they lack .* and hold strange, which the model has not"):
            list(pool.draw(requests))
        pool.push(state_of(policy), 9)
        assert drawn(pool.draw(requests), 9) == before
    finally:
        pool.close()


@pytest.mark.parametrize("engine", ["transformers", pytest.param("vllm", marks=pytest.mark.vllm)])
@pytest.mark.ray
def test_completions_end_where_the_template_ends_a_turn_too(policy, ray_cluster, engine):
    """Such as at <|im_end|> with a model whose files name <|endoftext|> alone."""
    requests = [Request(f"p{i}", ids, i) for i, ids in enumerate(make_prompts(6))]

    def draw(ends):
        pool = make_pool(policy, ends, engine=engine, workers={"num_workers": 1})
        try:
            return {
                request.id: group
                for requests, groups, _ in pool.draw(requests)
                for request, group in zip(requests, groups, strict=True)
            }
        finally:
            pool.close()

    whole = draw([])
    tokens = Counter(token for group in whole.values() for item in group for token in item.ids[:-1])
    ((end, _),) = tokens.most_common(1)
    for name, group in draw([end]).items():
        for item, long in zip(group, whole[name], strict=True):
            assert item.ids == (long.ids[: long.ids.index(end) + 1] if end in long.ids else long.ids)
            assert item.is_finished == (end in long.ids or long.is_finished)


def stored_bytes():
    """What lies in the object store of this machine."""
    import ray
    from ray._private.internal_api import node_stats

    (node,) = ray.nodes()
    found = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], include_memory_info=False)
    return found.store_stats.object_store_bytes_used


@pytest.mark.ray
def test_weights_of_former_steps_do_not_stay_in_the_object_store(policy, ray_cluster):
    state = state_of(policy)
    size = sum(tensor.nbytes for tensor in state.values())
    pool = make_pool(policy, workers={"num_workers": 1})
    try:
        before = stored_bytes()
        for version in range(1, 51):
            pool.push(state, version)
            drawn(pool.draw([Request("a", [9], 4)]), version)
        deadline = time.monotonic() + 30
        while stored_bytes() > before + 2 * size and time.monotonic() < deadline:
            time.sleep(0.2)
        assert size <= stored_bytes() <= before + 2 * size
    finally:
        pool.close()


class Stub:
    """An actor that is late for as long as `<model>/late` is there, dies of a request named poison, never answers one
    named endless, and draws the number of its process."""

    def __init__(self, model, config, ends):
        while Path(model, "late").exists():
            time.sleep(0.05)

    def draw(self, requests, decoding, version, state):
        if any(request.id == "poison" for request in requests):
            os._exit(1)
        while any(request.id == "endless" for request in requests):
            time.sleep(0.05)
        if any(request.id == "stale" for request in requests):
            version += 1
        return version, [[Drawn([os.getpid()], [0.0], True)] for _ in requests]


def kill(actor):
    import ray
    from ray.exceptions import RayActorError

    ray.kill(actor)
    with pytest.raises(RayActorError):
        while True:
            ray.get(actor.__ray_ready__.remote())


@pytest.mark.ray
def test_nobody_waits_for_an_actor_that_starts_and_deaths_are_forgiven_with_progress(
    tmp_path, ray_cluster, monkeypatch
):
    monkeypatch.setattr(rollouts, "RolloutActor", Stub)
    pool = make_pool(str(tmp_path), max_failures=1)
    requests = [Request(f"p{i}", [9], i) for i in range(40)]

    def processes():
        found = drawn(pool.draw(requests), 0)
        assert found.keys() == {request.id for request in requests}
        return {ids[0][0] for ids in found.values()}

    def wait_for_both():
        deadline = time.monotonic() + 120
        while len(processes()) < 2:
            assert time.monotonic() < deadline, "a new actor never gets work"

    try:
        # More deaths than max_failures, with a whole draw behind each.
        for _ in range(3):
            wait_for_both()
            (tmp_path / "late").touch()
            kill(next(iter(pool._actors)))
            assert len(processes()) == 1
            (tmp_path / "late").unlink()
        wait_for_both()
        with pytest.raises(RayRMError, match="2 rollout actors died since the last whole draw, and max_failures is 1"):
            list(pool.draw([*requests, Request("poison", [9], 0)]))
    finally:
        pool.close()


@pytest.mark.ray
def test_who_waits_for_a_draw_is_let_go_when_the_pool_closes(tmp_path, ray_cluster, monkeypatch):
    from ray.exceptions import RayActorError

    monkeypatch.setattr(rollouts, "RolloutActor", Stub)
    pool = make_pool(str(tmp_path), max_failures=5, workers={"num_workers": 1})
    with pytest.raises(RayRMError, match="drew with the weights of step 1, where those of step 0 were pushed"):
        list(pool.draw([Request("stale", [9], 0)]))
    with ThreadPoolExecutor() as thread:
        waiting = thread.submit(lambda: list(pool.draw([Request("endless", [9], 0)])))
        with pytest.raises(TimeoutError):
            waiting.result(2)
        pool.close()
        with pytest.raises(RayActorError):
            waiting.result(60)
    assert len(pool._actors) == 1


def test_an_engine_holds_no_more_tokens_than_training_needs(policy, seq2seq):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(policy)
    assert [rollouts.tokens_needed(config, length) for length in (64, 160, 500)] == [64, 160, 160]
    assert rollouts.tokens_needed(AutoConfig.from_pretrained(seq2seq), 64) is None
    assert RolloutPool(policy, RolloutConfig(), DRAWS, 64).config.settings.max_model_len == 64
    narrow = RolloutConfig(settings=EngineConfig(max_model_len=32))
    assert RolloutPool(policy, narrow, DRAWS, 64).config.settings.max_model_len == 32
    assert RolloutPool(policy, RolloutConfig(), DRAWS).config.settings.max_model_len is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tensors_are_handed_over_bit_by_bit(dtype):
    whole = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    for tensor in (whole, whole.T, whole[::2, 1:], whole[0, 0]):
        given = rollouts._unpack(*rollouts._pack(tensor))
        assert given.dtype == dtype and given.shape == tensor.shape and torch.equal(given, tensor)


@pytest.mark.ray
def test_an_actor_that_cannot_start_says_why(tmp_path, ray_cluster):
    (tmp_path / "model").mkdir()
    pool = make_pool(str(tmp_path / "model"), workers={"num_workers": 1})
    with pytest.raises(CheckpointError, match="does not load as a language model"):
        list(pool.draw([Request("a", [9], 4)]))
    pool.close()
