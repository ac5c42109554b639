"""Readouts: where a reward model is read, and how what it gives there becomes a reward.

A checkpoint's mark holds its readout, so that scoring and serving read it as training did.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import Field, TypeAdapter

from rayrm.config import Config
from rayrm.errors import CheckpointError, ConfigError
from rayrm.rows import Message

if TYPE_CHECKING:
    from rayrm.models.rendering import Renderer
    from rayrm.models.reward_model import NewHead, RewardModel

Outputs = Sequence[Sequence[float]]
"""What a model gave at each token that was read, [reads][outputs]."""


class Encoded(NamedTuple):
    """Token ids of a conversation, and where it is read."""

    ids: list[int]
    """Empty where there is nothing to read."""
    reads: list[int]
    """Positions in `ids`."""
    status: str
    """`ok`, `truncated`, `overlength` or `empty`."""
    num_masked: int = 0
    """How many of the first ids no other attends to."""


class _Decoder(Config):
    """A readout of a decoder with a linear head."""

    @property
    def num_outputs(self) -> int:
        """Outputs of the head."""
        return 1

    def load(self, path: str, tokenizer: Any, *, new_head: NewHead | None = None, **settings: Any) -> RewardModel:
        """`load_reward_model` with as many outputs as this readout reads."""
        from rayrm.models.reward_model import load_reward_model

        return load_reward_model(path, num_outputs=self.num_outputs, new_head=new_head, **settings)

    def encode(self, renderer: Renderer, prompt: Sequence[Message], completion: str) -> Encoded:
        """A prompt with a completion, read at the token that ends the assistant's turn."""
        if not completion.strip():
            return Encoded([], [], "empty")
        rendered = renderer.pair_ids(prompt, completion)
        masked = renderer.num_masked(rendered.ids)
        return Encoded(rendered.ids, [len(rendered.ids) - 1], rendered.status, masked)


class LastToken(_Decoder):
    """One number at the last token, which is the reward."""

    type: Literal["last_token"] = "last_token"
    """Tag of the readout."""

    def reward(self, outputs: Outputs) -> float:
        """The reward of a completion."""
        return outputs[0][0]


class Whole(_Decoder):
    """The one number that a model with code of its own gives for a conversation."""

    type: Literal["whole"] = "whole"
    """Tag of the readout."""
    last_token: int | None = None
    """Token at which the model wants to be read, put behind a conversation that does not end with it."""

    def load(self, path: str, tokenizer: Any, *, new_head: NewHead | None = None, **settings: Any) -> Any:
        """`load_whole_model`; there is no head to draw."""
        from rayrm.models.whole import load_whole_model

        return load_whole_model(path, **settings)

    def encode(self, renderer: Renderer, prompt: Sequence[Message], completion: str) -> Encoded:
        """A prompt with a completion, read where the model's own code does."""
        found = super().encode(renderer, prompt, completion)
        if not found.ids or self.last_token in (None, found.ids[-1]):
            return found
        return found._replace(ids=[*found.ids, self.last_token], reads=[len(found.ids)])

    def reward(self, outputs: Outputs) -> float:
        """The reward of a completion."""
        return outputs[0][0]


class Ratings(_Decoder):
    """A number for each rating at the last token; the reward is their weighted sum."""

    type: Literal["ratings"] = "ratings"
    """Tag of the readout."""
    names: tuple[str, ...]
    """Names of the ratings, in the order of the outputs."""
    weights: tuple[float, ...]
    """Weight of each rating in the reward."""
    means: tuple[float, ...]
    """What an output of 0 stands for."""
    stds: tuple[float, ...]
    """What an output of 1 stands for, less the mean."""
    is_logit: bool
    """Whether σ(output) is the rating; means and stds are then 0 and 1."""

    @property
    def num_outputs(self) -> int:
        """One a rating."""
        return len(self.names)

    def ratings(self, outputs: Outputs) -> dict[str, float]:
        """Each rating by its name, on the scale of the rows that were learned from."""
        values = [sigmoid(value) for value in outputs[0]] if self.is_logit else outputs[0]
        scales = zip(self.names, values, self.means, self.stds, strict=True)
        return {name: mean + std * value for name, value, mean, std in scales}

    def reward(self, outputs: Outputs) -> float:
        """The reward of a completion."""
        return sum(w * value for w, value in zip(self.weights, self.ratings(outputs).values(), strict=True))


class Steps(_Decoder):
    """A logit at the end of each step of a completion; the reward makes one number of their σ."""

    type: Literal["steps"] = "steps"
    """Tag of the readout."""
    separator: str = Field("\n\n", min_length=1)
    """Text between two steps; it also follows the last one, and a step is read at its last token."""
    aggregate: Literal["mean", "min", "product", "last"] = "mean"
    """How the probabilities of the steps become a reward between 0 and 1."""

    def encode(self, renderer: Renderer, prompt: Sequence[Message], completion: str) -> Encoded:
        """A prompt with the steps of a completion, each read at its last token."""
        return self.encode_steps(renderer, prompt, [step for step in completion.split(self.separator) if step.strip()])

    def encode_steps(self, renderer: Renderer, prompt: Sequence[Message], steps: Sequence[str]) -> Encoded:
        """A prompt with steps; the turn is not ended behind them."""
        if not steps:
            return Encoded([], [], "empty")
        texts = [step + self.separator for step in steps]
        parts = renderer.tokenizer(texts, add_special_tokens=False)["input_ids"]
        rendered = renderer.join_ids(renderer.prompt_ids(prompt), [token for part in parts for token in part])
        if not rendered.ids:
            return Encoded([], [], rendered.status)
        reads, position = [], rendered.num_prompt - 1
        for part in parts:
            position += len(part)
            reads.append(position)
        return Encoded(rendered.ids, reads, rendered.status, renderer.num_masked(rendered.ids))

    def reward(self, outputs: Outputs) -> float:
        """The reward of a completion."""
        steps = [sigmoid(logit) for (logit,) in outputs]
        return {"mean": sum(steps) / len(steps), "min": min(steps), "product": math.prod(steps), "last": steps[-1]}[
            self.aggregate
        ]


class Gated(_Decoder):
    """The scores of several objectives at the last token, weighed by a gate that reads the end of the prompt."""

    type: Literal["gated"] = "gated"
    """Tag of the readout."""
    names: tuple[str, ...]
    """Names of the objectives, in the order of the scores."""

    @property
    def num_outputs(self) -> int:
        """The reward, the scores and their weights."""
        return 1 + 2 * len(self.names)

    def load(self, path: str, tokenizer: Any, *, new_head: NewHead | None = None, **settings: Any) -> RewardModel:
        """`load_gated_model`; there is no head to draw."""
        from rayrm.models.reward_model import load_gated_model

        return load_gated_model(path, self.names, **settings)

    def encode(self, renderer: Renderer, prompt: Sequence[Message], completion: str) -> Encoded:
        """A prompt with a completion, read at the end of the prompt's last turn and of the assistant's."""
        if not completion.strip():
            return Encoded([], [], "empty")
        rendered = renderer.pair_ids(prompt, completion)
        end = max(0, rendered.num_prompt - 1 - renderer.header_length(prompt))
        masked = renderer.num_masked(rendered.ids)
        return Encoded(rendered.ids, [end, len(rendered.ids) - 1], rendered.status, masked)

    def ratings(self, outputs: Outputs) -> dict[str, float]:
        """The score of each objective by its name."""
        return dict(zip(self.names, outputs[0][1:], strict=False))

    def reward(self, outputs: Outputs) -> float:
        """The reward of a completion."""
        return outputs[0][0]


class Comparison(Config):
    """Two completions in one prompt; what is read is log p of the word for each, as the answer's first token."""

    type: Literal["comparison"] = "comparison"
    """Tag of the readout."""
    words: tuple[str, str] = ("A", "B")
    """The words for the first and the second completion; one token each."""

    @property
    def num_outputs(self) -> int:
        """One a word."""
        return 2

    def load(self, path: str, tokenizer: Any, *, new_head: NewHead | None = None, **settings: Any) -> RewardModel:
        """`load_comparing_model` with the tokens of the words; there is no head to draw."""
        from rayrm.models.reward_model import load_comparing_model

        return load_comparing_model(path, self.tokens(tokenizer), **settings)

    def tokens(self, tokenizer: Any) -> tuple[int, int]:
        """Ids of the two words. Raises CheckpointError unless each is one token, and not the same one."""
        first, second = (tokenizer(word, add_special_tokens=False)["input_ids"] for word in self.words)
        if len(first) != 1 or len(second) != 1 or first == second:
            raise CheckpointError(
                f"The tokenizer writes the words {self.words[0]!r} and {self.words[1]!r} as {first} and {second}; a "
                "model that compares needs two words of one token each."
            )
        return first[0], second[0]

    def encode_both(
        self, renderer: Renderer, prompt: Sequence[Message], first: str, second: str
    ) -> tuple[Encoded, ...]:
        """The question with `first` as A and `second` as B, and the other way round; both or neither have ids."""
        if not first.strip() or not second.strip():
            return (Encoded([], [], "empty"),) * 2
        orders = [self._encode(renderer, prompt, *order) for order in ((first, second), (second, first))]
        return tuple(orders) if all(order.ids for order in orders) else (Encoded([], [], "overlength"),) * 2

    def _encode(self, renderer: Renderer, prompt: Sequence[Message], first: str, second: str) -> Encoded:
        check_header(renderer)
        turns = "".join(f"\n<turn> {message['role']}\n {message['content']}" for message in prompt)
        question = f"[CONTEXT] \n{turns}\n [RESPONSE A] {first} [RESPONSE B] {second} \n"
        ids = renderer.prompt_ids([{"role": "user", "content": question}])
        if renderer.max_length is not None and len(ids) > renderer.max_length:
            return Encoded([], [], "overlength")
        return Encoded(ids, [len(ids) - 1], "ok", renderer.num_masked(ids))

    def gap(self, forward: Outputs, backward: Outputs) -> float:
        """log p − log(1 − p), where p is the mean, over both orders, of the first completion's share of the words."""
        gaps = forward[0][0] - forward[0][1], backward[0][1] - backward[0][0]
        sure, unsure = ([log_sigmoid(sign * gap) for gap in gaps] for sign in (1, -1))
        return log_sum(*sure) - log_sum(*unsure)


def check_header(renderer: Renderer) -> None:
    """Raise ConfigError unless the chat template ends a question with the header of an answer.

    Without it, the next token is not the first of an answer.
    """
    question: list[Message] = [{"role": "user", "content": "a"}]
    if renderer.template is None or renderer.prompt_text(question) == renderer.turn_text(question):
        raise ConfigError(
            "The chat template writes no header for the assistant's answer, where a comparison is read; set "
            "chat_template to one that does."
        )


def log_sigmoid(value: float) -> float:
    """log σ(value), finite for any value."""
    return min(value, 0.0) - math.log1p(math.exp(-abs(value)))


def log_sum(first: float, second: float) -> float:
    """log(exp(first) + exp(second))."""
    return max(first, second) + math.log1p(math.exp(-abs(first - second)))


def sigmoid(value: float) -> float:
    """σ(value), without overflow."""
    return (1 + math.tanh(value / 2)) / 2


Readout = LastToken | Whole | Ratings | Steps | Gated | Comparison
"""How any reward model is read, told apart by `type`."""
_ADAPTER: TypeAdapter[Readout] = TypeAdapter(Annotated[Readout, Field(discriminator="type")])


def parse_readout(stored: dict[str, Any]) -> Readout:
    """The readout that a checkpoint's mark holds."""
    return _ADAPTER.validate_python(stored)
