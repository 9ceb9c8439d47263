"""The command ``cluster start``: a Ray whose dashboard compares trials."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.cli import SetOption
from cluster.errors import MachineError
from cluster.options import JsonOption, QuietOption
from cluster.schema import default_spec, load_spec
from cluster.spec import ClusterSpec

DEFAULT_PORT = 6379


def register_under_cluster(app: typer.Typer) -> None:
    """Add the command to the group ``cluster`` of ``app``."""
    groups: dict[str | None, Any] = {group.name: group.typer_instance for group in app.registered_groups}
    groups["cluster"].command("start")(start)


def start(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="A cluster's YAML file without address (default: none).")
    ] = None,
    overrides: SetOption = None,
    port: Annotated[int, typer.Option("--port", min=1024, max=65535, help="Port to join it at.")] = DEFAULT_PORT,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Start a Ray on this machine, for sweeps and other machines to join, until Ctrl-C.

    Its dashboard's tab Metrics compares the trials of the sweeps that join, the newest twenty whose folders this
    machine sees, unless RAY_GRAFANA_HOST names a Grafana, or is DISABLED, by which Ray hides the tab.

    Exit codes: 0 ended by Ctrl-C, SIGTERM or SIGHUP, 2 bad input, 3 no such file, 5 a port is taken, or Ray does not
    start or ends by itself.

    Raises:
        MachineError: Ray ended by itself.
    """
    spec = load_spec(config, ClusterSpec, overrides or ()) if config else default_spec(ClusterSpec, overrides or ())
    from cluster.connect import asks_for_token
    from cluster.head import head_spec, started_head
    from cluster.signals import handle_hangup
    from tuning.compare.tab import Tab, metrics_tab

    handle_hangup()
    spec = head_spec(spec, port)
    dashboard = f"127.0.0.1:{spec.dashboard_port}"
    environment = {**os.environ, **spec.env}
    opened = metrics_tab(None, dashboard, environment) if spec.dashboard else contextlib.nullcontext(Tab())
    with contextlib.suppress(KeyboardInterrupt), opened as tab, started_head(spec, port, tab.variables) as head:
        if as_json:
            typer.echo(json.dumps({"address": head.address, "dashboard": head.dashboard}))
        else:
            asks = asks_for_token(spec.env)
            for line in [head.address] if quiet else _told(head.address, head.dashboard, tab.told(), asks=asks):
                typer.echo(line)
        sys.stdout.flush()
        head.process.wait()
        raise MachineError("Ray has ended by itself")


def _told(address: str, dashboard: str | None, ours: str, *, asks: bool) -> list[str]:
    how = "   (with this token in ~/.ray/auth_token, RAY_AUTH_MODE=token)" if asks else ""
    lines = [
        f"Ray runs at {address}",
        f"sweep here       loraloom sweep CONFIG --set cluster.address={address}",
        f"other machines   ray start --address={address}{how}",
    ]
    if dashboard is not None:
        lines.append(f"dashboard        http://{dashboard}{ours}")
    open_to_all = "none: RAY_AUTH_MODE has it so, and whoever reaches that port may run anything here"
    return [*lines, f"token            {'ray get-auth-token' if asks else open_to_all}", "Ctrl-C ends it."]
