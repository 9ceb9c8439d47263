"""Between a browser and a real server: what the server streams is passed on event by event, when a test says so.

An answer is whole before its first event is passed on. So the engine takes no core from the browser meanwhile, and what
the page shows depends on nobody's speed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Generator
from queue import Queue

import aiohttp
from aiohttp import web

_PASSED = ("Content-Type", "Location", "x-loraloom-model")
PATIENCE_S = 100


class Stream:
    """One answer's events, held back."""

    def __init__(self, model: str, answer: bytes, loop: asyncio.AbstractEventLoop) -> None:
        self.model = model
        self.events = [event + b"\n\n" for event in answer.split(b"\n\n") if event]
        self.has_left = threading.Event()
        """Set once the browser has hung up."""
        self._loop = loop
        self._passed: asyncio.Queue[bytes | None] = asyncio.Queue()

    def steps(self) -> list[tuple[int, str]]:
        """The events with a completion's text, so many at a time that each time there is something new to be seen: how
        many, and their text. A token may be half a character, and show nothing.
        """
        documents = [event.removeprefix(b"data: ") for event in self.events if b"[DONE]" not in event]
        texts = [choice[0]["text"] for choice in (json.loads(document)["choices"] for document in documents) if choice]
        steps = [(0, "")]
        for text in texts:
            count, before = steps[-1]
            if before and text:
                steps.append((1, text))
            else:
                steps[-1] = (count + 1, before + text)
        return steps

    def send(self, count: int) -> None:
        """Pass the next ``count`` events on, in one piece."""
        self._put(b"".join(self.events[:count]))
        del self.events[:count]

    def end(self) -> None:
        """End the answer, whole or not."""
        self._put(None)

    def _put(self, piece: bytes | None) -> None:
        self._loop.call_soon_threadsafe(self._passed.put_nowait, piece)

    async def pass_to(self, response: web.StreamResponse) -> None:
        while piece := await self._passed.get():
            await response.write(piece)


class Gate:
    """An HTTP server on 127.0.0.1 before another one."""

    def __init__(self, upstream: str) -> None:
        self.url = ""
        self._upstream = upstream
        self._streams: Queue[Stream] = Queue()

    def streams(self, count: int) -> dict[str, Stream]:
        """The next ``count`` answers that begin to stream, by the model asked for."""
        found = [self._streams.get(timeout=PATIENCE_S) for _ in range(count)]
        return {stream.model: stream for stream in found}

    def has_more(self) -> bool:
        return not self._streams.empty()

    async def _pass(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        headers = {"Content-Type": request.content_type} if body else {}
        async with (
            aiohttp.ClientSession(auto_decompress=False) as session,
            session.request(
                request.method, self._upstream + request.path_qs, data=body, headers=headers, allow_redirects=False
            ) as answer,
        ):
            whole = await answer.read()
            kept = {name: answer.headers[name] for name in _PASSED if name in answer.headers}
        if answer.content_type != "text/event-stream":
            return web.Response(status=answer.status, body=whole, headers=kept)
        stream = Stream(json.loads(body)["model"], whole, asyncio.get_running_loop())
        response = web.StreamResponse(status=answer.status, headers=kept)
        await response.prepare(request)
        self._streams.put(stream)
        try:
            await stream.pass_to(response)
        except (asyncio.CancelledError, ConnectionError):
            stream.has_left.set()
            raise
        return response

    async def listen(self, opened: threading.Event, closed: asyncio.Event) -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._pass)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        opened.set()
        await closed.wait()
        await runner.cleanup()


@contextlib.contextmanager
def gate(upstream: str) -> Generator[Gate]:
    """A gate before the server at ``upstream``, in a thread of its own; closed with the block."""
    loop = asyncio.new_event_loop()
    opened, closed = threading.Event(), asyncio.Event()
    here = Gate(upstream)
    thread = threading.Thread(target=loop.run_until_complete, args=(here.listen(opened, closed),))
    thread.start()
    try:
        assert opened.wait(PATIENCE_S)
        yield here
    finally:
        loop.call_soon_threadsafe(closed.set)
        thread.join(PATIENCE_S)
        loop.close()
