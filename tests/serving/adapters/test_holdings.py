"""A real registry and a real cache; the engine only writes down what it is told, and refuses what it is told to."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.errors import MachineError
from serving.adapters.cache import AdapterCache
from serving.adapters.holdings import Holdings
from serving.http.api_error import ApiError
from serving.manifest import Manifest
from serving.registry import Registry
from tests.serving.engines import RecordingEngine
from tests.serving.make import identity, make_adapter

pytest.importorskip("vllm")

CAPACITY = 2


class Setting:
    def __init__(self, folder: Path, base: Path) -> None:
        self.registry = Registry(folder / "registry")
        for number in range(4):
            adapter = make_adapter(folder / f"adapter-{number}", base, seed=number)
            self.registry.publish(f"a{number}", adapter, identity(base), metrics={}, lineage={})
        self.engine = RecordingEngine()
        self.models = SimpleNamespace(lora_requests={})
        self.cache = AdapterCache(self.registry, folder / "cache")
        self.told: list[tuple[str, bool, bool]] = []
        self.holdings = Holdings(self.engine, self.models, self.cache, CAPACITY, self._tell)

    def _tell(self, manifest: Manifest, seconds: float | None, failed: bool) -> None:
        self.told.append((manifest.id, seconds is None, failed))

    async def ask(self, name: str) -> None:
        manifest = self.registry.resolve(name)
        async with self.holdings.hold(manifest):
            assert self.models.lora_requests[manifest.id].lora_int_id in self.engine.held

    def held_files(self) -> set[str]:
        return {digest[:8] for digest in self.cache._held}

    def digests(self, *names: str) -> set[str]:
        return {self.registry.resolve(name).digest[:8] for name in names}


@pytest.fixture
def setting(tmp_path: Path, base: Path) -> Setting:
    return Setting(tmp_path, base)


def run(work: Coroutine[Any, Any, None]) -> None:
    async def until_settled() -> None:
        await work
        await asyncio.sleep(0.05)  # files are given back by callbacks

    asyncio.run(asyncio.wait_for(until_settled(), 30))


def test_the_engine_knows_immutable_ids_and_really_unloads(setting: Setting) -> None:
    async def work() -> None:
        for name in ("a0", "a1", "a0", "a2"):
            await setting.ask(name)

    run(work())
    assert setting.engine.order == ["+a0@1", "+a1@1", "+a2@1", "-a1@1"]
    assert set(setting.models.lora_requests) == {"a0@1", "a2@1"}
    assert setting.held_files() == setting.digests("a0", "a2")
    assert setting.told[-2:] == [("a2@1", False, False), ("a1@1", True, False)]


def test_numbers_are_never_used_again(setting: Setting) -> None:
    numbers: set[int] = set()

    async def work() -> None:
        for name in ("a0", "a1", "a2", "a0", "a1", "a2"):
            await setting.ask(name)
            numbers.update(setting.engine.held)

    run(work())
    assert len(numbers) == 6


def test_requests_that_come_together_share_a_load(setting: Setting) -> None:
    async def work() -> None:
        await asyncio.gather(*(setting.ask("a0") for _ in range(20)))

    run(work())
    assert setting.engine.order == ["+a0@1"]


def damaged(setting: Setting, name: str) -> Path:
    path = setting.registry.path(setting.registry.resolve(name)) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    return path


def refusal(setting: Setting, name: str) -> ApiError:
    with pytest.raises(ApiError) as caught:
        run(setting.ask(name))
    return caught.value


def test_a_corrupt_one_evicts_nothing_and_is_tried_again(setting: Setting) -> None:
    async def fill() -> None:
        await setting.ask("a0")
        await setting.ask("a1")

    run(fill())
    path = setting.registry.path(setting.registry.resolve("a2")) / "adapter_model.safetensors"
    whole = path.read_bytes()
    damaged(setting, "a2")
    error = refusal(setting, "a2")
    assert (error.status, error.code) == (503, "adapter_corrupt")
    assert "a2@1 is corrupt" in error.message
    assert set(setting.models.lora_requests) == {"a0@1", "a1@1"}
    assert setting.held_files() == setting.digests("a0", "a1")
    path.write_bytes(whole)
    run(setting.ask("a2"))
    assert setting.engine.order[-2:] == ["+a2@1", "-a0@1"]


def test_one_that_the_engine_refuses_evicts_nothing(setting: Setting) -> None:
    setting.engine.refuses.add("a2@1")

    async def work() -> None:
        await setting.ask("a0")
        await setting.ask("a1")
        await setting.ask("a2")

    with pytest.raises(ApiError, match="no room in this engine") as caught:
        run(work())
    assert (caught.value.status, caught.value.code) == (503, "adapter_refused")
    assert set(setting.engine.held.values()) == {"a0@1", "a1@1"}
    assert setting.told[-1] == ("a2@1", False, True)


def test_what_is_loaded_outlives_its_files_in_the_registry(setting: Setting) -> None:
    run(setting.ask("a0"))
    shutil.rmtree(setting.registry.path(setting.registry.resolve("a0")))
    run(setting.ask("a0"))
    assert setting.engine.order == ["+a0@1"]


def test_the_same_id_with_another_content(setting: Setting) -> None:
    run(setting.ask("a0"))
    other = setting.registry.resolve("a1").model_copy(update={"name": "a0"})

    async def ask() -> None:
        async with setting.holdings.hold(other):
            pass

    with pytest.raises(ApiError, match="never changes") as caught:
        run(ask())
    assert (caught.value.status, caught.value.code) == (409, "adapter_changed")


def test_a_copy_that_cannot_be_made_now_is_not_called_corrupt(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: Manifest) -> Path:
        raise MachineError("the cache of adapters: cannot write /secret/place (No space left on device)")

    monkeypatch.setattr(setting.cache, "hold", full)
    error = refusal(setting, "a0")
    assert (error.status, error.code, "Retry-After" in error.headers) == (503, "registry_unreachable", True)
    assert "/secret" not in error.message


def test_pins_stay_and_what_cannot_be_pinned_is_told(setting: Setting) -> None:
    damaged(setting, "a3")
    manifests = [setting.registry.resolve(name) for name in ("a0", "a3")]
    faults: list[ApiError] = []

    async def work() -> None:
        faults.extend(await setting.holdings.keep(manifests[:1], [manifests[1]]))
        for name in ("a1", "a2"):
            await setting.ask(name)

    run(work())
    assert [fault.code for fault in faults] == ["adapter_corrupt"]
    assert setting.engine.order == ["+a0@1", "+a1@1", "+a2@1", "-a1@1"]


def test_what_is_loaded_ahead_is_fetched_side_by_side(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch: Callable[[Manifest], Path] = setting.cache.hold
    both = threading.Barrier(2, timeout=10)  # breaks unless two are being fetched at once

    def hold(manifest: Manifest) -> Path:
        if threading.current_thread() is not threading.main_thread():  # which only counts one holder more
            both.wait()
        return fetch(manifest)

    async def work() -> None:
        assert await setting.holdings.keep((), [setting.registry.resolve(name) for name in ("a0", "a1")]) == []

    monkeypatch.setattr(setting.cache, "hold", hold)
    run(work())
    assert sorted(setting.engine.order) == ["+a0@1", "+a1@1"]


def test_a_client_that_leaves_during_the_fetch_takes_nothing_along(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow: Callable[[Manifest], Path] = setting.cache.hold

    async def work() -> None:
        began = asyncio.Event()
        loop = asyncio.get_running_loop()

        def hold(manifest: Manifest) -> Path:
            loop.call_soon_threadsafe(began.set)
            return slow(manifest)

        monkeypatch.setattr(setting.cache, "hold", hold)
        leaving, staying = asyncio.create_task(setting.ask("a0")), asyncio.create_task(setting.ask("a0"))
        await began.wait()
        leaving.cancel()
        await staying
        assert leaving.cancelled()
        for name in ("a1", "a2"):
            await setting.ask(name)

    run(work())
    assert setting.held_files() == setting.digests("a1", "a2")


def test_slow_fetches_do_not_hold_up_what_shares_asyncios_threads(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch, answer = setting.cache.hold, threading.Event()

    def hold(manifest: Manifest) -> Path:
        assert answer.wait(20)
        return fetch(manifest)

    async def work() -> None:
        monkeypatch.setattr(setting.cache, "hold", hold)
        # As many of asyncio's threads as there are fetches: one shared by both would be waited for.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
        fetches = [asyncio.create_task(setting.ask(name)) for name in ("a0", "a1")]
        await asyncio.sleep(0.05)
        await asyncio.wait_for(asyncio.to_thread(setting.registry.refresh), 10)
        assert not any(task.done() for task in fetches)
        answer.set()
        await asyncio.gather(*fetches)
        setting.holdings.close()

    run(work())
