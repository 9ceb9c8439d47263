"""One driver at a time in a sweep's folder.

The lock is the kernel's (``flock``): it goes with the process that holds it, however that ends, so a folder is never
locked by a driver that is dead. The file stays, and says who was the last.

A second lock lies beside it, of the kind that others can ask after without taking it (an open file description's):
what only looks whether a sweep runs is never in the way of one that starts.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from cluster.errors import ConflictError, MachineError
from cluster.storage import disk_trouble

LOCK_FILE = ".lock"
_FLOCK = "@hhqqi4x"
"""The kernel's ``struct flock``: type, whence, start, length (0: all), process."""
_WHOLE_FILE = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)


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
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").partition("\n")[0]
            raise ConflictError(f"{folder}: a sweep is running there ({holder or 'it has just begun'})") from None
        except OSError as error:
            raise MachineError(f"{folder}: its file system has no locks ({error.strerror}); choose another") from error
        with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()}{_here(descriptor)}".encode(), 0)
        with contextlib.suppress(OSError):  # a kernel that has no such locks: nobody can ask, then
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _WHOLE_FILE)
        yield
    finally:
        os.close(descriptor)


def is_held(folder: Path) -> bool | None:
    """Whether a driver holds the lock of ``folder``; asks only, and takes nothing.

    None where that cannot be known: there is no such file, or it is a copy, as in a copy of the folder; or nobody holds
    it here and it was another machine that did, whose locks may not reach this one; or this kernel or file system does
    not say.
    """
    try:
        descriptor = os.open(folder / LOCK_FILE, os.O_RDONLY)
    except OSError:
        return None
    try:
        found, *_ = struct.unpack(_FLOCK, fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _WHOLE_FILE))
        if found != fcntl.F_UNLCK:
            return True
        return False if os.pread(descriptor, 200, 0).endswith(_here(descriptor).encode()) else None
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _here(descriptor: int) -> str:
    """Which machine's lock it is, and which file: a copy has another number."""
    return f" on {socket.gethostname()}\nfile {os.fstat(descriptor).st_ino}\n"
