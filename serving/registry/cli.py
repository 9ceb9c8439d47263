"""The commands ``adapters …``: what is in the registry, and what its aliases point to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from cluster.errors import ConflictError, Fault, InputError, NotFoundError
from cluster.options import JsonOption

if TYPE_CHECKING:
    from serving.registry import Registry
    from serving.registry.events import Event

DEFAULT_REGISTRY = "runs/registry"

IdsOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print ids only, one a line.")]
RegistryOption = Annotated[
    str, typer.Option("--registry", metavar="DIR|URI", help="Folder of the registry, or s3://bucket/prefix?region=…")
]
AliasOption = Annotated[str, typer.Option("--alias", metavar="NAME", help="The alias; a bare name follows prod.")]
ByOption = Annotated[str | None, typer.Option("--by", metavar="WHO", help="Who does it (default: user@host).")]
NoteOption = Annotated[str | None, typer.Option("--note", metavar="TEXT", help="Why; it is kept in the history.")]
Reference = Annotated[str, typer.Argument(metavar="REF", help="support, support@2 or support@prod.")]


def register(app: typer.Typer) -> None:
    """Add the group ``adapters`` to ``app``."""
    group = typer.Typer(no_args_is_help=True, help="What is in the registry.")
    group.command("list")(list_adapters)
    group.command("show")(show_adapter)
    group.command("promote")(promote_adapter)
    group.command("rollback")(roll_adapter_back)
    group.command("remove")(remove_adapter)
    group.command("verify")(verify_adapters)
    group.command("pull")(pull_adapter)
    app.add_typer(group, name="adapters")


def list_adapters(
    registry: RegistryOption = DEFAULT_REGISTRY, as_json: JsonOption = False, quiet: IdsOption = False
) -> None:
    """List every version of every adapter, with the aliases that point to it and its scores.

    Raises:
        NotFoundError: there is no registry.
    """
    from serving.registry.view import described, table

    shelf = _open(registry)
    versions = [(name, version) for name in shelf.names() for version in shelf.versions(name)]
    if as_json:
        typer.echo(json.dumps([described(shelf, name, version) for name, version in versions]))
    elif quiet:
        for name, version in versions:
            typer.echo(f"{name}@{version}")
    elif not versions:
        Console().print(f"{escape(shelf.where)} is empty; `loraloom publish` puts an adapter there")
    else:
        Console().print(table(shelf, versions))
    for reason in shelf.damage:
        Console(stderr=True).print(f"[yellow]warning:[/] {escape(reason)}", soft_wrap=True)


def show_adapter(
    reference: Reference,
    registry: RegistryOption = DEFAULT_REGISTRY,
    verify: Annotated[bool, typer.Option("--verify", help="Also compare every file with its SHA-256.")] = False,
    as_json: JsonOption = False,
    quiet: IdsOption = False,
) -> None:
    """Show one version of an adapter: what it is, where it comes from, its files, and the history of its name.

    Raises:
        NotFoundError: there is no such registry or adapter.
        CorruptAdapterError: a file is not what was published.
    """
    from serving.registry.view import described, history_lines, sheet

    shelf = _open(registry)
    manifest = shelf.resolve_one(reference)
    about = described(shelf, manifest.name, manifest.version)
    about |= {"path": shelf.location(manifest), "versions": shelf.versions(manifest.name)}
    if verify:
        shelf.verify(manifest)
        about["verified"] = True
    if as_json:
        history = [
            event.model_dump(mode="json", exclude={"manifest", "manifests"}) for event in shelf.history(manifest.name)
        ]
        typer.echo(json.dumps(about | {"history": history}))
    elif quiet:
        typer.echo(manifest.id)
    else:
        Console().print(sheet(about))
        Console().print(f"\nhistory of {manifest.name}:")
        for line in history_lines(shelf.history(manifest.name)):
            Console().print(f"  {escape(line)}", soft_wrap=True, highlight=False)


def promote_adapter(
    reference: Reference,
    alias: AliasOption = "prod",
    split: Annotated[
        list[str] | None,
        typer.Option("--split", metavar="VERSION=SHARE", help="Give this share of requests to another version."),
    ] = None,
    expect: Annotated[
        str | None,
        typer.Option(
            "--expect", metavar="VERSION", help="Refuse if the alias points elsewhere now; `none` for nowhere."
        ),
    ] = None,
    registry: RegistryOption = DEFAULT_REGISTRY,
    by: ByOption = None,
    note: NoteOption = None,
    as_json: JsonOption = False,
    quiet: IdsOption = False,
) -> None:
    """Point an alias to a version: running servers follow within a second, and no request is lost.

    `promote support@7` moves support@prod; `--split 8=0.1` gives version 8 a tenth of the requests, and 7 the others.

    Exit codes: 0 done, 2 bad input, 3 no such version, 4 the alias is not where --expect says, 5 the registry cannot
    be reached or written.
    """
    from serving.registry import UNSET

    faults: list[Fault] = []
    shares = dict(_shares(split or [], faults))
    if expect is not None and expect != "none" and not _is_version(expect):
        faults.append(Fault("--expect", "must be a version, or none", expect))
    if "@" not in reference:
        faults.append(Fault("REF", f"must say which version: {reference}@2, or {reference}@latest", reference))
    if faults:
        raise InputError(faults)
    shelf = _open(registry)
    manifest = shelf.resolve_one(reference)
    if manifest.version in shares:
        rule = f"must name another version than {manifest.id}, which has what the others leave"
        raise InputError([Fault("--split", rule, manifest.version)])
    target = {manifest.version: 1 - sum(shares.values()), **shares}
    wanted = UNSET if expect is None else None if expect == "none" else int(expect)
    _tell(shelf.move(manifest.name, alias, target, by=by, note=note, expect=wanted), as_json=as_json, quiet=quiet)


def roll_adapter_back(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The adapter, such as support.")],
    alias: AliasOption = "prod",
    registry: RegistryOption = DEFAULT_REGISTRY,
    by: ByOption = None,
    note: NoteOption = None,
    as_json: JsonOption = False,
    quiet: IdsOption = False,
) -> None:
    """Point an alias to what it pointed to before its last move; done again, it goes back further.

    Exit codes: 0 done, 2 bad input, 3 no such adapter or alias, 4 there is nothing to go back to, 5 the registry
    cannot be reached or written.
    """
    _tell(_open(registry).rollback(name, alias, by=by, note=note), as_json=as_json, quiet=quiet)


def remove_adapter(
    reference: Annotated[str, typer.Argument(metavar="REF", help="A version (support@2), or an alias to take away.")],
    force: Annotated[bool, typer.Option("--force", help="Even if aliases point to it: they go with it.")] = False,
    registry: RegistryOption = DEFAULT_REGISTRY,
    by: ByOption = None,
    note: NoteOption = None,
    as_json: JsonOption = False,
    quiet: IdsOption = False,
) -> None:
    """Remove a version that no alias points to. Its number is not given again; its files go after a day.

    Exit codes: 0 done, 2 bad input, 3 no such version, 4 an alias points to it, 5 the registry cannot be reached or
    written.
    """
    _tell(_open(registry).remove(reference, force=force, by=by, note=note), as_json=as_json, quiet=quiet)


def verify_adapters(
    references: Annotated[list[str] | None, typer.Argument(metavar="[REF]...", help="Default: every version.")] = None,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
    quiet: IdsOption = False,
) -> None:
    """Compare every file of the versions with its SHA-256, and sweep away what crashes left more than a day ago.

    With --quiet, the ids of corrupt versions are printed.

    Exit codes: 0 all are whole, 1 some are corrupt, 3 no such registry or version, 5 the registry cannot be reached.
    """
    from serving.registry import CorruptAdapterError

    shelf = _open(registry)
    ids = [f"{name}@{version}" for name in shelf.names() for version in shelf.versions(name)]
    manifests = [shelf.resolve_one(reference) for reference in references or ids]
    corrupt: dict[str, str] = {}
    for manifest in manifests:
        try:
            shelf.verify(manifest)
        except CorruptAdapterError as error:
            corrupt[manifest.id] = str(error)
    swept = shelf.sweep()
    if as_json:
        verified = [manifest.id for manifest in manifests if manifest.id not in corrupt]
        typer.echo(json.dumps({"verified": verified, "corrupt": corrupt, "damage": shelf.damage, "swept": swept}))
    elif quiet:
        for one in corrupt:
            typer.echo(one)
    else:
        typer.echo(
            f"{len(manifests) - len(corrupt)} of {len(manifests)} versions are whole; swept {len(swept)} folders"
        )
    for reason in [*corrupt.values(), *shelf.damage]:
        Console(stderr=True).print(f"[red]error:[/] {escape(reason)}", soft_wrap=True)
    if corrupt or shelf.damage:
        raise typer.Exit(1)


def pull_adapter(
    reference: Reference,
    folder: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="Where to; empty or not there (default: ./NAME@VERSION).")
    ] = None,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
    quiet: IdsOption = False,
) -> None:
    """Copy a version's files, checked by their hashes, into a folder: a LoRA in PEFT's format.

    Exit codes: 0 done, 1 a file is corrupt, 3 no such version, 4 the folder holds something, 5 the registry cannot be
    reached, or the folder cannot be written.
    """
    from cluster.storage import disk_trouble
    from serving.scratch import Scratch

    shelf = _open(registry)
    manifest = shelf.resolve_one(reference)
    target = (folder or Path(manifest.id)).absolute()
    with disk_trouble("the folder", target):
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ConflictError(f"{target}: already holds something; choose another folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Scratch(target.parent, ".pull-")
        try:
            shelf.fetch(manifest, scratch.path)
            scratch.path.chmod(0o755)
            scratch.path.rename(target)
            scratch.keep()
        finally:
            scratch.close()
    if as_json:
        typer.echo(json.dumps({"id": manifest.id, "path": str(target)}))
    else:
        typer.echo(manifest.id if quiet else f"{manifest.id} -> {target}")


def _open(reference: str) -> Registry:
    from serving.registry import Registry

    registry = Registry(reference)
    if not registry.exists():
        raise NotFoundError(f"{reference}: no registry is here; `loraloom publish` makes one, --registry names another")
    return registry


def _tell(event: Event, *, as_json: bool, quiet: bool) -> None:
    """What was done."""
    from serving.registry.view import history_lines

    if as_json:
        typer.echo(event.model_dump_json())
    elif quiet:
        typer.echo(str(event.seq))
    else:
        typer.echo(next(history_lines([event])))


def _shares(texts: list[str], faults: list[Fault]) -> Iterator[tuple[int, float]]:
    """Version and share of each ``--split``."""
    total = 0.0
    for text in texts:
        version, _, share = text.partition("=")
        try:
            number = float(share)
        except ValueError:
            number = 0.0
        if not _is_version(version) or not 0 < number < 1:
            faults.append(Fault("--split", "must look like 8=0.1: a version, and a share between 0 and 1", text))
            continue
        total += number
        yield int(version), number
    if total >= 1:
        faults.append(Fault("--split", "the shares must leave something to the version that is promoted", texts))


def _is_version(text: str) -> bool:
    return text.isascii() and text.isdigit() and 0 < len(text) < 10 and int(text) > 0
