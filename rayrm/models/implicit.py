"""The implicit reward of a policy: how much likelier it finds an answer than a reference does.

Of DPO (arXiv 2305.18290) without its factor beta: log π(answer | prompt) − log π_ref(answer | prompt), summed over the
tokens of the answer. The header of the assistant's turn counts as answer, as does the end token behind it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from json import JSONDecodeError
from typing import Any, Literal, NamedTuple

import torch

from rayrm.batching import token_batches
from rayrm.errors import CheckpointError, ConfigError
from rayrm.models.cpu import keep_freed_memory, use_onednn
from rayrm.models.inputs import pad_right
from rayrm.models.loading import load_padding_tokenizer
from rayrm.models.rendering import Renderer, load_template
from rayrm.models.reward_model import _label_logits, load_comparing_model
from rayrm.rows import Message

KEPT_OF_PROMPT = 128
"""Tokens that are left of a prompt that is cut."""
MAX_LOGITS = 2**26
"""Numbers of a part of the logits that is in memory at a time: 256 MiB."""
Reward = tuple[float | None, str]
"""A reward and `ok` or `truncated`; or None and `empty`, `nan`, or `error` where the template refuses the messages."""
Bos = Literal["doubled", "one"]
Reduction = Literal["mean", "sum", "norm"]


class Question(NamedTuple):
    """A prompt and all of its completions, which are cut alike."""

    prompt: Sequence[Message]
    completions: Sequence[str]
    tools: str | None = None
    """Tool schemas, a JSON list, for the template to show."""


class Answer(NamedTuple):
    """Token ids of a prompt with an answer."""

    ids: list[int]
    """Empty where there is nothing to read."""
    start: int
    """Place of the answer's first token."""
    status: str
    """`ok`, `truncated`, `empty` or `error`."""


NORMS: dict[str, Callable[[Sequence[float]], float]] = {
    "mean": lambda logs: math.fsum(logs) / len(logs),
    "sum": math.fsum,
    "norm": lambda logs: -math.sqrt(math.fsum(log * log for log in logs)),
}
"""How the log-probabilities of an answer's tokens become one number; `norm` is minus their Euclidean norm."""


class AnswerEncoder:
    """Prompts and answers → token ids, as RewardBench makes them.

    A text is tokenized whole and split where the tokens of the prompt alone end, one token earlier where the prompt's
    last token has grown together with the answer.
    """

    def __init__(self, renderer: Renderer, max_length: int, bos: Bos = "doubled") -> None:
        self.renderer = renderer
        self.max_length = max_length
        tokenizer = renderer.tokenizer
        self.eos: int = tokenizer.eos_token_id
        self.strips_bos = bos == "one"
        bos_id = tokenizer.bos_token_id
        self.bos: int | None = self.eos if bos_id is None and bos == "doubled" else bos_id

    def encode(self, question: Question) -> list[Answer]:
        """[bos] prompt answer [eos] of each completion.

        Where the prompt with the longest of the answers has more than `max_length` tokens, only the prompt's last 128
        stay, and if that is not enough, only the first `max_length` − 128 of every answer.
        """
        from jinja2 import TemplateError

        try:
            renderer = self.renderer.with_tools(question.tools)
            pairs = [self._split(renderer, question.prompt, c) if c.strip() else None for c in question.completions]
        except (TemplateError, JSONDecodeError):
            # Such as a system turn, for a template that knows none.
            return [Answer([], 0, "error" if c.strip() else "empty") for c in question.completions]
        longest = max((len(pair[1]) for pair in pairs if pair), default=0)
        return [
            self._join(*pair, longest) if pair else Answer([], 0, "error" if completion.strip() else "empty")
            for pair, completion in zip(pairs, question.completions, strict=True)
        ]

    def _split(
        self, renderer: Renderer, prompt: Sequence[Message], completion: str
    ) -> tuple[list[int], list[int]] | None:
        """Ids of the prompt and of the answer; None where the template writes the prompt anew once an answer follows."""
        head = renderer.turn_text(prompt)
        if renderer.template is None:
            whole = f"{head} {completion}"
        else:
            whole = renderer.turn_text([*prompt, {"role": "assistant", "content": completion}])
        if not whole.startswith(head):
            return None
        alone, ids = renderer.tokenizer([head, whole], add_special_tokens=False)["input_ids"]
        start = len(alone) - (ids[: len(alone)] != alone)
        first = 0
        while self.strips_bos and first < start and ids[first] == self.bos:
            first += 1
        return [*([] if self.bos is None else [self.bos]), *ids[first:start]], [*ids[start:], self.eos]

    def _join(self, head: list[int], answer: list[int], longest: int) -> Answer:
        status = "ok"
        if len(head) + longest > self.max_length:
            status = "truncated"
            head = head[-KEPT_OF_PROMPT:]
            if len(head) + longest > self.max_length:
                answer = answer[: self.max_length - KEPT_OF_PROMPT]
        # Nothing foretells the first token of all.
        return Answer(head + answer, max(1, len(head)), status)


class ImplicitRewarder:
    """A loaded policy, with its reference or without one."""

    def __init__(self, policy: Any, reference: Any, encoder: AnswerEncoder, reduction: Reduction) -> None:
        """`policy` and `reference`, which may be None, are causal language models of transformers."""
        self.policy = policy
        self.reference = reference
        self.encoder = encoder
        self.reduction = reduction

    def rewards(self, questions: Sequence[Question], token_budget: int = 16384) -> list[list[Reward]]:
        """A reward for each completion of each question, in order.

        `token_budget` bounds the padded tokens of a forward pass.
        """
        encoded = [self.encoder.encode(question) for question in questions]
        answers = [answer for answers in encoded for answer in answers if answer.ids]
        found = iter(self._rewards(answers, token_budget))
        return [[next(found) if answer.ids else (None, answer.status) for answer in answers] for answers in encoded]

    def _rewards(self, answers: Sequence[Answer], token_budget: int) -> list[Reward]:
        reduce = NORMS[self.reduction]
        values = [reduce(logs) for logs in token_log_probs(self.policy, answers, token_budget)]
        if self.reference is not None:
            others = token_log_probs(self.reference, answers, token_budget)
            values = [value - reduce(logs) for value, logs in zip(values, others, strict=True)]
        return [
            (value, answer.status) if math.isfinite(value) else (None, "nan")
            for value, answer in zip(values, answers, strict=True)
        ]


@torch.inference_mode()
def token_log_probs(network: Any, answers: Sequence[Answer], token_budget: int) -> list[list[float]]:
    """The log-probability of each token of each answer, given all tokens before it, under a causal language model.

    Raises CheckpointError when the network has no embedding for a token.
    """
    known = network.get_input_embeddings().num_embeddings
    if (unknown := max((max(answer.ids) for answer in answers), default=0)) >= known:
        raise CheckpointError(
            f"A text has the token {unknown}, and {type(network).__name__} knows {known} tokens; give a ref_model with "
            "the tokenizer of the model."
        )
    device = next(network.parameters()).device
    found: list[list[float]] = [[] for _ in answers]
    for batch in token_batches([len(answer.ids) for answer in answers], token_budget):
        rows = [answers[index] for index in batch]
        ids, mask = pad_right([row.ids for row in rows], 0, device)
        hidden = network.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        # A token is foretold at the one before it.
        places = [n * ids.shape[1] + p for n, row in enumerate(rows) for p in range(row.start, len(row.ids))]
        wanted = torch.tensor(places, device=device)
        logs = _log_probs(network, hidden.flatten(0, 1)[wanted - 1], ids.flatten()[wanted])
        first = 0
        for index, row in zip(batch, rows, strict=True):
            last = first + len(row.ids) - row.start
            found[index] = logs[first:last]
            first = last
    return found


def _log_probs(network: Any, hidden: torch.Tensor, targets: torch.Tensor) -> list[float]:
    """log p of each target [tokens] at a hidden state [tokens, size], a bounded part of the logits at a time."""
    rows = max(1, MAX_LOGITS // network.config.get_text_config().vocab_size)
    found: list[float] = []
    for states, tokens in zip(hidden.split(rows), targets.split(rows), strict=True):
        logits = _label_logits(network, states)
        chosen = logits.gather(-1, tokens[:, None])[:, 0]
        found += (chosen - logits.logsumexp(-1)).tolist()
    return found


def load_implicit_rewarder(
    path: str,
    reference: str | None,
    *,
    chat_template: str | None = None,
    max_length: int = 2048,
    bos: Bos = "doubled",
    reduction: Reduction = "sum",
    **settings: Any,
) -> ImplicitRewarder:
    """The policy at `path` and the reference, on one device. `settings` are those of `load_language_model`.

    `max_length` is lowered to the positions of the model that has fewest. Raises CheckpointError when a model does not
    load, and ConfigError for a `max_length` that leaves no answer of a prompt that is cut.
    """
    tokenizer = load_padding_tokenizer(path, settings.get("trust_remote_code", False))
    template = load_template(chat_template, tokenizer, path)
    networks = [load_language_model(each, **settings) for each in (path, reference) if each is not None]
    positions = (getattr(network.config, "max_position_embeddings", None) for network in networks)
    max_length = min([max_length, *(found for found in positions if found)])
    if max_length <= KEPT_OF_PROMPT:
        raise ConfigError(
            f"max_length is {max_length}, and a prompt that is cut keeps {KEPT_OF_PROMPT} tokens; raise max_length, or "
            "take models with more positions."
        )
    encoder = AnswerEncoder(Renderer(tokenizer, template), max_length, bos)
    return ImplicitRewarder(networks[0], networks[1] if len(networks) > 1 else None, encoder, reduction)


def load_language_model(path: str, device: str = "cpu", dtype: torch.dtype | None = None, **how: Any) -> Any:
    """The causal language model at `path`; `dtype` is bf16 on a GPU and fp32 on a CPU, `how` are fields of Loading.

    Raises CheckpointError when it does not load.
    """
    dtype = dtype or (torch.bfloat16 if device.startswith("cuda") else torch.float32)
    network = load_comparing_model(path, (0, 0), dtype=dtype, **how).to(device).network
    if device == "cpu":
        use_onednn(network)
        keep_freed_memory()
    return network
