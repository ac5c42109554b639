"""As many replicas as keep the queue short: the policy counts seconds of waiting, not requests."""

from __future__ import annotations

import math
from typing import Any

WAIT = "wait_s"
"""Name under which a replica tells how long an item that comes now would wait."""


class WaitPolicy:
    """Asks for the replicas that would bring the mean wait to a target.

    The wait of a replica is the work before it, in seconds of its own speed, so the sum over all replicas is the work
    there is, and that sum divided by the target is the number of replicas which each have the target's wait.
    """

    def __init__(self, target_wait_s: float) -> None:
        self.target_wait_s = target_wait_s

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Replicas that are wanted, before bounds and delays, which Serve applies."""
        waits = (context.aggregated_metrics or {}).get(WAIT, {})
        return wanted_replicas(sum(waits.values()), context.total_num_requests, self.target_wait_s), {}


def wanted_replicas(work_s: float, num_requests: float, target_wait_s: float) -> int:
    """Replicas for so many seconds of work; at least one while there are requests, and none without."""
    return max(math.ceil(work_s / target_wait_s), int(num_requests > 0))
