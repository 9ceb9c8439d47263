from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import InputError, MachineError, NotFoundError
from serving.manifest import BaseIdentity, Manifest
from serving.registry import CorruptAdapterError, Registry
from tests.serving.adapters import edit_config, identity, make_adapter

Publish = Callable[..., Manifest]

PUBLISHER = """
import sys
from pathlib import Path
from serving.manifest import BaseIdentity
from serving.registry import Registry
root, adapter, model, fingerprint, times = sys.argv[1:]
base = BaseIdentity(model=model, fingerprint=fingerprint)
print("ready", flush=True)
sys.stdin.readline()
for _ in range(int(times)):
    print(Registry(root).publish("support", Path(adapter), base, metrics={}, lineage={}).id, flush=True)
"""

STOPPED_PUBLISHER = """
import sys, time
from pathlib import Path
import serving.registry as module
# Stop where everything is written and nothing is renamed yet.
module._sync_folder = lambda path: (print(path, flush=True), time.sleep(60))
""" + PUBLISHER.replace("sys.stdin.readline()", "")


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return make_adapter(tmp_path / "adapter", base)


@pytest.fixture
def publish(registry: Registry, adapter: Path, base: Path) -> Publish:
    def call(name: str = "support", **options: Any) -> Manifest:
        facts: dict[str, Any] = {"metrics": {}, "lineage": {}}
        return registry.publish(name, adapter, identity(base), **(facts | options))

    return call


def start(script: str, registry: Registry, adapter: Path, base: BaseIdentity, times: int = 1) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, str(registry.root), str(adapter), base.model, base.fingerprint, str(times)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


def test_what_is_published_is_there(registry: Registry, publish: Publish, adapter: Path, base: Path) -> None:
    manifest = publish(metrics={"eval_loss": 1.25}, lineage={"sweep": "s", "trial": 3, "lr": 1e-4, "note": None})
    assert (
        manifest == registry.resolve("support") == registry.resolve("support@1") == registry.resolve("support@latest")
    )
    assert (manifest.id, manifest.rank, manifest.alpha, manifest.rslora) == ("support@1", 4, 8.0, False)
    assert (manifest.metrics, manifest.base) == ({"eval_loss": 1.25}, identity(base))
    assert manifest.lineage == {"sweep": "s", "trial": 3, "lr": 1e-4, "note": None}
    assert abs((datetime.now(UTC) - manifest.created_at).total_seconds()) < 60
    path = registry.path(manifest)
    assert path == registry.root / "support" / "1"
    assert {file.name for file in path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
    }
    for name, sha256 in manifest.files.items():
        assert hashlib.sha256((adapter / name).read_bytes()).hexdigest() == sha256
        assert (path / name).read_bytes() == (adapter / name).read_bytes()
    registry.verify(manifest)


def test_versions_count_up_and_latest_follows(registry: Registry, publish: Publish) -> None:
    assert [publish().version for _ in range(11)] == list(range(1, 12))
    publish("other")
    assert registry.names() == ["other", "support"]
    assert registry.versions("support") == list(range(1, 12))
    assert registry.aliases("support") == {"latest": 11}
    assert registry.resolve("support").version == 11
    assert registry.resolve("support@2").version == 2


def test_only_the_adapter_is_copied(registry: Registry, publish: Publish, adapter: Path) -> None:
    (adapter / "README.md").write_text("model card")
    (adapter / "checkpoint").mkdir()
    assert not (registry.path(publish()) / "README.md").exists()


def test_a_registry_that_is_not_there_is_empty(registry: Registry) -> None:
    assert (registry.names(), registry.versions("support"), registry.aliases("support")) == ([], [], {})
    with pytest.raises(NotFoundError, match=r"support: there is no such adapter in .* \(it is empty\)"):
        registry.resolve("support")
    assert not registry.root.exists()


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("none", "there are: support"),
        ("support@3", "there are: 1, 2"),
        ("support@prod", "it has: latest"),
        ("none@1", "no such adapter"),
    ],
)
def test_what_is_not_there_is_said_with_what_is(
    registry: Registry, publish: Publish, reference: str, message: str
) -> None:
    publish()
    publish()
    with pytest.raises(NotFoundError, match=message):
        registry.resolve(reference)


@pytest.mark.parametrize(
    "reference", ["../adapter", "..", ".", "", "support@../1", "/etc", "support/1", "support@1/.."]
)
def test_names_never_climb(registry: Registry, publish: Publish, reference: str) -> None:
    publish()
    with pytest.raises(InputError):
        registry.resolve(reference)
    with pytest.raises(NotFoundError):
        registry.manifest(reference, 1)
    assert registry.versions(reference) == []


def test_strangers_in_the_folder_are_no_adapters(registry: Registry, publish: Publish) -> None:
    publish()
    for stranger in (
        ".publish-x/1",
        "Upper/1",
        "empty",
        "support/02",
        "support/x",
        "support/.tmp",
        "support/-1",
        "support/³",
    ):
        (registry.root / stranger).mkdir(parents=True)
    (registry.root / "file").touch()
    (registry.root / "support" / "7").touch()
    assert registry.names() == ["support"]
    assert registry.versions("support") == [1]


def test_all_faults_come_at_once_and_nothing_is_written(registry: Registry, publish: Publish, adapter: Path) -> None:
    edit_config(adapter, r=100, use_dora=True)
    with pytest.raises(InputError) as caught:
        publish("../evil", max_rank=64, metrics={"loss": float("nan")}, lineage={"x": object()})
    text = str(caught.value)
    for part in ("name:", "adapter_config.json: r", "use_dora", "metrics.loss", "lineage.x"):
        assert part in text
    assert not registry.root.exists()


@pytest.mark.parametrize("damage", ["missing", "byte", "cut", "longer"])
def test_a_changed_file_is_found(registry: Registry, publish: Publish, tmp_path: Path, damage: str) -> None:
    manifest = publish()
    path = registry.path(manifest) / "adapter_model.safetensors"
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"byte": content[:-1] + b"\x01", "cut": content[:-1], "longer": content + b"\0"}[damage])
    (tmp_path / "copy").mkdir()
    for check in (lambda: registry.verify(manifest), lambda: registry.fetch(manifest, tmp_path / "copy")):
        with pytest.raises(CorruptAdapterError, match=r"support@1 is corrupt: adapter_model\.safetensors"):
            check()


def test_fetch_copies(registry: Registry, publish: Publish, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    registry.fetch(publish(), tmp_path / "copy")
    assert (tmp_path / "copy" / "adapter_config.json").read_bytes() == (adapter / "adapter_config.json").read_bytes()


@pytest.mark.parametrize("content", [None, "", "{", "{}", '{"name": "support"}', "swap"])
def test_a_manifest_that_cannot_be_read(registry: Registry, publish: Publish, content: str | None) -> None:
    path = registry.path(publish()) / "manifest.json"
    other = registry.path(publish()) / "manifest.json"
    if content is None:
        path.unlink()
    else:
        path.write_text(other.read_text() if content == "swap" else content)
    with pytest.raises(CorruptAdapterError, match=r"support@1 is corrupt: manifest\.json"):
        registry.resolve("support@1")
    assert registry.resolve("support").version == 2
    assert registry.versions("support") == [1, 2]


def test_publishers_at_once_all_succeed(registry: Registry, publish: Publish, adapter: Path, base: Path) -> None:
    publishers = [start(PUBLISHER, registry, adapter, identity(base), times=6) for _ in range(3)]
    for publisher in publishers:
        assert line_of(publisher) == "ready"
    for publisher in publishers:
        assert publisher.stdin
        publisher.stdin.write("go\n")
        publisher.stdin.flush()
    seen: set[int] = set()
    while any(publisher.poll() is None for publisher in publishers):  # a reader never sees half a version
        for version in registry.versions("support"):
            if version not in seen:
                registry.verify(registry.manifest("support", version))
                seen.add(version)
        time.sleep(0.002)
    ids = [line for publisher in publishers for line in publisher.communicate()[0].split()]
    assert sorted(ids, key=lambda text: int(text.partition("@")[2])) == [f"support@{number}" for number in range(1, 19)]
    assert registry.versions("support") == list(range(1, 19))
    assert {path.name for path in registry.root.iterdir()} == {"support"}


def test_a_crash_in_mid_publish_leaves_nothing_visible(
    registry: Registry, publish: Publish, adapter: Path, base: Path
) -> None:
    publisher = start(STOPPED_PUBLISHER, registry, adapter, identity(base))
    assert line_of(publisher) == "ready"
    half = Path(line_of(publisher))
    assert (half / "manifest.json").is_file()
    assert (registry.names(), registry.versions("support")) == ([], [])
    publisher.send_signal(signal.SIGKILL)
    publisher.communicate()
    assert (registry.names(), registry.versions("support")) == ([], [])
    assert publish().version == 1
    assert half.exists()  # too young to be sure that nobody is about to lock it
    old = time.time() - 3600
    os.utime(half, (old, old))
    assert publish().version == 2
    assert {path.name for path in registry.root.iterdir()} == {"support"}


def test_a_failing_copy_leaves_nothing(
    registry: Registry, publish: Publish, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("serving.registry.copy_hashed", full)
    with pytest.raises(MachineError, match=rf"the registry: cannot write {registry.root} \(No space left on device\)"):
        publish()
    assert list(registry.root.iterdir()) == []


def test_a_registry_that_cannot_be_made_or_written(adapter: Path, base: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for root in ("/proc/r", "/sys/r", str(tmp_path / "file" / "r")):
        with pytest.raises(MachineError, match=rf"the registry: cannot write {root} \("):
            Registry(root).publish("support", adapter, identity(base), metrics={}, lineage={})


def test_numbers_are_not_used_again_while_a_higher_one_is_there(registry: Registry, publish: Publish) -> None:
    for _ in range(3):
        publish()
    shutil.rmtree(registry.root / "support" / "2")
    assert publish().version == 4
