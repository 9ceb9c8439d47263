"""Folders that belong to a living process, and whose remains are found and removed when it died without cleaning up.

The owner holds an advisory lock (flock) on the folder itself. The kernel drops the lock when the process ends,
however it ends, so a folder whose lock can be taken has no owner any more. A folder younger than ``GRACE_S`` is left
alone: its owner may be between making it and locking it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

GRACE_S = 60.0
LONGEST_FOLDER = 45
"""Bytes of a path below which sockets are made: theirs has 107, of which vLLM's names and a scratch's take 62."""


def socket_folder() -> Path:
    """The folder for temporary files; ``/tmp`` where a socket's path would be too long below it."""
    folder = Path(tempfile.gettempdir())
    return folder if len(os.fsencode(folder)) <= LONGEST_FOLDER else Path("/tmp")  # noqa: S108 - a private folder in it


class Scratch:
    """A locked folder ``parent/prefix*``; ``keep`` leaves it there (it was renamed), ``close`` removes it."""

    def __init__(self, parent: Path, prefix: str) -> None:
        remove_abandoned(parent, prefix)
        self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        self._lock: int | None = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def keep(self) -> None:
        """Give up the lock and leave the folder, wherever it is now."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def close(self) -> None:
        """Remove the folder; nothing happens if it is gone already."""
        if self._lock is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            self.keep()


def remove_abandoned(parent: Path, prefix: str, grace_s: float = GRACE_S) -> list[Path]:
    """Remove folders ``parent/prefix*`` that no living process holds and return them."""
    removed: list[Path] = []
    for path in parent.glob(f"{prefix}*"):
        try:
            if time.time() - path.stat().st_mtime < grace_s:
                continue
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:  # another cleaner was faster, or it is not ours to open
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
            removed.append(path)
        except BlockingIOError:
            pass
        finally:
            os.close(lock)
    return removed
