"""Train a policy: `training.type=sft` fine-tunes a language model on the references of Prompt rows, `dpo` makes the
chosen sides of Preference rows likelier than the rejected ones, and `ppo`, `rloo` and `grpo` draw completions of Prompt
rows, have them scored and make the better ones likelier.

Writes `<output>/model`, plain Hugging Face files with the chat template and, last, `rayrm.json`. A run that was
killed and is started again goes on from its last state.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from rayrm import files
from rayrm.config import parse_args, run_job
from rayrm.errors import RayRMError
from rayrm.evaluation.policy_report import REPORT, write_policy_report
from rayrm.runs import abandon_run, finish_run, start_run
from rayrm.training.checkpoints import push_to_hub
from rayrm.training.curves import CURVE, SAMPLES
from rayrm.training.launch import MARK, MODEL
from rayrm.training.policy import PolicyJob, check_policy, train_policy
from rayrm.training.ppo.settings import PolicyGradient

log = logging.getLogger("rayrm")


class TrainPolicy(PolicyJob):
    """A policy from Prompt rows with a reference (sft), Preference rows (dpo), or Prompt rows and scorers."""


def main(argv: Sequence[str] | None = None) -> None:
    """Train the policy of `argv`, unless it is there; push it when asked to."""
    config = parse_args(TrainPolicy, argv)
    is_complete = files.exists(files.join(config.output, MARK))
    # Checked first, so that a config that cannot work claims no output.
    template = None if is_complete else check_policy(config)
    if start_run(config, mark=MARK):
        try:
            facts = train_policy(config, template)
        except RayRMError:
            # What must change is part of what the output was claimed for; before any step, nothing is lost.
            if not any(files.exists(files.join(config.output, name)) for name in (CURVE, SAMPLES)):
                abandon_run(config)
            raise
        finish_run(config, facts, mark=MARK)
    if isinstance(config.training, PolicyGradient) and not files.exists(files.join(config.output, REPORT)):
        log.info("the page of the run: %s", write_policy_report(config.output))
    if config.hub_id is not None:
        push_to_hub(files.join(config.output, MODEL), config.hub_id)


if __name__ == "__main__":
    run_job(main)
