from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from serving.adapters.cache import AdapterCache, default_folder
from serving.manifest import Manifest
from serving.registry import CorruptAdapterError, Registry
from serving.registry.errors import RegistryUnreachableError
from tests.serving.make import identity, make_adapter
from tests.serving.s3 import s3_server

HOLDER = """
import sys
from pathlib import Path
from serving.adapters.cache import AdapterCache
from serving.registry import Registry
registry = Registry(sys.argv[1])
path = AdapterCache(registry, Path(sys.argv[2])).hold(registry.resolve(sys.argv[3]))
print(path, flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def root(tmp_path: Path) -> str:
    return str(tmp_path / "registry")


@pytest.fixture
def versions(registry: Registry, base: Path, tmp_path: Path) -> list[Manifest]:
    """Four versions of the same size and different content."""
    return [
        registry.publish(
            "support", make_adapter(tmp_path / f"a{seed}", base, seed=seed), identity(base), metrics={}, lineage={}
        )
        for seed in range(4)
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def sized(registry: Registry, folder: Path, manifest: Manifest, copies: float) -> AdapterCache:
    """A cache that is bounded at ``copies`` times the size of a version."""
    size = sum((registry.path(manifest) / file).stat().st_size for file in manifest.files)
    return AdapterCache(registry, folder, limit_gib=copies * size / 2**30)


def weights(copy: Path) -> Path:
    return copy / "adapter_model.safetensors"


def held_elsewhere(registry: Registry, folder: Path, manifest: Manifest) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLDER, registry.root, str(folder), manifest.id]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline().strip() == str(folder / manifest.digest)
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_a_copy_is_what_was_published(registry: Registry, folder: Path, versions: list[Manifest]) -> None:
    cache = AdapterCache(registry, folder)
    for manifest in versions:
        copy = cache.hold(manifest)
        for file in manifest.files:
            assert (copy / file).read_bytes() == (registry.path(manifest) / file).read_bytes()
    assert len(set(folder.glob("*/"))) == 4
    assert cache.size() == sum(
        (registry.path(manifest) / file).stat().st_size for manifest in versions for file in manifest.files
    )
    cache.close()


def test_the_cache_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "loraloom" / "adapters"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_folder() == Path.home() / ".cache" / "loraloom" / "adapters"


def test_a_copy_is_taken_again_without_the_registry(registry: Registry, folder: Path, versions: list[Manifest]) -> None:
    first = AdapterCache(registry, folder)
    copy = first.hold(versions[0])
    weights(registry.path(versions[0])).unlink()
    assert AdapterCache(registry, folder).hold(versions[0]) == copy
    with pytest.raises(CorruptAdapterError, match=r"support@1 is corrupt"):
        AdapterCache(registry, folder.with_name("other")).hold(versions[0])


@pytest.mark.parametrize("damage", ["byte", "cut", "missing", "folder", "empty folder"])
def test_a_wrong_copy_is_fetched_anew(registry: Registry, folder: Path, versions: list[Manifest], damage: str) -> None:
    cache = AdapterCache(registry, folder)
    copy = cache.hold(versions[0])
    cache.release(versions[0].digest)
    content = weights(copy).read_bytes()
    if damage in ("byte", "cut"):
        weights(copy).write_bytes(content[:-1] + (b"\x01" if damage == "byte" else b""))
    else:
        weights(copy).unlink()
    if damage == "folder":
        weights(copy).mkdir()
    elif damage == "empty folder":
        (copy / "adapter_config.json").unlink()
    assert cache.hold(versions[0]) == copy
    assert weights(copy).read_bytes() == content
    assert not list(folder.glob(".fetch*"))


def test_the_least_recently_used_copy_goes_first(registry: Registry, folder: Path, versions: list[Manifest]) -> None:
    cache = sized(registry, folder, versions[0], 2.5)
    for age, manifest in ((30, versions[0]), (10, versions[1])):
        copy = cache.hold(manifest)
        cache.release(manifest.digest)
        past = copy.stat().st_mtime - age
        os.utime(copy, (past, past))
    cache.hold(versions[0])  # used again
    cache.release(versions[0].digest)
    cache.hold(versions[2])
    assert {path.name for path in folder.glob("*/")} == {versions[0].digest, versions[2].digest}
    assert {path.name for path in folder.iterdir()} == {
        name for manifest in (versions[0], versions[2]) for name in (manifest.digest, f"{manifest.digest}.lock")
    }


def test_what_is_held_is_never_removed(registry: Registry, folder: Path, versions: list[Manifest]) -> None:
    cache = sized(registry, folder, versions[0], 1.5)
    other = held_elsewhere(registry, folder, versions[0])
    try:
        cache.hold(versions[1])
        cache.hold(versions[1])
        cache.release(versions[1].digest)  # once of two times
        cache.hold(versions[2])
        assert {path.name for path in folder.glob("*/")} == {manifest.digest for manifest in versions[:3]}
    finally:
        end(other)
    cache.release(versions[1].digest)
    cache.hold(versions[3])  # the killed process holds nothing any more
    assert {path.name for path in folder.glob("*/")} == {versions[2].digest, versions[3].digest}
    cache.release("nobody")


def test_threads_and_processes_at_once(registry: Registry, folder: Path, versions: list[Manifest]) -> None:
    others = [held_elsewhere(registry, folder, versions[number]) for number in (0, 1)]
    cache = sized(registry, folder, versions[0], 2.5)

    def use(number: int) -> None:
        manifest = versions[number % 4]
        copy = cache.hold(manifest)
        assert weights(copy).read_bytes() == weights(registry.path(manifest)).read_bytes()
        cache.release(manifest.digest)

    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(use, range(64)))
        assert {manifest.digest for manifest in versions[:2]} <= {path.name for path in folder.glob("*/")}
    finally:
        for other in others:
            end(other)
    assert not list(folder.glob(".*"))


def test_a_registry_that_does_not_answer_takes_no_copy_away(
    adapter: Path, base: Path, folder: Path, tmp_path: Path
) -> None:
    with s3_server() as server:
        server.make_bucket("bucket")
        registry = Registry(server.uri("bucket/cache"))
        first = registry.publish("support", adapter, identity(base), metrics={}, lineage={})
        second = registry.publish(
            "support", make_adapter(tmp_path / "second", base, seed=9), identity(base), metrics={}, lineage={}
        )
        cache = AdapterCache(registry, folder)
        copy = cache.hold(first)
        cache.release(first.digest)
        server.stop()
        assert cache.hold(first) == copy
        with pytest.raises(RegistryUnreachableError):
            cache.hold(second)
        server.start()
        assert weights(cache.hold(second)).is_file()
    cache.close()
