"""The comparison in Ray's dashboard: a process beside a Ray that this program starts, in the place of Grafana.

The variables must be there before Ray's head starts; Ray's dashboard then asks the process whenever somebody opens the
tab Metrics. Where the user has a Grafana (``RAY_GRAFANA_HOST`` is set), it stays, and nothing is started.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Generator, Mapping
from pathlib import Path

from tuning.compare.server import new_secret

GRAFANA, GRAFANA_IFRAME, PROMETHEUS = "RAY_GRAFANA_HOST", "RAY_GRAFANA_IFRAME_HOST", "RAY_PROMETHEUS_HOST"
_END_S = 5.0


@contextlib.contextmanager
def metrics_tab(
    folder: Path | None, dashboard: str | None = None, variables: Mapping[str, str] = os.environ
) -> Generator[dict[str, str]]:
    """Serve the comparison on a free port of loopback until the block ends, however it ends.

    Args:
        folder: the sweep's; None for all sweeps that run or have run in the Ray of ``dashboard``.
        dashboard: ``HOST:PORT`` of Ray's dashboard.
        variables: the environment; a Grafana that it names stays.

    Yields:
        Environment variables for Ray's head; none where ``variables`` name a Grafana already.

    Raises:
        OSError: no port, or no process can be had.
    """
    if GRAFANA in variables:
        yield {}
        return
    secret = new_secret()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/{secret}"
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
    try:
        stdin = process.stdin
        if stdin is not None:
            # Not in its arguments, which everybody on the machine can read; and when this end closes, it ends.
            task = {"fd": number, "secret": secret, "folder": folder and str(folder), "dashboard": dashboard}
            line = json.dumps(task) + "\n"
            with contextlib.suppress(OSError):
                stdin.write(line.encode())
                stdin.flush()
        found = {GRAFANA: url, GRAFANA_IFRAME: url}
        if PROMETHEUS not in variables:
            found[PROMETHEUS] = url  # without one the tab shows nothing
        yield found
    finally:
        process.terminate()
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdin is not None:
            with contextlib.suppress(OSError):
                process.stdin.close()
