"""Many at once, crashes and outages: the same over a folder and over S3."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from cluster.errors import InputError, MachineError
from serving.registry import Registry, RegistryUnreachableError, files
from serving.registry.events import EVENT, Moved, Published
from serving.registry.store import LocalStore
from tests.serving.conftest import Publish
from tests.serving.make import identity, make_adapter
from tests.serving.s3 import S3Server, s3_server
from tests.serving.writers import at_once, context, crashing_publisher, mover, publisher


def test_publishers_at_once_all_succeed(registry: Registry, adapter: Path, base: Path) -> None:
    job = publisher, (registry.root, adapter, identity(base), 2)
    reader, seen = Registry(registry.root), set[int]()
    with at_once([job] * 8) as publishers:
        while any(one.is_alive() for one in publishers):  # a reader never sees half a version
            reader.refresh()
            for version in set(reader.versions("support")) - seen:
                reader.verify(reader.manifest("support", version))
                seen.add(version)
            time.sleep(0.02)
        assert [one.exitcode for one in publishers] == [0] * 8
    reader.refresh()
    assert reader.versions("support") == list(range(1, 17))
    assert [event.seq for event in Registry(registry.root).history("support")] == list(range(1, 17))


def test_movers_at_once_are_all_in_the_history(registry: Registry, publish: Publish) -> None:
    publish()
    publish()
    with at_once([(mover, (registry.root, who, 10)) for who in ("ann", "bob")]) as movers:
        for one in movers:
            one.join(60)
        assert [one.exitcode for one in movers] == [0, 0]
    moves = [event for event in Registry(registry.root).history("support") if isinstance(event, Moved)]
    assert [move.seq for move in moves] == list(range(3, len(moves) + 3))
    assert {move.by for move in moves} == {"ann", "bob"}
    for before, after in itertools.pairwise(moves):  # each one saw the one before it
        assert after.before == before.target != after.target


def test_a_crash_in_mid_publish_leaves_nothing_visible(
    registry: Registry, publish: Publish, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_adapter(tmp_path / "other", base, seed=7)
    spawn = context()
    reached = spawn.Event()
    crashing = spawn.Process(target=crashing_publisher, args=(reached, registry.root, other, identity(base)))
    crashing.start()
    assert reached.wait(60)
    os.kill(crashing.pid, signal.SIGKILL)
    crashing.join()
    left = registry._store.keys("support")
    assert len(left) == 2
    assert (registry.names(), Registry(registry.root).versions("support")) == ([], [])
    assert publish().version == 1
    assert len(registry._store.keys("support")) == 4
    assert registry.sweep() == []  # too young: its publisher may live
    monkeypatch.setattr(files, "SWEEP_AFTER", timedelta(seconds=-5))  # as if it were a day later
    assert registry.sweep(["support"]) == [left[0].key.rpartition("/")[0]]
    registry.verify(registry.resolve("support"))
    assert len(registry._store.keys("support")) == 2


def test_what_was_removed_is_swept_when_nobody_needs_it(
    registry: Registry, publish: Publish, adapter: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, again = publish(), publish()
    second = registry.publish(
        "support", make_adapter(tmp_path / "b", base, seed=3), identity(base), metrics={}, lineage={}
    )
    monkeypatch.setattr(files, "SWEEP_AFTER", timedelta(seconds=-5))
    registry.remove(first.id)
    assert registry.sweep() == []  # the same content is support@2
    registry.remove(again.id)
    assert registry.sweep() == [f"support/{first.digest[:16]}"]
    registry.verify(second)
    assert publish().version == 4  # the content comes back with a version
    registry.verify(registry.resolve("support"))


def test_nothing_is_swept_that_only_others_know_of(
    registry: Registry, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "SWEEP_AFTER", timedelta(seconds=-5))
    stale = Registry(registry.root)
    assert stale.names() == []
    manifest = publish()
    assert stale.sweep() == []
    registry._store.delete(["_log/000000000001.json"])
    registry._store.create("_log/000000000001.json", b"{")
    assert Registry(registry.root).sweep() == []
    registry.verify(manifest)


def test_a_thousand_adapters_are_read_in_a_moment(tmp_path: Path, adapter: Path, base: Path) -> None:
    registry = Registry(tmp_path / "registry")
    manifest = registry.publish("n0001", adapter, identity(base), metrics={"eval_loss": 1.0}, lineage={"trial": "t1"})
    first = registry.history("n0001")[0]
    assert isinstance(first, Published)
    for seq in range(2, 1001):
        event = first.model_copy(update={"seq": seq, "manifest": manifest.model_copy(update={"name": f"n{seq:04}"})})
        (tmp_path / "registry" / "_log" / f"{seq:012}.json").write_bytes(EVENT.dump_json(event))
    reader = Registry(registry.root)
    began = time.perf_counter()
    assert len(reader.names()) == 1000
    opened = time.perf_counter()
    assert not reader.refresh()
    refresh_ms = 1000 * (time.perf_counter() - opened)
    print(f"1,000 adapters: opened in {opened - began:.2f} s, asked for news in {refresh_ms:.2f} ms")  # noqa: T201
    assert opened - began < 10


# outages


@pytest.fixture
def server() -> Iterator[S3Server]:
    """One that can be stopped without harm to other tests."""
    with s3_server() as server:
        server.make_bucket("outage")
        yield server


def test_an_unreachable_store_is_told_and_what_was_read_stays(
    server: S3Server, adapter: Path, base: Path, tmp_path: Path
) -> None:
    registry, fresh = (Registry(server.uri("outage/registry")) for _ in range(2))
    manifest = registry.publish("support", adapter, identity(base), metrics={}, lineage={})
    server.stop()
    began = time.monotonic()
    for call in (
        registry.refresh,
        lambda: registry.verify(manifest),
        lambda: registry.move("support", "prod", 1),
        lambda: registry.publish("support", adapter, identity(base), metrics={}, lineage={}),
        fresh.names,
        fresh.names,  # what was never read is not taken for empty
    ):
        with pytest.raises(RegistryUnreachableError, match=r"s3://outage/registry does not answer \("):
            call()
    assert time.monotonic() - began < 60
    assert registry.resolve("support@1") == manifest
    assert registry.names() == ["support"]
    server.start()
    assert not registry.refresh()
    assert registry.move("support", "prod", 1).seq == 2
    registry.verify(manifest)
    assert fresh.aliases("support") == {"latest": 1, "prod": 1}


def test_a_folder_that_cannot_be_read(tmp_path: Path, adapter: Path, base: Path) -> None:
    registry = Registry(tmp_path / "registry")
    registry.publish("support", adapter, identity(base), metrics={}, lineage={})
    (tmp_path / "registry" / "_log" / "000000000002.json").mkdir()
    with pytest.raises(RegistryUnreachableError, match=r"000000000002\.json \(Is a directory\)"):
        registry.refresh()
    assert registry.resolve("support").version == 1


def test_a_bucket_that_is_not_there(s3: S3Server, adapter: Path, base: Path) -> None:
    registry = Registry(s3.uri("nowhere/registry"))
    for call in (
        registry.exists,
        registry.refresh,
        registry.names,
        lambda: registry.publish("support", adapter, identity(base), metrics={}, lineage={}),
    ):
        with pytest.raises(InputError, match="registry: its bucket must exist, got 's3://nowhere/registry'"):
            call()


def test_a_failing_copy_leaves_nothing(registry: Registry, publish: Publish, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("serving.registry.registry.copy_hashed", full)
    with pytest.raises(MachineError, match=r"the registry: cannot write .* \(No space left on device\)"):
        publish()
    assert registry._store.keys("") == []
    if isinstance(registry._store, LocalStore):
        assert list(registry._store.folder.iterdir()) == []


def test_a_registry_that_cannot_be_made_or_written(adapter: Path, base: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for root in ("/proc/r", "/sys/r", str(tmp_path / "file" / "r")):
        with pytest.raises(MachineError, match=rf"the registry: cannot write {root} \("):
            Registry(root).publish("support", adapter, identity(base), metrics={}, lineage={})


def test_what_killed_writers_leave_in_a_folder_is_removed(tmp_path: Path, adapter: Path, base: Path) -> None:
    registry = Registry(tmp_path / "registry")
    left = tmp_path / "registry" / ".publish-x"
    left.mkdir(parents=True)
    (left / "draft").touch()
    registry.publish("support", adapter, identity(base), metrics={}, lineage={})
    assert left.exists()  # too young to be sure that nobody is about to lock it
    old = (datetime.now(UTC) - timedelta(hours=1)).timestamp()
    os.utime(left, (old, old))
    registry.move("support", "prod", 1)
    assert {path.name for path in (tmp_path / "registry").iterdir()} == {"_log", "support"}
