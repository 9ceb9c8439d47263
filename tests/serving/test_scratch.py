from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from serving.scratch import Scratch, remove_abandoned, socket_folder

HOLD = (
    "import sys, time; from pathlib import Path; from serving.scratch import Scratch; "
    "scratch = Scratch(Path(sys.argv[1]), 'x-'); print(scratch.path, flush=True); time.sleep(60)"
)


def age(path: Path) -> None:
    old = time.time() - 3600
    os.utime(path, (old, old))


@pytest.mark.parametrize(("length", "kept"), [(45, True), (46, False)])
def test_sockets_have_room_below_their_folder(monkeypatch: pytest.MonkeyPatch, length: int, kept: bool) -> None:
    """The kernel takes 107 bytes; vLLM adds a UUID to the folder that it is given."""
    folder = Path("/" + "t" * (length - 1))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    assert (socket_folder() == folder) == kept
    assert len(str(folder)) + len("/loraloom-engine-12345678/00000000-0000-0000-0000-000000000000") <= 107 or not kept


def test_close_removes_and_keep_leaves(tmp_path: Path) -> None:
    gone, kept = Scratch(tmp_path, "x-"), Scratch(tmp_path, "x-")
    (gone.path / "file").touch()
    gone.close()
    kept.keep()
    kept.close()
    assert list(tmp_path.iterdir()) == [kept.path]


def test_only_what_nobody_holds_is_removed(tmp_path: Path) -> None:
    held, abandoned, young, other = Scratch(tmp_path, "x-"), tmp_path / "x-a", tmp_path / "x-b", tmp_path / "y-c"
    for path in (abandoned, young, other):
        path.mkdir()
        (path / "file").touch()
    for path in (held.path, abandoned, other):
        age(path)
    assert remove_abandoned(tmp_path, "x-") == [abandoned]
    assert {path.name for path in tmp_path.iterdir()} == {held.path.name, "x-b", "y-c"}


def test_a_killed_owner_holds_nothing(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout
        path = Path(owner.stdout.readline().strip())
        age(path)
        assert remove_abandoned(tmp_path, "x-") == []
        owner.kill()
        owner.wait()
        assert remove_abandoned(tmp_path, "x-") == [path]
        assert not path.exists()
