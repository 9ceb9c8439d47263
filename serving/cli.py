"""The commands ``serve``, ``adapters`` and ``evaluate``."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.fields import spec_command
from cluster.schema import load_spec
from serving.evaluate_cli import evaluate
from serving.spec import ServeSpec

if TYPE_CHECKING:
    from serving.app import Server, Shelf
    from serving.manifest import Manifest
    from serving.registry import Registry

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON value as the last line of standard output.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print the result only, no progress.")]
IdsOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print ids only, one a line.")]
RegistryOption = Annotated[Path, typer.Option("--registry", metavar="DIR", help="Folder of the registry.")]
DEFAULT_REGISTRY = Path("runs/registry")


def register(app: typer.Typer) -> None:
    """Add this package's commands to ``app``."""
    app.command(cls=spec_command("serving.spec", "ServeSpec"))(serve)
    app.command()(evaluate)
    group = typer.Typer(no_args_is_help=True, help="What is in the registry.")
    group.command("list")(list_adapters)
    group.command("show")(show_adapter)
    app.add_typer(group, name="adapters")


def serve(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="Such as configs/serve/demo.yaml.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Override a field, such as http.port=0; repeatable."),
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Serve a base and all adapters of a registry over HTTP (OpenAI's API), until Ctrl-C.

    Everything that can be checked is checked before Ray starts. With --json, one line is printed once the server
    answers: {"url", "base", "adapters", "unfit", "start_s"}. An engine that dies is started again; if it does not come
    back within 60 s, or twice the time that its start took, the command ends.

    Exit codes: 0 stopped by Ctrl-C or SIGTERM, 1 did not start or has ended by itself, 2 bad input, 3 no such file or
    registry, 4 the port is taken, 5 the machine lacks something.
    """
    from cluster.connect import connect
    from serving.app import prepare, serving
    from serving.watch import patience_s, watch

    spec = load_spec(config, ServeSpec, overrides or ())
    errors = Console(stderr=True, highlight=False)
    progress = (lambda _: None) if quiet or as_json else (lambda line: errors.print(escape(line), style="dim"))
    tell = (lambda _: None) if quiet else (lambda line: errors.print(f"[yellow]{escape(line)}[/]", soft_wrap=True))
    progress(f"checking {config}")
    shelf = prepare(spec)
    if not as_json:
        for reason in shelf.unfit.values():
            errors.print(f"[yellow]not served:[/] {escape(reason)}", soft_wrap=True)
    with (
        connect(spec.cluster, job_name=f"serve {spec.base.served_name}"),
        serving(spec, shelf, progress) as server,
    ):
        _announce(shelf, server, as_json=as_json)
        with contextlib.suppress(KeyboardInterrupt):
            watch(tell, patience_s(server.start_s))


def list_adapters(
    registry: RegistryOption = DEFAULT_REGISTRY, as_json: JsonOption = False, quiet: IdsOption = False
) -> None:
    """List every version of every adapter.

    Raises:
        NotFoundError: there is no registry.
    """
    manifests, corrupt = _read(_open(registry))
    if as_json:
        typer.echo(json.dumps([_described(manifest) for manifest in manifests]))
    elif quiet:
        for manifest in manifests:
            typer.echo(manifest.id)
    elif not manifests:
        Console().print(f"{escape(str(registry))} is empty; `loraloom publish` puts an adapter there")
    else:
        Console().print(_table(manifests))
    for reason in corrupt:
        Console(stderr=True).print(f"[yellow]warning:[/] {escape(reason)}", soft_wrap=True)


def show_adapter(
    reference: Annotated[str, typer.Argument(metavar="REF", help="support, support@2 or support@latest.")],
    registry: RegistryOption = DEFAULT_REGISTRY,
    verify: Annotated[bool, typer.Option("--verify", help="Also compare every file with its SHA-256.")] = False,
    as_json: JsonOption = False,
    quiet: IdsOption = False,
) -> None:
    """Show one version of an adapter: what it is, where it comes from, and its files.

    Raises:
        NotFoundError: there is no such registry or adapter.
        CorruptAdapterError: a file is not what was published.
    """
    shelf = _open(registry)
    manifest = shelf.resolve(reference)
    if verify:
        shelf.verify(manifest)
    about = _described(manifest) | {"path": str(shelf.path(manifest)), "versions": shelf.versions(manifest.name)}
    if verify:
        about["verified"] = True
    if as_json:
        typer.echo(json.dumps(about))
    elif quiet:
        typer.echo(manifest.id)
    else:
        Console().print(_sheet(about))


def _announce(shelf: Shelf, server: Server, *, as_json: bool) -> None:
    base = shelf.catalogue.base_name
    if as_json:
        answer = {"url": server.url, "base": base, "adapters": shelf.adapters, "unfit": shelf.unfit}
        typer.echo(json.dumps(answer | {"start_s": round(server.start_s, 1)}))
        return
    model = shelf.adapters[-1].partition("@")[0] if shelf.adapters else base
    request = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 32})
    typer.echo(f"serving {base} and {len(shelf.adapters)} adapters at {server.url} after {server.start_s:.0f} s\n")
    typer.echo(f"  curl {server.url}/chat/completions -H 'Content-Type: application/json' -d '{request}'\n")
    typer.echo("Ctrl-C ends it.")


def _open(folder: Path) -> Registry:
    from cluster.errors import NotFoundError
    from serving.registry import Registry

    if not folder.is_dir():
        raise NotFoundError(f"{folder}: no registry is here; `loraloom publish` makes one, --registry names another")
    return Registry(folder)


def _read(registry: Registry) -> tuple[list[Manifest], list[str]]:
    """All manifests, and what is wrong with the log."""
    manifests = [registry.manifest(name, version) for name in registry.names() for version in registry.versions(name)]
    return manifests, list(registry.damage)


def _described(manifest: Manifest) -> dict[str, Any]:
    return {"id": manifest.id, **manifest.model_dump(mode="json")}


def _table(manifests: list[Manifest]) -> Table:
    """What tells adapters apart, in 80 columns; `adapters show` has all of it."""
    table = Table(header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("adapter", "published", "base", "rank", "alpha", "targets", "params", "eval loss"):
        numeric = heading in {"rank", "alpha", "params", "eval loss"}
        table.add_column(heading, justify="right" if numeric else "left", no_wrap=heading != "base")
    for manifest in manifests:
        targets = manifest.lineage.get("target_modules") or ", ".join(manifest.target_modules)
        loss = manifest.metrics.get("eval_loss")
        table.add_row(
            escape(manifest.id),
            f"{manifest.created_at.astimezone():%m-%d %H:%M}",
            escape(manifest.base.model.rsplit("/", 1)[-1]),
            str(manifest.rank),
            f"{manifest.alpha:g}",
            escape(str(targets)),
            f"{manifest.parameters:,}",
            "" if loss is None else f"{loss:.4g}",
        )
    return table


def _sheet(about: dict[str, Any]) -> Table:
    """Fields and values, one a line; what lies deeper is indented by its name."""
    sheet = Table(box=None, show_header=False, pad_edge=False)
    for field, value in about.items():
        if not isinstance(value, dict):
            sheet.add_row(field, escape(_text(value)))
            continue
        for name, part in cast("dict[str, Any]", value).items():
            sheet.add_row(f"{field}.{name}", escape(_text(part)))
    return sheet


def _text(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(str(item) for item in cast("list[object]", value))
    return "" if value is None else str(value)
