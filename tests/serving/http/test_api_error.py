from __future__ import annotations

import pickle
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from serving.http.api_error import (
    ApiError,
    error_body,
    insufficient_scope,
    invalid_api_key,
    model_not_found,
    overloaded,
    request_fault,
    too_many,
)


class Request(BaseModel):
    model: str
    max_tokens: int
    messages: list[dict[str, str | list[int]]]


def details(document: object) -> list[Any]:
    with pytest.raises(ValidationError) as caught:
        Request.model_validate(document)
    return [dict(error) for error in caught.value.errors()]


def test_the_shape_is_that_of_openai() -> None:
    assert error_body(404, "no", "model_not_found", "model") == {
        "error": {"message": "no", "type": "invalid_request_error", "param": "model", "code": "model_not_found"}
    }
    assert error_body(500, "oops")["error"]["type"] == "server_error"


def test_errors_survive_pickling() -> None:
    error = pickle.loads(pickle.dumps(ApiError(409, "changed", "adapter_changed", "model")))
    assert (error.status, error.message, error.code, error.param) == (409, "changed", "adapter_changed", "model")
    assert str(model_not_found("x")).startswith("The model `x` does not exist")


def test_headers_survive_pickling_and_none_are_none() -> None:
    error = pickle.loads(
        pickle.dumps(too_many("slower", "rate_limit_exceeded", 0.2, {"x-ratelimit-limit-requests": "5"}))
    )
    assert error.headers == {"Retry-After": "1", "x-ratelimit-limit-requests": "5"}
    assert (error.status, error.code) == (429, "rate_limit_exceeded")
    assert ApiError(404, "no").headers == {}


def test_a_wait_is_rounded_up_to_whole_seconds() -> None:
    assert overloaded("busy", "queue_timeout", 2.01).headers == {"Retry-After": "3"}
    assert overloaded("busy", "queue_timeout", 2.01).status == 503


def test_the_challenge_says_no_error_where_no_key_was_sent() -> None:
    # RFC 6750, section 3.1: a request without any credentials is told no error code.
    assert "error" not in invalid_api_key("send one", is_given=False).headers["WWW-Authenticate"]
    assert 'error="invalid_token"' in invalid_api_key("unknown").headers["WWW-Authenticate"]
    assert 'error="insufficient_scope"' in insufficient_scope("no").headers["WWW-Authenticate"]


def test_a_missing_field() -> None:
    error = request_fault(details({"model": "m", "max_tokens": 1}))
    assert (error.status, error.param) == (400, "messages")
    assert "messages: Field required" in error.message


def test_values_are_not_repeated_and_long_lists_are_cut() -> None:
    messages = [{"role": 12345, "content": {"secret": "hunter2"}}] * 5
    error = request_fault(details({"model": "m", "max_tokens": "many", "messages": messages}))
    assert "hunter2" not in error.message
    assert error.message.endswith(" more")
    assert error.param == "max_tokens"
    assert len(error.message) < 300


def test_members_of_unions_are_left_out_of_the_path() -> None:
    error = request_fault(details({"model": "m", "max_tokens": 1, "messages": [{"role": 5}]}))
    assert error.param == "messages.0.role"


@pytest.mark.parametrize(
    "detail",
    [
        {"type": "missing", "loc": ("body",), "msg": "Field required"},
        {"type": "model_attributes_type", "loc": ("body",), "msg": "Input should be a valid dictionary"},
    ],
)
def test_a_body_that_is_no_object(detail: dict[str, Any]) -> None:
    assert "Content-Type: application/json" in request_fault([detail]).message


def test_a_body_that_is_no_json() -> None:
    detail = {
        "type": "json_invalid",
        "loc": ("body", 1),
        "msg": "JSON decode error",
        "ctx": {"error": "Expecting value"},
    }
    error = request_fault([detail])
    assert (error.status, error.code) == (400, "invalid_json")
    assert "Expecting value" in error.message
