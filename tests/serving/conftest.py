from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from serving.manifest import Manifest
from serving.registry import Registry
from tests.serving.make import identity, make_adapter
from tests.serving.s3 import S3Server, s3_server
from tests.tiny import make_base

Publish = Callable[..., Manifest]
_prefixes = itertools.count()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random base; heads of 64, which vLLM's CPU attention wants."""
    return make_base(tmp_path_factory.mktemp("base") / "tiny", hidden=256)


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    with s3_server() as server:
        server.make_bucket("bucket")
        yield server


@pytest.fixture(params=["folder", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a registry may be: a folder that is not there, or a prefix of a bucket with nothing below it."""
    if request.param == "folder":
        return str(tmp_path / "registry")
    server: S3Server = request.getfixturevalue("s3")
    return server.uri(f"bucket/team a/{next(_prefixes)}".replace(" ", "%20"))


@pytest.fixture
def registry(root: str) -> Registry:
    return Registry(root)


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return make_adapter(tmp_path / "adapter", base)


@pytest.fixture
def publish(registry: Registry, adapter: Path, base: Path) -> Publish:
    """Publish the adapter under a name, with whatever options."""

    def call(name: str = "support", **options: Any) -> Manifest:
        facts: dict[str, Any] = {"metrics": {}, "lineage": {}}
        return registry.publish(name, adapter, identity(base), **(facts | options))

    return call
