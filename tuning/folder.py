"""Whether a sweep can go into a folder, or go on in it: known before torch, Ray or the rows are touched."""

from __future__ import annotations

from pathlib import Path

from cluster.errors import ConflictError, InputError
from cluster.storage import disk_trouble, writable_folder
from tuning.lock import LOCK_FILE
from tuning.past import damage, differences
from tuning.results import BOARD_FILE, SPEC_FILE, SWEEP_FILE, read_sweep
from tuning.spec import SweepSpec

DATA_FOLDER = "data"


def check_folder(folder: Path) -> None:
    """A new sweep can go into ``folder``; nothing is made or written.

    Raises:
        ConflictError: it holds something.
        InputError: it is no folder of this machine.
        MachineError: it cannot be made or written.
    """
    with disk_trouble("the sweep's folder", folder):
        in_use = _in_use(folder)
    if in_use:
        raise ConflictError(f"{folder}: already holds something; give the sweep another --dir or name")
    writable_folder(str(folder), "the sweep's folder")


def check_same(folder: Path, spec: SweepSpec, where: str) -> None:
    """The sweep in ``folder`` can go on as ``spec``; ``where`` names it in messages.

    Raises:
        NotFoundError: the folder is no sweep's.
        InputError: it is another sweep, or files of its trials are damaged.
        MachineError: the folder cannot be written.
    """
    sweep = read_sweep(folder)
    writable_folder(str(folder), "the sweep's folder")
    if faults := [*differences(sweep.spec, spec, where), *damage(sweep)]:
        raise InputError(faults)


def _in_use(folder: Path) -> bool:
    """True if a folder holds anything but what a sweep that never came to a trial left there."""
    if not folder.is_dir():
        return folder.exists()
    left_over = {SPEC_FILE, SWEEP_FILE, BOARD_FILE, f".{SPEC_FILE}", f".{SWEEP_FILE}", DATA_FOLDER, LOCK_FILE}
    return any(path.name not in left_over for path in folder.iterdir())
