"""The sweeps of a running Ray: drivers tell their sweeps' folders with their jobs, and its dashboard lists jobs."""

from __future__ import annotations

import json
import os
import time
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any

from cluster.errors import MachineError, NotFoundError
from tuning.compare.source import LocalSource, Source
from tuning.results import SWEEP_FILE

SWEEP_KEY = "loraloom_sweep"
"""Key of a job's metadata that holds the sweep's folder."""
ASK_EVERY_S = 3.0
MOST_SWEEPS = 20
"""The newest of a Ray that runs for months."""
_TIMEOUT_S = 10.0
_DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Whatever http_proxy says: the token is for Ray alone."""


class JobsShelf:
    """The sweeps that run or have run in the Ray whose dashboard this is (see ``source.Shelf``).

    Their folders must be seen from here, as from all nodes of the cluster.
    """

    def __init__(self, dashboard: str) -> None:
        self._dashboard = dashboard
        self._asked_at: float | None = None
        self._trouble: str | None = None
        self._folders: list[Path] = []

    def sources(self) -> list[Source]:
        """As ``Shelf.sources``."""
        if self._asked_at is None or time.monotonic() - self._asked_at >= ASK_EVERY_S:
            self._trouble = None
            try:
                self._folders = sweep_folders(self._ask())
            except MachineError as error:
                self._trouble = str(error)
            finally:
                self._asked_at = time.monotonic()  # also where it does not answer: whoever asks would wait for that
        if self._trouble is not None:
            raise MachineError(self._trouble)
        found: list[Source] = [LocalSource(folder) for folder in self._folders if (folder / SWEEP_FILE).is_file()]
        if not found:
            raise NotFoundError("No sweep has run in this Ray yet. One that joins it appears here.")
        return found

    def close(self) -> None:
        """Nothing was copied."""

    def _ask(self) -> list[dict[str, Any]]:
        request = urllib.request.Request(f"http://{self._dashboard}/api/jobs/")
        token = ray_token()
        if token is not None:
            request.add_header("Authorization", f"Bearer {token}")
        try:
            with _DIRECTLY.open(request, timeout=_TIMEOUT_S) as answer:
                return json.loads(answer.read())
        except (OSError, ValueError, HTTPException) as error:
            raise MachineError(f"Ray's dashboard at {self._dashboard} does not tell its jobs ({error})") from None


def sweep_folders(jobs: list[dict[str, Any]]) -> list[Path]:
    """The folders that jobs tell of, each once, the newest sweeps first."""
    newest = sorted(jobs, key=lambda job: job.get("start_time") or 0, reverse=True)
    folders = [(job.get("metadata") or {}).get(SWEEP_KEY) for job in newest]
    return [Path(folder) for folder in dict.fromkeys(filter(None, folders))][:MOST_SWEEPS]


def ray_token() -> str | None:
    """Ray's token, from where Ray looks for it (Ray 2.60: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token)."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except OSError:
        return None
