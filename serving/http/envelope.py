"""What an answer goes out in: headers that every answer has, and one shape for every error."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from http import HTTPStatus
from typing import Any, cast

from serving.http.api_error import UNAVAILABLE, ApiError, error_body, overloaded

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
"""ASGI's (https://asgi.readthedocs.io/en/latest/specs/www.html)."""

MODEL_HEADER = b"x-loraloom-model"
"""Says which version spoke: the immutable id of an adapter, or the base's name."""
REQUEST_ID_HEADER = b"x-request-id"
SERVER_FAILED = "internal_error"
_RETRY_AFTER_S = 1.0

_KEPT_HEADERS = (b"allow", b"www-authenticate", b"retry-after")


class Envelope:
    """ASGI's ``send`` for one request: answers pass, errors are held back until they are whole, and then told anew.

    Args:
        method: Of the request.
        path: Of the request.
        headers: Of the request.
        send: ASGI's.
        is_engine_dead: Says whether the engine has ended: the server's failures are then told as 503, because another
            replica, or this one's successor, can answer.
    """

    def __init__(
        self,
        method: str,
        path: str,
        headers: Mapping[bytes, bytes],
        send: Send,
        is_engine_dead: Callable[[], bool] = lambda: False,
    ) -> None:
        self.request_id = headers.get(REQUEST_ID_HEADER, b"").decode("latin-1")
        self.model: str | None = None
        """Who answers, once it is known."""
        self.headers: dict[str, str] = {}
        """More headers for the answer."""
        self.is_client_gone: Callable[[], bool] = lambda: False
        """Says whether the client has left. What would begin after that is not sent, and has no status."""
        self.status: int | None = None
        """The answer's status, once it has been sent."""
        self.error_code: str | None = None
        """The error's code, if it is one."""
        self._route = f"{method} {path}"
        self._send = send
        self._is_engine_dead = is_engine_dead
        self._error: MutableMapping[str, Any] | None = None
        self._error_body = b""

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        """Send on what the app sends."""
        if message["type"] == "http.response.start":
            if message["status"] >= HTTPStatus.BAD_REQUEST:
                self._error = message
                return
            if self.is_client_gone():
                return
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), *self._own_headers()]
        elif self._is_unsent():
            return
        elif self._error is not None:
            self._error_body += message.get("body", b"")
            if not message.get("more_body"):
                await self._tell(self._error)
            return
        await self._send(message)

    async def fail(self, error: ApiError) -> None:
        """Answer with ``error``, unless an answer is under way already: its end is then cut off by the server."""
        if self.status is not None:
            return
        await self._respond(error)

    def failure(self) -> ApiError:
        """500, or 503 where the engine has ended; the request's id is what the server's log can be searched for."""
        if self._is_engine_dead():
            return _engine_dead()
        return ApiError(500, f"The server failed to answer (request {self.request_id or 'without id'})", SERVER_FAILED)

    async def _tell(self, start: MutableMapping[str, Any]) -> None:
        status = int(start["status"])
        headers = {
            name.decode("latin-1"): value.decode("latin-1")
            for name, value in start.get("headers", ())
            if name.lower() in _KEPT_HEADERS
        }
        message, code, param = self._read_error()
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            if self._is_engine_dead():
                await self._respond(_engine_dead())
                return
            code = code or SERVER_FAILED
        await self._respond(ApiError(status, message, code, param, headers))

    def _read_error(self) -> tuple[str, str | None, str | None]:
        """Message, code and field of an error in vLLM's shape, in FastAPI's, or in none."""
        try:
            document: Any = json.loads(self._error_body)
            error: Any = document.get("error", document)
        except (ValueError, AttributeError):
            error = None
        if isinstance(error, dict):
            fields = cast("dict[str, Any]", error)
            code, param = fields.get("code"), fields.get("param")
            if "message" in fields:
                return (
                    str(fields["message"]),
                    code if isinstance(code, str) else None,
                    param if isinstance(param, str) else None,
                )
            if "detail" in fields:
                return f"{self._route}: {fields['detail']}", None, None
        return f"{self._route}: {self._error_body[:200].decode(errors='replace') or 'no reason given'}", None, None

    def _is_unsent(self) -> bool:
        """True for the rest of an answer whose beginning was not sent."""
        return self._error is None and self.status is None

    async def _respond(self, error: ApiError) -> None:
        if self.is_client_gone():
            return
        self.status, self.error_code = error.status, error.code or f"http_{error.status}"
        body = json.dumps(error_body(error.status, error.message, error.code, error.param)).encode()
        raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in error.headers.items()]
        raw += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        start = {"type": "http.response.start", "status": error.status, "headers": [*raw, *self._own_headers()]}
        await self._send(start)
        await self._send({"type": "http.response.body", "body": body})

    def _own_headers(self) -> list[tuple[bytes, bytes]]:
        headers = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in self.headers.items()]
        if self.model is not None:
            headers.append((MODEL_HEADER, self.model.encode("latin-1")))
        if self.request_id:
            headers.append((REQUEST_ID_HEADER, self.request_id.encode("latin-1")))
        return headers


def _engine_dead() -> ApiError:
    return overloaded("The engine of this replica has ended, and is being replaced", UNAVAILABLE, _RETRY_AFTER_S)
