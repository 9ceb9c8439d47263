"""One host at a time on a GPU.

Ray hands out fractions of GPUs and does not say whose they are: trials of two sweeps may be given parts of one GPU, two
Rays on one machine hand out the same one, and a host without trials is still on a GPU that Ray has given to others. But
every host counts on a whole one. So it claims its GPU before it loads anything, and waits for a host that has it.

The claim is a lock of the kernel's (``flock``) on a file in /tmp: it goes with the process that holds it, however that
ends. Programs other than hosts know nothing of it.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from cluster.machine import find_gpus, uuid_of

FOLDER = Path("/tmp")  # noqa: S108 - what is locked there holds no secret, and links are not followed
POLL_S = 0.5
SOMEBODY = "another process"


def claim_path(gpu: str) -> Path:
    """The file that is locked for a GPU; ``gpu`` as in CUDA_VISIBLE_DEVICES, where 0 and a UUID may be the same one."""
    by_bus = os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    gpu = uuid_of(gpu, find_gpus(), by_bus=by_bus) or gpu
    # Whatever TMPDIR says, which may be another for each Ray.
    return FOLDER / f"loraloom-gpu-{re.sub('[^A-Za-z0-9-]', '_', gpu)}.lock"


def claim(gpu: str, owner: str, on_wait: Callable[[str], None]) -> int:
    """Wait until no other host is on ``gpu``, and keep others off it as long as this process lives.

    Args:
        gpu: as in CUDA_VISIBLE_DEVICES.
        owner: what others are told who wait for this process; it ends with "process" and this one's id.
        on_wait: told the owner, once for each owner that there is something to wait for.

    Returns:
        The descriptor that holds the claim; closing it gives the GPU up.

    Raises:
        OSError: /tmp cannot be used.
    """
    descriptor = _open(claim_path(gpu))
    told: str | None = None
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            holder = told_owner(os.pread(descriptor, 200, 0).decode(errors="replace"))
            if holder != told:
                told = holder
                on_wait(holder)
            time.sleep(POLL_S)
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_RDWR:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{owner}\n".encode(), 0)
    return descriptor


def told_owner(text: str) -> str:
    """Who has the claim, by what its file says: that is of an earlier owner until the new one has written its own."""
    process = re.search(r"process (\d{1,9})\s*$", text)
    return text.strip() if process and psutil.pid_exists(int(process[1])) else SOMEBODY


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except PermissionError:  # another user's; a lock wants no right to write
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
