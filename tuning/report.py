"""Show a sweep in a terminal: the leaderboard, the live table, the header."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from tuning.results import SweepRecord

STATE_STYLES = {
    "finished": "green",
    "running": "cyan",
    "stopped": "yellow",
    "diverged": "red",
    "failed": "bold red",
    "waiting": "dim",
}
NUMERIC = {
    "place",
    "rank",
    "alpha",
    "learning_rate",
    "steps",
    "train_loss",
    "eval_loss",
    "tokens_per_second",
    "adapter_parameters",
}
HEADINGS = {
    "place": "#",
    "target_modules": "targets",
    "learning_rate": "lr",
    "tokens_per_second": "tok/s",
    "adapter_parameters": "params",
    "train_loss": "train",
    "eval_loss": "eval",
}


WIDE = 105
"""Columns of a terminal that all of the table's columns need."""
LEFT_OUT = {"adapter"}
LEFT_OUT_WHERE_NARROW = {"adapter", "train_loss", "tokens_per_second", "place"}


def trial_table(rows: Sequence[dict[str, Any]], width: int, title: str | None = None, *, winner: bool = True) -> Table:
    """A table of leaderboard rows (``results.leaderboard``) for a terminal of ``width`` columns; the first row stands
    out as the winner's.
    """
    left_out = LEFT_OUT if width >= WIDE else LEFT_OUT_WHERE_NARROW
    columns = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in left_out]
    table = Table(title=title, title_justify="left", header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(HEADINGS.get(column, column), justify="right" if column in NUMERIC else "left", no_wrap=True)
    for index, row in enumerate(rows):
        cells: list[Text] = []
        for column in columns:
            style = STATE_STYLES.get(str(row.get(column)), "") if column == "state" else ""
            cells.append(Text(format_value(column, row.get(column)), style=style))
        table.add_row(*cells, style="bold" if winner and index == 0 else None)
    return table


def format_value(column: str, value: Any) -> str:
    """A number as short as it can be read."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-" if value is None else str(value)
    if column in ("train_loss", "eval_loss"):
        return f"{value:.4f}"
    if column == "tokens_per_second":
        return f"{value:,.0f}"
    if column == "adapter_parameters":
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "+".join(value) if isinstance(value, list) else str(value)


def header_lines(record: SweepRecord) -> Iterable[str]:
    """What was measured of the base and the data, and how many trials share a base."""
    base, data, room = record.base, record.data, record.room
    if base:
        yield (
            f"base   {base['parameters']:,.0f} parameters, {base['quantised_parameters']:,.0f} of them in NF4 at "
            f"{base['bits_per_parameter']:.3f} bits each; {base['memory_mib']:,.1f} MiB"
        )
    if data:
        cut = f"; {data['cut_rows']:,} cut at max_length (longest {data['longest']:,})" if data["cut_rows"] else ""
        dropped = f"; {data['dropped_rows']:,} dropped, with nothing to learn" if data["dropped_rows"] else ""
        yield (
            f"data   {data['train_rows']:,} rows to train on ({data['train_tokens']:,} tokens), "
            f"{data['eval_rows']:,} to evaluate{cut}{dropped}"
        )
    if room:
        line = f"slots  {room.slots} on each base"
        if room.needed_gib is not None:
            line += f", by estimate {room.needed_gib:.3g} of the {room.usable_gib:.3g} GiB that a {room.place} has"
        yield line
