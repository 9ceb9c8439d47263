"""Two replicas under load, on a registry in S3: promotions, keys, outages, a rolling restart, a killed replica."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Generator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import httpx
import psutil
import pytest
import yaml
from playwright.sync_api import expect

from cluster.connect import environment
from serving.access.key_file import KeyEntry, KeyFile, KeyLimits, KeyScopes, change_keys, key_digest, new_key
from serving.manifest import Manifest
from serving.registry import Registry
from serving.registry.votes import Tally, Votes
from tests.benchmarks.load import Reply, ask
from tests.benchmarks.serving import allowed
from tests.browser import chromium, visit
from tests.serving.make import identity, make_adapter
from tests.serving.s3 import S3Server, s3_server
from tests.waiting import wait_until

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parent.parent.parent
RESIDENT = 4
PROMOTIONS = 20


@dataclass
class Shelf:
    """A registry, and adapters for it."""

    registry: Registry
    base: Path
    folder: Path
    published: int = 0

    def publish(self, name: str) -> Manifest:
        """Publish a new random adapter; each one answers otherwise."""
        self.published += 1
        adapter = make_adapter(self.folder / f"adapter-{self.published}", self.base, seed=self.published)
        return self.registry.publish(name, adapter, identity(self.base), metrics={}, lineage={})


@dataclass
class Running:
    """The server, and what it serves."""

    url: str
    process: subprocess.Popen[str]
    stderr: Path
    shelf: Shelf
    store: S3Server
    key_file: Path
    keys: dict[str, str]

    @property
    def registry(self) -> Registry:
        return self.shelf.registry

    def headers(self, key: str = "alice") -> dict[str, str]:
        return {"Authorization": f"Bearer {self.keys[key]}"}

    def session(self, key: str = "alice") -> aiohttp.ClientSession:
        return aiohttp.ClientSession(headers=self.headers(key), connector=aiohttp.TCPConnector(limit=0))

    def post(self, model: str, key: str = "alice", **fields: object) -> httpx.Response:
        body = {"model": model, "prompt": "The loom is", "max_tokens": 4, "temperature": 0, **fields}
        return httpx.post(f"{self.url}/completions", json=body, headers=self.headers(key), timeout=120)

    def replicas(self) -> list[psutil.Process]:
        """The processes of the replicas that answer."""
        found: list[psutil.Process] = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it has just ended
                if "AdapterServer" in " ".join(child.cmdline()) and _listens(child):
                    found.append(child)
        return found

    def memory_mib(self) -> float:
        """What the replicas and their engines have to themselves."""
        family = [each for replica in self.replicas() for each in (replica, *replica.children(recursive=True))]
        return sum(each.memory_full_info().uss for each in family) / 2**20

    def said(self) -> str:
        return self.stderr.read_text()


def _listens(replica: psutil.Process) -> bool:
    """True once its HTTP server is there; Ray's own ports are on all addresses."""
    open_ports = replica.net_connections(kind="tcp")
    return any(port.status == psutil.CONN_LISTEN and port.laddr.ip == "127.0.0.1" for port in open_ports)


def write_keys(path: Path) -> dict[str, str]:
    keys = {name: new_key() for name in ("alice", "bob", "carol", "root")}

    def entries(_: KeyFile) -> KeyFile:
        def entry(name: str, scopes: KeyScopes, limits: KeyLimits) -> KeyEntry:
            return KeyEntry(sha256=key_digest(keys[name]), scopes=scopes, limits=limits)

        return KeyFile(
            keys={
                "alice": entry("alice", KeyScopes(adapters=["*"], base=True), KeyLimits()),
                "bob": entry("bob", KeyScopes(adapters=["sup*"], base=False), KeyLimits(requests_per_minute=5)),
                "carol": entry("carol", KeyScopes(adapters=["sup*"], base=False), KeyLimits()),
                "root": entry("root", KeyScopes(adapters=["*"], base=True, admin=True), KeyLimits()),
            }
        )

    change_keys(path, entries, create=True)
    return keys


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Generator[Running]:
    folder = tmp_path_factory.mktemp("replicas")
    variables = {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    with s3_server() as store, environment(variables):
        store.make_bucket("shelf")
        registry = Registry(store.uri("shelf/adapters"))
        keys = write_keys(folder / "keys.yaml")
        document = {
            "base": {"model": str(base), "name": "tiny"},
            "registry": registry.root,
            "engine": {"max_loras": 2, "max_cpu_loras": RESIDENT, "max_lora_rank": 16, "max_model_len": 128},
            "http": {"port": 0, "api_keys": str(folder / "keys.yaml")},
            "cache": {"folder": str(folder / "cache")},
            "pin": ["pinned"],
            "replicas": 2,
            "cluster": {"num_cpus": 2, "dashboard": False},
        }
        (folder / "serve.yaml").write_text(yaml.safe_dump(document))
        command = [sys.executable, str(ROOT / "loraloom.py"), "serve", str(folder / "serve.yaml"), "--json"]
        stderr = folder / "stderr"
        shelf = Shelf(registry, base, folder)
        for name in ("pinned", "support", "support"):
            shelf.publish(name)
        with (
            stderr.open("w") as errors,
            subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
        ):
            try:
                assert process.stdout
                line = next((line for line in process.stdout if line.startswith("{")), None)
                assert line, stderr.read_text()
                running = Running(json.loads(line)["url"], process, stderr, shelf, store, folder / "keys.yaml", keys)
                yield running
                process.send_signal(signal.SIGTERM)
                assert process.wait(90) == 0, running.said()
                assert "Traceback" not in running.said()
            finally:
                process.kill()


Asked = list[tuple[float, Reply]]
"""When a client asked, and the answer."""


async def under_load(
    server: Running, models: list[str], work: Callable[[Asked], Awaitable[None]], clients: int = 4, pause_s: float = 0.0
) -> Asked:
    """What clients got that asked all the time while ``work`` was done, which sees it grow."""
    done = asyncio.Event()
    asked: Asked = []

    async def client(session: aiohttp.ClientSession, number: int) -> None:
        turn = number
        while not done.is_set():
            turn += 1
            started = time.monotonic()
            reply = await ask(session, server.url, models[turn % len(models)], f"Question {number}", 4)
            asked.append((started, reply))
            await asyncio.sleep(pause_s)

    async with server.session() as session:
        tasks = [asyncio.create_task(client(session, number)) for number in range(clients)]
        try:
            await work(asked)
        finally:
            done.set()
            await asyncio.gather(*tasks)
    return asked


def test_keys(server: Running) -> None:
    assert httpx.get(f"{server.url}/models").status_code == 401
    assert server.post("support").status_code == 200
    refused = httpx.post(f"{server.url}/completions", json={"model": "support"}, headers={"Authorization": "Bearer x"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
    assert "Bearer" in refused.headers["www-authenticate"]
    forbidden = server.post("tiny", "bob")
    assert (forbidden.status_code, forbidden.json()["error"]["code"]) == (403, "insufficient_scope")
    listed = httpx.get(f"{server.url}/models", headers=server.headers("bob")).json()["data"]
    assert {card["id"].partition("@")[0] for card in listed} == {"support"}
    root = server.url.removesuffix("/v1")
    assert httpx.get(f"{root}/health").status_code == 200
    assert httpx.get(f"{root}/metrics", headers=server.headers()).status_code == 403
    assert "vllm" in httpx.get(f"{root}/metrics", headers=server.headers("root")).text


@pytest.mark.browser
def test_the_playground_honours_keys(server: Running) -> None:
    root = server.url.removesuffix("/v1")
    with chromium() as browser, visit(browser, refused=[401, 403]) as seen:
        page = seen.page
        page.goto(f"{root}/playground#m=support%401&m=support%402&m=tiny&prompt=x&max=4&mode=completion")
        expect(page.locator("#note")).to_have_text("This server wants an API key.")
        page.fill("#key", "loom-nonsense")
        page.press("#key", "Enter")
        expect(page.locator("#note")).to_have_text("This key is not known here.")
        page.fill("#key", server.keys["carol"])
        page.press("#key", "Enter")
        expect(page.locator("#served")).to_contain_text("no base, 1 adapter")
        page.click("#ask")
        expect(page.locator("pre.bad")).to_contain_text("may not use the model `tiny`")
        page.click("#choices button:text-is('A')")  # between the two that answered
        expect(page.locator("#tally")).to_contain_text("support@1 is preferred in 100 %")
        assert server.keys["carol"] not in page.url
        assert page.evaluate("localStorage.length") == 0
    shelf = Registry(server.shelf.registry.root)
    assert shelf.history("support")[-1].by == "carol"
    assert shelf.entry("support", 2).votes == Votes(1, {"support@1": Tally(lost=1)})


def test_a_limit_counts_over_both_replicas_and_says_when_to_come_again(server: Running) -> None:
    """Five a minute: what passes is at most twice that, however requests spread, and then what has come free since."""
    server.shelf.publish("supply")  # of another name, and so perhaps at home in the other replica
    wait_until(lambda: server.post("supply").status_code == 200, timeout_s=30)
    answers: list[httpx.Response] = []
    began = time.monotonic()
    for number in range(14):
        answers.append(server.post("supply" if number % 2 else "support", "bob"))
        time.sleep(0.3)  # until a replica has met the ledger, it lets pass half of what is allowed
    statuses = Counter(answer.status_code for answer in answers)
    assert set(statuses) == {200, 429}
    free_again = (time.monotonic() - began) // 12
    assert 4 <= statuses[200] <= 10
    assert sum(answer.status_code == 200 for answer in answers[10:]) <= free_again
    refused = next(answer for answer in reversed(answers) if answer.status_code == 429)
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.headers["x-ratelimit-limit-requests"] == "5"


def test_keys_change_without_a_restart(server: Running) -> None:
    def without_bob(keys: KeyFile) -> KeyFile:
        return KeyFile(keys={name: entry for name, entry in keys.keys.items() if name != "bob"})

    change_keys(server.key_file, without_bob)
    wait_until(lambda: server.post("support", "bob").status_code == 401, timeout_s=10)
    whole = server.key_file.read_text()
    server.key_file.write_text(whole + "nonsense: [")
    time.sleep(1.5)
    assert server.post("support").status_code == 200
    server.process.send_signal(signal.SIGHUP)  # a file with faults is not gone over to
    wait_until(lambda: "not reloaded" in server.said(), timeout_s=60)
    server.key_file.write_text(whole)
    assert server.post("support").status_code == 200


def test_promotions_under_load(server: Running) -> None:
    """No request fails, none is answered by a version that the alias did not have within the second before it, and both
    versions, asked for the same prompt in turn, keep their own answers.
    """
    versions = [server.shelf.publish("swap").version for _ in range(2)]
    server.registry.move("swap", "prod", versions[0])
    wait_until(lambda: server.post("swap@prod").status_code == 200, timeout_s=10)
    moves = [(time.monotonic(), versions[0])]
    memory: list[float] = []

    async def promote(_: Asked) -> None:
        for number in range(PROMOTIONS):
            await asyncio.sleep(1.2)
            if number == PROMOTIONS // 4:
                memory.append(server.memory_mib())
            version = versions[(number + 1) % 2]
            await asyncio.to_thread(server.registry.move, "swap", "prod", version)
            moves.append((time.monotonic(), version))
        await asyncio.sleep(1.2)
        memory.append(server.memory_mib())

    asked = asyncio.run(under_load(server, ["swap@prod"], promote))
    assert len(asked) > 5 * PROMOTIONS
    assert memory[1] < memory[0] + 100
    assert {reply.status for _, reply in asked} == {200}
    for started, reply in asked:
        assert reply.model in allowed(moves, started, reply.total_s)
    texts: dict[tuple[str, str], set[str]] = {}
    for version in (*versions, *versions):
        answer = server.post(f"swap@{version}").json()
        texts.setdefault((answer["model"], "text"), set()).add(answer["choices"][0]["text"])
    assert all(len(found) == 1 for found in texts.values())
    assert len({next(iter(found)) for found in texts.values()}) == 2


def test_a_split_alias_is_sticky_over_replicas(server: Running) -> None:
    server.registry.move("support", "canary", {1: 0.5, 2: 0.5})
    wait_until(lambda: server.post("support@canary").status_code == 200, timeout_s=10)
    time.sleep(1)
    versions: dict[str, set[str]] = {}
    for user in [f"user-{number}" for number in range(8)] * 2:
        response = server.post("support@canary", user=user)
        assert response.headers["x-loraloom-model"] == response.json()["model"]
        versions.setdefault(user, set()).add(response.json()["model"])
    assert all(len(found) == 1 for found in versions.values())
    assert len(set.union(*versions.values())) == 2


def test_the_registry_cannot_be_reached(server: Running) -> None:
    """What is loaded goes on, the rest is told that it must wait, and all is well again afterwards."""
    cold = server.shelf.publish("cold").id
    wait_until(lambda: cold in httpx.get(f"{server.url}/models", headers=server.headers()).text, timeout_s=10)
    assert server.post("pinned").status_code == 200
    server.store.stop()
    try:
        assert server.post("pinned").status_code == 200
        refused = server.post(cold)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "registry_unreachable")
        assert "retry-after" in refused.headers
        assert server.post("tiny").status_code == 200
    finally:
        server.store.start()
    wait_until(lambda: server.post(cold).status_code == 200, timeout_s=60)


def test_500_clients_at_once(server: Running) -> None:
    async def work() -> Counter[int]:
        async with server.session() as session:
            models = ["tiny", "support@1", "support@2", "pinned"]
            asking = (ask(session, server.url, models[number % 4], f"Question {number}", 2) for number in range(500))
            return Counter(reply.status for reply in await asyncio.gather(*asking))

    statuses = asyncio.run(work())
    assert sum(statuses.values()) == 500
    assert set(statuses) <= {200, 429}
    assert statuses[200] >= 250
    assert server.post("tiny").status_code == 200


def test_a_rolling_restart_fails_no_request(server: Running) -> None:
    before = {process.pid for process in server.replicas()}
    assert len(before) == 2

    async def restart(_: Asked) -> None:
        server.process.send_signal(signal.SIGHUP)
        deadline = time.monotonic() + 400
        while before & {process.pid for process in server.replicas()} or len(server.replicas()) != 2:
            assert time.monotonic() < deadline, server.said()
            await asyncio.sleep(1)
        await asyncio.sleep(3)

    asked = asyncio.run(under_load(server, ["tiny", "support@1", "support@2", "pinned"], restart, 3, pause_s=0.3))
    failed = [reply for _, reply in asked if reply.status != 200 or not reply.model]
    assert not failed
    assert len(asked) > 50
    assert "reloaded: the replicas are being replaced" in server.said()


def test_a_killed_replica(server: Running) -> None:
    """Requests that nothing had come back for go to the other one; a stream that had begun is cut off, and no more."""

    async def kill(asked: Asked) -> None:
        await asyncio.sleep(1)
        victim = server.replicas()[0]
        for process in [victim, *victim.children(recursive=True)]:
            process.kill()
        killed_at = time.monotonic()
        while sum(started > killed_at and reply.status == 200 for started, reply in asked) <= 20:
            assert time.monotonic() < killed_at + 120
            await asyncio.sleep(0.1)

    asked = asyncio.run(under_load(server, ["tiny", "support@1", "support@2", "pinned"], kill, clients=6))
    statuses = Counter(reply.status for _, reply in asked)
    cut_off = [reply for _, reply in asked if reply.status == 200 and not reply.model]
    assert set(statuses) <= {200, 503}
    assert len(cut_off) + statuses[503] <= 6
    for model in ("tiny", "support@1", "support@2", "pinned"):
        assert server.post(model).status_code == 200
    wait_until(lambda: len(server.replicas()) == 2, timeout_s=300)  # Ray Serve has started another
