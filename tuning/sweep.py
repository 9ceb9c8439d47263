"""Run a sweep: check everything, prepare the data, start the actors, let Tune search, write the leaderboard."""

from __future__ import annotations

import contextlib
import logging
import math
import shlex
import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cluster.connect import connect, environment
from cluster.errors import ConflictError, Fault, InputError, LoraloomError, MachineError
from cluster.schema import to_yaml
from tuning.disk import needs_disk
from tuning.engine.base import NO_CHECKPOINTS
from tuning.estimate import rows_on_disk
from tuning.inspect import BaseOutline, load_tokenizer, outline, trial_faults
from tuning.keep import write_text
from tuning.lock import LOCK_FILE, locked
from tuning.past import Past
from tuning.results import (
    BOARD_FILE,
    COLUMNS,
    SPEC_FILE,
    SWEEP_FILE,
    Sweep,
    SweepRecord,
    read_sweep,
    write_leaderboard,
)
from tuning.spec import SweepSpec, TrialConfig
from tuning.suitable import weight_faults

if TYPE_CHECKING:
    from tuning.engine.data import OnRows, TokenisedData
    from tuning.live import Progress
    from tuning.watch import InterruptStopper

T = TypeVar("T")
DATA_FOLDER = "data"
MAX_FAILURES = 2
"""Times that a trial is started again after its own process died, or something in it failed. Dead hosts do not count
(see ``ThinTrial.step``)."""
PACKAGES = ("ray", "torch", "transformers", "bitsandbytes", "peft", "optuna")
TUNE_VARIABLES = {
    # Tune's newer console output prints a banner even when told to be silent; the older one obeys.
    "RAY_AIR_NEW_OUTPUT": "0",
    # What it writes of trials goes to a temporary folder first; ours goes where it belongs at once (tuning/ledger.py).
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
}


def check_sweep(spec: SweepSpec, where: str, on_rows: OnRows | None = None) -> TokenisedData:
    """All that can be known without loading weights and without processes: the base, every trial on it, every row.

    Args:
        spec: the sweep.
        where: names the spec in messages.
        on_rows: told how many rows are through the tokenizer so far.

    Returns:
        The rows, tokenised; nothing has been written.

    Raises:
        InputError: all faults together.
    """
    from tuning.engine.data import check_rows, tokenise

    faults: list[Fault] = []
    data = tokenizer = None
    base = _kept(faults, lambda: outline(spec.base))
    if base is not None or (Path(spec.base.model) / "config.json").is_file():
        tokenizer = _kept(faults, lambda: load_tokenizer(spec.base))
        faults += weight_faults(spec.base)
    if base is not None:
        faults += base_faults(spec, base)
    try:
        if tokenizer is None:
            check_rows(spec.data)
        else:
            data = tokenise(spec.data, tokenizer, spec.search.seed, on_rows)
    except InputError as error:
        faults += error.faults
    if faults or data is None:
        raise InputError(placed(spec, faults, where))
    return data


def base_faults(spec: SweepSpec, base: BaseOutline) -> list[Fault]:
    """What the base forbids of the sweep."""
    faults = trial_faults(base, [("space.", trial) for trial in spec.planned() or _corners(spec)])
    if base.max_length is not None and spec.data.max_length > base.max_length:
        rule = f"must be at most {base.max_length}, the base's positions"
        faults.append(Fault("data.max_length", rule, spec.data.max_length))
    if spec.data.packing and not base.has_row_attention:
        rule = f"must be false for this base: {base.model_type} computes its attention itself, over the whole batch"
        faults.append(Fault("data.packing", rule, spec.data.packing))
    if spec.base.gradient_checkpointing and not base.has_checkpoints:
        faults.append(Fault("base.gradient_checkpointing", NO_CHECKPOINTS, spec.base.gradient_checkpointing))
    return faults


def run_sweep(spec: SweepSpec, folder: Path, *, where: str = "spec", progress: Progress | None = None) -> Sweep:
    """Run ``spec`` into ``folder``, which must not exist or be empty, and return what is there at the end.

    Ctrl-C (SIGINT) ends the running trials and keeps what is there; the record then says `interrupted`.

    Raises:
        ConflictError: the folder is in use.
        InputError: the spec, the base and the data do not fit each other, and nothing has been started or written; or
            a trial does not fit the GPUs, and no trial has been started.
        MachineError: `slots: auto`, and the memory of the GPUs is not known; or the folder cannot be written.
        LoraloomError: no trial came to a result.
    """
    if _in_use(folder):
        raise ConflictError(f"{folder}: already holds something; give the sweep another --dir or name")
    data = check_sweep(spec, where, progress.tokenised if progress else None)
    with needs_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        if _in_use(folder):  # by a sweep that ended since
            raise ConflictError(f"{folder}: already holds something; give the sweep another --dir or name")
        with needs_disk(folder):
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
        with needs_disk(folder):
            write_record(folder, record)
        with connect(spec.cluster, job_name=f"sweep {spec.name}"):
            record = _search(spec, folder, record, past, progress, where)
    except BaseException:
        with contextlib.suppress(OSError):
            write_record(folder, record.model_copy(update={"state": "failed"}))
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


def _search(
    spec: SweepSpec, folder: Path, record: SweepRecord, past: Past, progress: Progress | None, where: str
) -> SweepRecord:
    """The part that needs Ray."""
    import ray
    from ray import tune
    from ray.tune.logger import TBXLoggerCallback

    from tuning.host import HostPlan, start_broker
    from tuning.ledger import Ledger
    from tuning.room import choose_slots, find_room
    from tuning.search import make_scheduler, make_search
    from tuning.trial import TRIAL_KEY, Ticket, make_trainable
    from tuning.watch import SweepWatch

    logging.getLogger("ray.tune").setLevel(logging.WARNING)
    # Its own snapshots need no room on the disk to be of no use to us.
    logging.getLogger("ray.tune.execution.experiment_state").setLevel(logging.CRITICAL)
    _require_shared(folder)
    data = folder.absolute() / DATA_FOLDER
    try:
        room = choose_slots(spec, rows_on_disk(data), find_room(ray.nodes()))
    except InputError as error:
        raise InputError(placed(spec, error.faults, where)) from None
    record = record.model_copy(update={"room": room})
    cpus, gpus = trial_resources(room.slots, ray.nodes())
    plan = HostPlan(
        spec.name,
        spec.base,
        data,
        spec.resources.threads,
        spec.search.metric,
        spec.resources.idle_host_s,
        spec.data.packing,
    )
    broker = start_broker(plan)
    shared = {key: value for key, value in spec.train.model_dump().items() if key not in ("alpha", "alpha_over_rank")}
    shared = {key: shared[key] for key in shared if key not in spec.space}
    watch = SweepWatch(
        spec,
        record,
        broker,
        Ledger(folder.absolute(), spec.search.metric, spec.search.keep_adapters, past),
        lambda record: write_record(folder, record),
        progress,
        _rows(past),
    )
    budget = spec.search.time_budget_s
    # Of trials that end together, Tune keeps as many processes as it has asked the search for next trials. A search
    # that learns is asked for one at a time, so that it knows all results there are.
    ahead = {} if spec.search.algorithm == "tpe" else {"TUNE_MAX_PENDING_TRIALS_PG": str(room.slots)}
    with environment({**TUNE_VARIABLES, **ahead}), _interruptible() as stopper:
        tune.Tuner(
            make_trainable(Ticket(broker, folder.absolute(), shared, cpus, gpus, spec.resources.reuse_processes)),
            tune_config=tune.TuneConfig(
                metric=spec.search.metric,
                mode="min",
                search_alg=make_search(spec, past),
                scheduler=make_scheduler(spec, past),
                num_samples=len(past.left(spec.num_trials)),
                max_concurrent_trials=spec.resources.max_concurrent,
                reuse_actors=spec.resources.reuse_processes,
                time_budget_s=budget and max(budget - record.resumed_after, 1.0),
                trial_name_creator=lambda trial: trial.config[TRIAL_KEY],
                trial_dirname_creator=lambda trial: trial.config[TRIAL_KEY],
            ),
            run_config=tune.RunConfig(
                name=folder.name,
                storage_path=str(folder.absolute().parent),
                callbacks=[watch, TBXLoggerCallback()],
                stop=stopper,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
                checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
            ),
        ).fit()
    record = watch.finish()
    ray.kill(broker)
    state = "interrupted" if stopper.interrupted else "finished"
    if not watch.has_result and state == "finished":
        reason = (
            f"the first error is in {watch.first_error}"
            if watch.first_error
            else "the time budget ended before one did"
        )
        raise LoraloomError(f"{folder}: no trial came to a result; {reason}")
    return record.model_copy(update={"state": state})


def _rows(past: Past) -> list[dict[str, Any]]:
    """What the display and the record are to say of trials that have ended before."""
    rows: list[dict[str, Any]] = []
    for trial in past.done.values():
        numbers = {column: trial.best.get(column) for column in COLUMNS}
        rows.append({"trial": trial.name, "state": trial.state, **trial.knobs, **numbers})
    return rows


def trial_resources(slots: int, nodes: list[dict[str, Any]]) -> tuple[float, float]:
    """CPUs and GPUs of one trial: ``1/slots`` of a GPU, or of the CPUs of the smallest node where there is no GPU.

    Rounded down to Ray's granularity of 1/10000, so that ``slots`` trials always fit.
    """
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    if any(node.get("GPU", 0) >= 1 for node in alive):
        return 0.0, math.floor(10_000 / slots) / 10_000
    cpus = min(node["CPU"] for node in alive if node.get("CPU", 0) > 0)
    return math.floor(10_000 * cpus / slots) / 10_000, 0.0


@contextmanager
def _interruptible() -> Generator[InterruptStopper]:
    """A stopper for Tune that ends the sweep after the first SIGINT; a second one raises KeyboardInterrupt as usual."""
    from tuning.watch import InterruptStopper

    stopper = InterruptStopper()
    if threading.current_thread() is not threading.main_thread():
        yield stopper
        return

    def on_interrupt(_number: int, _frame: object) -> None:
        stopper.interrupt()
        signal.signal(signal.SIGINT, previous)

    # Tune's own handler is left out: it breaks off in the middle of a checkpoint.
    with environment({"TUNE_DISABLE_SIGINT_HANDLER": "1"}):
        previous = signal.signal(signal.SIGINT, on_interrupt)
        try:
            yield stopper
        finally:
            signal.signal(signal.SIGINT, previous)


def _in_use(folder: Path) -> bool:
    """True if a folder holds anything but what a sweep that never came to a trial left there."""
    if not folder.is_dir():
        return folder.exists()
    left_over = {SPEC_FILE, SWEEP_FILE, BOARD_FILE, f".{SPEC_FILE}", f".{SWEEP_FILE}", DATA_FOLDER, LOCK_FILE}
    return any(path.name not in left_over for path in folder.iterdir())


def _require_shared(folder: Path) -> None:
    """Hosts read the rows from the sweep's folder and write checkpoints to it, so every node must see it.

    Raises:
        MachineError: a node does not.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) == 1:
        return
    marker = folder.absolute() / SPEC_FILE
    sees = ray.remote(num_cpus=0)(marker.is_file)
    seen = ray.get(
        [
            sees.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote()
            for node in nodes
        ]
    )
    blind = [node["NodeManagerAddress"] for node, there in zip(nodes, seen, strict=True) if not there]
    if blind:
        raise MachineError(
            f"{folder.absolute()}: must be on storage that all nodes share, but {', '.join(blind)} does not see it; "
            "give the sweep a --dir there"
        )


def _kept(faults: list[Fault], work: Callable[[], T]) -> T | None:
    """What ``work`` returns; its faults go to ``faults``."""
    try:
        return work()
    except InputError as error:
        faults += error.faults
        return None


def _corners(spec: SweepSpec) -> list[TrialConfig]:
    """Trials that show every value at the edge of its domain, for a search whose trials are not known beforehand."""
    first = {knob: domain.examples()[0] for knob, domain in spec.space.items()}
    return [spec.trial({**first, knob: value}) for knob, domain in spec.space.items() for value in domain.examples()]


def placed(spec: SweepSpec, faults: list[Fault], where: str) -> list[Fault]:
    """The faults with the spec's name before each field; a row's place (a path) stands for itself."""
    return [_placed(spec, fault, where) for fault in faults]


def _placed(spec: SweepSpec, fault: Fault, where: str) -> Fault:
    """A knob stands under ``space`` if it is searched, else under ``train``."""
    place = fault.where
    if place.startswith("space.") and place.removeprefix("space.") not in spec.space:
        place = f"train.{place.removeprefix('space.')}"
    is_field = place.startswith(("base.", "data.", "space.", "train.", "resources."))
    return fault._replace(where=f"{where}: {place}" if is_field else place)


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
