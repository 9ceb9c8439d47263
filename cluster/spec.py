"""Where work runs: a Ray that is started on this machine for one command, or one that is running already."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt

from cluster.rules import Broken, StrictModel, rule
from cluster.schema import Reference, is_local

# Ray appends loom-00000000/r/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store (81 bytes, see
# connect.py), and the kernel takes 107 bytes for the path of a socket (man 7 unix).
MAX_TEMP_DIR_BYTES = 24
MAX_PORT = 65535

_ADDRESS = re.compile(r"auto|(ray://)?[A-Za-z0-9._-]+:[0-9]{1,5}|(ray://)?\[[0-9A-Fa-f:]+\]:[0-9]{1,5}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_STARTED_HERE = (
    "num_cpus",
    "num_gpus",
    "object_store_memory_mib",
    "dashboard",
    "dashboard_port",
    "temp_dir",
    "keep_logs",
)


def _check_address(value: str) -> str:
    if not _ADDRESS.fullmatch(value):
        raise ValueError("must be auto, HOST:PORT or ray://HOST:PORT")
    if value != "auto" and not 1 <= int(value.rpartition(":")[2]) <= MAX_PORT:
        raise ValueError(f"must have a port from 1 to {MAX_PORT}")
    return value


def _check_temp_dir(value: str) -> str:
    if not is_local(value):
        raise ValueError("must be a folder of this machine: ./x, ../x, /x or ~/x")
    if len(value.encode()) > MAX_TEMP_DIR_BYTES:
        raise ValueError(
            f"must be at most {MAX_TEMP_DIR_BYTES} bytes long as an absolute path: Ray keeps sockets below it"
        )
    return value


def _check_variable(name: str) -> str:
    if not _VARIABLE.fullmatch(name):
        raise ValueError("must be a variable's name: letters, digits and _, not a digit first")
    return name


Address = Annotated[str, AfterValidator(_check_address)]
TempDir = Annotated[Reference, AfterValidator(_check_temp_dir)]
Variable = Annotated[str, AfterValidator(_check_variable)]


class ClusterSpec(StrictModel):
    """The Ray that a command works on. Without ``address`` one is started here, and ended with the command."""

    address: Address | None = None
    """A running Ray to join: ``auto`` (the one of this machine), ``HOST:PORT`` or ``ray://HOST:PORT``; null starts one.
    RAY_ADDRESS counts only for ``auto``."""

    num_cpus: PositiveInt | None = None
    """CPUs that Ray may hand out on this machine; null: as many as there are."""

    num_gpus: NonNegativeInt | None = None
    """GPUs that Ray may hand out on this machine; null: as many as there are."""

    object_store_memory_mib: Annotated[int, Field(ge=80)] | None = None
    """Shared memory for Ray's objects, in MiB; null: Ray's own choice, 30 % of the memory."""

    dashboard: bool = True
    """Start Ray's dashboard, on 127.0.0.1 only."""

    dashboard_port: Annotated[int, Field(ge=1024, le=65535)] | None = None
    """The dashboard's port; null: 8265, or the next one that is free."""

    temp_dir: TempDir | None = None
    """A folder for Ray's logs, sockets and spilled objects, with a short path; null: the system's temporary folder."""

    keep_logs: bool = False
    """Leave Ray's logs in ``temp_dir`` when the command ends."""

    namespace: Annotated[str, Field(min_length=1)] | None = None
    """Ray namespace of named actors; null: one of its own for each command."""

    env: dict[Variable, str] = {}
    """Environment variables of every worker process."""

    ship_code: bool = True
    """Send loraloom's packages to the workers of a Ray that is joined; false where they have this version installed."""

    @rule
    def _joined(self) -> Iterator[Broken]:
        if self.address is None:
            return
        for name in _STARTED_HERE:
            default = type(self).model_fields[name].default
            if vars(self).get(name, default) != default:
                yield name, "has no effect on a Ray that is running already (address is set)"

    @rule
    def _shipped(self) -> Iterator[Broken]:
        if self.address is None and not self.ship_code:
            yield "ship_code", "has no effect without address"

    @rule
    def _dashboard(self) -> Iterator[Broken]:
        if self.address is None and self.dashboard_port is not None and not self.dashboard:
            yield "dashboard_port", "has no effect without dashboard"

    @rule
    def _logs(self) -> Iterator[Broken]:
        if self.address is None and self.keep_logs and self.temp_dir is None:
            yield "keep_logs", "needs temp_dir, or nobody would find them"
