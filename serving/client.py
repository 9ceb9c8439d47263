"""A small client of a running server: ask one question or many, and wait until it answers.

Any OpenAI client can do this; this one has our errors and keeps the order of many answers. It sends no API key.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx

from cluster.errors import LoraloomError, NotFoundError

Messages = Sequence[Mapping[str, str]]
"""A conversation: ``{"role": "user", "content": "..."}`` and so on."""

TIMEOUT_S = 300.0


class AskError(LoraloomError):
    """The server answered with an error, or not at all; the message holds what it said."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer."""

    text: str
    model: str
    """What answered: the base's name, or an adapter's immutable id such as ``support@2``."""
    tokens: int
    """Length of the answer in tokens."""
    seconds: float
    """From the request to the whole answer."""


def ask(base_url: str, model: str, messages: Messages, *, max_tokens: int = 64, temperature: float = 0) -> Answer:
    """Ask one question.

    Args:
        base_url: Such as ``http://127.0.0.1:8000/v1``.
        model: The base's name, or a reference to an adapter (``support``, ``support@2``).
        messages: The conversation so far.
        max_tokens: Longest answer.
        temperature: 0 takes the likeliest token each time.

    Raises:
        NotFoundError: the server has no such model.
        AskError: it answered with another error, or not at all.
    """
    with _client(base_url) as client:
        return _ask(client, model, max_tokens, temperature, messages)


def ask_all(
    base_url: str,
    model: str,
    conversations: Sequence[Messages],
    *,
    max_tokens: int = 64,
    temperature: float = 0,
    concurrency: int = 16,
) -> list[Answer]:
    """Ask many questions, ``concurrency`` at once; the answers come in the order of the questions.

    Raises:
        NotFoundError: the server has no such model.
        AskError: one of the questions was answered with another error, or not at all.
    """
    with _client(base_url) as client, ThreadPoolExecutor(concurrency) as threads:
        return list(threads.map(partial(_ask, client, model, max_tokens, temperature), conversations))


def models(base_url: str) -> list[str]:
    """The ids of the models that can be asked.

    Raises:
        AskError: the server answered with an error, or not at all.
    """
    with _client(base_url) as client:
        return [model["id"] for model in _send(client, "GET", "models")["data"]]


def wait_ready(base_url: str, timeout_s: float = 60.0, poll_s: float = 0.2) -> float:
    """Wait until the server answers, and return the seconds that it took.

    Raises:
        AskError: it does not answer within ``timeout_s``.
    """
    started = time.monotonic()
    while True:
        try:
            models(base_url)
        except AskError as error:
            if time.monotonic() - started > timeout_s:
                raise AskError(f"no answer within {timeout_s:g} s: {error}") from None
            time.sleep(poll_s)
        else:
            return time.monotonic() - started


def _client(base_url: str) -> httpx.Client:
    # Proxies of the environment are for the way out, and a server of one's own is not out there.
    limits = httpx.Limits(max_connections=None)
    return httpx.Client(base_url=base_url.rstrip("/") + "/", timeout=TIMEOUT_S, limits=limits, trust_env=False)


def _ask(client: httpx.Client, model: str, max_tokens: int, temperature: float, messages: Messages) -> Answer:
    body = {"model": model, "messages": list(messages), "max_tokens": max_tokens, "temperature": temperature}
    started = time.monotonic()
    answer = _send(client, "POST", "chat/completions", body)
    return Answer(
        text=answer["choices"][0]["message"]["content"] or "",
        model=answer["model"],
        tokens=answer["usage"]["completion_tokens"],
        seconds=time.monotonic() - started,
    )


def _send(client: httpx.Client, method: str, path: str, body: object = None) -> Any:
    try:
        response = client.request(method, path, json=body)
    except httpx.HTTPError as error:
        raise AskError(f"{client.base_url} does not answer: {error or type(error).__name__}") from None
    if response.is_success:
        return response.json()
    message = f"{client.base_url} answered {response.status_code}: {_message(response)}"
    raise NotFoundError(message) if response.status_code == 404 else AskError(message)


def _message(response: httpx.Response) -> str:
    """What an error response says, in OpenAI's shape or not."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return response.text[:200]
