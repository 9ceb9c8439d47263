"""What a host tells Prometheus through Ray's metrics, and the thread that keeps gauges alive.

Prometheus sees each name with Ray's prefix, ``ray_loraloom_host_slots_used`` and so on; units and suffixes are those of
https://prometheus.io/docs/practices/naming/. Ray forgets a gauge about two report intervals after its last ``set``, so
that each is set every ``AGAIN_EVERY_S``, whether it has changed or not.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from ray.util.metrics import Gauge

logger = logging.getLogger(__name__)
AGAIN_EVERY_S = 4.0
HOST_TAGS = ("sweep", "run", "device")
HOST_NUMBERS = {
    "slots_used": "Trials that have a slot on the host",
    "pack_efficiency": "Share of the token places of the host's training passes that held a token, lately; the rest is "
    "padding",
    "memory_bytes": "Memory of the host: torch's on its GPU, or without one its process's",
}


def run_tag(folder: Path, started_at: str) -> str:
    """What tells sweeps of the same name apart: the folder's name, and when the sweep began (not when it was resumed),
    such as ``demo 2026-01-31T09:30:00``.
    """
    return f"{folder.name} {started_at.partition('+')[0]}"


class HostGauges:
    """A host's gauges, set every ``AGAIN_EVERY_S`` from what ``measure`` returns, by the names of ``HOST_NUMBERS``."""

    def __init__(self, sweep: str, run: str, device: str, measure: Callable[[], Mapping[str, float]]) -> None:
        self._gauges = {name: Gauge(f"loraloom_host_{name}", text, HOST_TAGS) for name, text in HOST_NUMBERS.items()}
        self._tags = {"sweep": sweep, "run": run, "device": device}
        self._measure = measure
        Repeating(AGAIN_EVERY_S, self._set).start()

    def _set(self) -> None:
        for name, value in self._measure().items():
            self._gauges[name].set(value, self._tags)


class Repeating:
    """A thread that does something again and again, until it is stopped or the process ends."""

    def __init__(self, every_s: float, work: Callable[[], None]) -> None:
        self._every_s, self._work = every_s, work
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gauges", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End, after what is being done."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        told = False
        while not self._ended.wait(self._every_s):
            try:
                self._work()
            except Exception:  # no figure is worth the thread that keeps all others alive
                if not told:
                    logger.exception("gauges cannot be set; trying again, and not telling again")
                told = True
