"""Where results are kept: folders of this machine. Object stores (``s3://`` and the like) are refused by name."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from cluster.errors import Fault, InputError, MachineError


def local_folder(reference: str, where: str) -> Path:
    """The folder that ``reference`` names, absolute; it need not exist. ``where`` is the field that holds it.

    Raises:
        InputError: it is a URI, or something that is not a folder stands there.
    """
    if "://" in reference:
        raise InputError(
            [Fault(where, "must be a folder of this machine (object stores are not supported)", reference)]
        )
    folder = Path(reference).expanduser().absolute()
    if folder.exists() and not folder.is_dir():
        raise InputError([Fault(where, "must be a folder, but a file stands there", reference)])
    return folder


def writable_folder(reference: str, where: str, *, need_gib: float = 0.0) -> Path:
    """``local_folder``, made if it is missing, in which this user can write and ``need_gib`` are free.

    Raises:
        InputError: as ``local_folder``.
        MachineError: it cannot be made or written, or its disk is too full.
    """
    folder = local_folder(reference, where)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise MachineError(f"{where}: cannot write in {folder} ({error.strerror}); choose another folder") from error
    free = free_gib(folder)
    if free < need_gib:
        raise MachineError(f"{where}: {folder} has {free:.1f} GiB free, but {need_gib:.1f} GiB are needed")
    return folder


def free_gib(folder: Path) -> float:
    """GiB that this user may still write on the disk of ``folder``, or of its nearest parent that exists."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free / 2**30
