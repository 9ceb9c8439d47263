"""The cache of quantised bases: made once, the same bit for bit, and never in the way."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import make_base
from tuning.engine import base_cache
from tuning.engine.base import Base
from tuning.engine.base_cache import KEPT, cache_folder, cache_key, load_cached
from tuning.spec import BaseSpec


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "loraloom" / "bases"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_base(tmp_path / "model")


def spec_of(model: Path, **fields: Any) -> BaseSpec:
    return BaseSpec(model=str(model), **fields)


@pytest.fixture
def spec(model: Path) -> BaseSpec:
    return spec_of(model)


@pytest.fixture
def stored(spec: BaseSpec) -> Path:
    """The folder of a base in the cache, with one file."""
    return store(spec)


class Weights:
    """A model as far as the cache knows one."""

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_text("weights")


def store(spec: BaseSpec) -> Path:
    """Have the cache keep ``Weights`` for ``spec``; returns where."""
    load_cached(spec, Weights, refuse)
    return cache_folder() / str(cache_key(spec, "cpu"))


def unwanted() -> Any:
    pytest.fail("the base is in the cache")


def refuse(*_: Any) -> Any:
    raise PermissionError(errno.EPERM, "Operation not permitted")


@contextmanager
def locked_elsewhere(path: Path) -> Generator[None]:
    """Another holder of the kernel's lock; a second descriptor is as good as a second process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def bases(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir())


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_a_cached_base_is_the_same_bit_for_bit(model: Path, own_cache: Path, compute_dtype: Any) -> None:
    spec = spec_of(model, compute_dtype=compute_dtype)
    first = Base(spec)
    (model / "model.safetensors").rename(model / "gone")  # so the second cannot be quantised again
    stat = (model / "gone").stat()
    (model / "model.safetensors").write_bytes(b"\0" * stat.st_size)
    os.utime(model / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    second = Base(spec)
    ours, theirs = second.model.state_dict(), first.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) and ours[name].dtype == value.dtype for name, value in theirs.items())
    assert second.report == first.report
    ids = torch.arange(20)[None]
    assert torch.equal(second.head(second.features(ids)), first.head(first.features(ids)))
    assert bases(own_cache) == [cache_key(spec, "cpu")]


def test_what_the_weights_depend_on_is_in_the_key(model: Path) -> None:
    spec = spec_of(model, compute_dtype="float32")
    key = cache_key(spec, "cpu")
    assert key == cache_key(spec_of(model, compute_dtype="float32", gradient_checkpointing=True), "cpu")
    assert key != cache_key(spec_of(model, compute_dtype="bfloat16"), "cpu")
    assert key != cache_key(spec, "cuda")
    weights = model / "model.safetensors"
    os.utime(weights, ns=(0, 0))
    assert cache_key(spec, "cpu") != key


def test_code_of_the_model_s_own_and_whoever_wants_none_have_no_cache(model: Path, own_cache: Path) -> None:
    assert cache_key(spec_of(model, trust_remote_code=True), "cpu") is None
    Base(spec_of(model, cache=False))
    assert not own_cache.exists()


def test_a_damaged_cache_is_told_and_made_anew(model: Path, own_cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    spec = spec_of(model)
    first = Base(spec)
    weights = own_cache / str(cache_key(spec, "cpu")) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with caplog.at_level(logging.WARNING):
        second = Base(spec)
    assert "cannot be read, and is made anew" in caplog.text
    assert second.report == first.report
    assert bases(own_cache) == [cache_key(spec, "cpu")]
    (note,) = second.notes
    assert note.startswith(f"{weights.parent}: the quantised base cannot be read, and is made anew: ")
    caplog.clear()
    third = Base(spec)
    assert third.report == first.report
    assert third.notes == []
    assert caplog.text == ""


def test_memory_that_is_short_does_not_harm_the_cache(stored: Path, spec: BaseSpec) -> None:
    """It is short on this device at this moment; the files are as good as before, and other hosts read them."""
    errors = torch.OutOfMemoryError("CUDA out of memory"), OSError(errno.ENOMEM, "Cannot allocate memory")
    for error in errors:

        def read(_: Path, error: Exception = error) -> Any:
            raise error

        with pytest.raises(type(error), match="memory"):
            load_cached(spec, unwanted, read)
    assert (stored / "model.safetensors").read_text() == "weights"


def test_a_cache_that_may_only_be_read_is_as_good(
    stored: Path, spec: BaseSpec, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "utime", refuse)
    assert load_cached(spec, unwanted, lambda folder: folder) == stored
    assert caplog.text == ""


def test_what_another_host_has_made_anew_is_not_removed(stored: Path, spec: BaseSpec) -> None:
    seen: list[Path] = []

    def read(folder: Path) -> str:
        seen.append(folder)
        if len(seen) == 1:
            folder.rename(folder.with_name("damaged"))
            folder.mkdir()
            (folder / "model.safetensors").write_text("made anew")
            raise ValueError("damaged")
        return (folder / "model.safetensors").read_text()

    assert load_cached(spec, unwanted, read) == "made anew"
    assert seen == [stored, stored]


def test_half_written_bases_are_not_counted_and_removed_where_nobody_writes(
    model: Path, own_cache: Path, tmp_path: Path
) -> None:
    for index in range(KEPT - 1):
        store(spec_of(shutil.copytree(model, tmp_path / f"copy{index}")))
    for name in ("stale", "busy"):
        (own_cache / f"{name}.writing").mkdir()
        os.utime(own_cache / f"{name}.writing", (0, 0))
    before = bases(own_cache)
    with locked_elsewhere(own_cache / "busy.lock"):
        store(spec_of(model))
    now = bases(own_cache)
    assert set(now) == {*before, cache_key(spec_of(model), "cpu")} - {"stale.writing"}
    assert "busy.writing" in now


def test_a_base_that_another_host_has_just_locked_stays(model: Path, own_cache: Path, tmp_path: Path) -> None:
    for index in range(KEPT):
        spec = spec_of(shutil.copytree(model, tmp_path / f"copy{index}"))
        store(spec)
        os.utime(own_cache / str(cache_key(spec, "cpu")), (index, index))
    oldest = str(cache_key(spec_of(tmp_path / "copy0"), "cpu"))
    with locked_elsewhere(own_cache / f"{oldest}.lock"):
        store(spec_of(model))
    assert oldest in bases(own_cache)
    assert len(bases(own_cache)) == KEPT + 1


def test_a_file_system_without_locks_has_no_cache(
    spec: BaseSpec, own_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", missing)
    assert isinstance(load_cached(spec, Weights, refuse), Weights)
    assert "no cache of quantised bases here" in caplog.text
    assert bases(own_cache) == []


def test_a_host_that_hangs_is_not_waited_for_for_ever(
    spec: BaseSpec, own_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(base_cache, "LOCK_S", 0.3)
    with locked_elsewhere(own_cache / f"{cache_key(spec, 'cpu')}.lock"):
        assert isinstance(load_cached(spec, Weights, refuse), Weights)
    assert "going on without the cache" in caplog.text
    assert bases(own_cache) == []


def test_a_base_has_its_name_only_when_it_is_on_the_disk(
    spec: BaseSpec, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        assert synced or bases(own_cache) == [f"{cache_key(spec, 'cpu')}.writing"]
        synced.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    folder = store(spec)
    written = {path.stat().st_ino for path in (*folder.rglob("*"), folder)}
    assert set(synced[:-1]) == written
    assert synced[-1] == own_cache.stat().st_ino


def test_without_a_place_for_it_bases_are_loaded_all_the_same(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        base = Base(spec_of(model))
    assert base.report.parameters > 0
    (note,) = base.notes
    assert note.startswith(f"{tmp_path}/file/loraloom/bases: no cache of quantised bases here: ")
    assert note in caplog.text


def test_a_copy_that_breaks_off_leaves_nothing(model: Path, own_cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Full:
        def save_pretrained(self, folder: Path) -> None:
            folder.mkdir(parents=True)
            (folder / "model.safetensors").write_text("half")
            raise OSError(28, "No space left on device")

    with caplog.at_level(logging.WARNING):
        assert isinstance(load_cached(spec_of(model), Full, lambda _: None), Full)
    assert "No space left on device" in caplog.text
    assert bases(own_cache) == []


def test_the_bases_used_last_are_kept(model: Path, own_cache: Path, tmp_path: Path) -> None:
    keys: list[str | None] = []
    for index in range(KEPT + 2):
        copy = shutil.copytree(model, tmp_path / f"copy{index}")
        Base(spec_of(copy))
        keys.append(cache_key(spec_of(copy), "cpu"))
        os.utime(own_cache / str(keys[-1]), (index, index))
        if index == KEPT - 1:
            Base(spec_of(tmp_path / "copy0"))
            os.utime(own_cache / str(keys[0]), (index + 0.5, index + 0.5))
    assert set(bases(own_cache)) == {keys[0], *keys[3:]}
    assert cache_folder() == own_cache


ONE_HOST = """
import sys
from tuning.engine import base_cache
from tuning.engine.base import Base
from tuning.spec import BaseSpec

store = base_cache._store
def counting(*arguments):
    print("quantised", flush=True)
    store(*arguments)
base_cache._store = counting
Base(BaseSpec(model=sys.argv[1]))
"""


@pytest.mark.slow
def test_hosts_that_start_together_quantise_once(model: Path) -> None:
    command = [sys.executable, "-c", ONE_HOST, str(model)]
    root = Path(base_cache.__file__).parents[2]
    hosts = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) for _ in range(3)]
    outs = [host.communicate(timeout=200)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0, 0]
    assert "".join(outs).split().count("quantised") == 1
