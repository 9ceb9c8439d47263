"""A place in the S3 server of the tests, and what lies there."""

from __future__ import annotations

from pathlib import Path

import obstore
from obstore.store import S3Store

from tests.serving.s3 import S3Server


class Bucket:
    """A prefix of the bucket."""

    def __init__(self, server: S3Server, prefix: str) -> None:
        self.uri = server.uri(f"bucket/{prefix}")
        self._client = S3Store(
            "bucket", prefix=prefix, endpoint=server.endpoint, region="us-east-1", access_key_id="key",
            secret_access_key="secret", client_options={"allow_http": True},
        )  # fmt: skip

    def copy(self, folder: Path, below: str = "") -> None:
        for path in folder.rglob("*"):
            if path.is_file():
                self.put(below + path.relative_to(folder).as_posix(), path.read_bytes())

    def put(self, key: str, content: bytes) -> None:
        obstore.put(self._client, key, content)

    def delete(self, key: str) -> None:
        obstore.delete(self._client, key)
