"""The sweeps of a running Ray: drivers tell their sweeps' folders with their jobs, and its dashboard lists jobs.

Of a job that `ray job submit` has begun it lists the metadata given there, and none of the driver's.
"""

from __future__ import annotations

import json
import os
import re
import time
import urllib.request
from collections import deque
from collections.abc import Iterator
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
"""The newest of a Ray that runs for months, of those whose folders are there."""
_TIMEOUT_S = 10.0
_SWEEP_COMMAND = re.compile(r"\bloraloom(\.py)?\s+sweep\b")
_DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Whatever http_proxy says: the token is for Ray alone."""


class JobsShelf:
    """The sweeps that run or have run in the Ray whose dashboard this is (see ``source.Shelf``).

    Their folders must be seen from here, as from all nodes of the cluster. Others are counted, for ``left_out``.
    """

    def __init__(self, dashboard: str) -> None:
        self._dashboard = dashboard
        self._asked_at: float | None = None
        self._trouble: str | None = None
        self._jobs: list[dict[str, Any]] = []
        self._left_out: list[str] = []

    def sources(self) -> list[Source]:
        """As ``Shelf.sources``."""
        if self._asked_at is None or time.monotonic() - self._asked_at >= ASK_EVERY_S:
            self._trouble = None
            try:
                self._jobs = self._ask()
            except MachineError as error:
                self._trouble = str(error)
            finally:
                self._asked_at = time.monotonic()  # also where it does not answer: whoever asks would wait for that
        if self._trouble is not None:
            raise MachineError(self._trouble)
        found: list[Source] = []
        unseen = 0
        waiting = deque(sweep_folders(self._jobs))
        while waiting and len(found) < MOST_SWEEPS:
            folder = waiting.popleft()
            if _is_sweep(folder):
                found.append(LocalSource(folder))
            else:
                unseen += 1
        self._left_out = list(_left_out(unseen, len(waiting), untold_sweeps(self._jobs)))
        if not found:
            nothing = "No sweep has run in this Ray yet. One that joins it appears here."
            raise NotFoundError(" ".join(self._left_out) or nothing)
        return found

    def left_out(self) -> list[str]:
        """As ``Shelf.left_out``."""
        return self._left_out

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
    return [Path(folder) for folder in dict.fromkeys(folders) if folder]


def untold_sweeps(jobs: list[dict[str, Any]]) -> int:
    """How many jobs run a sweep, as their command says, and do not tell its folder."""
    return sum(
        _SWEEP_COMMAND.search(job.get("entrypoint") or "") is not None
        for job in jobs
        if job.get("type") == "SUBMISSION" and SWEEP_KEY not in (job.get("metadata") or {})
    )


def _left_out(unseen: int, older: int, untold: int) -> Iterator[str]:
    if unseen:
        yield f"The folders of {unseen} sweeps of this Ray cannot be seen from here."
    if older:
        yield f"Only the newest {MOST_SWEEPS} sweeps are shown, and not {older} older ones."
    if untold:
        yield (
            f"Ray does not tell the folders of {untold} sweeps that `ray job submit` has begun. Name them there: "
            f'--metadata-json \'{{"job_name": "sweep NAME", "{SWEEP_KEY}": "/FOLDER"}}\''
        )


def _is_sweep(folder: Path) -> bool:
    try:
        return (folder / SWEEP_FILE).is_file()
    except OSError:  # it may not be looked at
        return False


def ray_token() -> str | None:
    """Ray's token, from where Ray looks for it (Ray 2.60: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token)."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except OSError:
        return None
