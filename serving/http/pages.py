"""The routes of ours, beside vLLM's: models by alias and version, health, and vLLM's own way of loading adapters.

vLLM's app has many more routes, for other tasks and for its operators (pausing, scaling, profiling). Only those are
kept that this server stands for: the others are taken out, of its OpenAPI document too.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Any, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount

from serving.access.keys import Key
from serving.adapters.catalogue import Catalogue
from serving.http.api_error import ApiError, error_body, request_fault
from serving.http.door import KEY_IN_SCOPE
from serving.manifest import Manifest

KEPT_ROUTES = frozenset(
    {
        "/v1/chat/completions",
        "/v1/completions",
        "/tokenize",
        "/detokenize",
        "/version",
        "/metrics",
        "/docs",
        "/openapi.json",
        "/static",
    }
)
"""vLLM's routes that stay."""


class LoadAdapter(BaseModel):
    """vLLM's request to load an adapter."""

    lora_name: str
    """Name that the adapter is published under."""
    lora_path: str
    """A PEFT adapter's folder, below one of the server's ``http.adapter_roots``."""
    load_inplace: bool = False
    """Publish a new version if the name is there already; else that is refused. A name with an alias ``prod`` goes on
    following that; the answer says which version is new.
    """


class UnloadAdapter(BaseModel):
    """vLLM's request to unload an adapter."""

    lora_name: str
    """Name of an adapter that was loaded by the route above."""
    lora_int_id: int | None = None
    """Ignored, as by vLLM."""


Finder = Callable[[str], Awaitable[Manifest | None]]
Health = Callable[[], Awaitable[None]]
Loader = Callable[[LoadAdapter], Awaitable[str]]
Unloader = Callable[[UnloadAdapter], Awaitable[str]]


def add_pages(app: FastAPI, catalogue: Catalogue, find: Finder, health: Health, load: Loader, unload: Unloader) -> None:
    """Make vLLM's ``app`` this server's: take out what it does not stand for, and put in what is ours.

    Args:
        app: As vLLM builds it.
        catalogue: What there is to ask.
        find: Looks a model up, in the registry if need be.
        health: Raises ApiError where the engine does not answer.
        load: Publishes an adapter.
        unload: Removes it.
    """
    app.title, app.description = "loraloom", "One base and many LoRA adapters, over OpenAI's API."
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", "") in KEPT_ROUTES]
    for route in app.router.routes:
        if isinstance(route, Mount) and route.path == "/metrics":
            # vLLM takes whatever begins so; the door looks after the exact path.
            route.path_regex = re.compile(r"^/metrics(?P<path>)$")
    app.middleware_stack = None  # vLLM has built it already; the handlers below are part of it
    app.add_exception_handler(ApiError, _answer)
    app.add_exception_handler(RequestValidationError, _answer)
    app.add_exception_handler(ValidationError, _answer)

    @app.get("/v1/models", summary="The base, and each adapter by name, alias and version")
    def list_models(request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        key: Key = request.scope[KEY_IN_SCOPE]
        return _json(catalogue.cards(lambda model: key.may_ask(model, catalogue.base_name)))

    @app.get("/v1/models/{model:path}", summary="One of them")
    async def show_model(request: Request, model: str) -> Response:  # pyright: ignore[reportUnusedFunction]
        key: Key = request.scope[KEY_IN_SCOPE]
        key.authorise(model, catalogue.base_name)
        return _json(catalogue.card(model, await find(model)))

    @app.get("/health", summary="200 while this replica takes requests, else 503")
    async def check_health() -> Response:  # pyright: ignore[reportUnusedFunction]
        await health()
        return JSONResponse({"status": "ok"})

    @app.post("/v1/load_lora_adapter", summary="Publish an adapter's folder; an admin's key")
    async def load_adapter(body: LoadAdapter) -> Response:  # pyright: ignore[reportUnusedFunction]
        return PlainTextResponse(await load(body))

    @app.post("/v1/unload_lora_adapter", summary="Remove what was loaded so; an admin's key")
    async def unload_adapter(body: UnloadAdapter) -> Response:  # pyright: ignore[reportUnusedFunction]
        return PlainTextResponse(await unload(body))


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json")


async def _answer(_request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, RequestValidationError | ValidationError):
        error = request_fault(error.errors())
    found = cast("ApiError", error)
    body: dict[str, Any] = error_body(found.status, found.message, found.code, found.param)
    return JSONResponse(body, status_code=found.status, headers=found.headers or None)
