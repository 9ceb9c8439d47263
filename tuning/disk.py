"""What is told where the disk says no before a sweep has begun; afterwards ``SweepWatch`` sees to it."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from cluster.errors import MachineError


@contextmanager
def needs_disk(folder: Path) -> Generator[None]:
    """For the writing of a sweep's files in ``folder``.

    Raises:
        MachineError: the system refused.
    """
    try:
        yield
    except OSError as error:
        raise MachineError(
            f"cannot write {error.filename or folder}: {error.strerror or error}. No trial was started: mend that, "
            "then call this again"
        ) from error
