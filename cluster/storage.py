"""Where results are kept: folders of this machine. Object stores (``s3://`` and the like) are refused by name."""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path

from cluster.errors import ABSENT, Fault, InputError, MachineError, NotFoundError

_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # a Path makes one slash of the two


def local_folder(reference: str, where: str) -> Path:
    """The folder that ``reference`` names, absolute; it need not exist. ``where`` is the field that holds it.

    Raises:
        InputError: it is a URI, or something that is not a folder stands there.
        MachineError: the system does not let us look.
    """
    if _URI.match(reference):
        raise InputError(
            [Fault(where, "must be a folder of this machine (object stores are not supported)", reference)]
        )
    folder = Path(reference).expanduser().absolute()
    with disk_trouble(where, folder):
        if folder.exists() and not folder.is_dir():
            raise InputError([Fault(where, "must be a folder, but a file stands there", reference)])
    return folder


def writable_folder(reference: str, where: str, *, need_gib: float = 0.0) -> Path:
    """``local_folder`` in which this user can write, or which this user can make, and where ``need_gib`` are free.

    Nothing is left there: a folder that is missing is not made.

    Raises:
        InputError: as ``local_folder``.
        MachineError: it cannot be made or written, or its disk is too full.
    """
    folder = local_folder(reference, where)
    with disk_trouble(where, folder):
        with tempfile.TemporaryFile(dir=_nearest(folder)):
            pass
        free = free_gib(folder)
    if free < need_gib:
        raise MachineError(f"{where}: {folder} has {free:.1f} GiB free, but {need_gib:.1f} GiB are needed")
    return folder


def read_file(path: Path) -> bytes:
    """What stands in a user's file.

    Raises:
        NotFoundError: there is no such file.
        InputError: it is a folder.
        MachineError: the system does not let us read it.
    """
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise NotFoundError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise InputError([Fault(str(path), "must be a file, but is a folder", ABSENT)]) from None
    except OSError as error:
        raise MachineError(f"{path}: cannot be read ({error.strerror or error})") from None


@contextlib.contextmanager
def disk_trouble(where: str, path: Path) -> Generator[None]:
    """What the system refuses in the block is a MachineError that names ``where`` and the path: the one that the system
    names, else ``path``.

    Raises:
        MachineError: the block raised an OSError.
    """
    try:
        yield
    except OSError as error:
        # What tempfile tried there has a name that nobody knows.
        named = error.filename if isinstance(error.filename, str) and not _is_scratch(error.filename) else path
        reason = error.strerror or str(error)
        raise MachineError(f"{where}: cannot write {named} ({reason}); choose another place, or mend that") from error


def free_gib(folder: Path) -> float:
    """GiB that this user may still write on the disk of ``folder``, or of its nearest parent that exists."""
    return shutil.disk_usage(_nearest(folder)).free / 2**30


def _nearest(folder: Path) -> Path:
    """``folder``, or the nearest of its parents that exists."""
    while not folder.exists():
        folder = folder.parent
    return folder


def _is_scratch(name: str) -> bool:
    return Path(name).name.startswith(tempfile.gettempprefix())
