"""Which adapters an engine holds: loaded when they are asked for, dropped by recency, never while they answer.

vLLM loads an adapter into its host memory when it is told to, and drops the least recently used one by itself when that
memory is full, even one that requests are using: it then reads the files again in the middle of a batch. So the engine
is given room for one adapter more than is kept here, and everything is decided here:

- an adapter is *held* while a request uses it, and is never dropped meanwhile; pinned ones are never dropped at all;
- a new one is loaded before the old one is dropped: one that cannot be loaded costs nobody a place;
- where every place is held, the next newcomer waits for the first that is let go, and no adapter in constant use can
  keep it out: the least recently used one is *closed*, which makes new requests for it queue behind the newcomer;
- newcomers take places in the order in which they came, and requests for the same one share one load;
- a newcomer that nobody waits for any more is not loaded, and drives nobody out.

All of it runs on one event loop and knows nothing of vLLM, so that it can be tested as it is.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection
from dataclasses import dataclass
from typing import Generic, TypeVar

Adapter = TypeVar("Adapter")
"""What is loaded; ``key`` tells one from another."""


@dataclass(eq=False)
class _Place(Generic[Adapter]):
    """An adapter that the engine holds."""

    adapter: Adapter
    holders: int = 0
    is_closed: bool = False
    """It is to go: requests for it wait as newcomers do."""


class Residency(Generic[Adapter]):
    """At most ``capacity`` adapters, loaded by ``load`` and dropped by ``unload``.

    Args:
        capacity: Adapters kept; the engine needs room for one more.
        key: The identity of an adapter; the same key means the same content.
        load: Hands an adapter to the engine. What it raises reaches every request that waits for this adapter.
        unload: Takes it out of the engine. It must not raise.
    """

    def __init__(
        self,
        capacity: int,
        key: Callable[[Adapter], str],
        load: Callable[[Adapter], Awaitable[None]],
        unload: Callable[[Adapter], Awaitable[None]],
    ) -> None:
        self.capacity = capacity
        self.loads = 0
        self.evictions = 0
        self._key = key
        self._load = load
        self._unload = unload
        self._places: dict[str, _Place[Adapter]] = {}  # the least recently used first
        self._waiting: dict[str, list[asyncio.Future[_Place[Adapter]]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._pinned: frozenset[str] = frozenset()
        self._door = asyncio.Lock()  # one newcomer at a time, in order: asyncio's locks are fair
        self._let_go = asyncio.Event()

    @property
    def resident(self) -> list[str]:
        """Keys of what the engine holds, the least recently used first."""
        return list(self._places)

    def is_open(self, key: str) -> bool:
        """True if ``hold`` would not wait."""
        place = self._places.get(key)
        return place is not None and not place.is_closed

    def pin(self, keys: Collection[str]) -> None:
        """From now on these, and no others, are never dropped. At least one place must stay free of pins."""
        if len(set(keys)) >= self.capacity:
            raise ValueError(f"{len(set(keys))} pinned adapters leave none of {self.capacity} places to the others")
        self._pinned = frozenset(keys)
        self._let_go.set()

    @contextlib.asynccontextmanager
    async def hold(self, adapter: Adapter) -> AsyncGenerator[None]:
        """The adapter is in the engine while the block runs; it is loaded first if need be."""
        place = await self._enter(self._key(adapter), adapter)
        try:
            yield
        finally:
            self._release(place)

    async def _enter(self, key: str, adapter: Adapter) -> _Place[Adapter]:
        place = self._places.get(key)
        if place is not None and not place.is_closed:
            place.holders += 1
            self._places[key] = self._places.pop(key)
            return place
        admitted: asyncio.Future[_Place[Adapter]] = asyncio.get_running_loop().create_future()
        if key not in self._waiting:
            # A task of its own: a client that goes away must not leave the engine with an adapter that nobody counts.
            self._waiting[key] = []
            task = asyncio.create_task(self._admit(key, adapter))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        self._waiting[key].append(admitted)
        try:
            return await admitted
        except asyncio.CancelledError:
            if admitted.done() and not admitted.cancelled() and not admitted.exception():
                self._release(admitted.result())
            self._let_go.set()  # who waits for a place on its behalf may find that nobody wants it any more
            raise

    def _release(self, place: _Place[Adapter]) -> None:
        place.holders -= 1
        if not place.holders:
            self._let_go.set()

    async def _admit(self, key: str, adapter: Adapter) -> None:
        """Give all who wait for ``key`` its place, or what went wrong."""
        async with self._door:
            try:
                # It is there already if it was to go for another that then could not be loaded.
                place = self._places.get(key) or await self._make_place(key, adapter)
            except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to those who wait
                for admitted in self._waiting.pop(key):
                    if not admitted.done():
                        admitted.set_exception(error)
                return
            if place is None:
                del self._waiting[key]
                return
            self._places[key] = place
            waiting = [admitted for admitted in self._waiting.pop(key) if not admitted.done()]
            place.holders += len(waiting)
            for admitted in waiting:
                admitted.set_result(place)

    def _is_wanted(self, key: str) -> bool:
        return not all(admitted.done() for admitted in self._waiting[key])

    async def _make_place(self, key: str, adapter: Adapter) -> _Place[Adapter] | None:
        """Load a newcomer, and drop another if all places are taken; None if all who wanted it have left before."""
        victim = await self._find_victim(key) if len(self._places) >= self.capacity else None
        if not self._is_wanted(key):
            return None
        try:
            await self._load(adapter)
        except Exception:
            if victim is not None:
                self._places[victim].is_closed = False
            raise
        self.loads += 1
        if victim is not None:
            await self._evict(victim)
        return _Place(adapter)

    async def _find_victim(self, key: str) -> str | None:
        """The key of a closed place that nobody holds: the least recently used that is idle now, or will be first.

        None, and every place is open again, as soon as nobody waits for the newcomer ``key``.
        """
        closing: _Place[Adapter] | None = None
        while self._is_wanted(key):
            candidates = [held for held in self._places if held not in self._pinned]
            idle = next((held for held in candidates if not self._places[held].holders), None)
            if idle is not None:
                if closing is not None:
                    closing.is_closed = False
                self._places[idle].is_closed = True
                return idle
            if closing is None and candidates:
                closing = self._places[candidates[0]]
                closing.is_closed = True
            self._let_go.clear()
            await self._let_go.wait()
        if closing is not None:
            closing.is_closed = False
        return None

    async def _evict(self, key: str) -> None:
        place = self._places.pop(key)
        self.evictions += 1
        await self._unload(place.adapter)
