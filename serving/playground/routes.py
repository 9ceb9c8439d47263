"""The playground: a page that asks several models one prompt side by side, and takes votes on their answers.

The page itself needs no key and holds no secret: it asks over the API like any other client, with the key that its user
types in. Its files are plain HTML, CSS and JavaScript (the folder ``page``), without a build step or any other
host.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import Annotated, Any

from fastapi import FastAPI, Request
from pydantic import BaseModel, Field
from starlette.responses import JSONResponse, RedirectResponse, Response

from serving.access.keys import Key
from serving.http.api_error import ApiError
from serving.http.door import KEY_IN_SCOPE, PLAYGROUND, VOTES_PATH

_PARTS = {"page.css": "text/css", "answer.js": "text/javascript", "page.js": "text/javascript"}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {"Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
_LONGEST_NAME = 256
_MOST_NAMES = 32
"""Far more than may be compared: the answer says how many those are."""

Name = Annotated[str, Field(max_length=_LONGEST_NAME)]


class Vote(BaseModel):
    """Which of several answers to one prompt is the best."""

    models: Annotated[list[Name], Field(min_length=2, max_length=_MOST_NAMES)]
    """Who gave the answers, as the header ``x-loraloom-model`` says: versions (``support@7``), or the base's name."""
    better: Name | None
    """The one of them whose answer is the best; null where none is."""


Voter = Callable[[Key, Vote], Awaitable[dict[str, Any]]]


def add_playground(app: FastAPI, vote: Voter) -> None:
    """Add the page and what it needs beyond OpenAI's API.

    Args:
        app: vLLM's.
        vote: Keeps a vote by a key; raises ApiError where it cannot.
    """
    folder = files("serving.playground") / "page"
    parts = {name: ((folder / name).read_bytes(), kind) for name, kind in _PARTS.items()}
    page = (folder / "index.html").read_bytes()

    @app.get("/", include_in_schema=False)
    def go_there() -> Response:  # pyright: ignore[reportUnusedFunction]
        return RedirectResponse(PLAYGROUND.removeprefix("/"))  # relative: there may be a prefix before it

    @app.get(PLAYGROUND, include_in_schema=False)
    def show_page() -> Response:  # pyright: ignore[reportUnusedFunction]
        return Response(page, media_type="text/html", headers={**_HEADERS, "Content-Security-Policy": _POLICY})

    @app.get(PLAYGROUND + "/{name}", include_in_schema=False)
    def show_part(name: str) -> Response:  # pyright: ignore[reportUnusedFunction]
        if name not in parts:
            raise ApiError(404, "The playground has no such file", "not_found")
        content, kind = parts[name]
        return Response(content, media_type=kind, headers=_HEADERS)

    @app.post(VOTES_PATH, summary="Which of several answers is the best; kept beside the versions' scores")
    async def cast_vote(request: Request, body: Vote) -> Response:  # pyright: ignore[reportUnusedFunction]
        return JSONResponse(await vote(request.scope[KEY_IN_SCOPE], body))
