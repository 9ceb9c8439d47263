"""How many threads a host without a GPU computes with: all cores while nothing else is busy, else one less.

OpenMP's threads wait for each other at the end of every product, so one that shares its core holds up all: measured on
two cores with another process busy, two threads take twice as long as one, and 0.6 of the time with none busy. A sum
that is shared out differently is rounded differently, so float32, where a resumed trial is to be the same bit for bit,
keeps to one number.
"""

from __future__ import annotations

import os
import time

import psutil
import torch

QUIET_CORES = 0.4
"""Cores' worth of other processes that leave a core to compute with: Ray's own take about a fifth."""
LOOK_EVERY_S = 0.5


def choose_threads(cores: int, others: float) -> int:
    """Threads for ``cores`` of which other processes keep so many busy."""
    return cores if others < QUIET_CORES else max(1, cores - 1)


class ThreadTuner:
    """Call it between passes."""

    def __init__(self, cores: int | None = None) -> None:
        self._cores = cores or len(os.sched_getaffinity(0))
        self._process = psutil.Process()
        self._looked = self._look()

    def __call__(self) -> None:
        """Set torch's threads by how busy the other processes were of late."""
        before, now = self._looked, self._look()
        if now[0] - before[0] < LOOK_EVERY_S:
            return
        self._looked = now
        torch.set_num_threads(choose_threads(self._cores, (now[1] - before[1]) / (now[0] - before[0])))

    def _look(self) -> tuple[float, float]:
        """The time, and the CPU seconds that all other processes have taken so far."""
        machine, own = psutil.cpu_times(), self._process.cpu_times()
        busy = sum(machine) - machine.idle - getattr(machine, "iowait", 0.0) - getattr(machine, "guest", 0.0)
        return time.monotonic(), busy - own.user - own.system
