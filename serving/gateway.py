"""The gateway: OpenAI's routes, the names and aliases of the registry, and errors in OpenAI's shape.

A request's ``model`` is the base's name or a reference to an adapter. The reference is resolved here, at each
request, against the registry: a publication or a moved alias is seen by the next request. Behind the gateway there are
only immutable ids.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from ray.exceptions import RayError
from ray.llm._internal.serve.core.configs.openai_api_models import ModelCard, OpenAIHTTPException
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.llm.ingress import OpenAiIngress, make_fastapi_ingress
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from serving.api_error import CODES, ApiError, error_body, request_fault
from serving.catalogue import Catalogue

HEALTH_TIMEOUT_S = 10.0


class Gateway(OpenAiIngress):
    """The HTTP face of one base and the adapters of one registry."""

    def __init__(
        self, llm_deployments: dict[str, DeploymentHandle[Any]], model_cards: dict[str, ModelCard], catalogue: Catalogue
    ) -> None:
        super().__init__(llm_deployments, model_cards)
        self._catalogue = catalogue

    async def list_models(self) -> Response:
        """``GET /v1/models``: the base, and each adapter that it can serve, by name and by version."""
        return JSONResponse({"object": "list", "data": await asyncio.to_thread(self._catalogue.cards)})

    async def show_model(self, model: str) -> Response:
        """``GET /v1/models/{model}``: one of them."""
        return JSONResponse(await asyncio.to_thread(self._catalogue.card, model))

    async def health(self) -> Response:
        """``GET /health``: 200 if an engine answers, 503 if none does."""
        handle = self._default_serve_handles[self._catalogue.base_name]
        try:
            await asyncio.wait_for(handle.check_health.remote(), HEALTH_TIMEOUT_S)
        except (RayError, RayServeException, TimeoutError) as error:
            raise ApiError(503, f"The engine does not answer: {error or type(error).__name__}") from None
        return JSONResponse({"status": "ok"})

    async def _get_response(
        self, *, body: Any, call_method: str, raw_request: Request | None = None
    ) -> AsyncGenerator[Any, None]:
        body.model = await asyncio.to_thread(self._catalogue.route, body.model)
        _read_lazy_content(body)
        async for response in super()._get_response(body=body, call_method=call_method, raw_request=raw_request):
            yield response


def _read_lazy_content(body: Any) -> None:
    """Read the parts of messages now: pydantic validates them when they are first read, and upstream hides its
    errors.
    """
    for message in getattr(body, "messages", ()):
        content = message.get("content")
        if content is not None and not isinstance(content, str):
            message["content"] = list(content)


def build_ingress() -> type[Any]:
    """``Gateway`` with its routes, ready for ``serve.deployment``."""
    app = FastAPI(title="loraloom", docs_url=None, redoc_url=None)
    app.add_exception_handler(ApiError, _answer)
    app.add_exception_handler(RequestValidationError, _answer)
    app.add_exception_handler(OpenAIHTTPException, _answer)
    app.add_exception_handler(HTTPException, _answer)
    app.add_exception_handler(Exception, _answer)
    return make_fastapi_ingress(
        Gateway,
        endpoint_map={
            "list_models": lambda app: app.get("/v1/models"),
            "show_model": lambda app: app.get("/v1/models/{model:path}"),
            "chat": lambda app: app.post("/v1/chat/completions", response_model=None),
            "completions": lambda app: app.post("/v1/completions", response_model=None),
            "health": lambda app: app.get("/health"),
        },
        app=app,
    )


async def _answer(request: Request, error: Exception) -> JSONResponse:
    found = _api_error(request, error)
    body = error_body(found.status, found.message, found.code, found.param)
    return JSONResponse(body, status_code=found.status, headers=getattr(error, "headers", None))


def _api_error(request: Request, error: Exception) -> ApiError:
    """What happened, as the client is told it."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError):
        return request_fault(error.errors())
    if isinstance(error, ValidationError):  # a message's content is validated when it is first read
        return request_fault(error.errors())
    if isinstance(error, OpenAIHTTPException):  # how upstream passes on what the engine answered
        code = error.type if error.type in CODES else None
        return ApiError(error.status_code, error.message, code, "model" if code else None)
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
    # Anything else is logged by the server with its traceback; the client gets what the server's log can be searched
    # for.
    return ApiError(500, f"The server failed to answer (request {request.headers.get('x-request-id', 'without id')})")
