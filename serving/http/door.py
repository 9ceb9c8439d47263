"""What every HTTP request passes on its way to vLLM's own app, inside the replica that answers it.

In this order: whose key it is, which version of which adapter it wants and whether that key may have it, the key's
limits, the adapter's files, the request's turn in the queue, the adapter's place in the engine. So a store that is slow
costs nobody a turn. Then vLLM's OpenAI server takes over: it is given the request with the adapter's immutable id for a
model, so that a promotion in the meantime changes nothing for it, and its answers go out as they are. Only errors are
looked at: they are brought into one shape.

A model that does not exist costs its key nothing: it is looked up before the limits, nearly always in memory.

There is no hop and no copy in between: this is an ASGI application around another, in one process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from http import HTTPStatus
from typing import Any, TypeVar

from serving.access.admission import Admission
from serving.access.keys import ANONYMOUS, KeyRing
from serving.access.limits import Limiter
from serving.adapters.catalogue import Catalogue
from serving.adapters.follower import Follower
from serving.adapters.holdings import Holdings
from serving.http.api_error import QUEUE_TIMEOUT, ApiError, insufficient_scope, overloaded
from serving.http.envelope import Envelope, Send
from serving.http.request import ClientGoneError, Expected, ModelRequest, Receive, read_body
from serving.http.usage import Usage, current_usage
from serving.manifest import Manifest
from serving.metrics import BASE, Metrics

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Result = TypeVar("Result")

MODEL_PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"})
"""Routes whose body names a model."""
CHAT_PATH = "/v1/chat/completions"
GENERATING_PATHS = frozenset({CHAT_PATH, "/v1/completions"})
"""Those of them that keep the engine busy."""
VOTES_PATH = "/v1/votes"
"""A route that counts as a request of its key, without tokens: each vote is one more event of the registry."""
PLAYGROUND = "/playground"
OPEN_PATHS = frozenset({"/", PLAYGROUND, "/health", "/version", "/docs", "/openapi.json"})
"""Routes that need no key."""
ADMIN_PATHS = frozenset({"/metrics", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"})
"""Routes that need an admin's key, where there are keys."""
OPEN_FOLDERS = ("/static/", f"{PLAYGROUND}/")
"""What the pages of /docs and of the playground load."""
BODILESS_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
UNSTATED_ANSWER_TOKENS = 512
"""What an answer is charged until it has ended where the request leaves its length to the engine. Most chats do: were
they charged up to the model's end, a key could have fewer tokens a minute than one of them, and would never get any."""
RETRY_AFTER_S = 5.0
CLIENT_LEFT = 499
"""What is counted, as by nginx, where the client closed the connection before an answer began."""
SESSION_HEADER = b"x-session-id"
"""Requests of one session stay on one version of a split alias."""
KEY_IN_SCOPE = "loraloom.key"
"""Where routes of ours find the key of a request."""

_log = logging.getLogger(__name__)


class _Visit:
    """What is known of one request so far."""

    __slots__ = ("arrived", "expected", "has_begun", "key", "model", "usage", "waited_s")

    def __init__(self) -> None:
        self.arrived = time.monotonic()
        self.key = ANONYMOUS
        self.model = ""
        """Who answers, as metrics call it; "" before it is known."""
        self.expected = Expected(0, 0, 0)
        self.usage = Usage()
        self.waited_s: float | None = None
        """How long it waited for its place in the engine."""
        self.has_begun = False
        """True once it is with vLLM."""

    def prompt_tokens(self, status: int | None) -> int:
        """Tokens of the prompt that the engine read; where the engine has told of none because the client left before
        it could, and so before any ``status``, or in the answer's first moment, as many as were expected.
        """
        if self.usage.prompt_tokens or not self.has_begun or (status or 0) >= HTTPStatus.BAD_REQUEST:
            return self.usage.prompt_tokens
        return self.expected.prompt_tokens


class Door:
    """An ASGI application around vLLM's.

    Args:
        app: vLLM's app with our routes.
        catalogue: What there is to ask.
        follower: Finds the version that a request gets.
        holdings: The adapters in the engine.
        keys: Whom to let in; None lets everybody in.
        limiter: How much each key may do.
        admission: The queue of the requests that generate.
        metrics: Where requests are counted.
        max_body_bytes: Largest body.
        is_open: True if admin's routes are for everybody, where there are no keys.
        max_sequences: Most answers that one request may ask for: what the engine works on at a time.
        wait_s: Longest that a request waits for its adapter: for its files and for a place in the engine together.
        body_timeout_s: Longest that a body may take to arrive.
        is_engine_dead: Says whether the engine has ended.
    """

    def __init__(
        self,
        app: App,
        *,
        catalogue: Catalogue,
        follower: Follower,
        holdings: Holdings,
        keys: KeyRing | None,
        limiter: Limiter,
        admission: Admission,
        metrics: Metrics,
        max_body_bytes: int,
        is_open: bool,
        max_sequences: int = 256,
        wait_s: float = 60.0,
        body_timeout_s: float = 30.0,
        is_engine_dead: Callable[[], bool] = lambda: False,
    ) -> None:
        self._app = app
        self._catalogue = catalogue
        self._follower = follower
        self._holdings = holdings
        self._keys = keys
        self._limiter = limiter
        self._admission = admission
        self._metrics = metrics
        self._max_body_bytes = max_body_bytes
        self._is_open = is_open
        self._max_sequences = max_sequences
        self._wait_s = wait_s
        self._body_timeout_s = body_timeout_s
        self._is_engine_dead = is_engine_dead
        self.running = 0
        """Requests that are being answered."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI's entrance; see https://asgi.readthedocs.io/en/latest/specs/www.html."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            raise RuntimeError(f"{scope['type']} is not served here")
        headers: dict[bytes, bytes] = dict(scope["headers"])
        envelope = Envelope(scope["method"], scope["path"], headers, send, self._is_engine_dead)
        visit = _Visit()
        self.running += 1
        try:
            await self._pass(scope, headers, receive, envelope, visit)
        except ClientGoneError:
            pass
        except ApiError as error:
            await envelope.fail(error)
        except Exception:  # noqa: BLE001 - a client gets an answer whatever happens
            _log.exception("request %s: %s %s failed", envelope.request_id, scope["method"], scope["path"])
            await envelope.fail(envelope.failure())
        finally:
            self.running -= 1
            if scope["path"] in MODEL_PATHS:
                self._count(envelope, visit)

    async def _pass(
        self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, envelope: Envelope, visit: _Visit
    ) -> None:
        path: str = scope["path"]
        if self._keys is not None and path not in OPEN_PATHS and not path.startswith(OPEN_FOLDERS):
            visit.key = self._keys.authenticate(headers.get(b"authorization", b"").decode("latin-1"))
        if path in ADMIN_PATHS and not self._is_open:
            visit.key.require_admin()
        if path == VOTES_PATH and self._keys is None and not self._is_open:
            raise insufficient_scope("Votes are kept for good: where others reach the server, they want an API key")
        scope[KEY_IN_SCOPE] = visit.key
        if path in MODEL_PATHS and scope["method"] == "POST":
            await self._ask(scope, headers, receive, envelope, visit)
        elif scope["method"] in BODILESS_METHODS:
            await self._app(scope, receive, envelope)
        else:
            body = await read_body(receive, self._max_body_bytes, self._body_timeout_s)
            if path == VOTES_PATH:
                charge = self._limiter.admit(visit.key, 0)
                envelope.headers |= charge.headers()
                charge.settle(0)
            await self._app(scope, _replay(body, receive), envelope)

    async def _ask(
        self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, envelope: Envelope, visit: _Visit
    ) -> None:
        body = await read_body(receive, self._max_body_bytes, self._body_timeout_s)
        request = ModelRequest(body, headers.get(b"content-type", b"").decode("latin-1"))
        visit.key.authorise(request.model, self._catalogue.base_name)
        sticky = request.text("user") or headers.get(SESSION_HEADER, b"").decode("latin-1") or None
        manifest = await self._follower.find(request.model, sticky)
        visit.model, envelope.model = (manifest.id, manifest.id) if manifest else (BASE, self._catalogue.base_name)
        if scope["path"] in GENERATING_PATHS:
            self._expect(request, visit, is_chat=scope["path"] == CHAT_PATH)
        charge = self._limiter.admit(
            visit.key, visit.expected.tokens(min(UNSTATED_ANSWER_TOKENS, self._catalogue.longest))
        )
        gone = asyncio.ensure_future(receive())  # the body is there: what comes next is the client's leaving
        envelope.is_client_gone = lambda: gone.done() and not gone.cancelled()
        try:
            async with contextlib.AsyncExitStack() as stack:
                await self._enter(stack, gone, scope, visit, manifest, envelope)
                if manifest is not None:
                    body = request.encoded(manifest.id)
                envelope.headers |= charge.headers()
                visit.has_begun = True
                await self._app(scope, _replay(body, lambda: asyncio.shield(gone)), envelope)
        finally:
            gone.cancel()
            if visit.has_begun:
                charge.settle(visit.prompt_tokens(envelope.status) + visit.usage.answer_tokens)
            else:
                charge.cancel()

    def _expect(self, request: ModelRequest, visit: _Visit, *, is_chat: bool) -> None:
        """Refuse what the engine is not asked for here, and write down what the rest will take."""
        request.require_plain_decoding()
        request.require_sequences(self._max_sequences, is_chat=is_chat)
        visit.expected = request.expected(self._catalogue.longest, is_chat=is_chat)

    async def _enter(
        self,
        stack: contextlib.AsyncExitStack,
        gone: asyncio.Future[Any],
        scope: Scope,
        visit: _Visit,
        manifest: Manifest | None,
        envelope: Envelope,
    ) -> None:
        """Wait for the adapter's files, for a place in the engine, and for the adapter in it, until ``stack`` ends."""
        left_s = self._wait_s
        is_generating = scope["path"] in GENERATING_PATHS
        if manifest is not None and not (self._holdings.has(manifest) and self._admission.has_room):
            # Also where it is in the engine: it may have been driven out when the request's turn has come.
            left_s = await _within(left_s, gone, stack.enter_async_context(self._holdings.fetched(manifest)))
        if is_generating:
            await self._queue(stack, gone, scope, visit, envelope)
        if manifest is not None:
            entering = stack.enter_async_context(self._holdings.hold(manifest))
            if self._holdings.has(manifest):
                await entering
            else:
                await _within(left_s, gone, entering)

    async def _queue(
        self,
        stack: contextlib.AsyncExitStack,
        gone: asyncio.Future[Any],
        scope: Scope,
        visit: _Visit,
        envelope: Envelope,
    ) -> None:
        """Wait for a place in the engine, which is left when ``stack`` ends."""
        entering = self._admission.enter(
            visit.key.tenant((scope.get("client") or ("",))[0]),
            weight=visit.key.limits.weight,
            prompt_tokens=visit.expected.prompt_tokens,
            max_tokens=visit.expected.max_tokens,
            answers=visit.expected.sequences,
        )
        place = await (entering if self._admission.has_room else _unless_gone(gone, entering))
        visit.waited_s = place.waited_s
        current_usage.set(visit.usage)
        stack.callback(lambda: place.leave(visit.prompt_tokens(envelope.status), visit.usage.answer_tokens))

    def _count(self, envelope: Envelope, visit: _Visit) -> None:
        usage = visit.usage
        self._metrics.request(
            visit.model,
            visit.key.id,
            envelope.status or CLIENT_LEFT,
            error=envelope.error_code,
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.answer_tokens,
            queue_s=visit.waited_s,
            first_token_s=None if usage.first_at is None else usage.first_at - visit.arrived,
            total_s=None if usage.last_at is None else usage.last_at - visit.arrived,
        )


async def _unless_gone(gone: asyncio.Future[Any], waiting: Awaitable[Result]) -> Result:
    """The result of ``waiting``.

    Raises:
        ClientGoneError: the client left first. What was waited for is cancelled.
    """
    task = asyncio.ensure_future(waiting)
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


async def _within(seconds: float, gone: asyncio.Future[Any], waiting: Awaitable[object]) -> float:
    """Wait for ``waiting``; what is left of ``seconds`` after it.

    Raises:
        ApiError: 503 ``queue_timeout``: it was not done in time.
        ClientGoneError: as ``_unless_gone``.
    """
    began = time.monotonic()
    try:
        async with asyncio.timeout(seconds):
            await _unless_gone(gone, waiting)
    except TimeoutError:
        message = "The adapter could not be brought into the engine in time: its store is slow, or every place is taken"
        raise overloaded(message, QUEUE_TIMEOUT, RETRY_AFTER_S) from None
    return max(0.0, seconds - (time.monotonic() - began))


def _replay(body: bytes, then: Receive) -> Receive:
    """What the app receives: the body, then what comes from ``then``."""
    is_read = False

    async def receive() -> MutableMapping[str, Any]:
        nonlocal is_read
        if not is_read:
            is_read = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await then()

    return receive
