"""Errors as OpenAI's API shows them: ``{"error": {"message", "type", "param", "code"}}``.

``type`` says whose fault it was (``invalid_request_error`` for 4xx, ``server_error`` for 5xx), ``code`` is a word for
programs, or null, and ``param`` names the request's field, or null. What the engine or FastAPI raise is brought into
this shape too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.errors import LoraloomError

MODEL_NOT_FOUND = "model_not_found"
ADAPTER_CORRUPT = "adapter_corrupt"
ADAPTER_CHANGED = "adapter_changed"
ADAPTER_UNFIT = "adapter_unfit"
ADAPTER_REFUSED = "adapter_refused"

INVALID_API_KEY = "invalid_api_key"
INSUFFICIENT_SCOPE = "insufficient_scope"
RATE_LIMIT_EXCEEDED = "rate_limit_exceeded"
QUEUE_FULL = "queue_full"
QUEUE_TIMEOUT = "queue_timeout"
SHUTTING_DOWN = "shutting_down"
REGISTRY_UNREACHABLE = "registry_unreachable"
UNAVAILABLE = "unavailable"

_RULES_SHOWN = 3
"""A message of the wrong kind breaks a rule of every kind of message that there is: dozens."""


class ApiError(LoraloomError):
    """What a request is answered with instead of a completion; ``headers`` go with the answer."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, code, param, headers)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers: dict[str, str] = dict(headers or {})

    def __str__(self) -> str:
        return self.message


def error_body(status: int, message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """The JSON document of an error response."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def model_not_found(model: str) -> ApiError:
    """404 for a model that is not there."""
    message = f"The model `{model}` does not exist; GET /v1/models lists those that do"
    return ApiError(404, message, MODEL_NOT_FOUND, "model")


def invalid_api_key(message: str, *, is_given: bool = True) -> ApiError:
    """401 with the challenge of RFC 6750, section 3: no ``error`` in it where no bearer token was sent at all."""
    challenge = 'Bearer realm="loraloom"' + (', error="invalid_token"' if is_given else "")
    return ApiError(401, message, INVALID_API_KEY, headers={"WWW-Authenticate": challenge})


def insufficient_scope(message: str) -> ApiError:
    """403 for a known key that may not do this."""
    challenge = 'Bearer realm="loraloom", error="insufficient_scope"'
    return ApiError(403, message, INSUFFICIENT_SCOPE, headers={"WWW-Authenticate": challenge})


def too_many(message: str, code: str, retry_after_s: float, headers: Mapping[str, str] | None = None) -> ApiError:
    """429; ``Retry-After`` is whole seconds, at least 1 (RFC 9110, 10.2.3)."""
    return ApiError(429, message, code, headers={"Retry-After": whole_seconds(retry_after_s), **(headers or {})})


def overloaded(message: str, code: str, retry_after_s: float) -> ApiError:
    """503 for a server that cannot take the request now, and may later."""
    return ApiError(503, message, code, headers={"Retry-After": whole_seconds(retry_after_s)})


def whole_seconds(seconds: float) -> str:
    """``seconds`` as Retry-After has them: rounded up, at least 1."""
    return str(max(1, math.ceil(seconds)))


def request_fault(details: Sequence[Mapping[str, Any]]) -> ApiError:
    """400 for a body that could not be read as a request; ``details`` are pydantic's errors.

    The values received are left out: they may be long, and they may be private.
    """
    kinds = {detail["type"] for detail in details}
    if "json_invalid" in kinds:
        return ApiError(400, f"The body must be JSON: {details[0].get('ctx', {}).get('error', '')}", "invalid_json")
    if kinds & {"model_attributes_type", "missing"} and all(tuple(detail["loc"]) == ("body",) for detail in details):
        return ApiError(400, "The body must be a JSON object, sent with Content-Type: application/json", "invalid_json")
    rules = list(dict.fromkeys(_rule(detail) for detail in details))
    message = "Invalid request: " + "; ".join(rules[:_RULES_SHOWN])
    if len(rules) > _RULES_SHOWN:
        message += f"; and {len(rules) - _RULES_SHOWN} more"
    return ApiError(400, message, "invalid_request", _field(details[0]) or None)


def _rule(detail: Mapping[str, Any]) -> str:
    field = _field(detail)
    return f"{field}: {detail['msg']}" if field else str(detail["msg"])


def _field(detail: Mapping[str, Any]) -> str:
    """The path in the request, without the members of unions that pydantic tried (``str``, ``FooParam``,
    ``list[...]``).
    """
    parts = [str(part) for part in detail["loc"] if part != "body"]
    return ".".join(
        part for part in parts if part.isdigit() or (part.isidentifier() and part.islower() and part != "str")
    )
