"""A request's body as far as this server reads it: which model, for whom, and how long it may get.

Everything else is vLLM's to read, and reaches it byte for byte: only the value of ``model`` is exchanged.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, NamedTuple

import msgspec
from pydantic import TypeAdapter, ValidationError

from serving.http.api_error import ApiError

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
"""ASGI's (https://asgi.readthedocs.io/en/latest/specs/www.html)."""

INVALID_JSON = "invalid_json"
REQUEST_TOO_LARGE = "request_too_large"
REQUEST_TIMEOUT = "request_timeout"
COMPLETION_TOKENS = 16
"""Longest answer of a completion that says nothing of it, by OpenAI's API and vLLM's; a chat may go on to the end."""
_PROMPTS = ("prompt", "messages", "tools")
_BYTES_PER_TOKEN = 4

_list = msgspec.json.Decoder(list[msgspec.Raw])
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
_integer = TypeAdapter(int)
_text = msgspec.json.Decoder(str)
_encoder = msgspec.json.Encoder()


class ClientGoneError(Exception):
    """The client has closed the connection: there is nobody to answer."""


class Expected(NamedTuple):
    """What a request will take as far as its body tells."""

    prompt_tokens: int
    """Of all its prompts, by their length."""
    sequences: int
    """Answers: prompts times ``n``."""
    max_tokens: int | None
    """Longest that each of them may get; None where the request leaves that to the engine."""

    def tokens(self, unstated: int) -> int:
        """All of it, with ``unstated`` for the length of an answer that the request leaves open."""
        return self.prompt_tokens + self.sequences * (unstated if self.max_tokens is None else self.max_tokens)


async def read_body(receive: Receive, limit: int, timeout_s: float) -> bytes:
    """The whole body.

    Raises:
        ApiError: 413, it has more than ``limit`` bytes; the rest is not read. 408, it has not come in ``timeout_s``.
        ClientGoneError: it has not arrived as a whole.
    """
    try:
        async with asyncio.timeout(timeout_s):
            return await _read_body(receive, limit)
    except TimeoutError:
        message = f"The request's body did not arrive within {timeout_s:g} s"
        raise ApiError(408, message, REQUEST_TIMEOUT, headers={"Connection": "close"}) from None


async def _read_body(receive: Receive, limit: int) -> bytes:
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
        """A field that holds what vLLM takes for an integer (``"5"`` and ``5.0`` too); None where it does not."""
        raw = self._fields.get(field)
        if raw is None:
            return None
        try:
            return _integer.validate_json(bytes(raw))
        except ValidationError:
            return None

    def require_plain_decoding(self) -> None:
        """Refuse beam search: vLLM runs it as a request for each beam and step, which neither queue nor limits see.

        Raises:
            ApiError: 400, ``use_beam_search`` is there and not false.
        """
        if bytes(self._fields.get("use_beam_search", b"false")) not in (b"false", b"null"):
            raise ApiError(400, "use_beam_search must be false on this server", "invalid_request", "use_beam_search")

    def require_sequences(self, most: int, *, is_chat: bool) -> None:
        """Refuse more answers than the engine works on at a time.

        Raises:
            ApiError: 400, ``n`` for each prompt makes more than ``most``.
        """
        prompts, answers = 1 if is_chat else self._prompts(), self._answers()
        if prompts * answers > most:
            message = f"The request asks for {prompts * answers} answers (prompts times n), and {most} is the most here"
            raise ApiError(400, message, "invalid_request", "n" if answers > 1 else "prompt")

    def expected(self, longest: int, *, is_chat: bool) -> Expected:
        """What it will take.

        Args:
            longest: Most tokens of an answer that the engine can give.
            is_chat: Whether it came by the route of chats: it then has one prompt, and an answer may get any length.
        """
        size = sum(len(self._fields[field]) for field in _PROMPTS if field in self._fields)
        stated = self.number("max_completion_tokens") if is_chat else None
        stated = self.number("max_tokens") if stated is None else stated
        if stated is None and not is_chat:
            stated = COMPLETION_TOKENS
        return Expected(
            prompt_tokens=max(1, size // _BYTES_PER_TOKEN),
            sequences=self._answers() * (1 if is_chat else self._prompts()),
            max_tokens=None if stated is None else max(1, min(stated, longest)),
        )

    def _answers(self) -> int:
        return max(1, self.number("n") or 1)

    def _prompts(self) -> int:
        """How many there are in ``prompt`` and ``prompt_embeds``; a list of tokens is one, like a text."""
        prompts = 0
        for field in ("prompt", "prompt_embeds"):
            raw = bytes(self._fields.get(field, b"null"))
            is_list = raw[:1] == b"[" and raw[1:].lstrip()[:1] in (b'"', b"[")
            prompts += len(_list.decode(raw)) if is_list else int(raw != b"null")
        return max(1, prompts)

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
