"""Between a browser and a real server: what the server streams is passed on event by event, when a test says so.

The server's answer is whole before its first event is passed on: its engine takes no core from the browser meanwhile,
and a test sees each piece on the page before it sends the next.
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

_OWN = {"Connection", "Content-Encoding", "Content-Length", "Date", "Server", "Transfer-Encoding"}
"""Headers of a connection, which the gate makes itself."""
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
        """The events with a completion's text, grouped so that each group brings a text: how many they are, and which.

        ``[(2, "a"), (1, "b")]``: two events show "a", the next one "b". A token may be half a character, and show
        nothing.
        """
        documents = [event.removeprefix(b"data: ") for event in self.events if event.strip() != b"data: [DONE]"]
        texts = [choices[0]["text"] for choices in (json.loads(each)["choices"] for each in documents) if choices]
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
        assert 0 < count <= len(self.events)
        self._put(b"".join(self.events[:count]))
        del self.events[:count]

    def end(self) -> None:
        """End the answer, whole or not."""
        self._put(None)

    def send_all(self) -> None:
        """Pass on what is left, in one piece, and end the answer."""
        self.send(len(self.events))
        self.end()

    def _put(self, piece: bytes | None) -> None:
        self._loop.call_soon_threadsafe(self._passed.put_nowait, piece)

    async def pass_to(self, response: web.StreamResponse) -> None:
        while (piece := await self._passed.get()) is not None:
            await response.write(piece)


class Gate:
    """An HTTP server on 127.0.0.1 before another one."""

    def __init__(self, upstream: str) -> None:
        self.url = ""
        self.asked: list[str] = []
        """The models that were asked, in the order of the requests' arrival."""
        self._upstream = upstream
        self._streams: Queue[Stream | AssertionError] = Queue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = asyncio.Event()

    def streams(self, count: int) -> dict[str, Stream]:
        """The next ``count`` answers that begin to stream, by the model asked for."""
        found: dict[str, Stream] = {}
        for _ in range(count):
            stream = self._streams.get(timeout=PATIENCE_S)
            if isinstance(stream, AssertionError):
                raise stream
            found[stream.model] = stream
        return found

    async def listen(self, opened: threading.Event) -> None:
        """Serve until ``close``."""
        self._loop = asyncio.get_running_loop()
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._pass)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1)
        try:
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            opened.set()
        await self._closed.wait()
        await runner.cleanup()

    def close(self) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._closed.set)

    async def _pass(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        is_question = request.method == "POST" and request.path.endswith("completions")
        model = ""
        if is_question:
            # A random base may say at any token that this is all.
            question = json.loads(body) | {"ignore_eos": True}
            body, model = json.dumps(question).encode(), question["model"]
            self.asked.append(model)
        headers = {"Content-Type": request.content_type} if body else {}
        async with (
            aiohttp.ClientSession() as session,
            session.request(
                request.method, self._upstream + request.path_qs, data=body, headers=headers, allow_redirects=False
            ) as answer,
        ):
            whole = await answer.read()
            kept = {name: value for name, value in answer.headers.items() if name.title() not in _OWN}
        if answer.content_type != "text/event-stream":
            if is_question:
                self._streams.put(AssertionError(f"{answer.status}: {whole[:500]!r}"))
            return web.Response(status=answer.status, body=whole, headers=kept)
        stream = Stream(model, whole, asyncio.get_running_loop())
        response = web.StreamResponse(status=answer.status, headers=kept)
        await response.prepare(request)
        self._streams.put(stream)
        try:
            await stream.pass_to(response)
        except (asyncio.CancelledError, ConnectionError):
            stream.has_left.set()
            raise
        return response


@contextlib.contextmanager
def gate(upstream: str) -> Generator[Gate]:
    """A gate before the server at ``upstream``, in a thread of its own; closed with the block."""
    here, opened = Gate(upstream), threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(here.listen(opened)))
    thread.start()
    try:
        assert opened.wait(PATIENCE_S)
        assert here.url
        yield here
    finally:
        here.close()
        thread.join(PATIENCE_S)
