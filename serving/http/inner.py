"""The replica's HTTP server is for HAProxy alone, wherever else it could be reached from.

On a cluster the replicas listen on the network between the nodes. Whoever reached them there would pass HAProxy by, and
with it the limits on what a request may bring; and where there are no keys because only one machine reaches the server,
everything else too. So HAProxy adds a secret to each request, made anew at each start.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from serving.http.api_error import ApiError
from serving.http.envelope import Envelope, Send
from serving.http.haproxy import HEALTH_PATH, SECRET_HEADER

_HEADER = SECRET_HEADER.encode()

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Any, Send], Awaitable[None]]


class FrontOnly:
    """An ASGI application around another: answers 403 to requests without the secret, but for health checks."""

    def __init__(self, app: App, secret: str) -> None:
        self._app = app
        self._secret = secret.encode()

    async def __call__(self, scope: Scope, receive: Any, send: Send) -> None:
        """ASGI's entrance."""
        if scope["type"] == "http" and scope["path"] != HEALTH_PATH:
            headers: dict[bytes, bytes] = dict(scope["headers"])
            if not hmac.compare_digest(headers.get(_HEADER, b""), self._secret):
                envelope = Envelope(scope["method"], scope["path"], headers, send)
                await envelope.fail(ApiError(403, "This port is for the server's own load balancer", "forbidden"))
                return
        await self._app(scope, receive, send)
