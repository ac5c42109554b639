"""What the learner's network gives to the tokens of completions, against plain transformers."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from rayrm.models.packing import make_packable
from rayrm.training.ppo.network import (
    HEAD_GRADIENT,
    ActorCritic,
    Reference,
    Snapshot,
    ValueHead,
    packed_batch,
    padded_batch,
)
from rayrm.training.settings import LowRank

PROMPTS = [[5, 6, 7, 8], [9], [10, 11]]
COMPLETIONS = [[12, 1], [13, 14, 15, 1], [1]]


def decoder():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes)).eval()


def encoder_decoder():
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=40, decoder_start_token_id=0, **sizes)).eval()


def plain(model, prompt, completion):
    """Log-probabilities and entropies of a completion's tokens, alone and without padding."""
    if model.config.is_encoder_decoder:
        logits = model(torch.tensor([prompt]), decoder_input_ids=torch.tensor([[0, *completion[:-1]]])).logits[0]
    else:
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    logprobs = (logits.double() / 0.7).log_softmax(-1)
    return logprobs[range(len(completion)), completion], -(logprobs.exp() * logprobs).sum(-1)


@pytest.mark.parametrize("make", [decoder, encoder_decoder])
def test_logprobs_and_entropies_are_those_of_each_completion_alone(make):
    model = make()
    wanted = [plain(model, p, c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    network = ActorCritic(model, 0.7, has_critic=True)
    torch.nn.init.normal_(network.value_head.weight)
    start = 0 if model.config.is_encoder_decoder else None
    batch = padded_batch(PROMPTS, COMPLETIONS, pad_id=0, start_id=start)
    with torch.no_grad():
        logprobs, entropy, values = network(*batch)
    assert logprobs.tolist() == pytest.approx(torch.cat([w[0] for w in wanted]).tolist(), abs=1e-5)
    assert entropy.tolist() == pytest.approx(torch.cat([w[1] for w in wanted]).tolist(), abs=1e-5)
    alone = [network(*padded_batch([p], [c], 0, start))[2] for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert values.tolist() == pytest.approx(torch.cat(alone).tolist(), abs=1e-5)
    assert values.std() > 0


def test_completions_that_share_their_prompt_get_what_they_get_alone():
    model = decoder()
    prompts = [PROMPTS[0], PROMPTS[0], PROMPTS[0], PROMPTS[1]]
    completions = [[12, 1], [12, 14, 15, 1], [1], [13, 1]]
    wanted = [plain(model, p, c) for p, c in zip(prompts, completions, strict=True)]
    make_packable(model)
    network = ActorCritic(model, 0.7, has_critic=False)
    batch = packed_batch(prompts, completions)
    assert batch.inputs["input_ids"].shape == (1, 4 + (2 + 4 + 1) + (1 + 2))
    with torch.no_grad():
        logprobs, entropy, _ = network(*batch)
    assert logprobs.tolist() == pytest.approx(torch.cat([w[0] for w in wanted]).tolist(), abs=1e-5)
    assert entropy.tolist() == pytest.approx(torch.cat([w[1] for w in wanted]).tolist(), abs=1e-5)


def test_the_value_before_a_token_does_not_know_it():
    network = ActorCritic(decoder(), 1.0, has_critic=True)
    torch.nn.init.normal_(network.value_head.weight)
    one, other = (network(*padded_batch([[5, 6]], [[7, last]], 0, None))[2].tolist() for last in (8, 9))
    assert one == other


def test_the_value_head_scales_the_gradient_of_its_own_weights_alone():
    torch.manual_seed(0)
    head, plain = ValueHead(16, 1), torch.nn.Linear(16, 1)
    plain.load_state_dict(head.state_dict())
    hidden = [torch.randn(5, 16).requires_grad_()]
    hidden.append(hidden[0].detach().clone().requires_grad_())
    values = [layer(read) for layer, read in zip((head, plain), hidden, strict=True)]
    assert torch.equal(*values)
    for found in values:
        found.square().sum().backward()
    torch.testing.assert_close(hidden[0].grad, hidden[1].grad)
    torch.testing.assert_close(head.weight.grad, HEAD_GRADIENT * plain.weight.grad)
    torch.testing.assert_close(head.bias.grad, HEAD_GRADIENT * plain.bias.grad)


def test_a_model_is_as_it_was_without_a_pass_of_the_network():
    model = decoder()
    before = model(torch.tensor([[5, 6, 7]])).logits
    network = ActorCritic(model, 1.0, has_critic=False)
    assert network.value_head is None
    assert network(*padded_batch([[5, 6]], [[7]], 0, None))[1:] == (None, None)
    assert torch.equal(model(torch.tensor([[5, 6, 7]])).logits, before)


def test_a_snapshot_stands_in_for_the_weights_and_gives_them_back():
    model = decoder()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        first = model(ids).logits
        snapshot = Snapshot(model)
        held = [parameter.data_ptr() for parameter in model.parameters()]
        for parameter in model.parameters():
            parameter.mul_(1.5)
        second = model(ids).logits
        with snapshot.active():
            assert torch.equal(model(ids).logits, first)
        assert torch.equal(model(ids).logits, second)
        assert held == [parameter.data_ptr() for parameter in model.parameters()]
        snapshot.take()
        for parameter in model.parameters():
            parameter.mul_(0.5)
        with snapshot.active():
            assert torch.equal(model(ids).logits, second)
    assert not torch.allclose(first, second)


def test_the_reference_of_lora_is_the_model_below_it():
    model = decoder()
    ids = torch.tensor([[5, 6, 7]])
    first = model(ids).logits
    adapted = LowRank(r=2).add_to(model, task_type="CAUSAL_LM")
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    reference = Reference(adapted)
    assert reference.snapshot is None
    assert not torch.allclose(adapted(ids).logits, first)
    with reference.active():
        assert torch.equal(adapted(ids).logits, first)
