"""What this machine has, read from the system without importing torch or Ray."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

_GIB = 2**30
_NVIDIA_SMI = (
    "nvidia-smi",
    "--query-gpu=name,memory.total,compute_cap,driver_version,index,uuid",
    "--format=csv,noheader,nounits",
)
_SMI_TIMEOUT_S = 30.0
# Version 2 and version 1 of the kernel's control groups, as seen from inside a container.
_MEMORY_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")


@dataclass(frozen=True)
class Gpu:
    """One GPU, as its driver tells it."""

    name: str
    memory_gib: float
    capability: tuple[int, int]
    """CUDA compute capability, such as (9, 0)."""
    driver: str
    index: int = 0
    """Its place in the order of the bus."""
    uuid: str = ""


@dataclass(frozen=True)
class Machine:
    """Cores and GiB that this process may use, which in a container is less than the hardware has."""

    cores: float
    memory_gib: float
    shm_gib: float
    """Size of /dev/shm, where Ray keeps its objects; 0 where there is none."""
    gpus: tuple[Gpu, ...]


def look() -> Machine:
    """This machine."""
    shm = Path("/dev/shm")  # noqa: S108 -- the place itself is what is measured
    return Machine(
        cores=_cores(),
        memory_gib=_memory_bytes() / _GIB,
        shm_gib=shutil.disk_usage(shm).total / _GIB if shm.is_dir() else 0.0,
        gpus=find_gpus(),
    )


def find_gpus() -> tuple[Gpu, ...]:
    """The GPUs that NVIDIA's driver lists; none where the driver is missing or does not answer."""
    try:
        done = subprocess.run(_NVIDIA_SMI, capture_output=True, text=True, timeout=_SMI_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return parse_gpus(done.stdout)


def count_gpus() -> int:
    """How many GPUs there are: those that the driver lists, or where it has nothing to list them with, its devices."""
    return len(find_gpus()) or len(list(Path("/dev").glob("nvidia[0-9]*")))


def parse_gpus(table: str) -> tuple[Gpu, ...]:
    """GPUs from ``nvidia-smi``'s rows ``name, MiB, capability, driver, index, uuid``; rows of another form are
    skipped.
    """
    gpus: list[Gpu] = []
    for row in table.splitlines():
        cells = [cell.strip() for cell in row.rsplit(",", 5)]
        try:
            name, memory, capability, driver, index, uuid = cells
            major, minor = capability.split(".")
            gpus.append(Gpu(name, int(memory) / 1024, (int(major), int(minor)), driver, int(index), uuid))
        except ValueError:
            continue
    return tuple(gpus)


def uuid_of(name: str, gpus: Sequence[Gpu], *, by_bus: bool) -> str | None:
    """The UUID of what CUDA_VISIBLE_DEVICES calls ``name``: a number, a UUID or its beginning.

    CUDA counts by speed unless CUDA_DEVICE_ORDER says PCI_BUS_ID (``by_bus``): GPUs of one kind come to the same then.

    Returns:
        None where it is not sure which of ``gpus`` is meant, and for a part of one (MIG).
    """
    found: list[str] = []
    if name.startswith("GPU-"):
        found = [gpu.uuid for gpu in gpus if gpu.uuid.startswith(name)]
    elif name.isdecimal() and (by_bus or len({gpu.name for gpu in gpus}) == 1):
        found = [gpu.uuid for gpu in gpus if gpu.index == int(name)]
    return found[0] if len(found) == 1 else None


def torch_is_for_cpus() -> bool:
    """Whether the torch that is installed was built without CUDA, as its version says; it is not imported."""
    try:
        return version("torch").endswith("+cpu")
    except PackageNotFoundError:
        return False


def port_is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Whether this process could listen on ``port`` of the loopback interface, or of another; "" is all of them."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _cores() -> float:
    cores = float(len(os.sched_getaffinity(0)))
    try:
        quota, period = _CPU_LIMIT.read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else min(cores, int(quota) / int(period))


def _memory_bytes() -> int:
    total = psutil.virtual_memory().total
    for limit in _MEMORY_LIMITS:
        try:
            return min(total, int(limit.read_text()))
        except (OSError, ValueError):  # no such version, or "max"
            continue
    return total
