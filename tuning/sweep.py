"""Run a sweep: prepare the data, start the actors, let Tune search, write the leaderboard."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Generator, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.connect import asks_for_token, connect
from cluster.errors import InputError, LoraloomError, MachineError
from cluster.schema import to_yaml
from cluster.spec import ClusterSpec
from cluster.storage import disk_trouble
from tuning.check import check_sweep, gpu_faults, placed
from tuning.compare.jobs import SWEEP_KEY
from tuning.compare.tab import Tab, metrics_tab
from tuning.estimate import rows_on_disk
from tuning.folder import DATA_FOLDER, check_folder
from tuning.keep import write_text
from tuning.lock import locked
from tuning.past import Past
from tuning.results import (
    COLUMNS,
    SPEC_FILE,
    SWEEP_FILE,
    Sweep,
    SweepRecord,
    read_sweep,
    write_leaderboard,
)
from tuning.spec import SweepSpec

if TYPE_CHECKING:
    from cluster.nodes import Node
    from tuning.host import HostPlan
    from tuning.live import Progress

PACKAGES = ("ray", "torch", "transformers", "bitsandbytes", "peft", "optuna")


def run_sweep(spec: SweepSpec, folder: Path, *, where: str = "spec", progress: Progress | None = None) -> Sweep:
    """Run ``spec`` into ``folder``, which must not exist or be empty, and return what is there at the end.

    Ctrl-C (SIGINT) or SIGTERM ends the running trials and keeps what is there; the record then says `interrupted`.

    Raises:
        ConflictError: the folder is in use.
        MachineError: it cannot be written; told before the rows are read.
        InputError: the spec, the base and the data do not fit each other, and nothing has been started or written; or
            a trial does not fit the GPUs, and no trial has been started.
        MachineError: `slots: auto`, and the memory of the GPUs is not known; or the folder cannot be written.
        LoraloomError: no trial came to a result.
    """
    check_folder(folder)
    data = check_sweep(spec, where, progress.tokenised if progress else None, gpu_faults(spec.cluster))
    with disk_trouble("the sweep's folder", folder):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        check_folder(folder)  # again: a sweep may have ended there since
        with disk_trouble("the sweep's folder", folder):
            data.write(folder / DATA_FOLDER)
            write_spec(folder, spec)
        record = SweepRecord(
            name=spec.name,
            state="running",
            started_at=now(),
            trials=spec.num_trials,
            versions=dict(_versions()),
            data=data.report.as_dict(),
        )
        return conduct(spec, folder, record, Past(), progress, where)


def conduct(
    spec: SweepSpec, folder: Path, record: SweepRecord, past: Past, progress: Progress | None, where: str
) -> Sweep:
    """Run what is left, and write down how it ended."""
    try:
        with disk_trouble("the sweep's folder", folder):
            write_record(folder, record)
        job = f"sweep {spec.name}"
        told = {SWEEP_KEY: str(folder.absolute())}
        with (
            compared(spec, folder) as tab,
            connect(spec.cluster, job_name=job, variables=tab.variables, metadata=told) as dashboard,
        ):
            if dashboard is not None and progress is not None:
                progress.note(dashboard_line(dashboard, tab, spec.cluster))
            record = _search(spec, folder, record, past, progress, where)
    except BaseException as error:
        state = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        with contextlib.suppress(OSError):
            write_record(folder, record.model_copy(update={"state": state}))
            write_leaderboard(read_sweep(folder))
        raise
    trouble = record.trouble
    try:
        write_record(folder, record)
        write_leaderboard(read_sweep(folder))
    except OSError as error:
        trouble = trouble or f"cannot write {error.filename}: {error.strerror}"
    if trouble:
        raise MachineError(
            f"{trouble}. The sweep has stopped, and what it has on the disk is kept: mend that, then "
            f"loraloom sweep --resume {shlex.quote(str(folder))}"
        )
    return read_sweep(folder)


def compared(spec: SweepSpec, folder: Path) -> contextlib.AbstractContextManager[Tab]:
    """The comparison of the sweep in ``folder``, which exists, for the dashboard of a Ray that is started for it."""
    import ray

    if spec.cluster.address is not None or not spec.cluster.dashboard or ray.is_initialized():
        return contextlib.nullcontext(Tab())
    return metrics_tab(folder.absolute(), variables={**os.environ, **spec.cluster.env})


def dashboard_line(dashboard: str, tab: Tab, cluster: ClusterSpec) -> str:
    """What a person is told of the dashboard of the Ray that ``cluster`` describes."""
    variables = cluster.env if cluster.address is None else {}  # of a Ray that is joined they are the workers' alone
    asked = "; the token it asks for: ray get-auth-token" if asks_for_token(variables) else ""
    return f"dashboard  http://{dashboard}{tab.told()}{asked}"


def _search(
    spec: SweepSpec, folder: Path, record: SweepRecord, past: Past, progress: Progress | None, where: str
) -> SweepRecord:
    """The part that needs Ray."""
    import ray

    from cluster.nodes import living_nodes
    from tuning.gauges import run_tag, wait_for_scrape
    from tuning.host import start_broker
    from tuning.ledger import Ledger
    from tuning.room import choose_slots, find_room, idle_nodes, trial_resources
    from tuning.tracking import trackers
    from tuning.trial import Ticket
    from tuning.trial_gauges import TrialGauges
    from tuning.tuner import interruptible, make_tuner, quiet_tune
    from tuning.watch import SweepWatch

    root = folder.absolute()
    nodes = living_nodes()
    require_shared(root, nodes)
    try:
        room = choose_slots(spec, rows_on_disk(root / DATA_FOLDER), find_room(nodes, spec.resources.slots))
    except InputError as error:
        raise InputError(placed(spec, error.faults, where)) from None
    record = record.model_copy(update={"room": room})
    run = run_tag(root, record.started_at)
    broker = start_broker(_host_plan(spec, root, room.slots, run))
    watch = SweepWatch(
        spec,
        record,
        broker,
        Ledger(root, spec.search.metric, spec.search.keep_adapters, past),
        lambda record: write_record(folder, record),
        progress,
        _rows(past),
    )
    cpus, gpus = trial_resources(room.slots, nodes)
    for note in idle_nodes(cpus, nodes):
        watch.say(note)
    ticket = Ticket(broker, root, _shared(spec), cpus, gpus, spec.resources.reuse_processes)
    gauges = TrialGauges(spec.name, run, spec.train.steps, past.done.values())
    with quiet_tune(spec, room.slots), interruptible() as stopper, gauges:
        callbacks = [watch, gauges, *trackers(spec.track, spec.name, watch.say)]
        make_tuner(spec, past, ticket, callbacks, stopper, record.resumed_after).fit()
        record = watch.finish()
        gauges.settle(record.states)
        is_interrupted = stopper.interrupted
        with contextlib.suppress(KeyboardInterrupt):  # a second Ctrl-C ends this, and loses nothing
            wait_for_scrape(ray_ends=spec.cluster.address is None)
    ray.kill(broker)
    if is_interrupted:
        return record.model_copy(update={"state": "interrupted"})
    if not watch.has_result:
        first = watch.first_error
        reason = f"the first error is in {first}" if first else "the time budget ended before one did"
        raise LoraloomError(f"{folder}: no trial came to a result; {reason}")
    return record.model_copy(update={"state": "finished"})


def _host_plan(spec: SweepSpec, folder: Path, slots: int, run: str) -> HostPlan:
    """What the hosts of a sweep are started with."""
    from tuning.host import HostPlan

    resources = spec.resources
    return HostPlan(
        spec.name,
        spec.base,
        folder / DATA_FOLDER,
        resources.threads,
        spec.search.metric,
        resources.idle_host_s,
        spec.data.packing,
        slots,
        run,
    )


def _shared(spec: SweepSpec) -> dict[str, Any]:
    """The fields of TrialConfig that the search does not set."""
    train = spec.train.model_dump(exclude={"alpha", "alpha_over_rank"})
    return {key: value for key, value in train.items() if key not in spec.space}


def _rows(past: Past) -> list[dict[str, Any]]:
    """What the display and the record are to say of trials that have ended before."""
    rows: list[dict[str, Any]] = []
    for trial in past.done.values():
        numbers = {column: trial.best.get(column) for column in COLUMNS}
        rows.append({"trial": trial.name, "state": trial.state, **trial.knobs, **numbers})
    return rows


def require_shared(folder: Path, nodes: Sequence[Node]) -> None:
    """Check that every node sees the sweep's folder: hosts read the rows from it and write checkpoints to it.

    Raises:
        MachineError: a node does not see it, or does not answer.
    """
    from cluster.nodes import require_answers

    if len(nodes) == 1:
        return
    seen = require_answers((folder / SPEC_FILE).is_file, nodes)
    blind = [node["NodeManagerAddress"] for node, there in zip(nodes, seen, strict=True) if not there]
    if blind:
        raise MachineError(
            f"{folder}: must be on storage that all nodes share, but {', '.join(blind)} cannot read it; "
            "give the sweep a --dir there"
        )


def _versions() -> Generator[tuple[str, str]]:
    for package in PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue


def now() -> str:
    """UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def write_record(folder: Path, record: SweepRecord) -> None:
    """Replace sweep.json in one step."""
    write_text(folder / SWEEP_FILE, record.model_dump_json(indent=2) + "\n")


def write_spec(folder: Path, spec: SweepSpec) -> None:
    """Replace sweep.yaml in one step."""
    write_text(folder / SPEC_FILE, f"# {spec.name}, as resolved\n{to_yaml(spec)}")
