"""The model card of a reward model: what it learned, how good it is, and how to read it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from rayrm import files

if TYPE_CHECKING:
    from rayrm.training.reward_model import RewardModelJob

CARD = "README.md"
SHOWN = ("accuracy", "loss", "margin", "brier", "ece", "auc", "ties", "length_correlation", "accuracy_worst_language")
"""Metrics that a card shows of all held-out rows."""

_USES = {
    "last_token": "One logit at the last token, which is the reward; plain transformers gives it as `logits[:, 0]`.",
    "ratings": "One output for each rating at the last token; the reward is their weighted sum.",
    "steps": "One logit at the end of each step; the reward makes one number of their σ.",
    "gated": "Scores of several objectives at the last token, weighed by a gate that reads the end of the prompt.",
    "comparison": "A language model that compares two completions in its prompt, read at the words of its verdict.",
}


def write_card(path: str, job: RewardModelJob, mark: dict[str, Any]) -> None:
    """Write the card of the model that lies at `path` and was trained by `job`, from what its mark will hold."""
    base = job.training.model
    front: dict[str, Any] = {
        "library_name": "transformers",
        "tags": ["reward-model", "rayrm", mark["objective"]["type"]],
    }
    if files.is_hub_id(base):
        front["base_model"] = base
    counts, rendering = mark["counts"], mark["rendering"]
    dropped = ", ".join(f"{num:,} {reason}" for reason, num in counts["dropped"].items()) or "none"
    name = base if files.is_hub_id(base) else Path(base).name
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=True).strip(),
        "---",
        "",
        "# Reward model",
        "",
        f"Trained by rayrm from `{name}` with the objective `{mark['objective']['type']}`.",
        "",
        f"- Rows: {counts['train']:,} trained on, {counts['held_out']:,} held out by group, dropped: {dropped}.",
        f"- Steps: {mark['steps']:,}"
        + (
            f"; the weights are those of step {mark['best_step']:,}, the best by `{job.training.best_by}`"
            if "best_step" in mark
            else ""
        )
        + ".",
        f"- Texts: the tokenizer's chat template ({'none' if rendering['chat_template'] == 'none' else 'saved with the model'}), at most {rendering['max_length']:,} tokens.",
        f"- Reading: {_USES[mark['readout']['type']]}",
        "",
        "```python",
        "from rayrm.models.rewarder import load_rewarder",
        "",
        'rewarder = load_rewarder("this folder or repository")',
        'question = [{"role": "user", "content": "…"}]',
        *(
            ['gap, status = rewarder.compare([(question, "one answer", "another")])[0]']
            if mark["readout"]["type"] == "comparison"
            else ['reward, status = rewarder.rewards([(question, "an answer")])[0]']
        ),
        "```",
        "",
        *_metrics(mark["metrics"]),
        "Rewards compare completions of one prompt; they have no unit, and mean little far from the rows above.",
        "",
    ]
    with files.atomic_file(files.join(path, CARD)) as handle:
        handle.write("\n".join(lines).encode())


def _metrics(metrics: dict[str, float]) -> list[str]:
    found = {name.removeprefix("eval_"): value for name, value in metrics.items() if name.startswith("eval_")}
    shown = [(name, found[name]) for name in SHOWN if name in found]
    shown += sorted(
        (name, value) for name, value in found.items() if name.startswith(("accuracy/", "pearson_", "mse_"))
    )
    if not shown:
        return []
    return ["| held-out rows | |", "|---|---|", *(f"| {name} | {value:.4g} |" for name, value in shown), ""]
