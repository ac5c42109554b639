"""Published models that see two answers at once, as their authors and RewardBench ask them.

Each is asked in both orders. What it gives becomes one number, the gap, which changes its sign when the answers change
places; σ(gap) is the chance that the first is the better one.

- `pair_rm`, llm-blender/PairRM-hf (arXiv 2306.02561): a DeBERTa encoder, read by a head at the marks of the source and of
  an answer; the gap is logit(A, B) − logit(B, A). `better_pair_rm`, mightbe/Better-PairRM, has the same network, writes
  turns in another way and cuts texts at other places.
- `slic`, RLHFlow/pair-preference-model-LLaMA3-8B (arXiv 2305.10425 and 2405.07863): a language model whose first token
  says A or B; the gap is the log-odds of P, the mean over both orders of the share of the first answer's letter.
- `steam_shp`, stanfordnlp/SteamSHP-flan-t5-xl and -large: an encoder and a decoder, read in the same way.

The formats follow public model cards and were tried on random networks only, not on the published weights. How
SteamSHP's own evaluation writes several turns and cuts long posts is not published; here turns are joined by spaces, and
a post loses its beginning.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import nn
from transformers import AutoModelForSeq2SeqLM
from transformers.models.deberta_v2.modeling_deberta_v2 import DebertaV2Model, DebertaV2PreTrainedModel

from rayrm.batching import token_batches
from rayrm.errors import CheckpointError
from rayrm.models.cpu import keep_freed_memory, use_onednn
from rayrm.models.folders import load_tokenizer
from rayrm.models.inputs import pad_right, padded_batch
from rayrm.models.loading import Loading, load_network, load_padding_tokenizer
from rayrm.models.readouts import Comparison
from rayrm.models.reward_model import load_comparing_model
from rayrm.rows import Message

PairFormat = Literal["pair_rm", "better_pair_rm", "slic", "steam_shp"]
MARKS = ("<|source|>", "<|candidate1|>", "<|candidate2|>")
"""Tokens before the source and the answers in PairRM's input."""
SOURCE_TASK = "Finish the following coversation in each i-th turn by filling in <Response i> with your response."
"""What PairRM's sources begin with, in the spelling that it was trained on."""
NAMES = {"user": "USER", "assistant": "ASSISTANT", "system": "SYSTEM MESSAGE"}
"""Who speaks in Better-PairRM's sources."""
SHP_TOKENS = 512
"""Most tokens that SteamSHP was trained on."""
Reward = tuple[float | None, str]
"""A gap and `ok` or `truncated`; or None and `empty`, `overlength`, `nan`, or `error` where the template refuses it."""


class Question(NamedTuple):
    """A prompt and two answers."""

    prompt: Sequence[Message]
    first: str
    second: str


class Encoded(NamedTuple):
    """Token ids of a question in one order."""

    ids: list[int]
    """Empty where there is nothing to read."""
    status: str
    reads: tuple[int, ...] = ()
    """Places that are read, for a model that is not read at the end."""


class PairModel(Protocol):
    """A loaded model of one of the formats."""

    def encode(self, question: Question) -> Encoded:
        """A question as it stands, with its first answer as A; no answer is empty."""
        ...

    def read(self, rows: Sequence[Encoded]) -> list[list[float]]:
        """What the model gives for rows that all have ids, in one forward pass."""
        ...

    def gap(self, forward: list[float], backward: list[float]) -> float:
        """One number of what it gives in both orders."""
        ...


@torch.inference_mode()
def compare_all(model: PairModel, questions: Sequence[Question], token_budget: int = 16384) -> list[Reward]:
    """The gap of each question, in order; `token_budget` bounds the padded tokens of a forward pass."""
    encoded = [side for question in questions for side in _encode_both(model, question)]
    readable = [index for index, row in enumerate(encoded) if row.ids]
    outputs: dict[int, list[float]] = {}
    for batch in token_batches([len(encoded[index].ids) for index in readable], token_budget):
        places = [readable[index] for index in batch]
        outputs.update(zip(places, model.read([encoded[place] for place in places]), strict=True))
    found: list[Reward] = []
    for place in range(0, len(encoded), 2):
        status = next((row.status for row in encoded[place : place + 2] if row.status != "ok"), "ok")
        if place not in outputs:
            found.append((None, status))
        else:
            gap = model.gap(outputs[place], outputs[place + 1])
            found.append((gap, status) if math.isfinite(gap) else (None, "nan"))
    return found


def _encode_both(model: PairModel, question: Question) -> tuple[Encoded, Encoded]:
    """A question in both orders; both or neither have ids."""
    from jinja2 import TemplateError

    prompt, first, second = question
    if not first.strip() or not second.strip():
        return (Encoded([], "empty"),) * 2
    try:
        forward, backward = model.encode(question), model.encode(Question(prompt, second, first))
    except TemplateError:
        return (Encoded([], "error"),) * 2
    if not forward.ids or not backward.ids:
        return (Encoded([], "overlength"),) * 2
    return forward, backward


class PairRanker(DebertaV2PreTrainedModel):
    """PairRM's network: a DeBERTa encoder, and a head on two of its hidden states."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        width = config.hidden_size
        # The names are those of the published files.
        self.pretrained_model = DebertaV2Model(config)
        self.head_layer = nn.Sequential(
            nn.Dropout(0.0),
            nn.Linear(2 * width, width),
            nn.Tanh(),
            nn.Dropout(0.0),
            nn.Linear(width, getattr(config, "n_tasks", 1)),
        )
        self.post_init()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, reads: torch.Tensor) -> torch.Tensor:
        """How much better the first answer is, fp32 [rows].

        `reads` [rows, 3] are the places of the marks of the source and of both answers, counted through the batch.
        """
        hidden = self.pretrained_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        source, first, second = hidden.flatten(0, 1)[reads].unbind(1)
        scores = [self.head_layer(torch.cat([source, answer], dim=-1)) for answer in (first, second)]
        gap: torch.Tensor = (scores[0].float() - scores[1].float()).mean(-1)
        return gap


class PairRM:
    """A loaded PairRM or Better-PairRM."""

    def __init__(self, network: PairRanker, tokenizer: Any, is_better: bool) -> None:
        """Raises CheckpointError when the tokenizer lacks the marks."""
        self.network = network
        self.tokenizer = tokenizer
        self.is_better = is_better
        self.source_size, self.total = (2030, 3370) if is_better else (1224, 2048)
        self.answer_size = 670 + 3 if is_better else self.total
        known = tokenizer.get_vocab()
        if missing := [mark for mark in MARKS if mark not in known]:
            raise CheckpointError(f"The tokenizer has no token {missing[0]}, which PairRM's input is made with.")
        self.marks = [known[mark] for mark in MARKS]

    def encode(self, question: Question) -> Encoded:
        """[CLS] mark text [SEP] of the source and of both answers; the answers share what the source leaves."""
        if self.is_better:
            head, _ = self._encode(MARKS[0], self.source_size)
            body, is_cut = self._encode(_named_turns(question.prompt), self.source_size - len(head), from_left=True)
            source, texts = head + body, (question.first.strip(), question.second.strip())
        else:
            text, turn = _numbered_turns(question.prompt)
            source, is_cut = self._encode(MARKS[0] + text, self.source_size)
            texts = (turn + question.first, turn + question.second)
        room = min(self.answer_size, (self.total - len(source)) // 2)
        parts = [self._encode(mark + text, room) for mark, text in zip(MARKS[1:], texts, strict=True)]
        ids, reads = list(source), [source.index(self.marks[0])]
        for mark, (part, _) in zip(self.marks[1:], parts, strict=True):
            reads.append(len(ids) + part.index(mark))
            ids += part
        is_cut = is_cut or any(cut for _, cut in parts)
        return Encoded(ids, "truncated" if is_cut else "ok", tuple(reads))

    def read(self, rows: Sequence[Encoded]) -> list[list[float]]:
        """The logit of each row."""
        device = self.network.device
        batch = padded_batch(
            [row.ids for row in rows], [row.reads for row in rows], self.tokenizer.pad_token_id, device
        )
        return [[logit] for logit in self.network(**batch).tolist()]

    def gap(self, forward: list[float], backward: list[float]) -> float:
        """logit(A, B) − logit(B, A)."""
        return forward[0] - backward[0]

    def _encode(self, text: str, size: int, from_left: bool = False) -> tuple[list[int], bool]:
        """[CLS] text [SEP] of at most `size` tokens, and whether it was cut."""
        ids: list[int] = list(self.tokenizer(text)["input_ids"])
        excess = len(ids) - size
        if excess <= 0:
            return ids, False
        return [ids[0], *ids[1 + excess :]] if from_left else [*ids[: size - 1], ids[-1]], True


def _numbered_turns(prompt: Sequence[Message]) -> tuple[str, str]:
    """PairRM's source for a conversation, and what its answers begin with: earlier answers stand in them too."""
    users, earlier = [""], []
    for turn in prompt:
        if turn["role"] == "assistant":
            earlier.append(turn["content"])
            users.append("")
        else:
            # A system turn belongs to the user's.
            users[-1] += ("\n" if users[-1] else "") + turn["content"]
    source = "\n".join(f"USER: {text}\nAssistant: <Response {n}>" for n, text in enumerate(users, start=1))
    answers = [f"<Response {n}>: {text}\n" for n, text in enumerate(earlier, start=1)]
    return SOURCE_TASK + source, "".join(answers) + f"<Response {len(users)}>: "


def _named_turns(prompt: Sequence[Message]) -> str:
    """Better-PairRM's source for a conversation."""
    turns = [f"{NAMES.get(turn['role'], 'USER')}: {turn['content'].strip()}" for turn in prompt]
    return "\n\n".join([*turns, "ASSISTANT:"])


class Slic:
    """A loaded language model that says A or B."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        """`model` is a RewardModel that reads the letters."""
        self.model = model
        self.tokenizer = tokenizer
        self.max_length = getattr(model.network.config, "max_position_embeddings", None)

    def encode(self, question: Question) -> Encoded:
        """The question as a turn of the user, with the header of an answer and without a BOS, as its authors ask it."""
        names = ("user", "assistant")
        turns = "".join(f"\n<turn> {names[n % 2]}\n {turn['content']}" for n, turn in enumerate(question.prompt))
        text = f"[CONTEXT] \n{turns}\n [RESPONSE A] {question.first} [RESPONSE B] {question.second} \n"
        asked = [{"role": "user", "content": text}]
        whole = str(self.tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True))
        if self.tokenizer.bos_token is not None:
            whole = whole.replace(self.tokenizer.bos_token, "")
        ids: list[int] = list(self.tokenizer(whole, add_special_tokens=False)["input_ids"])
        if self.max_length is not None and len(ids) > self.max_length:
            return Encoded([], "overlength")
        return Encoded(ids, "ok")

    def read(self, rows: Sequence[Encoded]) -> list[list[float]]:
        """log p of both letters for each row."""
        device = next(self.model.parameters()).device
        ends = [[len(row.ids) - 1] for row in rows]
        batch = padded_batch([row.ids for row in rows], ends, self.tokenizer.pad_token_id, device)
        outputs, _ = self.model(**batch)
        found: list[list[float]] = outputs[:, 0].tolist()
        return found

    def gap(self, forward: list[float], backward: list[float]) -> float:
        """The log-odds of the mean of both shares."""
        return Comparison().gap([forward], [backward])


class SteamSHP:
    """A loaded SteamSHP."""

    def __init__(self, network: Any, tokenizer: Any) -> None:
        """Raises CheckpointError when A or B is no token."""
        self.network = network
        self.tokenizer = tokenizer
        self.letters = Comparison().tokens(tokenizer)

    def encode(self, question: Question) -> Encoded:
        """The post, both answers and the question, without line feeds in them; a post that is too long loses its
        beginning."""
        post = _one_line(" ".join(turn["content"] for turn in question.prompt))
        first, second = _one_line(question.first), _one_line(question.second)
        rest = f" \n\n RESPONSE A: {first}\n\n RESPONSE B: {second}\n\n Which response is better? RESPONSE"
        ids: list[int] = list(self.tokenizer(f"POST: {post}{rest}")["input_ids"])
        excess = len(ids) - SHP_TOKENS
        if excess <= 0:
            return Encoded(ids, "ok")
        start, tail = (self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("POST:", rest))
        room = SHP_TOKENS - len(start) - len(tail) - 1
        if room < 0:
            return Encoded([], "overlength")
        body = self.tokenizer(post, add_special_tokens=False)["input_ids"]
        return Encoded([*start, *body[len(body) - room :], *tail, ids[-1]], "truncated")

    def read(self, rows: Sequence[Encoded]) -> list[list[float]]:
        """log p of both letters as the first new token, for each row."""
        ids, mask = pad_right([row.ids for row in rows], self.tokenizer.pad_token_id, self.network.device)
        start = ids.new_full((len(rows), 1), self.network.config.decoder_start_token_id)
        outputs = self.network(input_ids=ids, attention_mask=mask, decoder_input_ids=start, use_cache=False)
        logs = outputs.logits[:, -1].float().log_softmax(-1)
        found: list[list[float]] = logs[:, list(self.letters)].tolist()
        return found

    def gap(self, forward: list[float], backward: list[float]) -> float:
        """The log-odds of the mean of both shares."""
        return Comparison().gap([forward], [backward])


def _one_line(text: str) -> str:
    return " ".join(text.split())


def load_pair_model(path: str, kind: PairFormat, device: str = "cpu", dtype: torch.dtype | None = None) -> PairModel:
    """The model of a format at `path`; `dtype` is bf16 on a GPU and fp32 on a CPU.

    Raises CheckpointError when it does not load, or its tokenizer lacks what the format is made with.
    """
    dtype = dtype or (torch.bfloat16 if device.startswith("cuda") else torch.float32)
    if kind == "slic":
        tokenizer = load_padding_tokenizer(path)
        model = load_comparing_model(path, Comparison().tokens(tokenizer), dtype=dtype).to(device)
        _speed_up(model.network.base_model, device)
        return Slic(model, tokenizer)
    tokenizer = load_tokenizer(path)
    if kind == "steam_shp":
        # Its layers look at their weights' type, which layers of oneDNN have none of.
        return SteamSHP(_load(path, AutoModelForSeq2SeqLM, dtype).eval().to(device), tokenizer)
    network = _load(path, PairRanker, dtype).eval().to(device)
    _speed_up(network, device)
    return PairRM(network, tokenizer, is_better=kind == "better_pair_rm")


def _speed_up(network: nn.Module, device: str) -> None:
    if device == "cpu":
        use_onednn(network)
        keep_freed_memory()


def _load(path: str, model_class: Any, dtype: torch.dtype) -> Any:
    network, loaded = load_network(path, model_class, Loading(dtype).settings())
    if missing := sorted(map(str, loaded["missing_keys"])):
        raise CheckpointError(
            f"'{path}' is no model of this format: it lacks {', '.join(missing[:3])}; name another format."
        )
    return network
