"""What kind of reward model a folder holds, where no mark says it."""

from __future__ import annotations

from pathlib import Path

from rayrm.models.foreign import find_layout
from rayrm.models.gating import GATE_FILE, load_gate
from rayrm.models.own_code import find_own_model, read_config
from rayrm.models.readouts import Gated, LastToken, Readout, Whole

ARMORM_OBJECTIVES = (
    *(f"helpsteer-{name}" for name in ("helpfulness", "correctness", "coherence", "complexity", "verbosity")),
    *(
        f"ultrafeedback-{name}"
        for name in ("overall_score", "instruction_following", "truthfulness", "honesty", "helpfulness")
    ),
    "beavertails-is_safe",
    "prometheus-score",
    "argilla-overall_quality",
    "argilla-judge_lm",
    *(f"code-{name}" for name in ("complexity", "style", "explanation", "instruction-following", "readability")),
)
"""Objectives of the released ArmoRM, whose files do not name them (arXiv 2406.12845)."""


def find_readout(folder: str, trust_remote_code: bool = False) -> Readout:
    """How the model in the local `folder` is read, where no mark says it: by its own code where it has some that may
    run, by its gate if it has one, else at the last token."""
    if trust_remote_code and find_own_model(folder) is not None:
        return Whole(last_token=read_config(folder).get("reward_token_id"))
    layout = find_layout(folder)
    if layout is not None and layout.gate_temperature is not None:
        names = ARMORM_OBJECTIVES if layout.num_labels == len(ARMORM_OBJECTIVES) else range(layout.num_labels)
        return Gated(names=tuple(str(name) for name in names))
    if (Path(folder) / GATE_FILE).exists():
        return Gated(names=load_gate(folder).objectives)
    return LastToken()
