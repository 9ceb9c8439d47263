"""Registries from before there was a log are read as they are, and adopted by the first write."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cluster.errors import NotFoundError
from serving.manifest import Manifest
from serving.registry import CorruptAdapterError, CorruptRegistryError, Registry
from serving.registry.events import Adopted
from tests.serving.conftest import Publish
from tests.serving.make import identity, make_adapter


@pytest.fixture
def root(tmp_path: Path) -> str:
    return str(tmp_path / "registry")


@pytest.fixture
def old(root: str, tmp_path: Path, base: Path) -> list[Manifest]:
    """Three versions, each in ``name/version/`` with its manifest, as they were written then."""
    manifests: list[Manifest] = []
    for number, (name, version) in enumerate((("sales", 1), ("support", 1), ("support", 10))):
        adapter = make_adapter(tmp_path / f"old-{number}", base, seed=number)
        published = Registry(tmp_path / "elsewhere").publish(name, adapter, identity(base), metrics={}, lineage={})
        manifest = published.model_copy(update={"version": version})
        folder = Path(root, name, str(version))
        shutil.copytree(adapter, folder)
        (folder / "manifest.json").write_text(manifest.model_dump_json(indent=2) + "\n")
        manifests.append(manifest)
    return manifests


def check(registry: Registry, old: list[Manifest]) -> None:
    assert registry.names() == ["sales", "support"]
    assert registry.versions("support")[:2] == [1, 10]
    for manifest in old:
        assert registry.resolve(manifest.id) == manifest
        assert registry.path(manifest) == Path(registry.root, manifest.name, str(manifest.version))
        registry.verify(manifest)


def test_reading_changes_nothing(registry: Registry, old: list[Manifest]) -> None:
    check(registry, old)
    assert registry.aliases("support") == {"latest": 10}
    assert not Path(registry.root, "_log").exists()
    assert not registry.refresh()


def test_the_first_write_adopts_them_once(registry: Registry, old: list[Manifest], publish: Publish) -> None:
    reader = Registry(registry.root)
    check(reader, old)
    registry.move("support", "prod", 1)
    assert publish().id == "support@11"
    assert reader.refresh()
    for one in (registry, reader, Registry(registry.root)):
        check(one, old)
        assert one.versions("support") == [1, 10, 11]
        assert one.resolve("support").version == 1
        assert [type(event) is Adopted for event in one.history("support")] == [True, False, False]
    assert reader.entry("support", 10).at == old[2].created_at


def test_adopted_versions_can_be_removed(registry: Registry, old: list[Manifest]) -> None:
    registry.remove("support@1")
    with pytest.raises(NotFoundError):
        Registry(registry.root).resolve("support@1")
    assert registry.sweep() == []  # not before they are a day old


@pytest.mark.parametrize("content", [None, "", "{", "{}", '{"name": "support"}', "swap"])
def test_a_manifest_that_cannot_be_read(
    registry: Registry, old: list[Manifest], publish: Publish, content: str | None
) -> None:
    path = Path(registry.root, "support", "1", "manifest.json")
    if content is None:
        path.unlink()
    else:
        path.write_text(old[2].model_dump_json() if content == "swap" else content)
    with pytest.raises(CorruptAdapterError, match=r"support@1 .* may be lost: support/1/manifest\.json"):
        registry.resolve("support@1")
    assert registry.resolve("support").version == 10
    with pytest.raises(CorruptRegistryError, match=r"support/1/manifest\.json"):
        publish()
    assert not Path(registry.root, "_log").exists()


def test_strangers_in_the_folder_are_no_adapters(registry: Registry, old: list[Manifest]) -> None:
    for stranger in ("Upper/1", ".publish-x/1", "empty", "support/02", "support/x", "support/.tmp", "support/-1"):
        Path(registry.root, stranger).mkdir(parents=True)
    Path(registry.root, "file").touch()
    Path(registry.root, "support", "7").touch()
    check(registry, old)
    assert registry.damage == ()
