"""The commands `sweep`, `estimate` and `demo`, and those of publish_cli.py and compare/cli.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from cluster.errors import ABSENT, Fault, InputError, MachineError
from cluster.fields import spec_command
from cluster.options import JsonOption, QuietOption, set_option
from cluster.schema import load_spec
from tuning import publish_cli
from tuning.compare import cli as compare_cli
from tuning.live import live_progress, make_console
from tuning.outcome import show_sweep
from tuning.results import SPEC_FILE, read_sweep

INTERRUPTED = 130
GPU_GIB = 0.1, 100_000.0
"""What --gpu-memory-gib may be."""

SetOption = Annotated[list[str] | None, set_option("train.steps=50")]


def register(app: typer.Typer) -> None:
    """Add this package's commands to ``app``."""
    app.command("sweep", cls=spec_command("tuning.spec", "SweepSpec"))(sweep)
    app.command("estimate", cls=spec_command("tuning.spec", "SweepSpec"))(estimate)
    compare_cli.register(app)
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
            "trackers and time budget, and the adapters that it keeps, nothing else.",
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
    show_sweep(done, as_json=as_json, quiet=quiet)
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
