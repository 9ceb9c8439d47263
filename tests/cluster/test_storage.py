from __future__ import annotations

from pathlib import Path

import pytest

from cluster.errors import InputError, MachineError
from cluster.storage import disk_trouble, free_gib, local_folder, writable_folder


def test_a_folder_is_made_absolute_and_need_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert local_folder("./runs", "output") == tmp_path / "runs"
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("reference", ["s3://bucket/runs", "gs://bucket", "file:///tmp/x", "s3:/bucket/runs"])
def test_object_stores_are_refused_by_name(reference: str) -> None:
    with pytest.raises(InputError, match=f"output: must be a folder of this machine.*got '{reference}'"):
        local_folder(reference, "output")


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="a file stands there"):
        local_folder(str(tmp_path / "file"), "output")


def test_a_folder_that_can_be_made_is_not_made_yet(tmp_path: Path) -> None:
    assert writable_folder(str(tmp_path / "a" / "b"), "output") == tmp_path / "a" / "b"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folder", ["/proc/x", "/sys/foo/bar", "{tmp}/file/runs", "{tmp}/" + 300 * "x"])
def test_a_folder_that_cannot_be_made(folder: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = folder.format(tmp=tmp_path)
    with pytest.raises(MachineError, match=rf"output: cannot write {path} \([A-Z].+\); choose another"):
        writable_folder(path, "output")


def test_trouble_names_the_path_that_the_system_names(tmp_path: Path) -> None:
    named = rf"output: cannot write {tmp_path}/none/x \(No such file or directory\)"
    with pytest.raises(MachineError, match=named), disk_trouble("output", tmp_path):
        (tmp_path / "none" / "x").write_text("")


def test_a_full_disk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"GiB free, but 1000000000\.0 GiB are needed"):
        writable_folder(str(tmp_path), "output", need_gib=1e9)


def test_free_space_of_a_folder_that_does_not_exist_yet(tmp_path: Path) -> None:
    assert free_gib(tmp_path / "x" / "y") == pytest.approx(free_gib(tmp_path), rel=0.05)
