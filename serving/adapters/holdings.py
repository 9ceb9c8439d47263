"""The adapters of one vLLM engine: fetched from the registry, verified, loaded, and really unloaded again.

An adapter is fetched and verified before the engine hears of it: one that is gone or corrupt costs a place in the
engine nobody. Its files stay as long as the engine holds it, because vLLM reads them again when it likes to. The engine
knows adapters by their immutable ids only; its prefix cache is keyed by them, so no version is ever answered from what
another one has computed.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cluster.errors import LoraloomError, NotFoundError
from serving.adapters.cache import AdapterCache
from serving.adapters.residency import Residency
from serving.http.api_error import (
    ADAPTER_CHANGED,
    ADAPTER_CORRUPT,
    ADAPTER_REFUSED,
    REGISTRY_UNREACHABLE,
    ApiError,
    model_not_found,
    overloaded,
)
from serving.manifest import Manifest
from serving.registry import CorruptAdapterError

_RETRY_AFTER_S = 5.0
_FETCHES_AT_ONCE = 8

_log = logging.getLogger(__name__)


class _Fetch:
    """A copy that is being fetched, or is there, for requests that have not been let in yet."""

    def __init__(self, work: asyncio.Future[None]) -> None:
        self.work = work
        self.wanted = 0


class Holdings:
    """What one engine holds.

    Args:
        engine: vLLM's ``EngineClient``.
        models: vLLM's ``OpenAIServingModels``, where its server looks adapters up by name.
        cache: Where adapters are fetched to.
        capacity: Adapters that the engine keeps; it must have room for one more.
        told: Called after each load with the manifest, the seconds that it took, and whether it failed; after each
            eviction with None for the seconds.
    """

    def __init__(
        self,
        engine: Any,
        models: Any,
        cache: AdapterCache,
        capacity: int,
        told: Callable[[Manifest, float | None, bool], None] = lambda _manifest, _seconds, _failed: None,
    ) -> None:
        self._engine = engine
        self._models = models
        self._cache = cache
        self._told = told
        self._numbers = itertools.count(1)
        self._digests: dict[str, str] = {}
        """Content of each id that the engine has ever seen: its prefix cache may still know it."""
        self._fetches: dict[str, _Fetch] = {}
        # Threads of their own: a store that is slow to answer must not hold up what shares asyncio's, such as the
        # refreshing of the registry and of the keys.
        self._threads = ThreadPoolExecutor(_FETCHES_AT_ONCE, thread_name_prefix="fetch-adapter")
        self._warming: set[asyncio.Task[None]] = set()
        self._residency: Residency[Manifest] = Residency(capacity, _id, self._load, self._unload)

    @property
    def resident(self) -> list[str]:
        """Ids of the adapters in the engine, the least recently used first."""
        return self._residency.resident

    def has(self, manifest: Manifest) -> bool:
        """True if it can be held without waiting."""
        return self._residency.is_open(manifest.id) and self._digests.get(manifest.id) == manifest.digest

    @contextlib.asynccontextmanager
    async def hold(self, manifest: Manifest) -> AsyncGenerator[None]:
        """The adapter is in the engine while the block runs.

        Raises:
            ApiError: it vanished, is corrupt, was exchanged, is refused by the engine, or cannot be fetched now.
        """
        if self.has(manifest):
            async with self._residency.hold(manifest):
                yield
            return
        async with contextlib.AsyncExitStack() as stack:
            async with self.fetched(manifest):
                await stack.enter_async_context(self._residency.hold(manifest))
            yield

    async def keep(self, pinned: Iterable[Manifest], warm: Iterable[Manifest] = ()) -> list[ApiError]:
        """Load ``pinned`` for good (and let go of what was pinned before), and ``warm`` for now.

        Returns:
            Why some could not be loaded, or not be pinned: one place must stay free of pins.
        """
        capacity, wanted = self._residency.capacity, list(pinned)
        faults = [
            ApiError(503, f"{manifest.id} is not pinned: an engine that keeps {capacity} has room for no more pins")
            for manifest in wanted[capacity - 1 :]
        ]
        self._residency.pin(await self._load_all(wanted[: capacity - 1], faults))
        await self._load_all(warm, faults)
        return faults

    async def _load_all(self, manifests: Iterable[Manifest], faults: list[ApiError]) -> list[str]:
        """Load many at once: they are fetched side by side. The ids of those that are there now, in their order."""

        async def load(manifest: Manifest) -> str | None:
            try:
                async with self.hold(manifest):
                    return manifest.id
            except ApiError as error:
                faults.append(error)
                return None

        return [loaded for loaded in await asyncio.gather(*map(load, manifests)) if loaded]

    def warm(self, manifest: Manifest) -> None:
        """Load an adapter soon, so that the first request for it finds it there."""

        async def load() -> None:
            with contextlib.suppress(ApiError):  # whoever asks for it is told
                async with self.hold(manifest):
                    pass

        task = asyncio.create_task(load())
        self._warming.add(task)
        task.add_done_callback(self._warming.discard)

    def close(self) -> None:
        """Give the files back. The engine must not be asked for adapters any more."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._cache.close()

    @contextlib.asynccontextmanager
    async def fetched(self, manifest: Manifest) -> AsyncGenerator[None]:
        """A verified copy is in the cache while the block runs: ``hold`` then has nothing to fetch. Requests that come
        together share the fetch.

        Raises:
            ApiError: as ``hold``, but for what the engine says.
        """
        known = self._digests.get(manifest.id, manifest.digest)
        if known != manifest.digest:
            # The engine's prefix cache may hold what the old content has computed, under this id.
            reason = "it was replaced after it was loaded; publish it as a new version, or restart the server"
            message = f"The adapter `{manifest.id}` never changes, but {reason}"
            raise ApiError(409, message, ADAPTER_CHANGED, "model")
        fetch = self._fetches.get(manifest.digest)
        if fetch is None:
            work = asyncio.get_running_loop().run_in_executor(self._threads, self._fetch, manifest)
            fetch = self._fetches[manifest.digest] = _Fetch(work)
        fetch.wanted += 1
        try:
            # Whoever leaves must not take the others' fetch along.
            await asyncio.shield(fetch.work)
            yield
        finally:
            fetch.wanted -= 1
            if not fetch.wanted:
                del self._fetches[manifest.digest]
                fetch.work.add_done_callback(lambda work: self._give_back(work, manifest.digest))

    def _give_back(self, work: asyncio.Future[None], digest: str) -> None:
        if not work.cancelled() and work.exception() is None:
            self._cache.release(digest)

    def _fetch(self, manifest: Manifest) -> None:
        try:
            self._cache.hold(manifest)
        except NotFoundError:
            raise model_not_found(manifest.id) from None
        except CorruptAdapterError as error:
            message = f"The adapter `{manifest.id}` cannot be loaded: {error}"
            raise ApiError(503, message, ADAPTER_CORRUPT, "model") from None
        except LoraloomError as error:  # the store does not answer, or refuses us; or the cache's disk is full
            _log.warning("%s cannot be fetched: %s", manifest.id, error)
            message = f"The adapter `{manifest.id}` is not loaded, and cannot be fetched from the registry now"
            raise overloaded(message, REGISTRY_UNREACHABLE, _RETRY_AFTER_S) from None

    async def _load(self, manifest: Manifest) -> None:
        from vllm.lora.request import LoRARequest

        started = time.monotonic()
        # Who asks for it holds it too, so this neither reads nor waits; the engine's own hold begins here.
        path = self._cache.hold(manifest)
        request = LoRARequest(lora_name=manifest.id, lora_int_id=next(self._numbers), lora_path=str(path))
        try:
            await self._engine.add_lora(request)
        except Exception as error:  # noqa: BLE001 - vLLM's engine raises whatever its loader did
            self._cache.release(manifest.digest)
            self._told(manifest, time.monotonic() - started, True)
            _log.warning("the engine refused %s: %s", manifest.id, error)
            message = f"The engine cannot serve the adapter `{manifest.id}`: {error}"
            raise ApiError(503, message, ADAPTER_REFUSED, "model") from None
        self._digests[manifest.id] = manifest.digest
        self._models.lora_requests[manifest.id] = request
        self._told(manifest, time.monotonic() - started, False)

    async def _unload(self, manifest: Manifest) -> None:
        request = self._models.lora_requests.pop(manifest.id)
        try:
            await self._engine.remove_lora(request.lora_int_id)
        except Exception as error:  # noqa: BLE001 - an engine that is dead holds nothing, and its death is told elsewhere
            _log.warning("the engine did not unload %s: %s", manifest.id, error)
        self._cache.release(manifest.digest)
        self._told(manifest, None, False)


def _id(manifest: Manifest) -> str:
    return manifest.id
