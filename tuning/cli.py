"""The commands `sweep`, `estimate`, `compare`, `publish` and `demo`."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.errors import ABSENT, Fault, InputError, MachineError
from cluster.fields import spec_command
from cluster.options import JsonOption, QuietOption, set_option
from cluster.schema import load_spec
from tuning import publish_cli
from tuning.live import live_progress, make_console
from tuning.report import header_lines, trial_table
from tuning.results import BOARD_FILE, SPEC_FILE, Sweep, leaderboard, read_sweep

INTERRUPTED = 130
GPU_GIB = 0.1, 100_000.0
"""What --gpu-memory-gib may be."""

SetOption = Annotated[list[str] | None, set_option("train.steps=50")]
SweepFolder = Annotated[Path, typer.Argument(metavar="DIR", help="A sweep's folder.")]


def register(app: typer.Typer) -> None:
    """Add this package's commands to ``app``."""
    app.command("sweep", cls=spec_command("tuning.spec", "SweepSpec"))(sweep)
    app.command("estimate", cls=spec_command("tuning.spec", "SweepSpec"))(estimate)
    app.command("compare")(compare)
    publish_cli.register(app)
    app.command("demo")(demo)


def sweep(
    config: Annotated[
        Path | None,
        typer.Argument(
            metavar="CONFIG", help="A sweep's YAML file, such as configs/sweep/demo.yaml; not needed with --resume."
        ),
    ] = None,
    overrides: SetOption = None,
    folder: Annotated[
        Path | None,
        typer.Option("--dir", help="The sweep's folder (default: OUTPUT/NAME of the file). Must not hold anything."),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            "--resume",
            metavar="DIR",
            help="Go on with the sweep in this folder, which was interrupted, killed or stopped by a full disk. Trials "
            "that have ended are not repeated. CONFIG and --set may change where it runs (cluster, resources), its "
            "time budget and the adapters that it keeps, nothing else.",
        ),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Check everything that can be known beforehand, then stop.")
    ] = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Search for the best adapter: many QLoRA trials on shared bases.

    Exit codes: 0 done, 1 no trial succeeded, 2 bad input, 3 nothing there to resume, 4 the folder is in use, 5 the disk
    is full, 130 interrupted by Ctrl-C or SIGTERM (results are kept).
    """
    from tuning.folder import check_folder, check_same
    from tuning.spec import SweepSpec

    if resume is not None and folder is not None:
        raise InputError([Fault("--dir", "has no effect with --resume, which names the folder", str(folder))])
    if resume is not None:
        folder = read_sweep(resume).folder
    elif config is None:
        raise InputError([Fault("CONFIG", "is required, or --resume DIR", ABSENT)])
    source = config or folder / SPEC_FILE  # pyright: ignore[reportOptionalOperand] - one of them is there
    spec = load_spec(source, SweepSpec, overrides or ())
    folder = folder or Path(spec.output).expanduser() / spec.name
    # Once more than in run_sweep and resume_sweep, for here torch and Ray are not imported yet: that takes seconds.
    if resume is not None:
        check_same(folder, spec, str(source))
    else:
        check_folder(folder)
    if check:
        from tuning.check import check_sweep, gpu_faults

        with live_progress(f"sweep {spec.name}", enabled=not quiet) as progress:
            check_sweep(spec, str(source), progress.tokenised if progress else None, gpu_faults(spec.cluster))
        typer.echo(
            json.dumps({"ok": True, "trials": spec.num_trials})
            if as_json
            else f"{source}: fine; {spec.num_trials} trials"
        )
        return
    with live_progress(f"sweep {spec.name}", enabled=not quiet) as progress:
        if resume is not None:
            from tuning.resume import resume_sweep

            done = resume_sweep(folder, spec, where=str(source), progress=progress)
        else:
            from tuning.sweep import run_sweep

            done = run_sweep(spec, folder, where=str(source), progress=progress)
    _show(done, as_json=as_json, quiet=quiet)
    if done.record.state == "interrupted":
        raise typer.Exit(INTERRUPTED)


def estimate(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A sweep's YAML file.")],
    overrides: SetOption = None,
    gpu_memory_gib: Annotated[
        float | None,
        typer.Option(
            "--gpu-memory-gib",
            metavar="GIB",
            help="Memory of a GPU (default: the smallest of this machine; without one, a table of common sizes).",
        ),
    ] = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Tell a sweep's memory before it starts: what its largest trial needs, and how many fit a GPU (some seconds).

    Needs no weights, only the base's config.json, and the rows only where they are here. Exit codes: 0 told, 2 bad
    input, 3 no such file, 5 not one trial fits the GPU that was named or is here.

    Raises:
        MachineError: not one trial fits.
    """
    from tuning.spec import SweepSpec

    low, high = GPU_GIB
    if gpu_memory_gib is not None and not low <= gpu_memory_gib <= high:  # nan is not either
        raise InputError([Fault("--gpu-memory-gib", f"must be from {low:g} to {high:g}", gpu_memory_gib)])
    spec = load_spec(config, SweepSpec, overrides or ())
    # After the file's faults: these import torch.
    from tuning.fit import refusal
    from tuning.forecast import devices_table, forecast, forecast_lines, parts_table

    with live_progress(f"sweep {spec.name}", enabled=not quiet) as progress:
        found = forecast(spec, str(config), gpu_memory_gib, progress.tokenised if progress else None)
    if as_json:
        typer.echo(json.dumps(found.as_dict()))
    elif quiet:
        typer.echo("\n".join(str(fit.runs) for fit, _ in found.fits))
    else:
        console = make_console()
        for line in forecast_lines(found):
            console.print(line, soft_wrap=True)
        console.print(parts_table(found), devices_table(found.fits))
    only, better = found.fits[0]
    if len(found.fits) == 1 and not only.runs:
        raise MachineError(f"{config}: {refusal(only, better)}")


def compare(folder: SweepFolder, quiet: QuietOption = False, as_json: JsonOption = False) -> None:
    """Show a sweep's leaderboard again, finished or not.

    Exit codes: 0 shown, 3 no such sweep.
    """
    _show(read_sweep(folder), as_json=as_json, quiet=quiet)


def demo(
    folder: Annotated[
        Path | None,
        typer.Option("--dir", help="Keep the sweep, the registry and the answers here (default: a temporary folder)."),
    ] = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Sweep, publish, serve and ask, on the built-in demo: a few minutes on two cores, nothing left behind.

    Exit codes: 0 done, 1 something failed, 4 the folder is in use.
    """
    from tuning.demo import run_demo

    console = make_console(stderr=as_json, quiet=quiet)
    outcome = run_demo(folder, console, lambda title: live_progress(title, enabled=not quiet, console=console))
    if as_json:
        typer.echo(json.dumps(outcome.as_dict()))


def _show(done: Sweep, *, as_json: bool, quiet: bool) -> None:
    """The leaderboard on standard output: a table, or one JSON object, or the winner's name."""
    rows = leaderboard(done)
    winner = done.winner
    if as_json:
        record = done.record.model_dump()
        document = {**record, "folder": str(done.folder), "winner": winner and winner.name, "leaderboard": _plain(rows)}
        typer.echo(json.dumps(document, allow_nan=False))
        return
    if quiet:
        typer.echo(winner.name if winner else "")
        return
    console = make_console()
    for line in header_lines(done.record):
        console.print(line, soft_wrap=True)
    took = "" if done.record.seconds is None else f" in {done.record.seconds:.0f} s"
    console.print(
        trial_table(rows, console.width, f"sweep {done.record.name}: {done.record.state}{took}, {len(rows)} trials")
    )
    for trial in done.trials:
        if trial.error:
            console.print(f"{trial.name} failed: {trial.error} (whole: {trial.folder / 'error.txt'})", soft_wrap=True)
    kept = done.spec.search.keep_adapters
    if kept is not None and len(done.trials) > kept:
        console.print(f"adapters are kept of the best {kept} trials only (search.keep_adapters)")
    if done.record.state == "interrupted":
        console.print(f"go on: loraloom sweep --resume {shlex.quote(str(done.folder))}", soft_wrap=True)
    if winner:
        console.print(f"winner {winner.name}: {winner.adapter}", soft_wrap=True)
        console.print(f"leaderboard: {done.folder / BOARD_FILE}", soft_wrap=True)
        console.print(f"next: loraloom publish {shlex.quote(str(done.folder))} --name NAME", soft_wrap=True)


def _plain(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """JSON has no infinity: a number that is not finite becomes null."""
    finite = float("inf")
    return [
        {
            key: None if isinstance(value, float) and not -finite < value < finite else value
            for key, value in row.items()
        }
        for row in rows
    ]
