"""What a running sweep shows, in a terminal and in a file."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from tuning import live
from tuning.live import LIVE_ROWS, live_progress
from tuning.results import SweepRecord

RECORD = SweepRecord(name="s", state="running", started_at="2026-01-01T00:00:00+00:00", trials=40, versions={})


def row(trial: str, state: str, steps: int | None, loss: float | None) -> dict[str, Any]:
    return {"trial": trial, "state": state, "rank": 8, "steps": steps, "eval_loss": loss}


def test_a_file_gets_a_line_for_each_change_and_no_other() -> None:
    text = io.StringIO()
    with live_progress("s", enabled=True, console=Console(file=text, width=200)) as progress:
        assert progress
        progress.trials(RECORD, [])
        assert "base   is being loaded" in text.getvalue()
        for rows in (
            [row("t000", "running", None, None)],
            [row("t000", "running", None, None), row("t001", "running", 5, 2.5)],
            [row("t000", "failed", None, None), row("t001", "running", 5, 2.5)],
        ):
            progress.trials(RECORD, rows)
    assert text.getvalue().splitlines()[1:] == ["t000 running", "t001 running step 5 eval 2.5000", "t000 failed"]


def test_a_file_is_told_of_rows_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 6.0, 6.0, 7.0])
    monkeypatch.setattr(live.time, "monotonic", lambda: next(clock))
    text = io.StringIO()
    with live_progress("s", enabled=True, console=Console(file=text, width=200)) as progress:
        assert progress
        for rows in (512, 20_000, 30_000):
            progress.tokenised(rows)
    assert text.getvalue().splitlines() == ["20,000 rows checked and tokenised"]


def test_a_terminal_shows_rows_then_the_best_trials() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100, height=60, legacy_windows=False, _environ={})
    with live_progress("sweep s", enabled=True, console=console) as progress:
        assert progress
        progress.tokenised(12_345)
        rows = [row(f"t{n:03}", "running", 5, float(50 - n)) for n in range(LIVE_ROWS + 10)]
        progress.trials(RECORD, [*rows, row("t999", "finished", 5, 60.0)])
    shown = screen.getvalue()
    assert "sweep s: 12,345 rows checked and tokenised" in shown
    assert "sweep s: checking the base and the rows" in shown
    last = shown[shown.rindex("t039") :]  # the best of them stands first
    assert "t010" in last
    assert "t009" not in last
    assert "sweep s: 1 of 40 trials ended, 40 running" in last


def test_quiet_shows_nothing() -> None:
    with live_progress("s", enabled=False) as progress:
        assert progress is None
