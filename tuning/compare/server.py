"""Serves the comparison page and its one endpoint, by itself or in the place of Grafana in Ray's dashboard.

Ray's dashboard shows in its tab Metrics whatever keeps Grafana's contract (Ray 2.60's
ray/dashboard/modules/metrics/metrics_head.py): ``/api/health`` answers ``{"database": "ok"}``, Prometheus'
``/api/v1/query`` answers ``vector(1)``, and the tab then embeds ``/d/<dashboard>/?theme=dark&...``. All of it lies
below a secret part of the path, where one is given: the dashboard tells it to whoever has Ray's token, and nobody else
on the machine can read along.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route

from tuning.compare.document import Comparison

PAGE = files("tuning.compare") / "page"
SCRIPTS = (
    "model.js", "filters.js", "elements.js", "press.js", "table.js", "traces.js", "maps.js", "plots.js", "trial.js",
    "page.js",
)  # fmt: skip
PLOTLY = "plotly.min.js"
_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
# Plotly writes styles into the page, and draws parallel coordinates by code that it makes as it runs (regl).
POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; img-src data: blob:; "
    "connect-src 'self'; font-src data:; base-uri 'none'; form-action 'none'"
)
FRESH_S = 1.0
"""However many pages ask, the sweeps' files are looked at no more often."""
LOOPBACK = ["127.0.0.1", "localhost"]


def plotly_source() -> Path:
    """Plotly's own bundle, as its Python package ships it."""
    return Path(str(files("plotly") / "package_data" / PLOTLY))


def make_app(
    document: Callable[[str | None], Comparison], *, secret: str = "", hosts: list[str] | None = None
) -> Starlette:
    """The ASGI app.

    Args:
        document: gives the document, or what has changed after a revision (``reader.Comparer.document``); called in a
            thread.
        secret: the first part of every path; empty for none.
        hosts: names under which it may be asked (a page of a stranger's that has its own name lead to this machine is
            refused); None for any.
    """

    async def data(request: Request) -> Response:
        squeezed = "gzip" in request.headers.get("accept-encoding", "")
        content = await asyncio.to_thread(_written, document, request.query_params.get("after"), squeezed=squeezed)
        headers = {"Cache-Control": "no-store", **({"Content-Encoding": "gzip"} if squeezed else {})}
        return Response(content, media_type="application/json", headers=headers)

    def page(_: Request) -> Response:
        return _file("index.html", {"Content-Security-Policy": POLICY})

    def part(request: Request) -> Response:
        name: str = request.path_params["name"]
        if name == PLOTLY:
            # Squeezed once: at each request that would take most of a second.
            headers = {"Content-Encoding": "gzip", "Cache-Control": "private, max-age=86400"}
            return Response(_squeezed_plotly(), media_type="text/javascript", headers=headers)
        if name not in (*SCRIPTS, "page.css"):
            return Response("no such file", 404)
        return _file(name)

    def health(_: Request) -> Response:
        return JSONResponse({"database": "ok", "version": "loraloom, not Grafana"})

    def query(request: Request) -> Response:
        if request.query_params.get("query") != "vector(1)":
            return JSONResponse({"status": "error", "error": "there is no Prometheus here; see loraloom metrics"}, 404)
        result = [{"metric": {}, "value": [0, "1"]}]
        return JSONResponse({"status": "success", "data": {"resultType": "vector", "result": result}})

    def elsewhere(_: Request) -> Response:
        text = "This place is for a panel of Grafana's, and none is set up. The tab Metrics compares trials."
        return Response(f"<!doctype html><title>no Grafana</title><p>{text}", media_type="text/html")

    page_and_parts = [Route("/", page), Route("/data.json", data), Route("/{name}", part)]
    routes = [
        Mount("/d/{dashboard}", routes=page_and_parts),
        Route("/d-solo/{rest:path}", elsewhere),
        Route("/api/health", health),
        Route("/api/v1/query", query),
        *page_and_parts,
    ]
    middleware = [Middleware(GZipMiddleware, minimum_size=1000, compresslevel=5)]
    if hosts is not None:
        middleware.insert(0, Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False))
    return Starlette(routes=[Mount(f"/{secret}" if secret else "", routes=routes)], middleware=middleware)


def _written(document: Callable[[str | None], Comparison], after: str | None, *, squeezed: bool) -> bytes:
    """The document as it is sent; megabytes of a large sweep, so that this is done in a thread."""
    content = document(after).model_dump_json().encode()
    return gzip.compress(content, 5) if squeezed else content


@cache
def _squeezed_plotly() -> bytes:
    return gzip.compress(plotly_source().read_bytes(), 6)


def _file(name: str, headers: dict[str, str] | None = None) -> Response:
    content = (PAGE / name).read_bytes()
    type_ = _TYPES[Path(name).suffix]
    always = {"Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
    return Response(content, media_type=type_, headers={**always, **(headers or {})})


def self_contained(document: Comparison) -> str:
    """The page with everything that it needs in it, as one HTML file."""
    html = (PAGE / "index.html").read_text(encoding="utf-8")
    css = (PAGE / "page.css").read_text(encoding="utf-8")
    html = _replaced(html, '<link rel="stylesheet" href="page.css">', f"<style>\n{css}</style>")
    # Nothing in it may end the element that holds it: `<` only stands inside strings, where \\u003c says the same.
    data = document.model_copy(update={"live": False}).model_dump_json().replace("<", "\\u003c")
    plotly = plotly_source().read_text(encoding="utf-8")
    html = _replaced(
        html,
        f'<script src="{PLOTLY}"></script>',
        f'<script type="application/json" id="data">{data}</script>\n<script>{_inline(plotly)}</script>',
    )
    for name in SCRIPTS:
        script = (PAGE / name).read_text(encoding="utf-8")
        html = _replaced(html, f'<script src="{name}"></script>', f"<script>\n{_inline(script)}</script>")
    return html


def _inline(script: str) -> str:
    r"""A script that may stand between tags: in its strings and patterns, ``<\/`` is ``</``."""
    return script.replace("</script", "<\\/script")


def _replaced(html: str, old: str, new: str) -> str:
    if html.count(old) != 1:
        raise AssertionError(f"index.html must hold {json.dumps(old)} once")
    return html.replace(old, new)


def serve(app: Any, host: str, port: int, started: Callable[[int], None]) -> None:
    """Serve until SIGINT or SIGTERM; ``started`` hears the port once it listens.

    Raises:
        OSError: the address cannot be had.
    """
    import socket

    import uvicorn

    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(128)
        started(listener.getsockname()[1])
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=1))
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn ends well, then raises the signal once more
            server.run(sockets=[listener])
