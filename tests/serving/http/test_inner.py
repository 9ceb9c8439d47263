from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from starlette.responses import PlainTextResponse

from serving.http.inner import FrontOnly


async def app(scope: Any, receive: Any, send: Any) -> None:
    await PlainTextResponse("in")(scope, receive, send)


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/v1/models", {}, 403),
        ("/v1/models", {"x-loraloom-front": "wrong"}, 403),
        ("/v1/models", {"X-Loraloom-Front": "secret"}, 200),
        ("/health", {}, 200),
        ("/health/", {}, 403),
    ],
)
def test_only_the_load_balancer_comes_in(path: str, headers: dict[str, str], status: int) -> None:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(FrontOnly(app, "secret"))
        async with httpx.AsyncClient(transport=transport, base_url="http://replica") as client:
            return await client.get(path, headers=headers)

    response = asyncio.run(ask())
    assert response.status_code == status
    if status == 403:
        assert response.json()["error"]["code"] == "forbidden"
