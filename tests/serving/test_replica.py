from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from serving.api_error import ApiError
from serving.engine import RoutedId
from serving.manifest import Manifest
from serving.quiet import quiet
from serving.registry import Registry
from tests.serving.adapters import identity, make_adapter

if TYPE_CHECKING:
    from serving.replica import RegistryLoader

pytest.importorskip("vllm")


@pytest.fixture
def registry(tmp_path: Path, base: Path) -> Registry:
    registry = Registry(tmp_path / "registry")
    make_adapter(tmp_path / "adapter", base)
    registry.publish("support", tmp_path / "adapter", identity(base), metrics={}, lineage={})
    return registry


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


@pytest.fixture
def loader(registry: Registry, cache: Path) -> Iterator[RegistryLoader]:
    with quiet():
        from serving.replica import RegistryLoader
    loader = RegistryLoader(str(registry.root), cache)
    yield loader
    loader.close()
    assert list(cache.iterdir()) == []


def routed(manifest: Manifest) -> RoutedId:
    return RoutedId("tiny", manifest.id, manifest.digest)


def test_requests_that_come_together_share_one_copy(registry: Registry, loader: RegistryLoader, cache: Path) -> None:
    async def fetch() -> list[Path]:
        return await asyncio.gather(*(loader.fetch(routed(registry.resolve("support"))) for _ in range(8)))

    folders = asyncio.run(fetch())
    assert len(set(folders)) == 1
    assert len(list(cache.glob("*/*"))) == 1
    assert {file.name for file in folders[0].iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_the_engine_gets_the_immutable_id(registry: Registry, loader: RegistryLoader) -> None:
    config = asyncio.run(loader.load_model_from_config(str(routed(registry.resolve("support"))), None))  # pyright: ignore[reportArgumentType]
    assert config.model_id == "support@1"
    assert (Path(config.local_path) / "adapter_model.safetensors").is_file()


def test_a_fault_leaves_no_copy_and_is_not_remembered(registry: Registry, loader: RegistryLoader, cache: Path) -> None:
    manifest = registry.resolve("support")
    path = registry.path(manifest) / "adapter_model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    for _ in range(2):
        with pytest.raises(ApiError, match="support@1 is corrupt") as caught:
            asyncio.run(loader.fetch(routed(manifest)))
        assert (caught.value.status, caught.value.code) == (500, "adapter_corrupt")
        assert list(cache.glob("*/*")) == []
    path.write_bytes(content)
    assert asyncio.run(loader.fetch(routed(manifest))).is_dir()


def test_what_is_gone_and_what_has_changed(registry: Registry, loader: RegistryLoader) -> None:
    manifest = registry.resolve("support")
    for asked, status in ((RoutedId("tiny", "support@2", "x"), 404), (RoutedId("tiny", "support@1", "other"), 409)):
        with pytest.raises(ApiError) as caught:
            asyncio.run(loader.fetch(asked))
        assert caught.value.status == status
    asyncio.run(loader.fetch(routed(manifest)))
    with pytest.raises(ApiError, match="never changes") as caught:
        asyncio.run(loader.fetch(RoutedId("tiny", manifest.id, "other")))
    assert (caught.value.status, caught.value.code) == (409, "adapter_changed")
