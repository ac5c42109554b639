"""The temperature at which one policy is as undecided as another: sharper samples are better ones, whatever was learned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rayrm import cluster, files
from rayrm.config import find_told
from rayrm.errors import EvaluationError
from rayrm.rows import Prompt
from rayrm.seeds import seed_of
from rayrm.shards import read_table

if TYPE_CHECKING:
    from rayrm.evaluation.translation.policies import Policy

NUM_PROMPTS = 512
"""Prompts that an entropy is measured on, drawn by a hash; the same ones for every policy."""
LOWEST, HIGHEST = 0.05, 16.0
"""The lowest and the highest temperature that are tried."""
NUM_HALVINGS = 9


def find_temperature(measure: Callable[[float], float], wanted: float, start: float, what: str) -> float:
    """The temperature whose entropy, as `measure` gives it, is nearest to `wanted`; `what` is the policy in messages.

    Entropy grows with the temperature: from `start` the temperature is doubled, or halved, until `wanted` lies between
    two of them, and then sought there. Raises EvaluationError when it does not down to `LOWEST` or up to `HIGHEST`.
    """
    entropy = measure(start)
    grows = entropy < wanted
    factor, last = (2.0, HIGHEST) if grows else (0.5, LOWEST)
    near = far = start
    while (entropy < wanted) == grows and entropy != wanted:
        if far == last:
            raise EvaluationError(
                f"{what} has an entropy of {entropy:.3f} nats a token at temperature {far:g}, the "
                f"{'highest' if grows else 'lowest'} that is tried, and {wanted:.3f} are wanted; set entropy_of to a "
                f"policy that is {'more' if grows else 'less'} decided, or leave it out, into another output."
            )
        near, far = far, min(far * factor, last) if grows else max(far * factor, last)
        entropy = measure(far)
    low, high = sorted((near, far))
    for _ in range(NUM_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if measure(middle) < wanted else (low, middle)
    return (low + high) / 2


def match_temperature(policy: Policy, other: Policy, prompts: str, output: str) -> dict[str, float]:
    """`temperature` at which `policy` has the `entropy` of `other`, `wanted`, in nats a token; measured once.

    Both are means of −log p over the tokens that each draws at its own temperature for the same prompts of the Prompt
    rows at `prompts`; the search starts at the policy's own temperature. What was found is kept in the folder `output`.
    Raises what the policies raise when they load, and EvaluationError when there is no such temperature.
    """
    where = files.join(output, "temperature.json")
    if not files.exists(where):
        rows = read_table(prompts).select(list(Prompt.columns)).to_pylist()
        rows = sorted(rows, key=lambda row: seed_of(0, row["id"], row["lang"]))[:NUM_PROMPTS]
        wanted = _measure(other, rows, lambda meter: meter(other.temperature))
        what = f"Policy '{policy.name}'"
        found = _measure(policy, rows, lambda meter: find_temperature(meter, wanted, policy.temperature, what))
        entropy = _measure(policy, rows, lambda meter: meter(found))
        files.write_json(where, {"temperature": found, "entropy": entropy, "wanted": wanted})
    kept: dict[str, float] = files.read_json(where)
    return kept


def _measure(policy: Policy, rows: Sequence[dict[str, Any]], use: Callable[[Callable[[float], float]], float]) -> float:
    """What `use` makes of the policy's entropy by temperature, while an actor holds the policy."""
    import ray

    workers = policy.workers
    cluster.require(1, workers.num_cpus, workers.num_gpus, f"Policy '{policy.name}'")
    meter_class: Any = ray.remote(num_cpus=workers.num_cpus, num_gpus=workers.num_gpus)(EntropyMeter)
    actor = meter_class.remote(policy, list(rows))
    try:
        return use(lambda temperature: float(ray.get(actor.measure.remote(temperature))))
    except ray.exceptions.RayError as error:
        raise find_told(error) or error from None
    finally:
        ray.kill(actor)


class EntropyMeter:
    """A policy with its prompts. Raises as `CandidateSampler` does; rows that it drops count nowhere."""

    def __init__(self, policy: Policy, rows: list[dict[str, Any]]) -> None:
        from rayrm.models.folders import load_tokenizer
        from rayrm.models.rendering import Renderer, load_template
        from rayrm.sampling import load_engine, prompt_ids

        self.policy = policy
        self.engine = load_engine(policy, with_logprobs=True)
        tokenizer = load_tokenizer(policy.model, policy.engine.trust_remote_code)
        renderer = Renderer(tokenizer, load_template(policy.chat_template, tokenizer, policy.model))
        found = [prompt_ids(row, renderer, policy, self.engine)[0] for row in rows]
        self.prompts = [ids for ids in found if ids is not None]
        self.seeds = [seed_of(policy.seed, str(index)) for index in range(len(self.prompts))]

    def measure(self, temperature: float) -> float:
        """Mean −log p of the drawn tokens, in nats."""
        decoding = self.policy.model_copy(update={"temperature": temperature, "num_candidates": 1, "stop": []})
        drawn = self.engine.draw(self.prompts, self.seeds, decoding)
        return -float(np.mean([logprob for (one,) in drawn for logprob in one.logprobs]))
