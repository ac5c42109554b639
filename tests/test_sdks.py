"""The real client code of others, unmodified, against a real server."""

import cohere
import openai
import pytest
import test_gateway as base
import test_judgements
import test_page
from test_gateway import PROMPT, TEXTS

from rayrm.models.rewarder import load_rewarder

replica, expected = base.replica, base.expected
stub, server, address = test_judgements.stub, test_judgements.server, test_page.address


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="s3cret", max_retries=0) as client:
        yield client


def test_openai_embeddings_in_both_encodings(client, served_model, expected):
    renderer = load_rewarder(served_model).renderer
    prompt = [{"role": "user", "content": PROMPT}]
    rendered = [renderer.prompt_text(prompt) + renderer.completion_text(prompt, text) for text in TEXTS]
    for options in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):
        found = client.embeddings.create(model="small", input=rendered, **options)
        if options.get("encoding_format") != "base64":
            assert [each.embedding[-1] for each in found.data] == pytest.approx(expected, abs=1e-5)
        assert found.usage.total_tokens > 40


def test_openai_chats_with_the_judge_and_lists_models(client):
    messages = [{"role": "user", "content": "[Begin of xx"}]
    found = client.chat.completions.create(model="critic", messages=messages, temperature=0.0)
    assert found.choices[0].message.content == "I see. [[2]]" and found.model == "critic"
    assert [model.id for model in client.models.list()] == ["small", "twin", "critic"]
    assert client.models.retrieve("small").owned_by == "rayrm"
    with pytest.raises(openai.NotFoundError, match="no judge 'x'"):
        client.chat.completions.create(model="x", messages=messages)
    with pytest.raises(openai.AuthenticationError, match="no valid key"):
        client.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.UnprocessableEntityError, match="has no reward"):
        client.embeddings.create(model="small", input="")


def test_openai_tries_again_after_a_503(client, stub):
    stub.failures = [(503, {}, "busy")]
    messages = [{"role": "user", "content": "[Begin of x"}]
    assert client.chat.completions.create(model="critic", messages=messages).choices[0].message.content


@pytest.mark.parametrize("kind", [cohere.Client, cohere.ClientV2])
def test_cohere_reranks(kind, address, expected):
    client = kind(api_key="s3cret", base_url=address)
    found = client.rerank(model="small", query=PROMPT, documents=TEXTS, top_n=3)
    order = sorted(range(4), key=lambda index: -expected[index])[:3]
    assert [each.index for each in found.results] == order
    assert all(0 < each.relevance_score < 1 for each in found.results)
