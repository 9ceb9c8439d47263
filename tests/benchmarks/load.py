"""A client that loads a server of OpenAI's API, and what it measures: the same for every server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp

TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Reply:
    """One answer, as its client saw it."""

    status: int
    """Of HTTP; 0 where the connection broke before an answer began."""
    model: str
    """What the answer says that it is from; "" where it failed or was cut off."""
    text: str
    first_s: float
    """From the request to the first piece of the answer."""
    total_s: float


@dataclass(frozen=True)
class Load:
    """What a number of clients got."""

    tokens_per_s: float
    median_s: float
    """Median time of a request."""
    replies: list[Reply]

    @property
    def failed(self) -> int:
        """Requests that were not answered as a whole."""
        return sum(not reply.model for reply in self.replies)


@asynccontextmanager
async def client(address: str = "127.0.0.1") -> AsyncGenerator[aiohttp.ClientSession]:
    """Connections from ``address`` are kept and used again, as many as there are requests at once."""
    connector = aiohttp.TCPConnector(limit=0, local_addr=(address, 0))
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=TIMEOUT_S)) as session:
        yield session


async def ask(
    session: aiohttp.ClientSession, url: str, model: str, prompt: str, tokens: int, *, stream: bool = True
) -> Reply:
    """Ask for exactly ``tokens`` tokens, the likeliest each time. ``url`` ends in ``/v1``."""
    body: dict[str, Any] = {
        "model": model,
        "prompt": prompt,
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": stream,
    }
    started = time.perf_counter()
    first = None
    content = b""
    status = 0
    with contextlib.suppress(aiohttp.ClientConnectionError, aiohttp.ClientPayloadError):
        async with session.post(f"{url}/completions", json=body) as response:
            status = response.status
            async for piece in response.content.iter_any():
                first = first or time.perf_counter() - started
                content += piece
    total = time.perf_counter() - started
    found, text = (read_stream(content) if stream else read_whole(content)) if status == 200 else ("", "")
    return Reply(status, found, text, first or total, total)


def read_whole(content: bytes) -> tuple[str, str]:
    """Model and text of a completion; model "" where it was cut off."""
    try:
        document = json.loads(content)
        return document["model"], document["choices"][0]["text"]
    except (ValueError, KeyError):
        return "", ""


def read_stream(content: bytes) -> tuple[str, str]:
    """Model and text of a stream of completions; model "" where it ended early."""
    lines = [line[6:] for line in content.decode(errors="replace").split("\n") if line.startswith("data: ")]
    if not lines or lines[-1].strip() != "[DONE]":
        return "", ""
    pieces = [json.loads(line) for line in lines[:-1]]
    return pieces[0]["model"], "".join(piece["choices"][0]["text"] for piece in pieces if piece["choices"])


async def load(
    url: str,
    models: Sequence[str],
    *,
    clients: int,
    requests: int,
    tokens: int,
    stream: bool = True,
    prompt: Callable[[int], str] = lambda number: f"Question {number}: what is it about?",
) -> Load:
    """``requests`` requests by ``clients`` clients, each with one under way; models in turn."""
    numbers = iter(range(requests))
    replies: list[Reply] = []

    async with client() as session:

        async def work() -> None:
            for number in numbers:
                model = models[number % len(models)]
                replies.append(await ask(session, url, model, prompt(number), tokens, stream=stream))

        started = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(clients)))
        elapsed = time.perf_counter() - started
    return Load(requests * tokens / elapsed, statistics.median(reply.total_s for reply in replies), replies)
