"""What looks wrong with a policy training with rewards."""

from __future__ import annotations

import numpy as np

from rayrm.evaluation.policy_run import PolicyRun, main_reward

MAX_LEFT_OUT = 0.2
"""Share of completions that are not learned from above which a run looks wrong."""
MAX_TRUNCATED = 0.02
"""Share of completions that a scorer did not read whole, or whose prompt or reference, above which a run looks wrong."""
MAX_LENGTHENING = 1.5
"""Factor between the lengths at the start and at the end above which, or below whose inverse, it looks wrong."""
MAX_THINNING = 1 / 3
"""Likewise for the share of distinct pairs of words that is lost."""
MAX_SHARPENING = 0.1
"""Share of the entropy of the start below which it looks wrong."""
DRIFT_FRACTION = 0.5
"""Share of `max_drift` above which it looks wrong."""
MIN_KL = -0.05
"""Nats a completion, over `KL_RECORDS` records, below which a divergence is negative by more than its noise."""
KL_RECORDS = 5


def find_warnings(run: PolicyRun) -> dict[str, str]:
    """What looks wrong, in plain words, by the name of what it is about: no name where all is well."""
    found = {
        "distinct_2": _lost_diversity(run),
        "completion_length": _changed_length(run),
        "drift": _drifted(run),
        "entropy": _sharpened(run),
        "left_out": _left_out(run),
        "truncated": _truncated(run),
        "filters": _filtered(run),
        "kl": _negative_divergence(run),
    }
    return {name: text for name, text in found.items() if text is not None}


def _lost_diversity(run: PolicyRun) -> str | None:
    start, end = run.series("distinct_2").start, run.series("distinct_2").end
    if not _is_rewarded(run) or not start or end is None or end >= (1 - MAX_THINNING) * start:
        return None
    return (
        f"The {main_reward(run)[0]} reward rose while the share of distinct pairs of words fell from {start:.3f} to "
        f"{end:.3f}: the policy repeats itself where the scorers like it. Read the examples; raise kl.coefficient, or add "
        "a scorer that dislikes repetition."
    )


def _changed_length(run: PolicyRun) -> str | None:
    start, end = run.series("completion_length").start, run.series("completion_length").end
    if not _is_rewarded(run) or not start or end is None or 1 / MAX_LENGTHENING <= end / start <= MAX_LENGTHENING:
        return None
    return (
        f"The {main_reward(run)[0]} reward rose while completions went from {start:.1f} to {end:.1f} tokens: the scorers "
        f"may reward {'longer' if end > start else 'shorter'} texts as such. Compare the rewards by length; set a rule of "
        "length, add the scorer `length`, or take the mean in the place of the sum for parts that are summed over "
        "sentences."
    )


def _is_rewarded(run: PolicyRun) -> bool:
    _, start, end = main_reward(run)
    return start is not None and end is not None and end > start


def _drifted(run: PolicyRun) -> str | None:
    limit, drift = run.series("drift/limit").last, run.series("drift").values
    if not limit or not len(drift) or drift.max() <= DRIFT_FRACTION * limit:
        return None
    return (
        f"Sampler and learner differed by up to {drift.max():.2g} nats a token, more than half of max_drift "
        f"{limit:g}: the policy learns from probabilities that are not quite its own. In bf16 some 0.01 are usual; else "
        "look at the filters, the sampler's number format and its weights."
    )


def _sharpened(run: PolicyRun) -> str | None:
    start, end = run.series("entropy").start, run.series("entropy").end
    if not start or end is None or end >= MAX_SHARPENING * start:
        return None
    return (
        f"The entropy fell from {start:.3g} to {end:.3g} nats a token: the policy hardly tries anything else any more. "
        "Raise kl.coefficient or entropy_coefficient, or lower lr."
    )


def _left_out(run: PolicyRun) -> str | None:
    series = run.series("left_out_fraction")
    if series.mean is None or series.end is None or max(series.mean, series.end) <= MAX_LEFT_OUT:
        return None
    return (
        f"{series.mean:.1%} of all completions were left out, and {series.end:.1%} at the end: the policy learns from "
        "the others only. See the reasons below."
    )


def _truncated(run: PolicyRun) -> str | None:
    shares = {name: run.shares(f"truncated/{name}").end or 0.0 for name in run.names("truncated/")}
    worst = max(shares, key=shares.__getitem__, default=None)
    if worst is None or shares[worst] <= MAX_TRUNCATED:
        return None
    return (
        f"The scorer '{worst}' cut {shares[worst]:.1%} of the completions at the end, or their prompts or references, to "
        "its max_length: what it did not read earns and costs nothing. Raise it, or lower max_length and "
        "sampling.max_tokens."
    )


def _filtered(run: PolicyRun) -> str | None:
    if not run.filters:
        return None
    return (
        f"Sampling has {', '.join(run.filters)} on. The learner knows nothing of these filters: it learns with other "
        "probabilities than those that drew, which shows as drift and can make a policy collapse."
    )


def _negative_divergence(run: PolicyRun) -> str | None:
    values = run.series("kl").values
    num = min(KL_RECORDS, len(values))
    lowest = np.convolve(values, np.full(num, 1 / num), mode="valid").min() if num else 0.0
    if lowest >= MIN_KL:
        return None
    return (
        f"The divergence from the start model was {lowest:.3g} nats a completion over {num} records, and no divergence "
        "is below 0: completions came from another distribution than the learner's, so sampler and learner differ."
    )
