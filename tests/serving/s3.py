"""A real S3 server on loopback: moto's, whose objects outlive a stop and a start of it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator

import httpx
from moto.server import ThreadedMotoServer

logging.getLogger("werkzeug").setLevel(logging.ERROR)  # one line for each request otherwise


class S3Server:
    """``start`` and ``stop`` as often as wanted, always at the same address."""

    def __init__(self) -> None:
        self.port = 0
        self._server: ThreadedMotoServer | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=self.port, verbose=False)
        server.start()
        _, self.port = server.get_host_and_port()
        self._server = server

    def stop(self) -> None:
        if self._server:
            self._server.stop()
            self._server = None

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
