"""The cache of quantised bases: made once, the same bit for bit, and never in the way."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
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
    assert bases(own_cache) == [cache_key(spec)]


def test_what_the_weights_depend_on_is_in_the_key(model: Path) -> None:
    spec = spec_of(model)
    key = cache_key(spec)
    assert key == cache_key(spec_of(model, gradient_checkpointing=True))
    assert key != cache_key(spec_of(model, compute_dtype="float32"))
    weights = model / "model.safetensors"
    os.utime(weights, ns=(0, 0))
    assert cache_key(spec) != key


def test_code_of_the_model_s_own_and_whoever_wants_none_have_no_cache(model: Path, own_cache: Path) -> None:
    assert cache_key(spec_of(model, trust_remote_code=True)) is None
    Base(spec_of(model, cache=False))
    assert not own_cache.exists()


def test_a_damaged_cache_is_told_and_made_anew(model: Path, own_cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    spec = spec_of(model)
    first = Base(spec)
    weights = own_cache / str(cache_key(spec)) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with caplog.at_level(logging.WARNING):
        second = Base(spec)
    assert "cannot be read, and is made anew" in caplog.text
    assert second.report == first.report
    assert bases(own_cache) == []
    Base(spec)
    assert bases(own_cache) == [cache_key(spec)]


def test_without_a_place_for_it_bases_are_loaded_all_the_same(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        assert Base(spec_of(model)).report.parameters > 0
    assert "no cache of quantised bases here" in caplog.text


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
        keys.append(cache_key(spec_of(copy)))
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
def counting(model, folder):
    print("quantised", flush=True)
    store(model, folder)
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
