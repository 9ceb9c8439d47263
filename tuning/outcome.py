"""A sweep's outcome on standard output, as `sweep` and `compare` print it."""

from __future__ import annotations

import json
import shlex
from typing import Any

import typer

from tuning.live import make_console
from tuning.report import header_lines, trial_table
from tuning.results import BOARD_FILE, Sweep, leaderboard


def show_sweep(done: Sweep, *, as_json: bool, quiet: bool) -> None:
    """The leaderboard on standard output: a table, or one JSON object, or the winner's name."""
    rows = leaderboard(done)
    winner = done.winner
    if as_json:
        record = done.record.model_dump()
        document = {**record, "folder": str(done.folder), "winner": winner and winner.name, "leaderboard": _plain(rows)}
        typer.echo(json.dumps(document, allow_nan=False))
        return
    if quiet:
        typer.echo(winner.name if winner else "")
        return
    console = make_console()
    for line in header_lines(done.record):
        console.print(line, soft_wrap=True)
    took = "" if done.record.seconds is None else f" in {done.record.seconds:.0f} s"
    console.print(
        trial_table(rows, console.width, f"sweep {done.record.name}: {done.record.state}{took}, {len(rows)} trials")
    )
    for trial in done.trials:
        if trial.error:
            console.print(f"{trial.name} failed: {trial.error} (whole: {trial.folder / 'error.txt'})", soft_wrap=True)
    kept = done.spec.search.keep_adapters
    if kept is not None and len(done.trials) > kept:
        console.print(f"adapters are kept of the best {kept} trials only (search.keep_adapters)")
    if done.record.state == "interrupted":
        console.print(f"go on: loraloom sweep --resume {shlex.quote(str(done.folder))}", soft_wrap=True)
    if winner:
        console.print(f"winner {winner.name}: {winner.adapter}", soft_wrap=True)
        console.print(f"leaderboard: {done.folder / BOARD_FILE}", soft_wrap=True)
        console.print(f"next: loraloom publish {shlex.quote(str(done.folder))} --name NAME", soft_wrap=True)


def _plain(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """JSON has no infinity: a number that is not finite becomes null."""
    finite = float("inf")
    return [
        {
            key: None if isinstance(value, float) and not -finite < value < finite else value
            for key, value in row.items()
        }
        for row in rows
    ]
