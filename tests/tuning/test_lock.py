"""One driver at a time; the lock of a dead one does not hold."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster.errors import ConflictError, MachineError
from tuning.lock import is_held, locked

HOLDER = """
import sys, time
from pathlib import Path
from tuning.lock import locked

with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def lock_holder(folder: Path) -> Generator[subprocess.Popen[str]]:
    """A process that holds the lock, as a driver does; killed at the end."""
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            yield holder
        finally:
            holder.kill()


def test_a_lock_goes_with_its_process_however_that_ends(tmp_path: Path) -> None:
    with lock_holder(tmp_path) as holder:
        with (
            pytest.raises(ConflictError, match=rf"a sweep is running there \(process {holder.pid} on "),
            locked(tmp_path),
        ):
            pass
        assert is_held(tmp_path)
        holder.kill()
        holder.wait()
        assert is_held(tmp_path) is False
    with locked(tmp_path):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")


def test_a_lock_is_free_after_its_block(tmp_path: Path) -> None:
    for _ in range(2):
        with locked(tmp_path), pytest.raises(ConflictError), locked(tmp_path):
            pass


def test_asking_whether_it_is_held_takes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with locked(tmp_path):
        assert is_held(tmp_path), "within one process too"
    assert is_held(tmp_path) is False
    plain = fcntl.fcntl

    def begin(descriptor: int, command: int, *argument: bytes) -> object:
        """A sweep that starts at the very moment that somebody asks."""
        monkeypatch.undo()
        with locked(tmp_path):
            return plain(descriptor, command, *argument)

    monkeypatch.setattr(fcntl, "fcntl", begin)
    assert is_held(tmp_path)


def test_where_nobody_can_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_held(tmp_path) is None, "a copy has no lock"
    (tmp_path / ".lock").write_text("process 7 on elsewhere\n")
    assert is_held(tmp_path) is None, "its locks may not reach this machine"
    with locked(tmp_path):
        pass

    def refuse(*_: object) -> None:
        raise OSError

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    assert is_held(tmp_path) is None
    with locked(tmp_path):
        assert is_held(tmp_path) is None


def test_a_lock_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()
    with pytest.raises(MachineError, match=rf"cannot write {tmp_path}/\.lock \(Is a directory\)"), locked(tmp_path):
        pass
    unwritable = r"cannot write /proc/\.lock \(No such file or directory\)"
    with pytest.raises(MachineError, match=unwritable), locked(Path("/proc")):
        pass


def test_of_a_copy_nobody_can_tell(tmp_path: Path) -> None:
    (tmp_path / "sweep").mkdir()
    with lock_holder(tmp_path / "sweep"):
        shutil.copytree(tmp_path / "sweep", tmp_path / "copy")
        assert (is_held(tmp_path / "sweep"), is_held(tmp_path / "copy")) == (True, None)
