"""What every HTTP request passes on its way to vLLM's own app, inside the replica that answers it.

In this order: whose key it is, which version of which adapter it wants, whether that key may have it, the adapter's
place in the engine. Then vLLM's OpenAI server takes over: it is given the request with the adapter's immutable id for a
model, so that a promotion in the meantime changes nothing for it, and its answers go out as they are. Only errors are
looked at: they are brought into one shape.

There is no hop and no copy in between: this is an ASGI application around another, in one process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeVar

from serving.admission import Admission
from serving.api_error import ApiError
from serving.catalogue import Catalogue
from serving.envelope import Envelope, Send
from serving.holdings import Holdings
from serving.keys import ANONYMOUS, Key, KeyRing
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
SESSION_HEADER = b"x-session-id"
"""Requests of one session stay on one version of a split alias."""
KEY_IN_SCOPE = "loraloom.key"
"""Where routes of ours find the key of a request."""

_log = logging.getLogger(__name__)


class Door:
    """An ASGI application around vLLM's.

    Args:
        app: vLLM's app with our routes.
        catalogue: What there is to ask.
        holdings: The adapters in the engine.
        admission: The queue of the requests that generate.
        keys: Whom to let in; None lets everybody in.
        max_body_bytes: Largest body.
    """

    def __init__(
        self,
        app: App,
        catalogue: Catalogue,
        holdings: Holdings,
        admission: Admission,
        keys: KeyRing | None,
        max_body_bytes: int,
    ) -> None:
        self._app = app
        self._catalogue = catalogue
        self._holdings = holdings
        self._admission = admission
        self._keys = keys
        self._max_body_bytes = max_body_bytes
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
        self.running += 1
        try:
            await self._pass(scope, headers, receive, envelope)
        except ClientGoneError:
            pass
        except ApiError as error:
            await envelope.fail(error)
        except Exception:  # noqa: BLE001 - a client gets an answer whatever happens
            _log.exception("request %s: %s %s failed", envelope.request_id, scope["method"], scope["path"])
            await envelope.fail(envelope.failure())
        finally:
            self.running -= 1

    async def _pass(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, envelope: Envelope) -> None:
        path: str = scope["path"]
        key = ANONYMOUS
        if self._keys is not None and path not in OPEN_PATHS:
            key = self._keys.authenticate(headers.get(b"authorization", b"").decode("latin-1"))
            if path in ADMIN_PATHS:
                key.require_admin()
        scope[KEY_IN_SCOPE] = key
        if path in MODEL_PATHS and scope["method"] == "POST":
            await self._ask(scope, headers, receive, envelope, key)
        else:
            await self._app(scope, receive, envelope)

    async def _ask(
        self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, envelope: Envelope, key: Key
    ) -> None:
        body = await read_body(receive, self._max_body_bytes)
        request = ModelRequest(body, headers.get(b"content-type", b"").decode("latin-1"))
        key.authorise(request.model, self._catalogue.base_name)
        sticky = request.text("user") or headers.get(SESSION_HEADER, b"").decode("latin-1") or None
        manifest = self._catalogue.find(request.model, sticky)
        gone = asyncio.ensure_future(receive())  # the body is there: what comes next is the client's leaving
        try:
            async with contextlib.AsyncExitStack() as stack:
                if scope["path"] in GENERATING_PATHS:
                    address = (scope.get("client") or ("", 0))[0]
                    await self._queue(stack, gone, key, address, request)
                if manifest is None:
                    envelope.model = self._catalogue.base_name
                else:
                    envelope.model = manifest.id
                    entering = stack.enter_async_context(self._holdings.hold(manifest))
                    await (entering if self._holdings.has(manifest) else _unless_gone(gone, entering))
                    body = request.encoded(manifest.id)
                await self._app(scope, _replay(body, gone), envelope)
        finally:
            gone.cancel()

    async def _queue(
        self,
        stack: contextlib.AsyncExitStack,
        gone: asyncio.Future[Any],
        key: Key,
        address: str,
        request: ModelRequest,
    ) -> None:
        """Wait for a place in the engine, which is left when ``stack`` ends."""
        prompt_tokens, answer_tokens = request.expected_tokens(otherwise=self._catalogue.longest)
        entering = self._admission.enter(
            key.tenant(address), weight=key.limits.weight, prompt_tokens=prompt_tokens, max_tokens=answer_tokens
        )
        place = await (entering if self._admission.has_room else _unless_gone(gone, entering))
        usage = Usage()
        current_usage.set(usage)
        stack.callback(lambda: place.leave(usage.prompt_tokens, usage.answer_tokens))


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
