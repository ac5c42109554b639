"""One renderer from messages to token ids, shared by training, sampling, scoring and serving.

With a chat template, a prompt is the template with its generation header, and a conversation ends with the token
that ends the assistant's turn; white space that a template writes behind it is cut, so the last token is always the
same. With `chat_template: none`, the contents are joined by line feeds, one space stands before the completion, and
the tokenizer's end-of-sequence token behind it.

That is how models are trained here. Those of other trainers have read texts in other ways, which Rules tells.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from importlib import resources
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rayrm.errors import CheckpointError, ConfigError
from rayrm.rows import Message

NO_TEMPLATE = "none"
Truncation = Literal["prompt_left", "left", "right", "none"]
BosRule = Literal["one", "masked", "doubled"]


class Rules(NamedTuple):
    """How conversations are cut and how they begin."""

    truncation: Truncation = "prompt_left"
    """Where a conversation over `max_length` is cut. prompt_left cuts the prompt's left and keeps the completion whole;
    prompt and completion are tokenized apart. left, right and none take the conversation as one text, with what the
    template and the tokenizer write behind it, as transformers' own pipelines do: left and right cut it at that side,
    and with none it is `overlength`."""
    bos: BosRule = "one"
    """What becomes of a second BOS, where the tokenizer puts one before a text whose template has written one: one
    leaves it out, doubled keeps both, and masked keeps both and hides the first from the model's attention."""


class Rendered(NamedTuple):
    """Token ids of a prompt with a completion."""

    ids: list[int]
    num_prompt: int
    """How many of the ids are the prompt's, its generation header included."""
    status: str
    """`ok`, `truncated` (tokens were cut from the prompt's left) or `overlength` (the completion alone is too long)."""


def load_template(name: str | None, tokenizer: Any, where: str) -> str | None:
    """The Jinja text of a chat template; None for `none`.

    `name` is a template of this package (case, - and _ make no difference), a `.jinja` file, `none`, or null for the
    tokenizer's own. Raises ConfigError for a name that is nowhere, and CheckpointError when the tokenizer at `where` has no template of its own.
    """
    if name == NO_TEMPLATE:
        return None
    if name is None:
        if tokenizer.chat_template is None:
            raise CheckpointError(
                f"The tokenizer at '{where}' has no chat template; set chat_template to a name, a .jinja file, or 'none'."
            )
        return str(tokenizer.chat_template)
    packaged = resources.files("rayrm") / "templates" / f"{name.lower().replace('_', '-')}.jinja"
    if packaged.is_file():
        return packaged.read_text(encoding="utf-8")
    if name.endswith(".jinja") and Path(name).is_file():
        return Path(name).read_text(encoding="utf-8")
    known = sorted(p.name.removesuffix(".jinja") for p in (resources.files("rayrm") / "templates").iterdir())
    raise ConfigError(f"chat_template '{name}' is no .jinja file that is there, and none of {', '.join(known)}, none.")


class Renderer:
    """Messages → token ids for one tokenizer and one template.

    `max_length` bounds prompt and completion together, in tokens; None for no bound.
    """

    def __init__(
        self, tokenizer: Any, template: str | None, max_length: int | None = None, rules: Rules | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.max_length = max_length
        self.rules = rules or Rules()
        self.tools: Any = None
        self.added = _added(tokenizer)
        self.bos = tokenizer.bos_token_id if self.added[0][:1] == [tokenizer.bos_token_id] else None

    def with_tools(self, tools: str | None) -> Renderer:
        """This renderer with tool schemas, a JSON list, for the template to show; itself without any.

        Raises JSONDecodeError for other text, and ConfigError for `chat_template: none`, which has no place for them.
        """
        if tools is None:
            return self
        if self.template is None:
            raise ConfigError("A row has tools, and chat_template 'none' has no place for them; set a chat template.")
        view = copy.copy(self)
        view.tools = json.loads(tools)
        if not isinstance(view.tools, list) or not all(isinstance(tool, dict) for tool in view.tools):
            raise json.JSONDecodeError("no list of tools", tools, 0)
        return view

    def prompt_text(self, prompt: Sequence[Message]) -> str:
        """The text that a policy continues."""
        if self.template is None:
            return "\n".join(message["content"] for message in prompt)
        return str(self._apply(list(prompt), add_generation_prompt=True))

    def check(self) -> None:
        """Raise ConfigError when the template ends a conversation with the header of another answer.

        The last token would then be the header's, whatever was answered.
        """
        if self.template is None:
            return
        question: Message = {"role": "user", "content": "a"}
        answered: list[Message] = [question, {"role": "assistant", "content": "b"}]
        if not self.turn_text([*answered, question]).startswith(self.turn_text(answered).rstrip()):
            raise ConfigError(
                "The chat template writes something behind an answer that is gone when the conversation goes on, such "
                "as the header of another answer; set chat_template to one that does not."
            )

    def turn_text(self, prompt: Sequence[Message]) -> str:
        """The prompt's turns, without the header of an answer."""
        return self.prompt_text(prompt) if self.template is None else self._apply(list(prompt), False)

    def header_length(self, prompt: Sequence[Message]) -> int:
        """Tokens of the answer's header: those of the prompt behind the token that ends its last turn."""
        head, turns = self.prompt_ids(prompt), self.encode(self.turn_text(prompt).rstrip())
        return len(head) - len(turns) if head[: len(turns)] == turns else 0

    def completion_text(self, prompt: Sequence[Message], completion: str) -> str:
        """What stands behind `prompt_text` in a whole conversation, end token included.

        Raises ConfigError when the template renders the prompt differently once an answer follows.
        """
        if self.template is None:
            return f" {completion}{self.tokenizer.eos_token}"
        answer: Message = {"role": "assistant", "content": completion}
        head, whole = self.prompt_text(prompt), self._apply([*prompt, answer], add_generation_prompt=False)
        if not whole.startswith(head):
            raise ConfigError("The chat template changes the prompt when an answer follows; it cannot be scored.")
        return str(whole[len(head) :]).rstrip()

    def encode(self, text: str) -> list[int]:
        """Token ids of rendered text, with exactly one BOS where the tokenizer has one and the rules say so."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for many texts in one call of the tokenizer."""
        rows = [list(ids) for ids in self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
        return rows if self.bos is None else [[self.bos, *self._without_bos(ids)] for ids in rows]

    def _without_bos(self, ids: list[int]) -> list[int]:
        """Ids of a text without the BOS that stand before the tokenizer's own, unless the rules keep them."""
        if self.bos is None or self.rules.bos != "one":
            return ids
        # A template may write one, or, with one in the text that it is given, two.
        return ids[_leading(ids, self.bos) :]

    def num_masked(self, ids: list[int]) -> int:
        """How many of the first ids the model does not attend to."""
        bos = self.tokenizer.bos_token_id
        return int(self.rules.bos == "masked" and bos is not None and ids[:2] == [bos, bos])

    def prompt_ids(self, prompt: Sequence[Message]) -> list[int]:
        """Token ids that a policy continues."""
        return self.encode(self.prompt_text(prompt))

    def encoder_ids(self, prompt: Sequence[Message]) -> list[int]:
        """Token ids that the encoder of a policy reads, with those that its tokenizer adds."""
        return list(self.tokenizer(self.prompt_text(prompt))["input_ids"])

    def pair_ids(self, prompt: Sequence[Message], completion: str) -> Rendered:
        """Token ids of a prompt with a completion, within `max_length`.

        With `prompt_left`, the prompt's ids are the same for every completion, so that candidates can share them.
        """
        if self.rules.truncation != "prompt_left":
            return self._whole_ids(prompt, completion)
        head = self.prompt_ids(prompt)
        tail = self.tokenizer(self.completion_text(prompt, completion), add_special_tokens=False)["input_ids"]
        return self.join_ids(head, list(tail))

    def join_ids(self, head: list[int], tail: list[int]) -> Rendered:
        """Prompt and completion ids within `max_length`, cut at the prompt's left."""
        excess = len(head) + len(tail) - self.max_length if self.max_length is not None else 0
        if excess <= 0:
            return Rendered(head + tail, len(head), "ok")
        first = min(_leading(head, self.tokenizer.bos_token_id), 1 if self.rules.bos == "one" else 2)
        if excess > len(head) - first:
            return Rendered([], 0, "overlength")
        head = head[:first] + head[first + excess :]
        return Rendered(head + tail, len(head), "truncated")

    def _whole_ids(self, prompt: Sequence[Message], completion: str) -> Rendered:
        if self.template is None:
            text = self.prompt_text(prompt) + self.completion_text(prompt, completion)
        else:
            text = self.turn_text([*prompt, {"role": "assistant", "content": completion}])
        texts = [text, self.prompt_text(prompt)]
        whole, head = map(self._without_bos, self.tokenizer(texts, add_special_tokens=False)["input_ids"])
        before, behind = self.added
        eos = self.tokenizer.eos_token_id
        if self.tokenizer.chat_template is None and eos is not None and eos not in (*behind, *whole[-1:]):
            # RewardBench makes tokenizers that know no turns add one.
            behind = [eos]
        alike = takewhile(lambda pair: pair[0] == pair[1], zip(head, whole, strict=False))
        num_prompt = len(before) + len(list(alike))
        length = len(before) + len(whole) + len(behind)
        excess = 0 if self.max_length is None else max(0, length - self.max_length)
        if excess and self.rules.truncation == "none":
            return Rendered([], 0, "overlength")
        is_left = self.rules.truncation == "left"
        whole = whole[excess:] if is_left else whole[: len(whole) - excess]
        ids = [*before, *whole, *behind]
        num_prompt = max(len(before), num_prompt - excess) if is_left else min(num_prompt, len(ids))
        return Rendered(ids, num_prompt, "truncated" if excess else "ok")

    def fingerprint(self) -> dict[str, Any]:
        """What must be equal for two renderers to read the same reward from the same text."""
        template = hashlib.blake2b((self.template or NO_TEMPLATE).encode(), digest_size=8).hexdigest()
        # Marks from before there were rules hold no word on BOS.
        bos = {} if self.rules.bos == "one" else {"bos": self.rules.bos}
        return {
            **bos,
            "template": template,
            "bos_token_id": self.bos,
            "eos_token_id": self.tokenizer.eos_token_id,
            "pad_token_id": self.tokenizer.pad_token_id,
            "max_length": self.max_length,
            "truncation": self.rules.truncation,
            "pooling": "last_attended",
        }

    def _apply(self, messages: list[Message], add_generation_prompt: bool) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.template,
                tools=self.tools,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        )


def _leading(ids: Sequence[int], token: int) -> int:
    """How many times `ids` begin with `token`."""
    return next((index for index, found in enumerate(ids) if found != token), len(ids))


def _added(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer puts before and behind a text."""
    bare, whole = tokenizer("a", add_special_tokens=False)["input_ids"], list(tokenizer("a")["input_ids"])
    starts = range(len(whole) - len(bare) + 1)
    first = next((i for i in starts if whole[i : i + len(bare)] == list(bare)), 0)
    return whole[:first], whole[first + len(bare) :]
