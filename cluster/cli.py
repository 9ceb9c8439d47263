"""The commands ``doctor``, ``metrics`` and ``cluster check``.

``cluster start`` is in ``tuning``: its dashboard shows trials.
"""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from cluster.errors import LoraloomError, MachineError
from cluster.options import JsonOption, QuietOption, set_option
from cluster.schema import load_spec, to_yaml
from cluster.spec import ClusterSpec

if TYPE_CHECKING:
    from cluster.checks import Check

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}

SetOption = Annotated[list[str] | None, set_option("num_cpus=4")]


def register(app: typer.Typer) -> None:
    """Add this package's commands to ``app``."""
    app.command()(doctor)
    app.command()(metrics)
    group = typer.Typer(no_args_is_help=True, help="Where work runs: this machine, or a Ray that is running.")
    group.callback()(_group)
    group.command()(check)
    app.add_typer(group, name="cluster")


def doctor(
    online: Annotated[bool, typer.Option("--online", help="Also ask whether the Hugging Face hub answers.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Say what this machine has, what is missing, and how to mend it (some 20 seconds).

    Exit codes: 0 nothing failed, 5 something did.

    Raises:
        MachineError: a check failed.
    """
    from cluster.doctor import examine

    with Console(stderr=True).status("asking the libraries, each in a process of its own", spinner="dots") as status:
        if quiet or as_json:
            status.stop()
        checks = examine(online=online)
    failed = [item.name for item in checks if item.status == "fail"]
    if as_json:
        typer.echo(json.dumps({"ok": not failed, "checks": [asdict(item) for item in checks]}))
    else:
        _show([item for item in checks if not quiet or item.status != "ok"])
    if failed:
        raise MachineError(f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}")


def metrics(
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port of Prometheus, on loopback.")] = 9090,
    folder: Annotated[Path, typer.Option("--dir", help="Where it keeps its figures, also for the next time.")] = Path(
        "runs/metrics"
    ),
    grafana: Annotated[
        Path | None,
        typer.Option(
            "--grafana", metavar="FILE", help="Only write a dashboard of trials and hosts for a Grafana of yours."
        ),
    ] = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Start a Prometheus that reads every Ray that you run on this machine, sweeps' and servers', until Ctrl-C.

    Exit codes: 0 written, or ended by Ctrl-C, SIGTERM or SIGHUP; 5 Prometheus is not installed or does not start, or a
    file cannot be written.
    """
    from cluster.prometheus import GRAFANA, started_prometheus
    from cluster.signals import handle_hangup
    from cluster.storage import disk_trouble

    if grafana is not None:
        with disk_trouble("--grafana", grafana):
            grafana.write_text(GRAFANA.read_text(encoding="utf-8"), encoding="utf-8")
        typer.echo(json.dumps({"file": str(grafana)}) if as_json else str(grafana))
        return

    def told(count: int) -> None:
        if not quiet and not as_json:
            typer.echo(f"{count} targets")

    handle_hangup()
    with contextlib.suppress(KeyboardInterrupt), started_prometheus(folder, port) as server:
        if as_json:
            typer.echo(json.dumps({"url": server.url}))
        else:
            typer.echo(server.url if quiet else f"Prometheus at {server.url}, figures in {folder}; Ctrl-C ends it")
        sys.stdout.flush()
        server.watch(told)


def check(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="Such as configs/cluster/local.yaml.")],
    overrides: SetOption = None,
    connect: Annotated[
        bool, typer.Option("--connect", help="Also start or join that Ray, and run one task on each of its nodes.")
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Check a cluster's configuration file, and print it with all its defaults.

    Exit codes: 0 all is well, 1 a node does not run our code, 2 bad input, 3 no such file, 5 no Ray there.
    """
    spec = load_spec(config, ClusterSpec, overrides or ())
    nodes: list[dict[str, object]] = []
    if connect:
        from cluster.connect import connect as connected
        from cluster.nodes import check_nodes

        with connected(spec, job_name="cluster check"):
            nodes = check_nodes()
    if as_json:
        typer.echo(json.dumps({"spec": spec.model_dump(mode="json"), "nodes": nodes}))
    elif not quiet:
        typer.echo(to_yaml(spec), nl=False)
        for node in nodes:
            typer.echo("node " + ", ".join(f"{key} {value}" for key, value in node.items()))
    troubled = [node for node in nodes if node["trouble"]]
    if troubled:
        raise LoraloomError("; ".join(f"{node['address']}: {node['trouble']}" for node in troubled))


def _group() -> None:
    """Keep ``cluster`` a group although it has one command here."""


def _show(checks: list[Check]) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    for item in checks:
        mark = f"[{_COLOURS[item.status]}]{item.status:>4}[/]"
        table.add_row(mark, item.name, _escaped(item.found))
        if item.meaning:
            table.add_row("", "", f"[dim]{_escaped(item.meaning)}[/]")
        if item.mend:
            table.add_row("", "", f"mend: [bold]{_escaped(item.mend)}[/]")
    if checks:
        Console().print(table)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
