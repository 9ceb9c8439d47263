"""The commands ``compare`` and ``dashboard``."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from cluster.errors import ABSENT, Fault, InputError, MachineError
from cluster.options import JsonOption, QuietOption
from tuning.outcome import show_sweep
from tuning.results import read_sweep

DEFAULT_PORT = 8270
DEFAULT_FOLDER = "runs/sweeps"
_SHELVES = "A sweep's folder, or a folder of them, here or in an object store (s3://bucket/prefix)"


def register(app: typer.Typer) -> None:
    """Add these commands to ``app``."""
    app.command("compare")(compare)
    app.command("dashboard")(dashboard)


def compare(
    folders: Annotated[
        list[str], typer.Argument(metavar="DIR...", help=f"{_SHELVES}; without --html one sweep's folder here.")
    ],
    html: Annotated[
        Path | None,
        typer.Option(
            "--html",
            metavar="FILE",
            help="Write the comparison page with everything that it needs into this one file, which any browser shows.",
        ),
    ] = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show a sweep's leaderboard again, finished or not; or write the comparison of sweeps as a page.

    Of several sweeps those that can be read are written, and what is wrong with the others is told. Exit codes: 0
    shown, 2 bad input, 3 no such sweep, 5 the file cannot be written; where no sweep can be read, that of its error.
    """
    if html is None:
        if len(folders) > 1:
            raise InputError([Fault("--html", "is required to compare several sweeps", ABSENT)])
        show_sweep(read_sweep(folders[0]), as_json=as_json, quiet=quiet)
        return
    from cluster.storage import disk_trouble
    from tuning.compare.reader import Comparer
    from tuning.compare.server import self_contained
    from tuning.compare.source import open_shelf
    from tuning.keep import write_text

    if html.is_dir():
        raise InputError([Fault("--html", "must be a file, but is a folder", str(html))])
    with disk_trouble("--html", html), tempfile.TemporaryFile(dir=html.parent):
        pass  # before sweeps are read, which takes its time
    shelves = [open_shelf(folder) for folder in folders]
    comparer = Comparer(shelves, live=False)
    try:
        document = comparer.document(wait=True)
    finally:
        comparer.close()
        for shelf in shelves:
            shelf.close()
    if not document.sweeps:
        first, *others = comparer.troubles
        for trouble in others:
            typer.echo(f"error: {trouble}", err=True)
        raise first
    for trouble in document.troubles:
        typer.echo(f"note: {trouble}", err=True)
    for text in document.left_out:
        typer.echo(f"note: {text}", err=True)
    with disk_trouble("--html", html):
        write_text(html, self_contained(document))
    if as_json:
        trials = sum(len(sweep.trials or ()) for sweep in document.sweeps)
        typer.echo(json.dumps({"file": str(html), "sweeps": len(document.sweeps), "trials": trials}))
    else:
        typer.echo(html)


def dashboard(
    folders: Annotated[
        list[str] | None, typer.Argument(metavar="[DIR]...", help=f"{_SHELVES} (default: {DEFAULT_FOLDER}).")
    ] = None,
    host: Annotated[
        str,
        typer.Option(
            "--host",
            help="Address to listen on. Loopback's page is open to all users of this machine; others have a secret.",
        ),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 for any free one.")] = DEFAULT_PORT,
    is_opened: Annotated[
        bool, typer.Option("--open/--no-open", help="Open the page in the browser, where there is a terminal.")
    ] = True,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compare trials and sweeps on a page, until Ctrl-C; it follows sweeps that run. Needs no Ray.

    Exit codes: 0 ended by Ctrl-C or SIGTERM, 2 bad input, 3 no such folder, 5 the port is taken.

    Raises:
        MachineError: the address cannot be had.
    """
    from tuning.compare.reader import Comparer
    from tuning.compare.server import FRESH_S, LOOPBACK, make_app, serve
    from tuning.compare.source import open_shelf
    from tuning.compare.tab import new_secret

    shelves = [open_shelf(folder) for folder in folders or [DEFAULT_FOLDER]]
    is_private = host in LOOPBACK
    secret = "" if is_private else new_secret()

    def started(actual: int) -> None:
        shown = f"[{host}]" if ":" in host else host
        url = f"http://{shown}:{actual}/{secret}{'/' if secret else ''}"
        if as_json:
            typer.echo(json.dumps({"url": url}))
        else:
            places = ", ".join(shelf.place for shelf in shelves)
            typer.echo(url if quiet else f"comparing {places} at {url}\nCtrl-C ends it.")
        sys.stdout.flush()
        if is_opened and sys.stdout.isatty():
            typer.launch(url)

    comparer = Comparer(shelves, fresh_s=FRESH_S)
    try:
        app = make_app(comparer.document, secret=secret, hosts=LOOPBACK if is_private else None)
        serve(app, host, port, started)
    except OSError as error:
        raise MachineError(
            f"cannot listen on {host}:{port} ({error.strerror or error}); choose another --port"
        ) from None
    finally:
        comparer.close()
        for shelf in shelves:
            shelf.close()
