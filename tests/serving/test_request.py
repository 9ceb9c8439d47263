from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from typing import Any

import pytest

from serving.api_error import ApiError
from serving.request import ClientGoneError, ModelRequest, Receive, read_body

JSON = "application/json"


def receiver(messages: Iterable[dict[str, Any]]) -> Receive:
    pending = iter(messages)

    async def receive() -> dict[str, Any]:
        return next(pending)

    return receive


def part(body: bytes, more: bool = False) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


def test_a_body_comes_in_parts() -> None:
    assert asyncio.run(read_body(receiver([part(b"ab", more=True), part(b"", more=True), part(b"c")]), 3)) == b"abc"


def test_a_body_that_is_too_large_is_not_read_to_its_end() -> None:
    endless = (part(b"x" * 10, more=True) for _ in iter(int, 1))
    with pytest.raises(ApiError, match="more than 25 bytes") as caught:
        asyncio.run(read_body(receiver(endless), 25))
    assert (caught.value.status, caught.value.code) == (413, "request_too_large")


def test_a_client_that_leaves_in_the_middle() -> None:
    with pytest.raises(ClientGoneError):
        asyncio.run(read_body(receiver([part(b"ab", more=True), {"type": "http.disconnect"}]), 100))


def test_only_the_model_is_exchanged() -> None:
    """Numbers that floats cannot hold, escapes, fields that nobody knows: all reach vLLM as they were written."""
    body = rb'{"seed": 12345678901234567890123, "model": "a", "stop": ["\u00e9\n"], "t": 1.10, "x": {"model": 1}}'
    request = ModelRequest(body, "application/json; charset=utf-8")
    assert request.model == "a"
    changed = request.encoded("support@7")
    expected = body.replace(b'"model": "a"', b'"model":"support@7"')
    assert changed.replace(b" ", b"") == expected.replace(b" ", b"")
    assert rb"\u00e9\n" in changed


def test_fields_that_are_looked_at() -> None:
    request = ModelRequest(json.dumps({"model": "a", "user": "u1", "n": 2, "max_tokens": 5, "x": 1.5}).encode(), JSON)
    assert request.text("user") == "u1"
    assert request.text("n") is None
    assert request.text("session") is None
    assert request.number("n") == 2
    assert request.number("user") is None
    assert request.number("x") is None


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"prompt": "x" * 400}, (100, 64)),
        ({"prompt": "x" * 400, "max_tokens": 10}, (100, 10)),
        ({"messages": [{"role": "user", "content": "x" * 365}], "max_completion_tokens": 7, "n": 3}, (99, 21)),
        ({"prompt": "", "max_tokens": 10**9}, (1, 64)),
        ({"prompt": "", "max_tokens": -5, "n": -5}, (1, 1)),
        ({"prompt": "", "max_tokens": "many", "n": 10**9}, (1, 64 * 64)),
    ],
)
def test_what_a_request_may_take(fields: dict[str, Any], expected: tuple[int, int]) -> None:
    request = ModelRequest(json.dumps({"model": "a", **fields}).encode(), JSON)
    prompt, answers = request.expected_tokens(otherwise=64)
    assert (prompt, answers) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    ("body", "content_type", "message", "param"),
    [
        (b"{", JSON, "must be JSON", None),
        (b"", JSON, "must be a JSON object", None),
        (b"  ", JSON, "must be a JSON object", None),
        (b"[]", JSON, "must be a JSON object", None),
        (b'"text"', JSON, "must be a JSON object", None),
        (b'{"model": "a"', JSON, "must be JSON", None),
        (b'{"model": "a"} x', JSON, "must be JSON", None),
        (b'{"model": "\xff"}', JSON, "must be a string", "model"),
        (b"[" * 100_000, JSON, "must be JSON", None),
        (b'{"model": "a"}', "text/plain", "Content-Type", None),
        (b'{"model": "a"}', "", "Content-Type", None),
        (b"{}", JSON, "which model", "model"),
        (b'{"model": ""}', JSON, "which model", "model"),
        (b'{"model": null}', JSON, "which model", "model"),
        (b'{"model": 5}', JSON, "model: must be a string", "model"),
        (b'{"model": ["a"]}', JSON, "model: must be a string", "model"),
    ],
)
def test_bodies_that_are_refused(body: bytes, content_type: str, message: str, param: str | None) -> None:
    with pytest.raises(ApiError) as caught:
        ModelRequest(body, content_type)
    assert caught.value.status == 400
    assert message in caught.value.message
    assert caught.value.param == param
