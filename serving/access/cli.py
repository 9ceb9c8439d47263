"""The command ``keys``: makes, lists, revokes and checks API keys."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.errors import ABSENT, ConflictError, Fault, InputError, NotFoundError
from cluster.options import JsonOption
from cluster.schema import load_spec, parse_spec
from serving.access.key_file import KeyEntry, KeyFile, change_keys, key_digest, new_key

FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="The file of hashed keys, YAML or JSON.")]
IdArgument = Annotated[str, typer.Argument(metavar="ID", help="Whose key it is; shown in metrics and logs.")]


def register(app: typer.Typer) -> None:
    """Add the command group to ``app``."""
    group = typer.Typer(no_args_is_help=True, help="API keys of a server (http.api_keys).")
    group.command("add")(add)
    group.command("list")(list_keys)
    group.command("revoke")(revoke)
    group.command("check")(check)
    app.add_typer(group, name="keys")


def add(
    file: FileArgument,
    name: IdArgument,
    adapters: Annotated[
        list[str] | None, typer.Option("--adapter", metavar="NAME", help="An adapter, or sales-*; repeatable.")
    ] = None,
    base: Annotated[bool, typer.Option("--base/--no-base", help="May ask the plain base.")] = True,
    admin: Annotated[bool, typer.Option("--admin", help="May load and unload adapters, and read /metrics.")] = False,
    requests_per_minute: Annotated[int | None, typer.Option(help="Requests a minute.")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(help="Tokens of prompts and answers a minute.")] = None,
    max_concurrent: Annotated[int | None, typer.Option(help="Requests at a time.")] = None,
    weight: Annotated[float, typer.Option(help="Share of a busy engine, against other keys' weights.")] = 1.0,
    days: Annotated[int | None, typer.Option(help="Expires after so many days.")] = None,
    note: Annotated[str, typer.Option(help="For people.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Make a key, write its hash to the file, and print the key: this once, for it is kept nowhere.

    A running server takes it within about a second.

    Exit codes: 0 made, 2 bad input, 4 there is a key of this id, 5 the file cannot be written.
    """
    now, key = datetime.now(UTC).replace(microsecond=0), new_key()
    if days is not None and not 1 <= days <= 36_500:
        raise InputError([Fault("--days", "must be from 1 to 36500", days)])
    document = {
        "sha256": key_digest(key),
        "scopes": {"adapters": adapters or [], "base": base, "admin": admin},
        "limits": {
            "requests_per_minute": requests_per_minute,
            "tokens_per_minute": tokens_per_minute,
            "max_concurrent": max_concurrent,
            "weight": weight,
        },
        "created_at": now.isoformat(),
        "expires_at": None if days is None else (now + timedelta(days=days)).isoformat(),
        "note": note,
    }
    entry = parse_spec({"keys": {name: document}}, KeyFile, "keys add").keys[name]

    def added(keys: KeyFile) -> KeyFile:
        if name in keys.keys:
            raise ConflictError(f"{file} has a key {name}; revoke it, or choose another id")
        return KeyFile(keys={**keys.keys, name: entry})

    change_keys(file, added, create=True)
    if as_json:
        typer.echo(json.dumps({"id": name, "key": key, "file": str(file)}))
        return
    typer.echo(key)
    typer.echo(f"{name} is in {file}; the key above is shown this once", err=True)


def list_keys(file: FileArgument, as_json: JsonOption = False) -> None:
    """List the keys: what each may do, how much, and whether it counts.

    Exit codes: 0 listed, 2 the file is at fault, 3 there is none.
    """
    keys, now = load_spec(file, KeyFile).keys, datetime.now(UTC)
    if as_json:
        typer.echo(json.dumps([_described(name, entry, now) for name, entry in keys.items()]))
        return
    table = Table(header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("key", "state", "may ask", "limits", "note"):
        table.add_column(heading)
    for name, entry in keys.items():
        table.add_row(name, _state(entry, now), escape(_scopes(entry)), _limits(entry), escape(entry.note))
    Console().print(table)


def revoke(file: FileArgument, name: IdArgument) -> None:
    """Refuse a key from now on; a running server does so within about a second. Its id stays taken.

    Exit codes: 0 revoked, 2 the file is at fault, 3 there is no such file or key, 5 the file cannot be written.
    """

    def revoked(keys: KeyFile) -> KeyFile:
        entry = keys.keys.get(name)
        if entry is None:
            raise NotFoundError(f"{file} has no key {name} (it has: {', '.join(keys.keys) or 'none'})")
        if entry.revoked_at is not None:
            return keys
        moment = datetime.now(UTC).replace(microsecond=0)
        return KeyFile(keys={**keys.keys, name: entry.model_copy(update={"revoked_at": moment})})

    if not file.exists():
        raise NotFoundError(f"{file}: no such file")
    change_keys(file, revoked)
    typer.echo(f"{name} is revoked")


def check(
    file: FileArgument,
    stdin: Annotated[bool, typer.Option("--stdin", help="Also read a key from standard input, and say whose.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Check the file, and with --stdin a key: never as an argument, which other users of the machine can read.

    Exit codes: 0 all is well, 2 the file is at fault, 3 there is no such file or key, 4 the key is revoked or expired.
    """
    keys, now = load_spec(file, KeyFile).keys, datetime.now(UTC)
    if not stdin:
        counting = sum(_state(entry, now) == "valid" for entry in keys.values())
        typer.echo(
            json.dumps({"keys": len(keys), "valid": counting}) if as_json else f"{len(keys)} keys, {counting} valid"
        )
        return
    key = sys.stdin.readline().strip()
    if not key:
        raise InputError([Fault("standard input", "must be one line with a key", ABSENT)])
    digest = key_digest(key)
    name = next((name for name, entry in keys.items() if entry.sha256 == digest), None)
    if name is None:
        raise NotFoundError(f"{file} does not know this key")
    about = _described(name, keys[name], now)
    typer.echo(json.dumps(about) if as_json else f"{name}: {about['state']}, may ask {_scopes(keys[name])}")
    if about["state"] != "valid":
        raise ConflictError(f"the key {name} is {about['state']}")


def _described(name: str, entry: KeyEntry, now: datetime) -> dict[str, Any]:
    return {"id": name, "state": _state(entry, now), **entry.model_dump(mode="json", exclude={"sha256"})}


def _state(entry: KeyEntry, now: datetime) -> str:
    if entry.revoked_at is not None:
        return "revoked"
    return "expired" if entry.expires_at is not None and entry.expires_at <= now else "valid"


def _scopes(entry: KeyEntry) -> str:
    scopes = entry.scopes
    return ", ".join([*(["the base"] if scopes.base else []), *scopes.adapters, *(["(admin)"] if scopes.admin else [])])


def _limits(entry: KeyEntry) -> str:
    limits = entry.limits
    shown = [
        f"{amount:g} {unit}"
        for amount, unit in (
            (limits.requests_per_minute, "requests/min"),
            (limits.tokens_per_minute, "tokens/min"),
            (limits.max_concurrent, "at a time"),
        )
        if amount is not None
    ]
    return ", ".join([*shown, *([f"weight {limits.weight:g}"] if limits.weight != 1 else [])])
