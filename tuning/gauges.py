"""What a host tells Prometheus through Ray's metrics, and the thread that keeps gauges alive.

Prometheus sees each name with Ray's prefix, ``ray_loraloom_host_slots_used`` and so on; units and suffixes are those of
https://prometheus.io/docs/practices/naming/. Ray forgets a gauge about two report intervals after its last ``set``, so
that each is set every ``AGAIN_EVERY_S``, whether it has changed or not.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil
import ray
from ray.util.metrics import Gauge

from cluster.prometheus import EVERY_S

logger = logging.getLogger(__name__)
AGAIN_EVERY_S = 4.0
_EXPORT_S = 1.0
"""What an export may take."""
_MOST_EXPORT_S = 10.0
"""Ray's default interval; of a Ray that exports less often, the end is not waited for."""
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


def wait_for_scrape(*, ray_ends: bool) -> None:
    """Wait until what the gauges hold now is where Prometheus finds it, at most a quarter of a minute; not at all where
    no Prometheus has asked this node for its figures within the last minute.

    A process exports its figures now and then and not at its end. Where Ray goes on, they can be scraped after that;
    where ``ray_ends``, there must be time for a scrape too (one that comes as often as those of ``loraloom metrics``).
    """
    try:
        here = ray.get_runtime_context().get_node_id()
        ports = {node["MetricsExportPort"] for node in ray.nodes() if node["NodeID"] == here}
        export_s = ray._config.metrics_report_interval_ms() / 1000  # noqa: SLF001
    except Exception:  # noqa: BLE001 - a Ray that is lost by now: the sweep has ended well all the same
        logger.warning("the end of the sweep is not told to Prometheus: Ray does not answer")
        return
    if _was_asked(ports):
        time.sleep(min(export_s, _MOST_EXPORT_S) + _EXPORT_S + (EVERY_S if ray_ends else 0.0))


def _was_asked(ports: set[int]) -> bool:
    """True if somebody is, or was within a minute (as the kernel keeps closed ones), connected to one of the ports."""
    try:
        connections = psutil.net_connections("tcp")
    except (psutil.Error, OSError):  # not for everybody on some systems
        return False
    return any(one.laddr and one.laddr.port in ports and one.status != psutil.CONN_LISTEN for one in connections)


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
