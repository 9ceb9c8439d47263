"""The command `publish`, which is also `adapters publish`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.errors import Fault, InputError, NotFoundError
from cluster.options import JsonOption, QuietOption
from serving.registry.cli import DEFAULT_REGISTRY, ByOption, NoteOption, RegistryOption

if TYPE_CHECKING:
    from serving.manifest import Manifest
    from serving.registry import Registry


def publish(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="A sweep's folder, a PEFT adapter's, or a hub id: org/name or org/name@revision."
        ),
    ],
    name: Annotated[
        str, typer.Option("--name", help="The adapter's name in the registry, by which it is called over HTTP.")
    ],
    trial: Annotated[
        str | None, typer.Option("--trial", metavar="ID", help="A trial of a sweep (default: the winner).")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            metavar="DIR|HUB_ID",
            help="The base of an adapter that comes from no sweep (default: what its adapter_config.json names).",
        ),
    ] = None,
    max_rank: Annotated[
        int | None,
        typer.Option(
            "--max-rank",
            min=1,
            metavar="RANK",
            help="Refuse a higher rank; the server's engine.max_lora_rank (default: 512, the largest of vLLM).",
        ),
    ] = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Run Python code that comes with --base. Only if you have read it."),
    ] = False,
    registry: RegistryOption = DEFAULT_REGISTRY,
    by: ByOption = None,
    note: NoteOption = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Publish a sweep's winner, or another trial, or any LoRA in PEFT's format, as the next version of an adapter.

    Everything is checked before anything is written: weights that are no safetensors or not finite, that do not fit the
    base or change nothing, a rank that is too high, and what vLLM does not serve (DoRA, modules_to_save, ...).

    Exit codes: 0 published, 2 the adapter was refused, 3 no such sweep, trial, folder or hub id, 5 the hub does not
    answer, or the registry cannot be written.
    """
    from serving.registry import Registry

    shelf = Registry(registry)
    manifest = _publish(
        source,
        shelf,
        name,
        trial,
        base=base,
        max_rank=max_rank,
        trust_remote_code=trust_remote_code,
        by=by,
        note=note,
    )
    if as_json:
        typer.echo(manifest.model_dump_json())
    elif quiet:
        typer.echo(manifest.id)
    else:
        origin = f"trial {manifest.lineage['trial']}" if "trial" in manifest.lineage else f"from {source}"
        typer.echo(f"published {manifest.id} ({origin}, rank {manifest.rank}) to {shelf.where}")


def _publish(
    source: str,
    registry: Registry,
    name: str,
    trial: str | None,
    *,
    base: str | None,
    max_rank: int | None,
    trust_remote_code: bool,
    by: str | None,
    note: str | None,
) -> Manifest:
    from serving.publish import is_folder, publish_adapter
    from tuning.publish import is_sweep, publish_trial
    from tuning.results import read_sweep

    if is_sweep(source):
        idle = {"--base": base, "--trust-remote-code": trust_remote_code or None}
        faults = [Fault(o, "has no effect on a sweep, which names its base", v) for o, v in idle.items() if v]
        if faults:
            raise InputError(faults)
        return publish_trial(read_sweep(source), registry, name, trial, max_rank, by=by, note=note)
    if trial is not None:
        raise InputError([Fault("--trial", f"has no effect: {source} is no sweep's folder", trial)])
    if is_folder(source) and not any(Path(source).glob("adapter_*")):
        raise NotFoundError(f"{source}: neither a sweep's folder (sweep.yaml) nor an adapter's (adapter_config.json)")
    return publish_adapter(
        source,
        registry,
        name,
        base=base,
        max_rank=max_rank,
        trust_remote_code=trust_remote_code,
        by=by,
        note=note,
    )


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command("publish")(publish)


def register_under_adapters(app: typer.Typer) -> None:
    """Add it to the group `adapters` too, which ``serving.cli`` has put into ``app``."""
    groups = {group.name: group.typer_instance for group in app.registered_groups}
    adapters = groups["adapters"]
    assert adapters is not None  # noqa: S101 - a bug of ours
    register(adapters)
