"""A request's body as far as this server reads it: which model, for whom, and how long it may get.

Everything else is vLLM's to read, and reaches it byte for byte: only the value of ``model`` is exchanged.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import msgspec

from serving.api_error import ApiError

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
"""ASGI's (https://asgi.readthedocs.io/en/latest/specs/www.html)."""

INVALID_JSON = "invalid_json"
REQUEST_TOO_LARGE = "request_too_large"
_PROMPTS = ("prompt", "messages", "tools")
_BYTES_PER_TOKEN = 4

_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
_text = msgspec.json.Decoder(str)
_encoder = msgspec.json.Encoder()


class ClientGoneError(Exception):
    """The client has closed the connection: there is nobody to answer."""


async def read_body(receive: Receive, limit: int) -> bytes:
    """The whole body.

    Raises:
        ApiError: 413, it has more than ``limit`` bytes; the rest is not read.
        ClientGoneError: it has not arrived as a whole.
    """
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        part: bytes = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise ApiError(
                413, f"The request has more than {limit} bytes, which is the most that is taken here", REQUEST_TOO_LARGE
            )
        parts.append(part)
        if not message.get("more_body"):
            return parts[0] if len(parts) == 1 else b"".join(parts)


class ModelRequest:
    """A JSON object that asks a model for something."""

    def __init__(self, body: bytes, content_type: str) -> None:
        """Read ``body``.

        Raises:
            ApiError: 400, it is not a JSON object with the name of a model.
        """
        if content_type.partition(";")[0].strip().lower() != "application/json":
            message = "The body must be a JSON object, sent with Content-Type: application/json"
            raise ApiError(400, message, INVALID_JSON)
        try:
            self._fields = _fields.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise _not_an_object(body, error) from None
        self.model = self._model()

    def encoded(self, model: str) -> bytes:
        """The body with another name of the model."""
        return _encoder.encode({**self._fields, "model": model})

    def text(self, field: str) -> str | None:
        """A field that holds a string; None where it is not there, or holds something else."""
        raw = self._fields.get(field)
        if raw is None:
            return None
        try:
            return _text.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None

    def number(self, field: str) -> int | None:
        """A field that holds an integer; None where it is not there, or holds something else."""
        raw = self._fields.get(field)
        if raw is None:
            return None
        try:
            return msgspec.json.decode(raw, type=int)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None

    def expected_tokens(self, otherwise: int) -> tuple[int, int]:
        """Tokens of the prompt, by its length, and of the answers: what was asked for at most, or ``otherwise``."""
        prompt = sum(len(self._fields[field]) for field in _PROMPTS if field in self._fields) // _BYTES_PER_TOKEN
        longest = self.number("max_completion_tokens") or self.number("max_tokens")
        answers = self.number("n") or 1
        return max(1, prompt), max(1, min(longest or otherwise, otherwise)) * max(1, min(answers, otherwise))

    def _model(self) -> str:
        raw = self._fields.get("model")
        if raw is None or bytes(raw) == b"null":
            raise ApiError(400, "The request must say which model to use", "model_required", "model")
        try:
            model = _text.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise ApiError(400, "Invalid request: model: must be a string", "invalid_request", "model") from None
        if not model:
            raise ApiError(400, "The request must say which model to use", "model_required", "model")
        return model


def _not_an_object(body: bytes, error: Exception) -> ApiError:
    try:
        msgspec.json.decode(body, type=msgspec.Raw)
        is_json = bool(body.strip())
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        is_json = False
    if is_json or not body.strip():
        return ApiError(400, "The body must be a JSON object, sent with Content-Type: application/json", INVALID_JSON)
    return ApiError(400, f"The body must be JSON: {error}", INVALID_JSON)
