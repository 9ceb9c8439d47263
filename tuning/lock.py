"""One driver at a time in a sweep's folder.

The lock is the kernel's (``flock``): it goes with the process that holds it, however that ends, so a folder is never
locked by a driver that is dead. The file stays, and says who was the last.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from cluster.errors import ConflictError, MachineError
from cluster.storage import disk_trouble

LOCK_FILE = ".lock"


@contextmanager
def locked(folder: Path) -> Generator[None]:
    """Hold the lock of ``folder``, which exists.

    Raises:
        ConflictError: another process holds it.
        MachineError: the lock's file cannot be opened, or is on a file system without locks.
    """
    with disk_trouble("the sweep's lock", folder / LOCK_FILE):
        descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            raise ConflictError(f"{folder}: a sweep is running there ({holder or 'it has just begun'})") from None
        except OSError as error:
            raise MachineError(f"{folder}: its file system has no locks ({error.strerror}); choose another") from error
        with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)
