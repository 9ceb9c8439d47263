"""Options that many commands have, said once."""

from __future__ import annotations

from typing import Annotated, Any

import typer

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON value as the last line of standard output.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print the result only, no progress.")]


def set_option(example: str) -> Any:
    """``--set FIELD=VALUE`` of a command that reads a file."""
    return typer.Option("--set", metavar="FIELD=VALUE", help=f"Override a field, such as {example}; repeatable.")
