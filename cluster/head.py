"""A Ray head that stays until it is told to end, for drivers and other machines to join.

Who has Ray's token may join, and nobody else: Ray's own ports listen on every interface of the machine. Only where the
user has set RAY_AUTH_MODE does that decide.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.connect import AUTH_MODE, ensure_token, make_folder
from cluster.connect import environment as variables_set
from cluster.errors import Fault, InputError, MachineError
from cluster.machine import port_is_free
from cluster.reaper import SESSION_VARIABLE, end_processes, reaper, session_processes
from cluster.spec import ClusterSpec

DASHBOARD_PORT = 8265
_START_S = 90.0
_POLL_S = 0.2
_SHOWN_LINES = 5


@dataclass(frozen=True)
class Head:
    """A head that runs."""

    address: str
    """``HOST:PORT``, to join it."""
    dashboard: str | None
    """``HOST:PORT`` of its dashboard, on this machine only; None where there is none."""
    process: subprocess.Popen[bytes]
    """``ray start --block``: ends when the head does."""


@contextlib.contextmanager
def started_head(spec: ClusterSpec, port: int, variables: Mapping[str, str]) -> Generator[Head]:
    """Start a head with the environment ``variables``; end all its processes with the block, whatever ends it.

    Raises:
        InputError: ``spec`` joins another Ray.
        MachineError: a port is taken, there is no token and none can be made, or Ray does not start.
    """
    if spec.address is not None:
        raise InputError([Fault("address", "must not be given: this starts a Ray, and joins none", spec.address)])
    dashboard_port = spec.dashboard_port or DASHBOARD_PORT
    for field, wanted in (("--port", port), *([("dashboard_port", dashboard_port)] if spec.dashboard else [])):
        if not port_is_free(wanted):
            raise MachineError(f"{field} {wanted} is taken; choose another")
    folder = make_folder(spec.temp_dir)
    session = uuid.uuid4().hex
    # `ray start` goes without authentication where nobody has asked for it and no token is there already.
    environment = {AUTH_MODE: "token", **os.environ, SESSION_VARIABLE: session, **variables, **spec.env}
    log = folder / "start.log"
    with reaper(session, None if spec.keep_logs else folder):
        try:
            with variables_set({AUTH_MODE: environment[AUTH_MODE], **spec.env}):
                ensure_token()
            with log.open("wb") as output:
                process = subprocess.Popen(
                    _command(spec, port, dashboard_port, folder / "r"),
                    stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment,
                    process_group=0,  # Ctrl-C in the terminal is ours to handle
                )  # fmt: skip
            host = _wait(process, port, dashboard_port if spec.dashboard else None, log)
            yield Head(f"{host}:{port}", f"127.0.0.1:{dashboard_port}" if spec.dashboard else None, process)
        finally:
            end_processes(session_processes(session))
            if not spec.keep_logs:
                shutil.rmtree(folder, ignore_errors=True)


def _command(spec: ClusterSpec, port: int, dashboard_port: int, folder: Path) -> list[str]:
    """``ray start``, of this environment."""
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}",
        f"--temp-dir={folder}", f"--include-dashboard={spec.dashboard}", "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard_port}",
    ]  # fmt: skip
    if spec.num_cpus is not None:
        command.append(f"--num-cpus={spec.num_cpus}")
    if spec.num_gpus is not None:
        command.append(f"--num-gpus={spec.num_gpus}")
    if spec.object_store_memory_mib is not None:
        command.append(f"--object-store-memory={spec.object_store_memory_mib * 2**20}")
    return command


def _wait(process: subprocess.Popen[bytes], port: int, dashboard_port: int | None, log: Path) -> str:
    """Wait until it answers; returns the host under which other machines find it.

    Raises:
        MachineError: it ended, or does not come up.
    """
    from ray.util import get_node_ip_address

    deadline = time.monotonic() + _START_S
    host = get_node_ip_address()
    waiting = [(host, port), *([("127.0.0.1", dashboard_port)] if dashboard_port is not None else [])]
    while waiting:
        if process.poll() is not None or time.monotonic() > deadline:
            said = log.read_text(errors="replace").strip().splitlines()[-_SHOWN_LINES:]
            raise MachineError("Ray does not start: " + " / ".join(said) + "\nTry `loraloom doctor`.")
        with contextlib.suppress(OSError):
            socket.create_connection(waiting[0], timeout=1).close()
            waiting.pop(0)
            continue
        time.sleep(_POLL_S)
    return host
