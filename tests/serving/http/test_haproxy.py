"""A real HAProxy in front of small real servers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from cluster.errors import MachineError
from serving.http.door import VOTES_PATH
from serving.http.haproxy import FrontSpec, HAProxy, config_text
from tests.ports import free_port
from tests.waiting import until, wait_until

LIMIT = 200_000
SECRET = "for-the-tests"


class Backend:
    """An HTTP server that says its name, and does as it is told."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_well = True
        self.hang = asyncio.Event()
        self.cut_off = 0
        self.paths: list[str] = []
        self.port = 0
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._handle, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        await self._server.wait_closed()

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            path = head.split()[1]
            lengths = [line.split(":")[1] for line in head.split("\r\n") if line.lower().startswith("content-length")]
            await reader.readexactly(int(lengths[0]) if lengths else 0)
            if path == "/health":
                await self._respond(writer, "200 OK" if self.is_well else "503 No", "")
                return
            self.paths.append(path)
            if self.cut_off:
                self.cut_off -= 1
            else:
                if path == "/slow":
                    await self.hang.wait()
                await self._respond(writer, "200 OK", json.dumps({"name": self.name, "head": head}))
        writer.close()

    async def _respond(self, writer: asyncio.StreamWriter, status: str, body: str) -> None:
        writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode())
        await writer.drain()
        writer.close()


class Setting:
    """HAProxy with some backends in its slots, and a client."""

    def __init__(self, proxy: HAProxy, backends: list[Backend], client: httpx.AsyncClient) -> None:
        self.proxy = proxy
        self.backends = backends
        self.client = client

    async def ask(self, path: str = "/v1/x", **body: Any) -> dict[str, Any]:
        response = await self.client.post(path, json=body)
        assert response.status_code == 200, response.text
        return response.json()


@contextlib.asynccontextmanager
async def setting(folder: Path, count: int, **changes: Any) -> AsyncGenerator[Setting]:
    spec = FrontSpec("127.0.0.1", free_port(), 4, count == 1, LIMIT, SECRET)._replace(connections=1000, **changes)
    backends = [Backend(f"b{number}") for number in range(count)]
    proxy = HAProxy(spec, folder)
    url = f"http://127.0.0.1:{spec.port}"
    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=20) as client:
        try:
            await proxy.wait_until_ready()
            for number, backend in enumerate(backends, start=1):
                await backend.start()
                await proxy.fill(number, "127.0.0.1", backend.port)
            yield Setting(proxy, backends, client)
        finally:
            proxy.stop()
            for backend in backends:
                backend.hang.set()
                await backend.stop()
    assert not proxy.is_alive


def on_a_loop(test: Callable[[Path], Coroutine[Any, Any, None]]) -> Callable[[Path], None]:
    def run(tmp_path: Path) -> None:
        asyncio.run(asyncio.wait_for(test(tmp_path), 60))

    run.__name__ = test.__name__
    return run


def error_of(response: httpx.Response) -> dict[str, Any]:
    assert response.headers["content-type"] == "application/json"
    return response.json()["error"]


@on_a_loop
async def test_requests_pass_with_an_id_and_the_clients_own_address(folder: Path) -> None:
    async with setting(folder, 1) as here:
        head = (await here.ask())["head"].lower()
        assert "\r\nx-request-id: " in head
        assert "\r\nx-forwarded-for: 127.0.0.1\r\n" in head
        assert f"\r\nx-loraloom-front: {SECRET}\r\n" in head
        headers = {"x-request-id": "mine", "x-forwarded-for": "8.8.8.8"}
        response = await here.client.post("/v1/x", json={}, headers=headers)
        head = response.json()["head"].lower()
        assert "\r\nx-request-id: mine\r\n" in head
        assert "8.8.8.8" not in head


@on_a_loop
async def test_errors_of_its_own_have_openai_s_shape(folder: Path) -> None:
    async with setting(folder, 0) as here:
        response = await here.client.post("/v1/x", json={})
        assert response.status_code == 503
        assert error_of(response) == {
            "message": "No replica can take the request now; try again",
            "type": "server_error",
            "param": None,
            "code": "unavailable",
        }
        assert response.headers["retry-after"] == "1"
    async with setting(folder, 1, body_timeout_s=1) as here:
        response = await here.client.post("/v1/x", content=b"x" * (LIMIT + 1))
        assert response.status_code == 413
        assert error_of(response)["code"] == "request_too_large"
        assert (await here.client.post("/v1/x", content=b"x" * LIMIT)).status_code == 200
        reader, writer = await asyncio.open_connection("127.0.0.1", here.client.base_url.port)
        writer.write(f"POST /v1/x HTTP/1.1\r\nHost: x\r\nContent-Length: {LIMIT + 1}\r\n\r\n".encode())
        assert (await reader.read()).startswith(b"HTTP/1.1 413")  # at once: the body is not waited for
        writer.close()
        reader, writer = await asyncio.open_connection("127.0.0.1", here.client.base_url.port)
        writer.write(b"POST /v1/x HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nonly this")
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 408")
        assert b'"code": "request_timeout"' in answer
        writer.close()
        reader, writer = await asyncio.open_connection("127.0.0.1", here.client.base_url.port)
        writer.write(b"no http at all\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 400")  # in HAProxy's own words: this is no HTTP request yet
        writer.close()


@on_a_loop
async def test_one_model_goes_to_one_replica_and_many_to_all(folder: Path) -> None:
    async with setting(folder, 3) as here:
        homes: dict[str, str] = {}
        for number in range(30):
            homes[f"m{number}"] = (await here.ask(model=f"m{number}"))["name"]
        assert set(homes.values()) == {"b0", "b1", "b2"}
        for model, home in homes.items():
            assert (await here.ask(messages=["x" * 1000], model=model))["name"] == home
            assert (await here.ask(model=f"{model}@7"))["name"] == home  # whichever version or alias of it
        await here.proxy.drain(1)
        moved = [model for model, home in homes.items() if (await here.ask(model=model))["name"] != home]
        assert set(moved) == {model for model, home in homes.items() if home == "b0"}


@on_a_loop
async def test_a_busy_replica_s_model_spills_over(folder: Path) -> None:
    """Bounded loads: no replica has more than 125 % of the average, and at least one more."""
    async with setting(folder, 3) as here:
        home = (await here.ask(model="hot"))["name"]
        slow = [asyncio.create_task(here.ask("/slow", model="hot")) for _ in range(30)]
        while sum(backend.paths.count("/slow") for backend in here.backends) < 30:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        loads = Counter({backend.name: backend.paths.count("/slow") for backend in here.backends})
        for backend in here.backends:
            backend.hang.set()
        await asyncio.gather(*slow)
        assert loads[home] == max(loads.values()) <= 14
        assert min(loads.values()) > 0


@on_a_loop
async def test_a_request_that_nothing_has_come_back_for_is_sent_to_another_replica(folder: Path) -> None:
    async with setting(folder, 2) as here:
        home = (await here.ask(model="m"))["name"]
        first = next(backend for backend in here.backends if backend.name == home)
        first.cut_off = 1  # it reads the request, and closes without a word, as a process does that is killed
        assert (await here.ask(model="m"))["name"] != home
        await first.stop()
        for _ in range(20):
            assert (await here.ask(model="m"))["name"] != home
        await first.start()


@on_a_loop
async def test_a_replica_that_says_that_it_is_ill_gets_no_requests_until_it_is_well(folder: Path) -> None:
    async with setting(folder, 2) as here:
        ill, well = here.backends

        async def answering() -> set[str]:
            return {(await here.ask(model=f"m{number}"))["name"] for number in range(20)}

        async def only_well() -> bool:
            return await answering() == {well.name}

        async def both() -> bool:
            return len(await answering()) == 2

        assert await both()
        ill.is_well = False
        await until(only_well, 2.5)
        assert await only_well()
        ill.is_well = True
        await until(both, 1.5)


@on_a_loop
async def test_draining_lets_answers_finish_and_emptying_cuts_them_off(folder: Path) -> None:
    async with setting(folder, 1) as here:
        backend = here.backends[0]
        running = asyncio.create_task(here.client.post("/slow", json={}))
        while not backend.paths:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await here.proxy.drain(1)
        assert (await here.client.post("/v1/x", json={})).status_code == 503
        backend.hang.set()
        assert (await running).status_code == 200
        await here.proxy.empty(1)
        await here.proxy.fill(1, "127.0.0.1", backend.port)
        assert (await here.ask())["name"] == "b0"


def test_what_it_says_when_it_cannot_start(tmp_path: Path) -> None:
    async def start() -> None:
        proxy = HAProxy(FrontSpec("192.0.2.1", 80, 1, True, LIMIT, SECRET, connections=100), tmp_path)
        try:
            await proxy.wait_until_ready()
        finally:
            proxy.stop()

    with pytest.raises(MachineError, match=r"HAProxy does not start: Binding .*192\.0\.2\.1"):
        asyncio.run(start())


def test_it_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    program = (
        "import asyncio, pathlib, signal, sys\n"
        "from serving.http.haproxy import FrontSpec, HAProxy\n"
        f"spec = FrontSpec('127.0.0.1', {free_port()}, 1, True, 1000, 'x', connections=100)\n"
        "proxy = HAProxy(spec, pathlib.Path(sys.argv[1]))\n"
        "asyncio.run(proxy.wait_until_ready())\n"
        "print(proxy._process.pid, flush=True)\n"
        "signal.pause()\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        proxy = psutil.Process(int(starter.stdout.readline()))
        assert proxy.is_running()
        starter.kill()
    wait_until(lambda: not proxy.is_running() or proxy.status() == psutil.STATUS_ZOMBIE)


def test_the_configuration_of_one_replica_looks_into_no_body(tmp_path: Path) -> None:
    spec = FrontSpec("::1", 8000, 3, True, LIMIT, SECRET)
    assert "json_query" not in config_text(spec, tmp_path)
    assert "bind [::1]:8000\n" in config_text(spec, tmp_path)
    assert "json_query" in config_text(spec._replace(is_one=False), tmp_path)


def test_what_changes_the_registry_is_not_asked_twice(tmp_path: Path) -> None:
    """Of a request whose answer does not come, nobody knows whether it was done."""
    changing = {"/v1/load_lora_adapter", "/v1/unload_lora_adapter", VOTES_PATH}
    (rule,) = [
        line
        for line in config_text(FrontSpec("::1", 8000, 3, True, LIMIT, SECRET), tmp_path).splitlines()
        if "disable-l7-retry" in line
    ]
    assert changing <= set(rule.split())
