"""The front with a real HAProxy, without Ray."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.http import front as module
from serving.http.front import Front
from serving.http.haproxy import FrontSpec
from tests.ports import free_port
from tests.waiting import until


class Replica:
    """An HTTP server that answers when it is told to."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.asked = 0
        self.port = 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if b"/health" not in head:
            self.asked += 1
            await self.go_on.wait()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
        await writer.drain()
        writer.close()


class StoppedByHand(Front):
    """Ray Serve awaits ``__del__``, Python does not."""

    def __del__(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        pass


class Setting:
    def __init__(self, front: Front, client: httpx.AsyncClient, replica: Replica) -> None:
        self.front = front
        self.client = client
        self.replica = replica

    async def ask(self) -> int:
        return (await self.client.get("/x")).status_code


@contextlib.asynccontextmanager
async def setting(slots: int = 2) -> AsyncGenerator[Setting]:
    spec = FrontSpec("127.0.0.1", free_port(), slots, True, 1000, "secret", connections=100, drain_s=1)
    front = StoppedByHand.__new__(StoppedByHand)
    await front.__init__(spec)  # pyright: ignore[reportGeneralTypeIssues]
    replica = Replica()
    server = await asyncio.start_server(replica.handle, "127.0.0.1", 0)
    replica.port = server.sockets[0].getsockname()[1]
    client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{spec.port}", trust_env=False, timeout=20)
    folder = front._scratch.path
    async with client, server:
        try:
            yield Setting(front, client, replica)
        finally:
            replica.go_on.set()
            await front.stop()
    assert not folder.exists()
    with pytest.raises(RuntimeError, match="HAProxy has ended"):
        front.check_health()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOST_S", 1.0)
    monkeypatch.setattr(module, "_SWEEP_S", 0.1)


def run(work: Any) -> None:
    asyncio.run(asyncio.wait_for(work(), 60))


def test_a_replica_comes_drains_and_leaves() -> None:
    async def work() -> None:
        async with setting() as here:
            assert await here.ask() == 503
            assert await here.front.announce("r1", "127.0.0.1", here.replica.port)
            assert await here.ask() == 200
            assert await here.front.members() == ["r1"]
            here.replica.go_on.clear()
            running = asyncio.create_task(here.ask())
            while here.replica.asked < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            await here.front.drain("r1")
            assert await here.front.members() == []
            assert await here.ask() == 503
            await here.front.leave("r1")
            here.replica.go_on.set()
            assert await running == 200

    run(work)


@pytest.mark.usefixtures("quick")
def test_a_drain_lasts_as_long_as_the_replica_announces_itself() -> None:
    async def work() -> None:
        async with setting() as here:
            await here.front.announce("r1", "127.0.0.1", here.replica.port)
            here.replica.go_on.clear()
            running = asyncio.create_task(here.ask())
            while not here.replica.asked:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            await here.front.drain("r1")
            for _ in range(10):
                await asyncio.sleep(0.25)
                assert await here.front.announce("r1", "127.0.0.1", here.replica.port)
            here.replica.go_on.set()
            assert await running == 200
            assert await here.ask() == 503  # to announce itself does not end a drain

    run(work)


@pytest.mark.usefixtures("quick")
def test_who_is_silent_is_forgotten_and_its_slot_is_free() -> None:
    async def work() -> None:
        async with setting(slots=1) as here:
            await here.front.announce("r1", "127.0.0.1", here.replica.port)
            assert not await here.front.announce("r2", "127.0.0.1", here.replica.port)

            async def is_forgotten() -> bool:
                return await here.front.members() == []

            await until(is_forgotten, 1.5)
            assert await here.front.announce("r2", "127.0.0.1", here.replica.port)
            assert await here.ask() == 200

    run(work)


def test_a_long_temporary_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 90)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))

    async def work() -> None:
        async with setting() as here:
            assert await here.ask() == 503

    run(work)
