"""Looking on while a sweep runs in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psutil

from tuning.results import SweepRecord


class Watcher:
    """Remembers what a sweep tells of its progress; ``react`` sees each state of the trials."""

    def __init__(self, react: Callable[[list[dict[str, Any]]], None] | None = None) -> None:
        self.counts: list[int] = []
        self.notes: list[str] = []
        self.seen: list[tuple[str, str]] = []
        self._react = react

    def tokenised(self, rows: int) -> None:
        self.counts.append(rows)

    def trials(self, record: SweepRecord, rows: list[dict[str, Any]]) -> None:
        assert record.state == "running"
        self.seen += [(row["trial"], row["state"]) for row in rows]
        if self._react:
            self._react(rows)

    def note(self, text: str) -> None:
        self.notes.append(text)


def processes_named(title: str) -> list[psutil.Process]:
    """The processes below this one whose title begins with ``title``, as Ray's workers show their actors."""
    found: list[psutil.Process] = []
    for process in psutil.Process().children(recursive=True):
        try:
            if " ".join(process.cmdline()).startswith(title):
                found.append(process)
        except psutil.Error:
            continue
    return found
