"""Folders that are expensive to make, kept on a node's disk: each whole or not there, made once, the oldest removed.

    ROOT/KEY/            what was made
    ROOT/KEY.writing/    one that is being written, or removed
    ROOT/KEY.lock

Whoever makes, replaces or removes a folder holds its lock, which is the kernel's: a process that dies holds none. A
folder is written and synced under another name and then renamed, and renamed again before it is removed, so one with
its name is whole; what a crash leaves under the other name is removed by the next writer.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path

_POLL_S = 0.2
_WRITING = ".writing"


def cache_root(kind: str) -> Path:
    """Where this node keeps folders of a kind: under XDG_CACHE_HOME, or ~/.cache where that is not set."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "loraloom" / kind


def write_whole(folder: Path, write: Callable[[Path], object]) -> None:
    """Make ``folder`` by ``write``, which is given a path that is not there; its lock is held.

    Whatever ``write`` or the system raises is passed on, and nothing is left.
    """
    writing = folder.with_name(f"{folder.name}{_WRITING}")
    try:
        shutil.rmtree(writing, ignore_errors=True)
        write(writing)
        for path in (*writing.rglob("*"), writing):
            sync(path)
        writing.rename(folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(writing, ignore_errors=True)
        raise


def remove(folder: Path) -> None:
    """Remove a folder, or what is left of one; its lock is held."""
    scrap = folder.with_suffix(_WRITING)
    with suppress(OSError):  # it is gone, or this disk can only be read
        folder.rename(scrap)  # at once: half a folder under its name would pass for a whole one
    shutil.rmtree(scrap, ignore_errors=True)


def remove_oldest(root: Path, kept: int) -> None:
    """Keep the ``kept`` folders that were used last, and nothing half written; what others hold is left alone."""
    folders = [path for path in root.iterdir() if path.is_dir()]
    whole = sorted((path for path in folders if path.suffix != _WRITING), key=_used)
    for folder in (*whole[: max(len(whole) - kept, 0)], *(path for path in folders if path.suffix == _WRITING)):
        with suppress(OSError), locked(folder.with_suffix(""), wait_s=0.0) as is_held:
            if is_held:
                remove(folder)


def mark_used(folder: Path) -> None:
    """Count ``folder`` as used now; a cache that may only be read is as good."""
    with suppress(OSError):
        os.utime(folder)


@contextmanager
def locked(folder: Path, wait_s: float) -> Generator[bool]:
    """Hold the lock of a folder, which need not exist, in the block; False if another process kept it for ``wait_s``.

    Raises:
        OSError: there is no place for a lock, or the file system has none.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        yield _wait_for(descriptor, wait_s)
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Have a file, or a folder's list of names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _used(folder: Path) -> float:
    """When a folder was used last; 0 for one that has just gone."""
    try:
        return folder.stat().st_mtime
    except OSError:
        return 0.0


def _wait_for(descriptor: int, wait_s: float) -> bool:
    """Take the lock of an open file within a time; False if another process keeps it.

    Raises:
        OSError: the file system has no locks.
    """
    until = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                return False
            time.sleep(min(_POLL_S, wait_s))
        else:
            return True
