"""How questions of each kind are asked, and how their answers are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Generic, TypeVar

from rayrm.client.replies import Answered, BleurtReply, PairsReply, RewardsReply, no_reply
from rayrm.client.values import Comparison, Pair, Prompt, Query, Reference, Reward

QuestionT = TypeVar("QuestionT")
AnswerT = TypeVar("AnswerT", bound=Reward | Comparison)


class Asking(Generic[QuestionT, AnswerT]):
    """A route: each question has a list of answers."""

    path: ClassVar[str]
    kind: ClassVar[type[Answered]]
    """What its replies are."""

    def body(self, questions: Sequence[QuestionT]) -> dict[str, Any]:
        """What is sent."""
        raise NotImplementedError

    def num_items(self, question: QuestionT) -> int:
        """How many answers a question has."""
        raise NotImplementedError

    def listed(self, reply: Any) -> list[list[AnswerT]]:
        """The answers of a reply."""
        raise NotImplementedError

    def halve(self, question: QuestionT) -> list[QuestionT]:
        """Two questions with half of its items each; nothing of a question with one item."""
        return []

    def fail(self, told: str) -> AnswerT:
        """The answer to an item that the service refuses, which says `told`."""
        raise NotImplementedError

    def read(self, reply: Answered, questions: Sequence[QuestionT], where: str) -> list[list[AnswerT]]:
        """As many answers as were asked for. Raises ServiceError for more or fewer; `where` says of whom."""
        found = self.listed(reply)
        if len(found) != len(questions):
            raise no_reply(where, f"answers to {len(found)} questions, and {len(questions)} were asked")
        for index, (answers, question) in enumerate(zip(found, questions, strict=True)):
            if len(answers) != (num := self.num_items(question)):
                raise no_reply(where, f"{len(answers)} answers to question {index}, which has {num} items")
        return found


class AskRewards(Asking[Query, Reward]):
    """Rewards of completions; `outputs` as `AsyncRewardClient.rewards` says."""

    path = "/v1/rewards"
    kind = RewardsReply

    def __init__(self, outputs: Sequence[str]) -> None:
        self.outputs = list(outputs)

    def body(self, questions: Sequence[Query]) -> dict[str, Any]:
        """What is sent."""
        items = [
            {
                "prompt": _prompt(query.prompt),
                "completions": list(query.completions),
                "lang": query.lang,
                "tools": None if query.tools is None else list(query.tools),
            }
            for query in questions
        ]
        return {"items": items, "outputs": self.outputs}

    def num_items(self, question: Query) -> int:
        """How many completions it has."""
        return len(question.completions)

    def halve(self, question: Query) -> list[Query]:
        """Each half of its completions."""
        return [question._replace(completions=texts) for texts in _halves(question.completions)]

    def fail(self, told: str) -> Reward:
        """No reward."""
        return Reward(None, "error", told, 0)

    def listed(self, reply: RewardsReply) -> list[list[Reward]]:
        """The rewards of a reply."""
        return [
            [Reward(c.reward, c.status, c.detail, c.num_tokens, c.calibrated, c.ratings) for c in item.completions]
            for item in reply.items
        ]


class AskLikeness(Asking[Reference, Reward]):
    """Scores of candidates by a model that compares them with a reference."""

    path = "/v1/bleurt"
    kind = BleurtReply

    def body(self, questions: Sequence[Reference]) -> dict[str, Any]:
        """What is sent."""
        return {"items": [{**question._asdict(), "candidates": list(question.candidates)} for question in questions]}

    def num_items(self, question: Reference) -> int:
        """How many candidates it has."""
        return len(question.candidates)

    def halve(self, question: Reference) -> list[Reference]:
        """Each half of its candidates."""
        return [question._replace(candidates=texts) for texts in _halves(question.candidates)]

    def fail(self, told: str) -> Reward:
        """No score."""
        return Reward(None, "error", told, 0)

    def listed(self, reply: BleurtReply) -> list[list[Reward]]:
        """The scores of a reply."""
        return [[Reward(c.score, c.status, c.detail, c.num_tokens) for c in item] for item in reply.items]


class AskPairs(Asking[Pair, Comparison]):
    """Which of two completions is better."""

    path = "/v1/rewards/pairs"
    kind = PairsReply

    def body(self, questions: Sequence[Pair]) -> dict[str, Any]:
        """What is sent."""
        return {"pairs": [{**pair._asdict(), "prompt": _prompt(pair.prompt)} for pair in questions]}

    def num_items(self, question: Pair) -> int:
        """One."""
        return 1

    def fail(self, told: str) -> Comparison:
        """No comparison."""
        return Comparison(None, None, "error", told)

    def listed(self, reply: PairsReply) -> list[list[Comparison]]:
        """The comparisons of a reply."""
        return [[Comparison(pair.better, pair.probability, pair.status, pair.detail)] for pair in reply.pairs]


def _halves(texts: Sequence[str]) -> list[Sequence[str]]:
    half = len(texts) // 2
    return [texts[:half], texts[half:]] if half else []


def _prompt(prompt: Prompt) -> Any:
    return prompt if isinstance(prompt, str) else list(prompt)
