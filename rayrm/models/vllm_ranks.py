"""The processes of an engine's ranks, and how long they live."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from typing import Any

INTERVAL_S = 1.0
"""How often a rank looks for its parent."""


def end_with_parent(worker: Any) -> None:
    """Have this process killed within seconds of its parent's death, whatever it waits for; called in each rank.

    vLLM tells its ranks of a parent that is gone, but one that waits for another rank, or for somebody to read what it
    found, does not listen. Linux could send a signal by itself, but does so when the thread ends that started them.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_watch, args=(parent.pid,), name="ParentWatch", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(INTERVAL_S)
    os.kill(os.getpid(), signal.SIGKILL)
