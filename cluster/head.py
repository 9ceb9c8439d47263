"""A Ray head that stays until it is told to end, for drivers and other machines to join.

Who has Ray's token may join, and nobody else: Ray's own ports listen on every interface of the machine. Only where the
user has set RAY_AUTH_MODE does that decide.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Collection, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.connect import AUTH_MODE, ensure_token, make_folder, system_config, traceback_reason
from cluster.connect import environment as variables_set
from cluster.errors import Fault, InputError, MachineError
from cluster.machine import port_is_free
from cluster.reaper import SESSION_VARIABLE, end_child, end_processes, reaper, session_processes
from cluster.signals import uninterrupted
from cluster.spec import ClusterSpec

DASHBOARD_PORT = 8265
CLIENT_PORT = 10001
_TRIED_PORTS = 100
_START_S = 90.0
_END_S = 10.0
_POLL_S = 0.2
_STARTED = "Ray runtime started."
"""What `ray start` prints then."""


@dataclass(frozen=True)
class Head:
    """A head that runs."""

    address: str
    """``HOST:PORT``, to join it."""
    dashboard: str | None
    """``HOST:PORT`` of its dashboard, on this machine only; None where there is none."""
    process: subprocess.Popen[bytes]
    """``ray start --block``: ends when the head does."""


def head_spec(spec: ClusterSpec, port: int) -> ClusterSpec:
    """``spec`` for a head on ``port``, with the port that its dashboard gets where there is one.

    Raises:
        InputError: ``spec`` joins another Ray, or its dashboard wants ``port`` too.
        MachineError: a port is taken.
    """
    faults: list[Fault] = []
    if spec.address is not None:
        faults.append(Fault("address", "must not be given: this starts a Ray, and joins none", spec.address))
    if spec.dashboard_port == port:
        faults.append(Fault("dashboard_port", "must be another than that of --port", port))
    if faults:
        raise InputError(faults)
    if not port_is_free(port, ""):
        raise MachineError(f"--port {port} is taken; choose another")
    if not spec.dashboard:
        return spec
    if spec.dashboard_port is None:
        return spec.model_copy(update={"dashboard_port": _next_free(DASHBOARD_PORT, "127.0.0.1", (port,))})
    if not port_is_free(spec.dashboard_port):
        raise MachineError(
            f"dashboard_port {spec.dashboard_port} is taken; choose another by `--set dashboard_port=PORT`, or null "
            "for the next free one"
        )
    return spec


def _next_free(port: int, host: str, others: Collection[int | None]) -> int:
    """``port``, or the next one that is free on ``host`` and none of ``others``."""
    for found in range(port, port + _TRIED_PORTS):
        if found not in others and port_is_free(found, host):
            return found
    raise MachineError(f"no port from {port} to {port + _TRIED_PORTS - 1} is free")


@contextlib.contextmanager
def started_head(spec: ClusterSpec, port: int, variables: Mapping[str, str]) -> Generator[Head]:
    """Start a head with the environment ``variables``; end all its processes with the block, whatever ends it.

    Raises:
        InputError: as ``head_spec``, which need not have been called.
        MachineError: a port is taken, there is no token and none can be made, or Ray does not start.
    """
    spec = head_spec(spec, port)
    folder = make_folder(spec.temp_dir)
    session = uuid.uuid4().hex
    # `ray start` goes without authentication where nobody has asked for it and no token is there already.
    environment = {AUTH_MODE: "token", **os.environ, SESSION_VARIABLE: session, **variables, **spec.env}
    log = folder / "start.log"
    process: subprocess.Popen[bytes] | None = None
    with reaper(session, None if spec.keep_logs else folder):
        try:
            with variables_set({AUTH_MODE: environment[AUTH_MODE], **spec.env}):
                ensure_token()
            with log.open("wb") as output:
                process = subprocess.Popen(
                    _command(spec, port, folder / "r", system_config(environment)),
                    stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment,
                    process_group=0,  # Ctrl-C in the terminal is ours to handle
                )  # fmt: skip
            host = _wait(process, port, spec.dashboard_port, log)
            dashboard = None if spec.dashboard_port is None else f"127.0.0.1:{spec.dashboard_port}"
            yield Head(f"{host}:{port}", dashboard, process)
        finally:
            with uninterrupted():
                before = session_processes(session)
                if process is not None:
                    end_child(process, _END_S)
                end_processes(before | session_processes(session))
                if not spec.keep_logs:
                    shutil.rmtree(folder, ignore_errors=True)


def _command(spec: ClusterSpec, port: int, folder: Path, settings: Mapping[str, object]) -> list[str]:
    """``ray start``, of this environment.

    Its fixed ports, 10001 to 19999 and 52365, would clash with a ``port`` among them and with a second head: the kernel
    chooses all that it lets be chosen (0), as in ``connect``. Ray Client's must be told.
    """
    client_port = _next_free(CLIENT_PORT, "", (port, spec.dashboard_port))
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}",
        f"--temp-dir={folder}", f"--include-dashboard={spec.dashboard}", "--dashboard-host=127.0.0.1",
        f"--ray-client-server-port={client_port}", "--dashboard-agent-listen-port=0",
        "--min-worker-port=0", "--max-worker-port=0", f"--system-config={json.dumps(settings)}",
    ]  # fmt: skip
    if spec.dashboard_port is not None:
        command.append(f"--dashboard-port={spec.dashboard_port}")
    if spec.num_cpus is not None:
        command.append(f"--num-cpus={spec.num_cpus}")
    if spec.num_gpus is not None:
        command.append(f"--num-gpus={spec.num_gpus}")
    if spec.object_store_memory_mib is not None:
        command.append(f"--object-store-memory={spec.object_store_memory_mib * 2**20}")
    return command


def _wait(process: subprocess.Popen[bytes], port: int, dashboard_port: int | None, log: Path) -> str:
    """Wait until all of it runs (its control store answers before); returns the host where other machines find it.

    Raises:
        MachineError: it ended, or does not come up.
    """
    from ray.util import get_node_ip_address

    deadline = time.monotonic() + _START_S
    host = get_node_ip_address()
    places = [(host, port), *([("127.0.0.1", dashboard_port)] if dashboard_port is not None else [])]
    while not (_STARTED in (said := log.read_text(errors="replace")) and all(_answers(*place) for place in places)):
        if process.poll() is not None:
            lines = said.strip().splitlines() or [f"exit code {process.returncode}"]
            raise MachineError(f"Ray does not start: {traceback_reason(lines) or lines[-1]}\nTry `loraloom doctor`.")
        if time.monotonic() > deadline:
            raise MachineError(f"Ray does not start within {_START_S:g} s.\nTry `loraloom doctor`.")
        time.sleep(_POLL_S)
    return host


def _answers(host: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1):
        return True
    return False
