"""A real S3 server on loopback: moto's, whose objects outlive a stop and a start of it.

moto looks whether an object is there and writes it in two steps, so that two conditional writes at once can both
succeed; S3 does it at one stroke (https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-writes.html).
Here one request is answered after the other.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Generator
from typing import Any

import httpx
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import BaseWSGIServer, make_server

logging.getLogger("werkzeug").setLevel(logging.ERROR)  # one line for each request otherwise


class S3Server:
    """``start`` and ``stop`` as often as wanted, always at the same address."""

    def __init__(self) -> None:
        self.port = 0
        self._server: BaseWSGIServer | None = None
        self._thread: threading.Thread | None = None
        self._answering = threading.Lock()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        moto = DomainDispatcherApplication(create_backend_app)

        def one_at_a_time(environ: dict[str, Any], start_response: Any) -> Any:
            with self._answering:
                return moto(environ, start_response)

        self._server = make_server("127.0.0.1", self.port, one_at_a_time, threaded=True)
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        if self._server and self._thread:
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()
            self._server = self._thread = None

    def make_bucket(self, name: str) -> None:
        httpx.put(f"{self.endpoint}/{name}").raise_for_status()

    def uri(self, place: str, credentials: str = "key:secret@") -> str:
        """The URI of ``bucket/prefix``, as pyarrow takes it."""
        options = f"scheme=http&endpoint_override=127.0.0.1:{self.port}&region=us-east-1"
        return f"s3://{credentials}{place}?{options}"


@contextlib.contextmanager
def s3_server() -> Generator[S3Server]:
    server = S3Server()
    server.start()
    try:
        yield server
    finally:
        server.stop()
