from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from typing import Any

import pytest

from serving.http.api_error import ApiError
from serving.http.request import ClientGoneError, ModelRequest, Receive, read_body

JSON = "application/json"


def receiver(messages: Iterable[dict[str, Any]]) -> Receive:
    pending = iter(messages)

    async def receive() -> dict[str, Any]:
        return next(pending)

    return receive


def part(body: bytes, more: bool = False) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


def test_a_body_comes_in_parts() -> None:
    parts = [part(b"ab", more=True), part(b"", more=True), part(b"c")]
    assert asyncio.run(read_body(receiver(parts), 3, timeout_s=5)) == b"abc"


def test_a_body_that_is_too_large_is_not_read_to_its_end() -> None:
    endless = (part(b"x" * 10, more=True) for _ in iter(int, 1))
    with pytest.raises(ApiError, match="more than 25 bytes") as caught:
        asyncio.run(read_body(receiver(endless), 25, timeout_s=5))
    assert (caught.value.status, caught.value.code) == (413, "request_too_large")


def test_a_client_that_leaves_in_the_middle() -> None:
    with pytest.raises(ClientGoneError):
        asyncio.run(read_body(receiver([part(b"ab", more=True), {"type": "http.disconnect"}]), 100, timeout_s=5))


def test_a_body_that_does_not_arrive() -> None:
    parts = iter([part(b"ab", more=True)])

    async def receive() -> dict[str, Any]:
        return next(parts, None) or await asyncio.get_running_loop().create_future()

    with pytest.raises(ApiError, match=r"within 0\.05 s") as caught:
        asyncio.run(read_body(receive, 100, timeout_s=0.05))
    assert (caught.value.status, caught.value.code) == (408, "request_timeout")
    assert caught.value.headers == {"Connection": "close"}


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
    written = ModelRequest(b'{"model": "a", "n": "3", "max_tokens": 4.0}', JSON)
    assert (written.number("n"), written.number("max_tokens")) == (3, 4)


def asking(**fields: Any) -> ModelRequest:
    return ModelRequest(json.dumps({"model": "a", **fields}).encode(), JSON)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"prompt": "x" * 400}, (100, 1, 16)),
        ({"prompt": "x" * 400, "max_tokens": None}, (100, 1, 16)),
        ({"prompt": "x" * 400, "max_tokens": 10}, (100, 1, 10)),
        ({"prompt": "", "max_tokens": 10**9}, (1, 1, 64)),
        ({"prompt": "", "max_tokens": -5, "n": -5}, (1, 1, 1)),
        ({"prompt": "", "max_tokens": "many", "n": 10**9}, (1, 10**9, 16)),
        ({"prompt": ["x" * 40] * 10, "n": 3}, (110, 30, 16)),
        ({"prompt": [[1, 2], [3]]}, (3, 2, 16)),
        ({"prompt": [1, 2, 3]}, (2, 1, 16)),
        ({"prompt_embeds": ["QQ==", "QQ=="]}, (1, 2, 16)),
        ({"prompt": []}, (1, 1, 16)),
    ],
)
def test_what_a_completion_may_take(fields: dict[str, Any], expected: tuple[int, int, int]) -> None:
    found = asking(**fields).expected(64, is_chat=False)
    assert found == pytest.approx(expected, rel=0.06)
    assert found.tokens(512) == found.prompt_tokens + expected[1] * expected[2]


@pytest.mark.parametrize(
    ("fields", "sequences", "max_tokens"),
    [({}, 1, None), ({"max_completion_tokens": 7, "max_tokens": 9, "n": 3}, 3, 7), ({"max_tokens": 9}, 1, 9)],
)
def test_what_a_chat_may_take(fields: dict[str, Any], sequences: int, max_tokens: int | None) -> None:
    messages = [{"role": "user", "content": "x" * 365}]
    found = asking(messages=messages, prompt=["a", "b"], **fields).expected(64, is_chat=True)
    assert (found.sequences, found.max_tokens) == (sequences, max_tokens)
    assert found.prompt_tokens == pytest.approx(102, abs=4)
    assert found.tokens(512) == found.prompt_tokens + sequences * (max_tokens or 512)


@pytest.mark.parametrize(
    ("fields", "is_chat", "param"),
    [
        ({"prompt": "a", "n": 9}, False, "n"),
        ({"prompt": "a", "n": "9"}, False, "n"),
        ({"prompt": ["a"] * 9}, False, "prompt"),
        ({"prompt": [[1]] * 3, "n": 3}, False, "n"),
        ({"messages": [], "n": 9}, True, "n"),
    ],
)
def test_more_answers_than_the_engine_works_on(fields: dict[str, Any], is_chat: bool, param: str) -> None:
    request = asking(**fields)
    request.require_sequences(9, is_chat=is_chat)
    with pytest.raises(ApiError, match="9 answers") as caught:
        request.require_sequences(8, is_chat=is_chat)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_beam_search_is_refused() -> None:
    for harmless in ({}, {"use_beam_search": False}, {"use_beam_search": None}):
        asking(**harmless).require_plain_decoding()
    for value in (True, "yes", 1):
        with pytest.raises(ApiError, match="use_beam_search") as caught:
            asking(use_beam_search=value).require_plain_decoding()
        assert caught.value.status == 400


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
