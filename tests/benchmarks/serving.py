"""The price of serving through loraloom, against bare vLLM's own OpenAI server with the same adapters.

    python -m tests.benchmarks.serving             # some ten minutes on two cores
    python -m tests.benchmarks.serving --zipf      # also 1,000 registered adapters, requests over 200 of them

Both servers get the same engine arguments, the same base (the demo's) and the same adapters, both run all the time, and
the same client loads them in turn. Throughput: 16 clients, 32 tokens each, streamed, over the base and two adapters
mixed. Added latency: one client, 8 tokens, request by request in turn. Cold: the time to the first token of an adapter
that has just been published, over that of the same adapter afterwards. Flood: two clients, alone and beside 64 of
another tenant's (by address), where loraloom lets 16 into the engine. Swaps: 20 promotions of an alias under steady
load; failed is what was not answered, or by another version than the alias had while the request was under way.

The last line is one JSON object: {"throughput_ratio": x, "added_ms": t, "cold_adapter_ms": t, "swap_failed": n}, with
what belongs to them beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml
from rich.console import Console
from rich.table import Table

from serving.engine import engine_arguments, environment
from serving.manifest import base_identity
from serving.registry import Registry
from serving.spec import ServeSpec
from tests.benchmarks.load import Load, Reply, ask, client, load
from tests.benchmarks.surroundings import ROOT
from tests.ports import free_port
from tests.serving.make import make_adapter
from tests.waiting import wait_until

BASE = ROOT / "configs" / "demo" / "base"
MIXED = ["base", "first", "second"]
RUNNING = 16
FLOOD = 64
FLOOD_S = 15.0
PROMOTIONS = 20
START_LIMIT_S = 300


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=96, help="a measurement of throughput")
    parser.add_argument("--resident", type=int, default=8, help="adapters that the engine keeps")
    parser.add_argument("--zipf", action="store_true", help="also 1,000 registered adapters")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        shelf = Shelf(Path(folder))
        for name in MIXED[1:]:
            shelf.publish(name)
        config = write_config(Path(folder), shelf, options.resident)
        spec = ServeSpec.model_validate(yaml.safe_load(config.read_text()))
        with loraloom(config) as (ours, process):
            with bare(spec, shelf) as theirs:
                result = against_bare(ours, theirs, options)
                result["flood"] = {
                    side: asyncio.run(flood(url)) for side, url in (("loraloom", ours), ("bare", theirs))
                }
            result |= asyncio.run(cold(ours, shelf))
            result |= asyncio.run(swaps(ours, shelf, process))
            if options.zipf:
                result["zipf"] = asyncio.run(zipf(ours, shelf, process))
    show(result)
    print(json.dumps(result))


class Shelf:
    """A registry of random adapters, each different from all others."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.registry = Registry(folder / "registry")
        self.base = base_identity(str(BASE))
        self.sources: dict[str, Path] = {}
        self._seeds = iter(range(1_000_000))

    def publish(self, name: str) -> str:
        """Publish a new adapter as the next version of ``name`` and return its id."""
        seed = next(self._seeds)
        self.sources[name] = make_adapter(self.folder / f"adapter-{seed}", BASE, seed=seed, rank=8)
        return self.registry.publish(name, self.sources[name], self.base, metrics={}, lineage={}).id


def write_config(folder: Path, shelf: Shelf, resident: int) -> Path:
    """What ``loraloom serve`` is given."""
    document = {
        "base": {"model": str(BASE), "name": "base"},
        "registry": str(shelf.registry.root),
        "engine": {"max_loras": 4, "max_cpu_loras": resident, "max_lora_rank": 16, "max_model_len": 256},
        "cache": {"folder": str(folder / "cache")},
        "http": {"port": free_port()},
        "queue": {"running": RUNNING},
    }
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


@contextlib.contextmanager
def loraloom(config: Path) -> Generator[tuple[str, psutil.Process]]:
    """Our server, and its process."""
    command = [sys.executable, "-m", "loraloom", "serve", str(config), "--json"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield json.loads(process.stdout.readline())["url"], psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait(60)


@contextlib.contextmanager
def bare(spec: ServeSpec, shelf: Shelf) -> Generator[str]:
    """vLLM's own server, with the same engine arguments."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", "--model", spec.base.model]
    command += [
        "--served-model-name",
        "base",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--disable-uvicorn-access-log",
    ]
    for name, value in engine_arguments(spec).items():
        flag = f"--{name.replace('_', '-')}"
        command += [flag] if value is True else [flag, str(value)]
    command += ["--lora-modules", *(f"{name}={folder}" for name, folder in shelf.sources.items())]
    variables = {**os.environ, **environment(spec), "PYTHONPATH": str(ROOT)}
    with (
        (shelf.folder / "bare.log").open("wb") as log,
        subprocess.Popen(command, env=variables, stdout=log, stderr=log) as process,
    ):
        url = f"http://127.0.0.1:{port}/v1"
        try:
            wait_until(lambda: process.poll() is not None or answers(url), timeout_s=START_LIMIT_S)
            assert process.poll() is None, (shelf.folder / "bare.log").read_text()[-2000:]
            yield url
        finally:
            process.terminate()
            process.wait(60)


def answers(url: str) -> bool:
    """True if a server answers there."""
    import httpx

    try:
        return httpx.get(f"{url}/models", trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def against_bare(ours: str, theirs: str, options: argparse.Namespace) -> dict[str, Any]:
    """Throughput and latency of both, in alternation."""
    sides = {"loraloom": ours, "bare": theirs}
    mixed: dict[str, list[Load]] = {side: [] for side in sides}
    alone: dict[str, list[Load]] = {side: [] for side in sides}
    single: list[dict[str, float]] = []
    for side, url in sides.items():
        check(asyncio.run(load(url, MIXED, clients=16, requests=48, tokens=8)), side)
    for number in range(options.rounds):
        order = list(sides) if number % 2 else list(reversed(sides))
        for measured, models in ((mixed, MIXED), (alone, ["base"])):
            for side in order:
                found = asyncio.run(load(sides[side], models, clients=16, requests=options.requests, tokens=32))
                measured[side].append(check(found, side))
        single += asyncio.run(in_turn(sides, max(12, options.requests // 4)))
    ratios = [
        one.tokens_per_s / other.tokens_per_s for one, other in zip(mixed["loraloom"], mixed["bare"], strict=True)
    ]
    added = [pair["loraloom"] - pair["bare"] for pair in single]
    return {
        "throughput_ratio": round(statistics.median(ratios), 3),
        "throughput_ratios": [round(ratio, 3) for ratio in ratios],
        "added_ms": round(statistics.median(added) * 1e3, 2),
        "tokens_per_s": {side: round(statistics.median(each.tokens_per_s for each in mixed[side])) for side in sides},
        "base_alone_tokens_per_s": {
            side: round(statistics.median(each.tokens_per_s for each in alone[side])) for side in sides
        },
        "request_ms": {side: round(statistics.median(pair[side] for pair in single) * 1e3, 1) for side in sides},
    }


async def in_turn(sides: dict[str, str], requests: int) -> list[dict[str, float]]:
    """Seconds of single requests, first to one server and then to the other: what else the machine does hits both."""
    pairs: list[dict[str, float]] = []
    async with client() as session:
        for number in range(requests):
            pair: dict[str, float] = {}
            for side in list(sides) if number % 2 else list(reversed(sides)):
                reply = await ask(session, sides[side], MIXED[number % 3], f"Question {number}: what is it about?", 8)
                assert reply.model, f"{side}: {reply}"
                pair[side] = reply.total_s
            pairs.append(pair)
    return pairs


async def flood(url: str) -> dict[str, float]:
    """What two clients wait for an answer, alone and beside a flood, and their share of the answers then."""

    async def keep_asking(session: Any, found: list[Reply], until: float) -> None:
        while time.perf_counter() < until:
            found.append(await ask(session, url, "first", f"Question {len(found)}", 16))

    alone: list[Reply] = []
    beside: list[Reply] = []
    flooding: list[Reply] = []
    async with client() as few, client("127.0.0.2") as many:
        until = time.perf_counter() + FLOOD_S / 3
        await asyncio.gather(*(keep_asking(few, alone, until) for _ in range(2)))
        until = time.perf_counter() + FLOOD_S
        flooders = [asyncio.create_task(keep_asking(many, flooding, until)) for _ in range(FLOOD)]
        await asyncio.sleep(FLOOD_S / 10)
        await asyncio.gather(*(keep_asking(few, beside, until) for _ in range(2)))
        await asyncio.gather(*flooders)
    assert all(reply.model for reply in (*alone, *beside, *flooding))
    return {
        "alone_ms": round(statistics.median(reply.total_s for reply in alone) * 1e3, 1),
        "beside_ms": round(statistics.median(reply.total_s for reply in beside) * 1e3, 1),
        "flood_ms": round(statistics.median(reply.total_s for reply in flooding) * 1e3, 1),
        "share": round(len(beside) / (len(beside) + len(flooding)), 3),
    }


def check(found: Load, side: str) -> Load:
    """``found``, if every request was answered."""
    assert not found.failed, (
        f"{side}: {found.failed} requests failed: {[r for r in found.replies if r.status != 200][:1]}"
    )
    return found


async def cold(url: str, shelf: Shelf, count: int = 8) -> dict[str, Any]:
    """Time to the first token of adapters that have just been published, over the same once they are loaded."""
    first: list[float] = []
    warm: list[float] = []
    async with client() as session:
        for number in range(count):
            model = shelf.publish(f"cold-{number}")
            await until_known(session, url, model)
            for times in (first, warm):
                reply = await ask(session, url, model, f"Question {number} of {len(times)}", 4)
                assert reply.model == model, reply
                times.append(reply.first_s)
    return {
        "cold_adapter_ms": round((statistics.median(first) - statistics.median(warm)) * 1e3, 1),
        "first_token_ms": {
            "cold": round(statistics.median(first) * 1e3, 1),
            "warm": round(statistics.median(warm) * 1e3, 1),
        },
    }


async def until_known(session: Any, url: str, model: str) -> None:
    """Wait until the server knows a model that was just published."""
    for _ in range(200):
        async with session.get(f"{url}/models/{model}") as response:
            if response.status == 200:
                return
        await asyncio.sleep(0.02)
    raise AssertionError(f"{model} is unknown after 4 s")


async def swaps(url: str, shelf: Shelf, process: psutil.Process) -> dict[str, Any]:
    """Promotions of ``swap@prod`` between two versions, under the load of eight clients."""
    versions = [int(shelf.publish("swap").partition("@")[2]) for _ in range(2)]
    shelf.registry.move("swap", "prod", versions[0])
    moves: list[tuple[float, int]] = [(time.perf_counter(), versions[0])]
    asked: list[tuple[float, Reply]] = []
    done = asyncio.Event()
    async with client() as session:
        await until_known(session, url, "swap@prod")

        async def work(number: int) -> None:
            while not done.is_set():
                started = time.perf_counter()
                reply = await ask(session, url, "swap@prod", f"Question {number}", 8)
                asked.append((started, reply))

        workers = [asyncio.create_task(work(number)) for number in range(8)]
        await asyncio.sleep(2)
        before = memory_mib(process)
        for number in range(PROMOTIONS):
            version = versions[(number + 1) % 2]
            await asyncio.to_thread(shelf.registry.move, "swap", "prod", version)
            moves.append((time.perf_counter(), version))
            await asyncio.sleep(1.5)
        done.set()
        await asyncio.gather(*workers)
    wrong = [reply for started, reply in asked if reply.model not in allowed(moves, started, reply.total_s)]
    return {
        "swap_failed": len(wrong),
        "swap_requests": len(asked),
        "swap_memory_mib": {"before": before, "after": memory_mib(process)},
    }


def allowed(moves: list[tuple[float, int]], started: float, total_s: float) -> set[str]:
    """Who may answer a request: what the alias pointed to a second before it began, or since then.

    Args:
        moves: When the alias was moved, and to which version; in order.
        started: When the request began, by the same clock.
        total_s: How long it took.
    """
    before = [version for moment, version in moves if moment <= started - 1.0][-1:]
    since = [version for moment, version in moves if started - 1.0 < moment <= started + total_s]
    return {f"swap@{version}" for version in [*before, *since]}


async def zipf(url: str, shelf: Shelf, process: psutil.Process) -> dict[str, Any]:
    """1,000 registered adapters, requests over 200 of them by a Zipf law."""
    for number in range(1000):
        shelf.publish(f"z{number}")
    weights = [1 / (rank + 1) for rank in range(200)]
    chance = random.Random(0)
    before = memory_mib(process)
    first: list[float] = []
    again: list[float] = []
    seen: set[str] = set()
    async with client() as session:
        await until_known(session, url, "z999@1")
        started = time.perf_counter()
        async with session.get(f"{url}/models") as response:
            listed = len((await response.json())["data"])
        listing_s = time.perf_counter() - started
        names = iter([f"z{number}" for number in chance.choices(range(200), weights, k=600)])

        async def work() -> None:
            for name in names:
                times = again if name in seen else first
                seen.add(name)
                reply = await ask(session, url, name, "Question", 8)
                assert reply.model == f"{name}@1", reply
                times.append(reply.first_s)

        await asyncio.gather(*(work() for _ in range(16)))
        cold = [(await ask(session, url, f"z{number}", "Question", 4)).first_s for number in range(900, 920)]
        warm = [(await ask(session, url, "z919", f"Question {number}", 4)).first_s for number in range(20)]
    return {
        "listed": listed,
        "listing_ms": round(listing_s * 1e3, 1),
        "answered": len(first) + len(again),
        "first_token_ms": {
            "asked for the first time": spread(first),
            "asked before, loaded or not": spread(again),
            "one client, cold": spread(cold),
            "one client, warm": spread(warm),
        },
        "memory_mib": {"before": before, "after": memory_mib(process)},
    }


def spread(times_s: list[float]) -> dict[str, float]:
    """Count, median and 95th percentile, in milliseconds."""
    cuts = statistics.quantiles(times_s, n=20)
    return {"count": len(times_s), "median": round(cuts[9] * 1e3, 1), "p95": round(cuts[18] * 1e3, 1)}


def memory_mib(process: psutil.Process) -> int:
    """What the processes of our server have to themselves, all together."""
    processes = [process, *process.children(recursive=True)]
    return round(sum(each.memory_full_info().uss for each in processes) / 2**20)


def show(result: dict[str, Any]) -> None:
    """Print a table for people."""
    table = Table("", "loraloom", "bare vLLM")
    for field, unit in (("tokens_per_s", "tokens/s, mixed"), ("base_alone_tokens_per_s", "tokens/s, base alone")):
        table.add_row(unit, *(f"{result[field][side]:,}" for side in ("loraloom", "bare")))
    for field, what in (("alone_ms", "alone"), ("beside_ms", "beside a flood")):
        table.add_row(f"ms a request, two clients {what}", *(f"{side[field]}" for side in result["flood"].values()))
    table.add_row("ms a request, one client", *(f"{result['request_ms'][side]}" for side in ("loraloom", "bare")))
    Console().print(table)


if __name__ == "__main__":
    main()
