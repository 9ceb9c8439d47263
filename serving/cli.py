"""The command ``serve``, and with it those of this package's other files."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from cluster.fields import spec_command
from cluster.options import JsonOption, QuietOption, set_option
from cluster.schema import load_spec
from serving.access import cli as keys_cli
from serving.evaluate.cli import evaluate
from serving.registry import cli as adapters_cli
from serving.spec import ServeSpec

if TYPE_CHECKING:
    from serving.app import Server, Shelf


def register(app: typer.Typer) -> None:
    """Add this package's commands to ``app``."""
    app.command(cls=spec_command("serving.spec", "ServeSpec"))(serve)
    adapters_cli.register(app)
    keys_cli.register(app)
    app.command()(evaluate)


def serve(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="Such as configs/serve/demo.yaml.")],
    overrides: Annotated[list[str] | None, set_option("http.port=0")] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Serve a base and all adapters of a registry over HTTP (OpenAI's API), until Ctrl-C.

    Everything that can be checked is checked before Ray starts. With --json, one line is printed once the server
    answers: {"url", "base", "adapters", "unfit", "start_s"}. An engine that dies is started again; if it does not come
    back within 60 s, or twice the time that its start took, the command ends. On SIGHUP the file is read and checked
    again, and the replicas are replaced one after another: with two or more of them, no request fails.

    Exit codes: 0 stopped by Ctrl-C or SIGTERM, 1 did not start or has ended by itself, 2 bad input, 3 no such file or
    registry, 4 the port is taken, 5 the machine lacks something.
    """
    spec = load_spec(config, ServeSpec, overrides or ())
    # After the file's faults: these import Ray.
    from cluster.connect import connect, environment
    from serving.app import RAY_VARIABLES, prepare, restart, serving
    from serving.reload import Reload, on_hangup
    from serving.watch import patience_s, rollout, watch

    errors = Console(stderr=True, highlight=False)
    progress = (lambda _: None) if quiet or as_json else (lambda line: errors.print(escape(line), style="dim"))
    tell = (lambda _: None) if quiet else (lambda line: errors.print(f"[yellow]{escape(line)}[/]", soft_wrap=True))
    progress(f"checking {config}")
    shelf = prepare(spec)
    if not as_json:
        for reason in shelf.unfit.values():
            errors.print(f"[yellow]not served:[/] {escape(reason)}", soft_wrap=True)
    with (
        environment(RAY_VARIABLES),
        connect(spec.cluster, job_name=f"serve {spec.base.served_name}", yields_to_others=False),
        serving(spec, shelf, progress) as server,
    ):
        _announce(shelf, server, as_json=as_json)
        reload = Reload(
            spec,
            read=lambda: load_spec(config, ServeSpec, overrides or ()),
            restart=lambda changed: restart(changed, prepare(changed, is_running=True), server),
            rollout=rollout,
            tell=tell,
        )

        def look_after() -> None:
            reload.look()
            server.keep()

        with contextlib.suppress(KeyboardInterrupt), on_hangup(reload):
            watch(tell, patience_s(server.start_s), each_time=look_after)


def _announce(shelf: Shelf, server: Server, *, as_json: bool) -> None:
    base = shelf.base.name
    if as_json:
        answer = {"url": server.url, "base": base, "adapters": shelf.adapters, "unfit": shelf.unfit}
        typer.echo(json.dumps(answer | {"start_s": round(server.start_s, 1)}))
        return
    model = shelf.adapters[-1].partition("@")[0] if shelf.adapters else base
    request = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 32})
    typer.echo(f"serving {base} and {len(shelf.adapters)} adapters at {server.url} after {server.start_s:.0f} s\n")
    typer.echo(f"  curl {server.url}/chat/completions -H 'Content-Type: application/json' -d '{request}'\n")
    typer.echo(f"  playground: {server.url.removesuffix('/v1')}/playground\n")
    typer.echo("Ctrl-C ends it.")
