"""Go on with a sweep that was interrupted, however that came: from what is in its folder, and nothing else."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.errors import InputError
from cluster.storage import disk_trouble
from tuning.check import check_sweep, gpu_faults, placed
from tuning.folder import DATA_FOLDER, check_same
from tuning.inspect import outline
from tuning.keep import prune, sweep_up
from tuning.ledger import Ledger
from tuning.lock import locked
from tuning.past import Past
from tuning.results import BOARD_FILE, Sweep, read_sweep, write_leaderboard
from tuning.spec import SweepSpec
from tuning.sweep import conduct, now, write_record, write_spec
from tuning.tracking import tracking_faults

if TYPE_CHECKING:
    from tuning.live import Progress


def resume_sweep(
    folder: Path, spec: SweepSpec | None = None, *, where: str = "spec", progress: Progress | None = None
) -> Sweep:
    """Go on with the sweep in ``folder``: trials that have ended are left alone, those that were begun go on from their
    last good checkpoints, and the rest follows; then it is as if it had never been interrupted.

    Args:
        folder: a sweep's.
        spec: the sweep as the user has it now; None: as it was. Only what changes no trial may differ (``past.FREE``).
        where: names the spec in messages.
        progress: as in ``run_sweep``.

    Raises:
        NotFoundError: the folder is no sweep's.
        ConflictError: the sweep is still running.
        InputError: ``spec`` is another sweep, or its base or rows are gone.
        MachineError: the folder cannot be written.
        LoraloomError: as ``run_sweep``.
    """
    spec = spec or read_sweep(folder).spec
    check_same(folder, spec, where)
    with locked(folder):
        sweep = read_sweep(folder)
        past = Past.of(sweep)
        _tidy(past, spec.search.metric)
        spent = sweep.record.seconds or 0.0
        budget = spec.search.time_budget_s
        if not past.left(spec.num_trials) or (budget is not None and spent >= budget):
            with disk_trouble("the sweep's folder", folder):
                return _settle(_keep(sweep, past, spec.search.keep_adapters, progress))
        _recheck(spec, folder, where, progress)
        with disk_trouble("the sweep's folder", folder):
            write_spec(folder, spec)
        resumed = {"resumed_at": [*sweep.record.resumed_at, now()], "resumed_after": spent}
        record = sweep.record.model_copy(update={**resumed, "state": "running", "states": {}, "trouble": None})
        return conduct(spec, folder, record, past, progress, where)


def _tidy(past: Past, metric: str) -> None:
    """Delete what ended trials do not need: a driver may have been killed between the mark of an end and that."""
    for trial in past.done.values():
        prune(trial.folder, metric, states=0)
        sweep_up(trial.folder)


def _keep(sweep: Sweep, past: Past, keep: int | None, progress: Progress | None) -> Sweep:
    """Nothing is left to run, but the adapters that stay may have become fewer."""
    before = sweep.spec.search
    if keep == before.keep_adapters:
        return sweep
    spec = sweep.spec.model_copy(update={"search": before.model_copy(update={"keep_adapters": keep})})
    write_spec(sweep.folder, spec)
    notes = [Ledger(sweep.folder, before.metric, keep, past).trim()]
    if any(trial.adapter is None and trial.best for trial in past.done.values()):
        notes.append("adapters that were not kept before do not come back")
    for note in filter(None, notes):
        if progress is not None:
            progress.note(note)
    sweep = read_sweep(sweep.folder)
    write_leaderboard(sweep)
    return sweep


def _settle(sweep: Sweep) -> Sweep:
    """Nothing is left to do; perhaps the driver was killed before it wrote that down."""
    if sweep.record.state != "finished" or not _has_board(sweep):
        states = {trial.name: "stopped" if trial.state == "running" else trial.state for trial in sweep.trials}
        write_record(sweep.folder, sweep.record.model_copy(update={"state": "finished", "states": states}))
        sweep = read_sweep(sweep.folder)
        write_leaderboard(sweep)
    return sweep


def _has_board(sweep: Sweep) -> bool:
    """The leaderboard has a line for each trial, under its head."""
    try:
        with (sweep.folder / BOARD_FILE).open(newline="", encoding="utf-8") as file:
            return len(list(csv.reader(file))) == 1 + len(sweep.trials)
    except (OSError, ValueError, csv.Error):
        return False


def _recheck(spec: SweepSpec, folder: Path, where: str, progress: Progress | None) -> None:
    """What a resumed sweep needs is still there; rows that are gone are tokenised again.

    Raises:
        InputError: it is not.
    """
    from tuning.engine.data import EVAL_FILE, TRAIN_FILE

    faults = gpu_faults(spec.cluster)
    if all((folder / DATA_FOLDER / name).is_file() for name in (TRAIN_FILE, EVAL_FILE)):
        faults += tracking_faults(spec.track)
        try:
            outline(spec.base)
        except InputError as error:
            faults += error.faults
        if faults:
            raise InputError(placed(spec, faults, where))
    else:
        data = check_sweep(spec, where, progress.tokenised if progress else None, faults)
        with disk_trouble("the sweep's folder", folder):
            data.write(folder / DATA_FOLDER)
