from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn

from tests.serving.s3 import S3Server, s3_server
from tests.tuning.compare.pages import Serve
from tests.waiting import wait_until
from tuning.compare.reader import Comparer
from tuning.compare.server import LOOPBACK, make_app
from tuning.compare.source import LocalShelf


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Serve what is in a folder; returns the page's address."""
    running: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(folder: Path) -> str:
        comparer = Comparer([LocalShelf(folder)])
        comparer.document(wait=True)
        app = make_app(comparer.document, hosts=LOOPBACK)
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        running.append((server, thread))
        wait_until(lambda: server.started)
        return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"

    yield start
    for server, thread in running:
        server.should_exit = server.force_exit = True
        thread.join(10)


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with s3_server() as server:
        server.make_bucket("bucket")
        yield server
