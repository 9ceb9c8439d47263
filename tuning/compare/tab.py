"""The comparison in Ray's dashboard: a process beside a Ray that this program starts, in the place of Grafana.

The variables must be there before Ray's head starts; Ray's dashboard then asks the process whenever somebody opens the
tab Metrics. Where the user has a Grafana (``RAY_GRAFANA_HOST`` is set), it stays, and nothing is started; nor is it
where that is ``DISABLED``, by which Ray hides the tab (Ray 2.60's ray/dashboard/modules/metrics/metrics_head.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cluster.reaper import end_child

GRAFANA, GRAFANA_IFRAME, PROMETHEUS = "RAY_GRAFANA_HOST", "RAY_GRAFANA_IFRAME_HOST", "RAY_PROMETHEUS_HOST"
DISABLED = "DISABLED"
"""Value of ``GRAFANA`` by which Ray hides the tab; no other spelling does."""
_END_S = 5.0


def new_secret() -> str:
    """A part of a path that nobody guesses."""
    return secrets.token_urlsafe(18)


@dataclass(frozen=True)
class Tab:
    """What the dashboard is to show."""

    variables: dict[str, str] = field(default_factory=dict[str, str])
    """For the environment of Ray's head."""
    port: int | None = None
    """Of the page; None where there is none."""
    process: subprocess.Popen[bytes] | None = None
    grafana: str | None = None
    """What the user has set ``GRAFANA`` to: the tab is not ours then."""

    def told(self) -> str:
        """What a person is to hear of it, to be said after the dashboard's address."""
        if self.grafana is not None:
            is_hidden = self.grafana == DISABLED
            does = f"is hidden by {GRAFANA}={DISABLED}" if is_hidden else f"shows the Grafana of {GRAFANA}"
            return f"; its tab Metrics {does} (loraloom dashboard DIR compares the trials)"
        if self.port is None or (self.process is not None and self.process.poll() is not None):
            return ""
        return f"; its tab Metrics compares the trials (from afar, tunnel port {self.port} too)"


@contextlib.contextmanager
def metrics_tab(
    folder: Path | None, dashboard: str | None = None, variables: Mapping[str, str] = os.environ
) -> Generator[Tab]:
    """Serve the comparison on a free port of loopback until the block ends, however it ends.

    Args:
        folder: the sweep's; None for all sweeps that run or have run in the Ray of ``dashboard``.
        dashboard: ``HOST:PORT`` of Ray's dashboard.
        variables: the environment; a Grafana that it names stays, and a tab that it hides stays hidden.

    Nothing is started where ``variables`` hold ``RAY_GRAFANA_HOST`` already, or where no port or no process can be had:
    training does not depend on it.
    """
    if GRAFANA in variables:
        yield Tab(grafana=variables[GRAFANA])
        return
    secret = new_secret()
    try:
        port, process = _start(folder, dashboard, secret)
    except OSError:
        yield Tab()
        return
    url = f"http://127.0.0.1:{port}/{secret}"
    found = {GRAFANA: url, GRAFANA_IFRAME: url}
    if PROMETHEUS not in variables:
        found[PROMETHEUS] = url  # without one the tab shows nothing
    try:
        yield Tab(found, port, process)
    finally:
        end_child(process, _END_S)
        if process.stdin is not None:
            with contextlib.suppress(OSError):
                process.stdin.close()


def _start(folder: Path | None, dashboard: str | None, secret: str) -> tuple[int, subprocess.Popen[bytes]]:
    """The process, and the port that it listens on from the first moment."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        number = listener.fileno()
        process = subprocess.Popen(
            [sys.executable, "-m", "tuning.compare.sidecar"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[number],
            cwd=Path(__file__).parents[2],  # where this package is found, whatever the current folder is
            process_group=0,  # Ctrl-C in the terminal is the driver's to handle
        )
        if process.stdin is not None:
            # Not in its arguments, which everybody on the machine can read; and when this end closes, it ends.
            task = {"fd": number, "secret": secret, "folder": folder and str(folder), "dashboard": dashboard}
            with contextlib.suppress(OSError):
                process.stdin.write(json.dumps(task).encode() + b"\n")
                process.stdin.flush()
        return listener.getsockname()[1], process
