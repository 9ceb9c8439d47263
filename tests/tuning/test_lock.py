"""One driver at a time; the lock of a dead one does not hold."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.errors import ConflictError, MachineError
from tuning.lock import locked

HOLDER = """
import sys, time
from pathlib import Path
from tuning.lock import locked

with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_goes_with_its_process_however_that_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(ConflictError, match=rf"a sweep is running there \(process {holder.pid} on "),
            locked(tmp_path),
        ):
            pass
        holder.kill()
    with locked(tmp_path):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")


def test_a_lock_is_free_after_its_block(tmp_path: Path) -> None:
    for _ in range(2):
        with locked(tmp_path), pytest.raises(ConflictError), locked(tmp_path):
            pass


def test_a_lock_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()
    with pytest.raises(MachineError, match=rf"cannot write {tmp_path}/\.lock \(Is a directory\)"), locked(tmp_path):
        pass
    unwritable = r"cannot write /proc/\.lock \(No such file or directory\)"
    with pytest.raises(MachineError, match=unwritable), locked(Path("/proc")):
        pass
