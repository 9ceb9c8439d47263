"""What every HTTP request passes on its way to vLLM's own app, inside the replica that answers it.

In this order: whose key it is, which version of which adapter it wants and whether that key may have it, the key's
limits, the request's turn in the queue, the adapter's place in the engine. Then vLLM's OpenAI server takes over: it is
given the request with the adapter's immutable id for a model, so that a promotion in the meantime changes nothing for
it, and its answers go out as they are. Only errors are looked at: they are brought into one shape.

There is no hop and no copy in between: this is an ASGI application around another, in one process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeVar

from serving.admission import Admission
from serving.api_error import ApiError
from serving.catalogue import Catalogue
from serving.envelope import Envelope, Send
from serving.follower import Follower
from serving.holdings import Holdings
from serving.keys import ANONYMOUS, KeyRing
from serving.limits import Limiter
from serving.metrics import BASE, Metrics
from serving.request import ClientGoneError, ModelRequest, Receive, read_body
from serving.usage import Usage, current_usage

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Result = TypeVar("Result")

MODEL_PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"})
"""Routes whose body names a model."""
GENERATING_PATHS = frozenset({"/v1/chat/completions", "/v1/completions"})
"""Those of them that keep the engine busy."""
OPEN_PATHS = frozenset({"/health", "/version", "/docs", "/openapi.json"})
"""Routes that need no key."""
ADMIN_PATHS = frozenset({"/metrics", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"})
"""Routes that need an admin's key, where there are keys."""
OPEN_FOLDER = "/static/"
"""What the page of /docs loads."""
CLIENT_LEFT = 499
"""What is counted, as by nginx, where the client closed the connection before an answer began."""
SESSION_HEADER = b"x-session-id"
"""Requests of one session stay on one version of a split alias."""
KEY_IN_SCOPE = "loraloom.key"
"""Where routes of ours find the key of a request."""

_log = logging.getLogger(__name__)


class _Visit:
    """What is known of one request so far."""

    __slots__ = ("arrived", "has_begun", "key", "model", "usage", "waited_s")

    def __init__(self) -> None:
        self.arrived = time.monotonic()
        self.key = ANONYMOUS
        self.model = ""
        """Who answers, as metrics call it; "" before it is known."""
        self.usage = Usage()
        self.waited_s: float | None = None
        """How long it waited for its place in the engine."""
        self.has_begun = False
        """True once it is with vLLM."""


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
        envelope = Envelope(scope["method"], scope["path"], headers, send)
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
        if self._keys is not None and path not in OPEN_PATHS and not path.startswith(OPEN_FOLDER):
            visit.key = self._keys.authenticate(headers.get(b"authorization", b"").decode("latin-1"))
        if path in ADMIN_PATHS and not self._is_open:
            visit.key.require_admin()
        scope[KEY_IN_SCOPE] = visit.key
        if path in MODEL_PATHS and scope["method"] == "POST":
            await self._ask(scope, headers, receive, envelope, visit)
        else:
            await self._app(scope, receive, envelope)

    async def _ask(
        self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, envelope: Envelope, visit: _Visit
    ) -> None:
        body = await read_body(receive, self._max_body_bytes)
        request = ModelRequest(body, headers.get(b"content-type", b"").decode("latin-1"))
        visit.key.authorise(request.model, self._catalogue.base_name)
        sticky = request.text("user") or headers.get(SESSION_HEADER, b"").decode("latin-1") or None
        manifest = await self._follower.find(request.model, sticky)
        visit.model, envelope.model = (manifest.id, manifest.id) if manifest else (BASE, self._catalogue.base_name)
        is_generating = scope["path"] in GENERATING_PATHS
        prompt_tokens, answer_tokens = request.expected_tokens(self._catalogue.longest) if is_generating else (0, 0)
        charge = self._limiter.admit(visit.key, prompt_tokens + answer_tokens)
        gone = asyncio.ensure_future(receive())  # the body is there: what comes next is the client's leaving
        try:
            async with contextlib.AsyncExitStack() as stack:
                if is_generating:
                    await self._queue(stack, gone, scope, visit, prompt_tokens, answer_tokens)
                if manifest is not None:
                    entering = stack.enter_async_context(self._holdings.hold(manifest))
                    await (entering if self._holdings.has(manifest) else _unless_gone(gone, entering))
                    body = request.encoded(manifest.id)
                envelope.headers |= charge.headers()
                visit.has_begun = True
                await self._app(scope, _replay(body, gone), envelope)
        finally:
            gone.cancel()
            if visit.has_begun:
                charge.settle(visit.usage.prompt_tokens + visit.usage.answer_tokens)
            else:
                charge.cancel()

    async def _queue(
        self,
        stack: contextlib.AsyncExitStack,
        gone: asyncio.Future[Any],
        scope: Scope,
        visit: _Visit,
        prompt_tokens: int,
        answer_tokens: int,
    ) -> None:
        """Wait for a place in the engine, which is left when ``stack`` ends."""
        entering = self._admission.enter(
            visit.key.tenant((scope.get("client") or ("",))[0]),
            weight=visit.key.limits.weight,
            prompt_tokens=prompt_tokens,
            max_tokens=answer_tokens,
        )
        place = await (entering if self._admission.has_room else _unless_gone(gone, entering))
        visit.waited_s = place.waited_s
        current_usage.set(visit.usage)
        stack.callback(lambda: place.leave(visit.usage.prompt_tokens, visit.usage.answer_tokens))

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


def _replay(body: bytes, gone: asyncio.Future[MutableMapping[str, Any]]) -> Receive:
    """What the app receives: the body, then the client's leaving."""
    is_read = False

    async def receive() -> MutableMapping[str, Any]:
        nonlocal is_read
        if not is_read:
            is_read = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await asyncio.shield(gone)

    return receive
