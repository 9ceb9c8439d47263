from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from serving.adapters.residency import Residency


class Engine:
    """Counts what it holds, as vLLM does: ``capacity`` and one to spare."""

    def __init__(self, capacity: int, pause_s: float = 0.0) -> None:
        self.room = capacity + 1
        self.pause_s = pause_s
        self.held: set[str] = set()
        self.loads: list[str] = []
        self.unloads: list[str] = []
        self.broken: set[str] = set()
        self.residency: Residency[str] = Residency(capacity, str, self.load, self.unload)

    async def load(self, adapter: str) -> None:
        await asyncio.sleep(self.pause_s)
        if adapter in self.broken:
            raise ValueError(f"{adapter} is broken")
        assert adapter not in self.held
        self.held.add(adapter)
        self.loads.append(adapter)
        assert len(self.held) <= self.room

    async def unload(self, adapter: str) -> None:
        await asyncio.sleep(self.pause_s)
        self.held.remove(adapter)
        self.unloads.append(adapter)

    async def ask(self, adapter: str, seconds: float = 0.0) -> None:
        """A request: the adapter must be in the engine from its first to its last moment."""
        async with self.residency.hold(adapter):
            assert adapter in self.held
            await asyncio.sleep(seconds)
            assert adapter in self.held


def on_a_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def run() -> None:
        asyncio.run(asyncio.wait_for(test(), 30))

    run.__name__ = test.__name__
    return run


async def turns(count: int = 10) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


@on_a_loop
async def test_requests_that_come_together_share_one_load() -> None:
    engine = Engine(2, pause_s=0.01)
    await asyncio.gather(*(engine.ask("a") for _ in range(20)))
    assert engine.loads == ["a"]


@on_a_loop
async def test_the_least_recently_used_goes_and_is_really_unloaded() -> None:
    engine = Engine(2)
    for adapter in ("a", "b", "a", "c"):
        await engine.ask(adapter)
    assert engine.unloads == ["b"]
    assert engine.held == {"a", "c"} == set(engine.residency.resident)
    assert (engine.residency.loads, engine.residency.evictions) == (3, 1)


@on_a_loop
async def test_one_that_cannot_be_loaded_costs_nobody_a_place() -> None:
    engine = Engine(2)
    engine.broken.add("bad")
    await engine.ask("a")
    await engine.ask("b")
    results = await asyncio.gather(*(engine.ask("bad") for _ in range(3)), return_exceptions=True)
    assert [str(result) for result in results] == ["bad is broken"] * 3
    assert engine.held == {"a", "b"}
    await engine.ask("a")
    assert engine.loads == ["a", "b"]
    engine.broken.clear()
    await engine.ask("bad")
    assert engine.held == {"a", "bad"}


@on_a_loop
async def test_what_answers_is_never_dropped_and_a_newcomer_waits_for_the_first_that_is_let_go() -> None:
    engine = Engine(2)
    slow = asyncio.create_task(engine.ask("slow", 1.0))
    quick = asyncio.create_task(engine.ask("quick", 0.05))
    await turns()
    await engine.ask("new")  # `ask` itself asserts that each stays while it answers
    assert engine.unloads == ["quick"]
    assert not slow.done()
    await asyncio.gather(slow, quick)


@on_a_loop
async def test_adapters_in_constant_use_cannot_keep_a_newcomer_out() -> None:
    engine = Engine(2)
    stop = asyncio.Event()

    async def client(adapter: str) -> None:
        while not stop.is_set():
            await engine.ask(adapter, 0.005)

    # Several clients each, so that neither adapter is ever without a holder while it is open.
    clients = [asyncio.create_task(client(adapter)) for adapter in "ab" for _ in range(8)]
    await asyncio.sleep(0.02)
    for adapter in ("new", "other", "third"):
        await asyncio.wait_for(engine.ask(adapter), 5)
        assert adapter in engine.loads
    stop.set()
    await asyncio.gather(*clients)


@on_a_loop
async def test_pinned_adapters_stay() -> None:
    engine = Engine(2)
    await engine.ask("a")
    engine.residency.pin(["a"])
    for adapter in "bcd":
        await engine.ask(adapter)
    assert engine.unloads == ["b", "c"]
    engine.residency.pin([])
    await engine.ask("e")
    assert engine.unloads == ["b", "c", "a"]
    with pytest.raises(ValueError, match="leave none of 2 places"):
        engine.residency.pin(["x", "y"])


@on_a_loop
async def test_a_client_that_goes_away_while_it_waits_holds_nothing() -> None:
    engine = Engine(1, pause_s=0.02)
    gone = asyncio.create_task(engine.ask("a"))
    await turns()
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    await engine.ask("b")  # it would wait for ever if the other still counted as a holder
    assert engine.unloads == ["a"]
    held = asyncio.create_task(engine.ask("b", 0.1))
    await turns()
    waiting = asyncio.create_task(engine.ask("c"))
    await turns()
    waiting.cancel()
    await asyncio.gather(held, waiting, return_exceptions=True)
    await engine.ask("b")
    await engine.ask("d")


@on_a_loop
async def test_a_newcomer_that_nobody_waits_for_any_more_drives_nobody_out() -> None:
    engine = Engine(2, pause_s=0.01)
    await engine.ask("a")
    await engine.ask("b")
    first = asyncio.create_task(engine.ask("c"))
    await turns()  # it has the door, and is being loaded
    second = asyncio.create_task(engine.ask("d"))
    await turns()
    second.cancel()
    await first
    await turns()
    assert engine.loads == ["a", "b", "c"]
    assert engine.unloads == ["a"]
    held = [asyncio.create_task(engine.ask(adapter, 0.5)) for adapter in "bc"]
    await turns()
    leaving = asyncio.create_task(engine.ask("d"))
    await turns()
    assert not engine.residency.is_open("b")
    leaving.cancel()
    await turns()
    assert engine.residency.is_open("b")
    assert not any(task.done() for task in held)
    await asyncio.gather(*held)
    assert engine.loads == ["a", "b", "c"]
    await engine.ask("d")
    assert engine.loads[3:] == ["d"]


@pytest.mark.parametrize("seed", range(5))
def test_a_storm(seed: int) -> None:
    """Zipf-distributed adapters, failing loads, clients that leave at any moment, changing pins: every request is
    answered or cancelled, ``Engine`` never holds too many, and in the end nobody holds anything.
    """
    chance = random.Random(seed)

    async def storm() -> None:
        engine = Engine(4, pause_s=0.0005)
        adapters = [f"a{number}" for number in range(40)]
        weights = [1 / (rank + 1) for rank in range(40)]
        outcomes: Counter[str] = Counter()

        async def request() -> None:
            await asyncio.sleep(chance.random() * 0.5)
            task = asyncio.create_task(engine.ask(chance.choices(adapters, weights)[0], chance.random() * 0.003))
            if chance.random() < 0.2:
                await asyncio.sleep(chance.random() * 0.003)
                task.cancel()
            try:
                await task
                outcomes["answered"] += 1
            except asyncio.CancelledError:
                outcomes["cancelled"] += 1
            except ValueError:
                outcomes["broken"] += 1

        async def disturb() -> None:
            for _ in range(50):
                await asyncio.sleep(0.01)
                engine.broken = set(chance.sample(adapters, 4))
                engine.residency.pin(chance.sample(adapters, chance.randint(0, 3)))

        await asyncio.gather(disturb(), *(request() for _ in range(600)))
        assert sum(outcomes.values()) == 600
        assert outcomes["answered"] > 300
        assert set(engine.residency.resident) == engine.held
        engine.residency.pin([])
        engine.broken.clear()
        fresh = [f"fresh{number}" for number in range(4)]
        for adapter in fresh:
            await asyncio.wait_for(engine.ask(adapter), 5)
        assert engine.held == set(fresh)

    asyncio.run(asyncio.wait_for(storm(), 60))
