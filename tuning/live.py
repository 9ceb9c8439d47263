"""What a sweep shows while it runs: a live table in a terminal, a line for each change anywhere else."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from tuning.report import header_lines, trial_table
from tuning.results import SweepRecord

FILE_WIDTH = 160
LIVE_ROWS = 30
"""Rows of the live table; a terminal is not longer, and the rest scrolls away unseen."""
ROWS_EVERY_S = 5.0
"""Seconds between two lines about rows, where there is no terminal."""


class Progress(Protocol):
    """Whoever wants to know how a sweep gets on."""

    def tokenised(self, rows: int) -> None:
        """So many rows have been read, checked and tokenised so far."""

    def trials(self, record: SweepRecord, rows: list[dict[str, Any]]) -> None:
        """Something changed: the record so far, and one leaderboard row for each trial that was started."""

    def note(self, text: str) -> None:
        """Something that the user must hear, once."""


@contextmanager
def live_progress(title: str, *, enabled: bool, console: Console | None = None) -> Generator[Progress | None]:
    """Show a sweep on standard error, or on ``console``, as the terminal or the file allows; None if not
    ``enabled``.
    """
    if not enabled:
        yield None
        return
    console = console or make_console(stderr=True)
    if not console.is_terminal:
        yield _Lines(console)
        return
    start = Text(f"{title}: checking the base and the rows, then starting Ray")
    with Live(start, console=console, refresh_per_second=4, transient=True) as live:
        yield _Table(title, console, live)


def make_console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """A console that is wide enough for any table where it is no terminal, so that nothing is cut in a file. What is
    printed is text: a path or an error that holds ``[...]`` or ``:x:`` is no markup.
    """
    console = Console(stderr=stderr, quiet=quiet, markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = FILE_WIDTH
    return console


def _header(record: SweepRecord) -> Iterator[str]:
    if not record.base:  # minutes, where it comes from the hub
        yield "base   is being loaded and quantised; its first results tell its size"
    yield from header_lines(record)


class _Table:
    """A live table of the trials."""

    def __init__(self, title: str, console: Console, live: Live) -> None:
        self._title, self._console, self._live = title, console, live

    def tokenised(self, rows: int) -> None:
        self._live.update(
            Text(f"{self._title}: {rows:,} rows checked and tokenised; Ray is started next"), refresh=True
        )

    def trials(self, record: SweepRecord, rows: list[dict[str, Any]]) -> None:
        ended = sum(row["state"] not in ("running", "waiting") for row in rows)
        caption = f"{self._title}: {ended} of {record.trials} trials ended, {len(rows) - ended} running"
        ranked = sorted(rows, key=lambda row: (row["eval_loss"] is None, row["eval_loss"] or 0.0))
        table = trial_table(ranked[:LIVE_ROWS], self._console.width, winner=False)
        self._live.update(Group(*_header(record), table, Text(caption, style="dim")))

    def note(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)


class _Lines:
    """A line for each change of a trial's state or step, and now and then one about rows."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._rows_told_at = time.monotonic()
        self._seen: dict[str, tuple[Any, Any]] = {}
        self._headers: set[str] = set()

    def tokenised(self, rows: int) -> None:
        if time.monotonic() - self._rows_told_at >= ROWS_EVERY_S:
            self._rows_told_at = time.monotonic()
            self._print(f"{rows:,} rows checked and tokenised")

    def trials(self, record: SweepRecord, rows: list[dict[str, Any]]) -> None:
        for line in _header(record):
            if line not in self._headers:
                self._headers.add(line)
                self._print(line)
        for row in rows:
            mark = (row["state"], row["steps"])
            if self._seen.get(row["trial"]) != mark:
                self._seen[row["trial"]] = mark
                losses = "" if row["steps"] is None else f" step {row['steps']} eval {row['eval_loss']:.4f}"
                self._print(f"{row['trial']} {row['state']}{losses}")

    def note(self, text: str) -> None:
        self._print(text)

    def _print(self, line: str) -> None:
        self._console.print(line, soft_wrap=True)
