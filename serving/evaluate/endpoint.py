"""The live server that is evaluated: which models it has, and what they say of a row.

Spoken to with the openai client, whose own retries do what is wanted: 408, 409, 429, 5xx and broken connections are
tried again, after ``Retry-After`` where the server gives one (up to two minutes), else after 0.5 s, 1 s, 2 s up to
8 s, each shortened at random so that many clients do not return at once.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, cast

import openai
from openai import AsyncOpenAI, DefaultAsyncHttpxClient

from cluster.errors import Fault, InputError, LoraloomError, NotFoundError
from serving.client import AskError
from serving.evaluate.answers import Answer, Likelihood
from serving.evaluate.data import Row

RETRIES = 8
"""Of each request: half a minute altogether without ``Retry-After``."""
FIRST_RETRIES = 2
"""Of the first look at the server, where a wrong address is the likeliest fault."""
TIMEOUT_S = 300.0
BASE = "base"
"""Means the server's base, unless it serves something of that very name."""
_VERSION = re.compile(r"[^@]+@[1-9][0-9]*")
_NO_KEY = "none"  # the client wants one; a server without keys does not look at it


class RowRefusedError(LoraloomError):
    """The server will not take this row: it is too long, say. Others may pass."""


@dataclass(frozen=True, slots=True)
class Model:
    """A model of the server, resolved: what it names cannot change under the evaluation."""

    reference: str
    """As it was asked for: ``support``, ``support@prod``, ``base``."""
    id: str
    """What is asked, and what answers must come from: ``support@2``, or the base's name."""
    base: str
    """The base's root: its folder or hub id."""
    created: int | None
    """Publication, in seconds since 1970; None for the base, whose card tells the server's start."""

    @property
    def is_base(self) -> bool:
        """True for the plain base."""
        return self.created is None

    @property
    def name(self) -> str:
        """The adapter's name, without its version."""
        return self.id.partition("@")[0]


class Endpoint:
    """A server's OpenAI interface."""

    def __init__(self, client: AsyncOpenAI, settings: Settings) -> None:
        self._client = client
        self._settings = settings
        self.retries = 0
        """How often a request had to be sent again."""

    async def resolve(self, reference: str) -> Model:
        """The immutable model that ``reference`` names now.

        Raises:
            NotFoundError: the server has no such model.
            InputError: it names several versions at once.
            AskError: the server answered with another error, or not at all.
        """
        try:
            card = await self._card(reference)
        except NotFoundError:
            if reference != BASE:
                raise
            card = await self._base_card()
        if card.get("parent") is None:
            return Model(reference, card["id"], str(card.get("root")), None)
        root = str(card.get("root"))
        if (card.get("metadata") or {}).get("split") or not _VERSION.fullmatch(root):
            rule = "must name one version: an alias that is split by weight does not; say support@7, say"
            raise InputError([Fault("--models", rule, reference)])
        parent = await self._card(str(card["parent"]))
        return Model(reference, root, str(parent.get("root")), int(card["created"]))

    async def answer(self, model: Model, row: Row) -> Answer:
        """What ``model`` writes for ``row``.

        Raises:
            RowRefusedError: the server refuses this row.
            AskError: it answered with another error, not at all, or as another model.
        """
        options = {"max_tokens": self._settings.max_tokens, **self._settings.sampling}
        document = await self._complete(model, row.prompt, options)
        choice = document["choices"][0]
        text = choice["text"] if isinstance(row.prompt, str) else choice["message"]["content"]
        return Answer(text or "", cut=choice["finish_reason"] == "length")

    async def likelihood(self, model: Model, row: Row) -> Likelihood:
        """How likely ``model`` finds the reference of ``row`` after its prompt, from the server's prompt logprobs.

        The reference's tokens are those behind the ones that the whole shares with the prompt alone, in a conversation
        with what the chat template puts after the turn, as in training. A first token has nothing to be predicted from
        and is not counted.

        Raises:
            RowRefusedError: the server refuses this row, or it has no token to count.
            AskError: as ``answer``.
        """
        before: list[int] = []
        if row.prompt:
            before = _tokens(await self._complete(model, row.prompt, {"max_tokens": 1, "return_token_ids": True}))
        options: dict[str, Any] = {"max_tokens": 1, "return_token_ids": True, "prompt_logprobs": 0}
        if isinstance(row.prompt, str):
            whole = await self._complete(model, row.prompt + row.reference, options)
            logprobs = whole["choices"][0]["prompt_logprobs"]
        else:
            turns = [*row.prompt, {"role": "assistant", "content": row.reference}]
            whole = await self._complete(model, turns, options | {"add_generation_prompt": False})
            logprobs = whole["prompt_logprobs"]
        found = [_logprob(entry) for entry in logprobs[_shared(before, _tokens(whole)) :] if entry]
        if not found:
            raise RowRefusedError("must have a token that perplexity can count: a first one has nothing before it")
        return Likelihood(-sum(found), len(found))

    async def _complete(self, model: Model, prompt: str | Any, options: dict[str, Any]) -> dict[str, Any]:
        """One completion of a text or a conversation, as the server's JSON."""
        known = {"temperature": 0, **options}
        create: Any
        if isinstance(prompt, str):
            create, known["prompt"] = self._client.completions.with_raw_response.create, prompt
        else:
            create, known["messages"] = self._client.chat.completions.with_raw_response.create, list(prompt)
        extra = {name: known.pop(name) for name in _EXTRA & known.keys()}
        document = await self._send(create(model=model.id, extra_body=extra, **known), row=True)
        if document.get("model") != model.id:
            raise AskError(
                f"{model.id} was asked, but {document.get('model')} answered: this would measure another model"
            )
        return document

    async def _card(self, reference: str) -> dict[str, Any]:
        client = self._client.with_options(max_retries=FIRST_RETRIES)
        return await self._send(client.models.with_raw_response.retrieve(reference))

    async def _base_card(self) -> dict[str, Any]:
        listed = await self._send(self._client.models.with_raw_response.list())
        bases = [card for card in listed["data"] if card.get("parent") is None]
        if len(bases) != 1:
            raise NotFoundError(f"{self._client.base_url} has {len(bases)} bases; name the one that is meant")
        return bases[0]

    async def _send(self, request: Awaitable[Any], *, row: bool = False) -> dict[str, Any]:
        where = self._client.base_url
        try:
            response = await request
            self.retries += response.retries_taken
            return cast("dict[str, Any]", response.http_response.json())
        except openai.APIStatusError as error:
            said = f"{where} answered {error.status_code}: {_message(error)}"
            if row and error.status_code in _ROW_STATUSES:
                raise RowRefusedError(
                    f"the server must take it, but it answered {error.status_code}: {_message(error)}"
                ) from None
            raise NotFoundError(said) if error.status_code == 404 else AskError(said) from None
        except openai.APIConnectionError as error:
            raise AskError(f"{where} does not answer: {error.__cause__ or error}") from None
        except ValueError as error:
            raise AskError(f"{where} answered what is no JSON: {error}") from None


@dataclass(frozen=True, slots=True)
class Settings:
    """How models are asked; part of what makes an answer worth keeping."""

    max_tokens: int
    """Longest answer."""
    temperature: float
    """0 takes the likeliest token each time."""
    seed: int
    """Of sampling; no effect at temperature 0."""

    @property
    def sampling(self) -> dict[str, Any]:
        """Options of a request that say how tokens are drawn."""
        return {"temperature": self.temperature} | ({"seed": self.seed} if self.temperature else {})


_EXTRA = frozenset({"return_token_ids", "prompt_logprobs", "add_generation_prompt"})
"""vLLM's own options, which OpenAI's interface does not have."""
_ROW_STATUSES = frozenset({400, 413, 422})


@asynccontextmanager
async def connect(url: str, api_key: str | None, settings: Settings) -> AsyncGenerator[Endpoint]:
    """The server at ``url``, such as ``http://127.0.0.1:8000/v1``; nothing is sent yet."""
    # Proxies of the environment are for the way out, and a server of one's own is not out there.
    async with (
        DefaultAsyncHttpxClient(trust_env=False) as http,
        AsyncOpenAI(
            base_url=url, api_key=api_key or _NO_KEY, max_retries=RETRIES, timeout=TIMEOUT_S, http_client=http
        ) as client,
    ):
        yield Endpoint(client, settings)


def _tokens(document: dict[str, Any]) -> list[int]:
    holder = document if "prompt_token_ids" in document else document["choices"][0]
    return holder["prompt_token_ids"]


def _shared(first: list[int], second: list[int]) -> int:
    """Length of the beginning that both have."""
    pairs = zip(first, second, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _logprob(entry: dict[str, Any]) -> float:
    """Of the token that stands there; with ``prompt_logprobs: 0`` it is the only one."""
    (found,) = entry.values()
    return float(found["logprob"])


def _message(error: openai.APIStatusError) -> str:
    """What an error response says, in OpenAI's shape or not."""
    try:
        return str(error.response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return error.response.text[:200]
