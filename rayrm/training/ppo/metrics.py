"""What is told of a step's samples: by language and length, and how much they repeat."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from rayrm.training.ppo.experience import RULES, Experience, Sample

COUNTED = ("left_out/", "penalised/", "truncated/")
UNBROKEN = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff]")
"""A character of Thai, Lao, Burmese, Khmer, kana or Han."""


def describe_samples(samples: Sequence[Sample]) -> dict[str, float]:
    """Rewards by language and length, lengths, shares of what was left out, and distinct n-grams.

    Rewards, scores, `truncated` and `gate_open_fraction` are means over the samples that are learned from, all others
    over all samples.
    """
    kept = [sample for sample in samples if sample.fault is None]
    faults = Counter(sample.fault for sample in samples if sample.fault is not None)
    found: dict[str, float] = {"num_samples": len(kept), "left_out_fraction": 1 - len(kept) / len(samples)}
    found |= {f"left_out/{fault}": num / len(samples) for fault, num in sorted(faults.items())}
    found["unscored_fraction"] = sum(num for fault, num in faults.items() if fault.startswith("unscored")) / len(
        samples
    )
    found["unfinished_fraction"] = _mean([not sample.is_finished for sample in samples])
    lengths = [len(sample.ids) for sample in samples]
    found |= {"completion_length": _mean(lengths), "completion_length/max": max(lengths)}
    for n in (1, 2):
        found[f"distinct_{n}"] = distinct_n([sample.text for sample in samples], n)
    if not kept:
        return found
    rewards = np.array([sample.reward for sample in kept], dtype=float)
    found |= {"reward": float(rewards.mean()), "reward_std": float(rewards.std())}
    for lang in sorted({sample.lang for sample in kept}):
        found[f"reward/{lang}"] = _mean([r for s, r in zip(kept, rewards, strict=True) if s.lang == lang])
    thirds = np.quantile([len(sample.ids) for sample in kept], [1 / 3, 2 / 3])
    place = np.searchsorted(thirds, [len(sample.ids) for sample in kept], side="left")
    for index, name in enumerate(("short", "middle", "long")):
        if (place == index).any():
            found[f"reward/length/{name}"] = float(rewards[place == index].mean())
    for rule in RULES:
        if num := sum(rule in sample.parts for sample in kept):
            found[f"penalised/{rule}"] = num / len(samples)
    cut = Counter(name for sample in kept for name in sample.truncated)
    found |= {f"truncated/{scorer}": num / len(kept) for scorer, num in sorted(cut.items())}
    for scorer in sorted({name for sample in kept for name in sample.parts} - set(RULES)):
        found[f"score/{scorer}"] = _mean([sample.parts[scorer] for sample in kept if scorer in sample.parts])
    gates = [sample.is_open for sample in kept if sample.is_open is not None]
    return found | ({"gate_open_fraction": _mean(gates)} if gates else {})


def describe_experience(experience: Experience, returns: np.ndarray | None, has_reference: bool) -> dict[str, float]:
    """Divergence in nats a completion, entropy in nats a token, drift between sampler and learner, and the critic."""
    mask = experience.mask.cpu().numpy().astype(bool)
    gap = (experience.old - experience.ref).cpu().numpy()
    drift = experience.drift().cpu().numpy()
    found = {"kl": float((gap * mask).sum(1).mean())} if has_reference else {}
    found |= {
        "entropy": float(experience.entropy.cpu().numpy()[mask].mean()),
        "drift": float(drift[mask].mean()),
        "drift/max": float(drift[mask].max()),
    }
    if returns is not None:
        spread = float(returns[mask].var())
        errors = returns[mask] - experience.values.cpu().numpy()[mask]
        found["explained_variance"] = 1 - float(errors.var()) / spread if spread else 0.0
    return found


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Share of different n-grams of words among all of them, over all texts together (arXiv 1510.03055); 0 for none."""
    grams = [tuple(words[i : i + n]) for words in map(words_of, texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def words_of(text: str) -> list[str]:
    """The words of a text; of a run of characters of a script that has no blanks between words, each character."""
    return UNBROKEN.sub(r" \g<0> ", text).split()


def _mean(values: Sequence[float] | Sequence[bool]) -> float:
    return float(np.mean(values)) if values else 0.0


def merge_records(records: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over steps; maxima of what ends in `/max`, the last of `lr` and `kl_coefficient`, and what was left out,
    penalised or truncated counts as 0 in a step that does not name it."""
    merged = {}
    for name in dict.fromkeys(name for record in records for name in record):
        values = [record[name] for record in records if name in record]
        if name in ("lr", "kl_coefficient"):
            merged[name] = values[-1]
        elif name.endswith("/max"):
            merged[name] = max(values)
        else:
            merged[name] = sum(values) / (len(records) if name.startswith(COUNTED) else len(values))
    return merged
