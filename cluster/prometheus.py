"""A Prometheus that reads all Rays that this user runs on this machine, as long as it is wanted.

Every Ray writes a service discovery file into its folder (https://docs.ray.io/en/latest/cluster/metrics.html), private
Rays into private folders. Here they are found by their processes, and their files put together into one that Prometheus
reads.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from cluster.errors import MachineError
from cluster.machine import port_is_free
from cluster.reaper import SESSION_VARIABLE, end_child, reaper
from cluster.signals import uninterrupted
from cluster.storage import disk_trouble

DISCOVERY = "prom_metrics_service_discovery.json"
GRAFANA = Path(__file__).parent / "grafana.json"
"""A dashboard of trials and hosts, as Grafana provisions and imports them."""
EVERY_S = 5.0
"""Seconds between two scrapes; a Ray that this program starts has new figures as often (connect.METRICS_EVERY_S)."""
_LOG_FOLDER = re.compile(r"--log[-_]dir=(?P<root>.+)/session_[^/]+/logs/?")
_END_S = 10.0
_POLL_S = 0.5
INSTALL = (
    "Prometheus is not installed (no `prometheus` in PATH): `apt-get install prometheus` on Debian and Ubuntu, "
    "`brew install prometheus` on a Mac, or https://prometheus.io/download/"
)


@dataclass
class Prometheus:
    """One that runs."""

    url: str
    process: subprocess.Popen[bytes]
    targets: Path
    """The file that it reads its targets from."""

    def watch(self, told: Callable[[int], None]) -> None:
        """Keep the targets up to date until it ends; ``told`` hears how many there are whenever that changes.

        Raises:
            MachineError: it has ended, or the targets cannot be written.
        """
        before: list[Any] | None = None
        looked_at = 0.0
        while self.process.poll() is None:
            if time.monotonic() - looked_at >= EVERY_S:
                looked_at = time.monotonic()
                found = read_targets(discovery_files())
                if found != before:
                    with disk_trouble("--dir", self.targets):
                        _replace(self.targets, json.dumps(found))
                    told(sum(len(group["targets"]) for group in found))
                    before = found
            time.sleep(_POLL_S)
        raise MachineError(f"Prometheus has ended by itself (exit code {self.process.returncode})")


@contextlib.contextmanager
def started_prometheus(folder: Path, port: int) -> Generator[Prometheus]:
    """Start one on ``port`` of loopback that keeps its figures in ``folder``; end it with the block, whatever ends it.

    Raises:
        MachineError: it is not installed, the port is taken, or the folder cannot be written.
    """
    program = shutil.which("prometheus")
    if program is None:
        raise MachineError(INSTALL)
    if not port_is_free(port):
        raise MachineError(f"--port {port} is taken; choose another")
    folder = folder.absolute()
    targets = folder / "targets.json"
    scrape = {"job_name": "ray", "file_sd_configs": [{"files": [str(targets)], "refresh_interval": f"{EVERY_S:g}s"}]}
    with disk_trouble("--dir", folder):
        folder.mkdir(parents=True, exist_ok=True)
        _replace(targets, "[]")
        document = {"global": {"scrape_interval": f"{EVERY_S:g}s"}, "scrape_configs": [scrape]}
        _replace(folder / "prometheus.yml", yaml.safe_dump(document))
    command = [
        program, f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}", "--log.level=error",
    ]  # fmt: skip
    session = uuid.uuid4().hex
    environment = {**os.environ, SESSION_VARIABLE: session}
    with reaper(session, None):  # should this program be killed
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            env=environment,
            process_group=0,  # Ctrl-C is ours to handle
        )
        try:
            yield Prometheus(f"http://127.0.0.1:{port}", process, targets)
        finally:
            with uninterrupted():
                end_child(process, _END_S)


def discovery_files() -> list[Path]:
    """The service discovery files of the Rays that this user runs on this machine.

    What others run may be private, and their arguments could name any file.
    """
    roots: set[str] = set()
    for process in psutil.process_iter(["cmdline", "uids"]):
        uids = process.info["uids"]
        if uids is not None and uids.real == os.getuid():
            roots |= {match["root"] for word in process.info["cmdline"] or () if (match := _LOG_FOLDER.fullmatch(word))}
    return sorted(path for root in roots if _is_file(path := Path(root) / DISCOVERY))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # it may not be looked at, or its name is too long
        return False


def read_targets(files: Iterable[Path]) -> list[dict[str, Any]]:
    """What the files hold, put together; one that is being written counts when it is whole."""
    found: list[dict[str, Any]] = []
    for path in files:
        with contextlib.suppress(OSError, ValueError):
            groups = json.loads(path.read_bytes())
            found += [group for group in groups if isinstance(group, dict) and isinstance(group.get("targets"), list)]
    return found


def _replace(path: Path, text: str) -> None:
    """Write a file at one stroke: Prometheus may be reading it."""
    draft = path.with_name(f".{path.name}")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
