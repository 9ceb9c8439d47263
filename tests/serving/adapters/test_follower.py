"""A replica's picture of the registry while that is away, or moves its aliases."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable, Coroutine, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.errors import MachineError
from serving.adapters.cache import AdapterCache
from serving.adapters.catalogue import Catalogue, ServedBase
from serving.adapters.follower import Follower
from serving.adapters.holdings import Holdings
from serving.http.api_error import ApiError
from serving.registry import Registry
from tests.serving.engines import RecordingEngine
from tests.serving.make import identity, make_adapter
from tests.serving.s3 import S3Server, s3_server

pytest.importorskip("vllm")


_prefixes = itertools.count()  # moto keeps its objects as long as the process lives


class Setting:
    """What follows a registry in S3, as in a replica; ``registry`` is somebody else's view of it."""

    def __init__(self, store: S3Server, folder: Path, base: Path) -> None:
        self.store = store
        self.registry = Registry(store.uri(f"bucket/{next(_prefixes)}"))
        for seed in range(2):
            adapter = make_adapter(folder / f"adapter-{seed}", base, seed=seed)
            self.registry.publish("support", adapter, identity(base), metrics={}, lineage={"folder": str(adapter)})
        self.seen = Registry(self.registry.root, reads_first=False)
        self.catalogue = Catalogue(ServedBase("tiny", identity(base), 16, 128, datetime.now(UTC)), self.seen)
        self.engine = RecordingEngine()
        models = SimpleNamespace(lora_requests={})
        self.holdings = Holdings(self.engine, models, AdapterCache(self.seen, folder / "cache"), 4)
        self.follower = Follower(self.seen, self.catalogue, self.holdings, [])

    def listed(self) -> list[str]:
        return [card["id"] for card in json.loads(self.catalogue.cards(lambda _: True))["data"]]

    async def refusal(self, model: str) -> ApiError:
        with pytest.raises(ApiError) as caught:
            await self.follower.find(model)
        return caught.value


@pytest.fixture
def here(tmp_path: Path, base: Path) -> Iterator[Setting]:
    with s3_server() as store:
        store.make_bucket("bucket")
        setting = Setting(store, tmp_path, base)
        yield setting
        setting.holdings.close()


def on_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    def run(here: Setting, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
        asyncio.run(asyncio.wait_for(test(here, caplog, monkeypatch), 60))

    run.__name__ = test.__name__
    return run


@on_a_loop
async def test_a_registry_that_was_never_read_is_not_taken_for_empty(here: Setting, *_: object) -> None:
    here.store.stop()
    assert await here.follower.find("tiny") is None
    assert here.listed() == ["tiny"]
    error = await here.refusal("support")
    assert (error.status, error.code, "Retry-After" in error.headers) == (503, "registry_unreachable", True)
    here.store.start()
    manifest = await here.follower.find("support")
    assert manifest is not None
    assert manifest.id == "support@2"
    assert here.listed() == ["tiny", "support", "support@latest", "support@1", "support@2"]
    assert (await here.refusal("nobody")).status == 404


@on_a_loop
async def test_what_else_is_wrong_with_the_registry_is_told_once(
    here: Setting, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> bool:
        raise MachineError("the store refuses these credentials")

    await here.follower.catch_up()
    monkeypatch.setattr(here.seen, "refresh", refuse)
    for _ in range(3):
        await here.follower.catch_up()
    assert caplog.text.count("what is known of the registry stays: the store refuses these credentials") == 1
    assert (await here.refusal("nobody")).code == "registry_unreachable"
    manifest = await here.follower.find("support@1")
    assert manifest is not None
    monkeypatch.undo()
    await here.follower.catch_up()
    assert "the registry answers again" in caplog.text


@on_a_loop
async def test_the_first_alias_of_an_adapter_in_use_is_loaded_ahead(here: Setting, *_: object) -> None:
    manifest = await here.follower.find("support")
    assert manifest is not None
    async with here.holdings.hold(manifest):
        pass
    here.registry.move("support", "prod", 1)
    await here.follower.catch_up()
    while len(here.holdings.resident) < 2:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    assert here.engine.order == ["+support@2", "+support@1"]


@on_a_loop
async def test_clients_are_not_told_where_an_adapter_lay(here: Setting, *_: object) -> None:
    await here.follower.catch_up()
    assert here.seen.resolve("support").lineage["folder"]
    assert b"folder" not in here.catalogue.cards(lambda _: True)


@on_a_loop
async def test_what_this_replica_writes_itself_is_listed_and_followed(here: Setting, *_: object) -> None:
    await here.follower.catch_up()
    assert "support@new" not in here.listed()
    here.seen.move("support", "new", 1)
    await here.follower.catch_up()
    assert "support@new" in here.listed()


@on_a_loop
async def test_a_promotion_that_a_write_of_this_replica_reads_first_is_warmed(here: Setting, *_: object) -> None:
    here.registry.move("support", "prod", 1)
    await here.follower.catch_up()
    async with here.holdings.hold(here.seen.manifest("support", 1)):
        pass
    here.registry.move("support", "prod", 2)  # by somebody else
    here.seen.record_vote(["support@1", "base"], "base")  # reads that first
    await here.follower.catch_up()
    async with asyncio.timeout(20):
        while "+support@2" not in here.engine.order:  # noqa: ASYNC110 - the engine has no event for it
            await asyncio.sleep(0.02)
    assert here.engine.order == ["+support@1", "+support@2"]
