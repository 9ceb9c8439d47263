"""Read a sweep's folder back: its trials, their state, their best checkpoints, the leaderboard. Needs neither Ray nor
torch.

A sweep folder explains itself:

    sweep.yaml          the spec as resolved
    sweep.json          state, times, versions, what the base and the data measured
    leaderboard.csv     the trials, best first
    data/               tokenised rows (Arrow)
    tNNN/               a trial: params.json and result.json in Ray Tune's form, TensorBoard's events
    tNNN/end.json       how it ended; not there while it has steps left to take
    tNNN/checkpoint_*/  its best checkpoint and its last: adapter/ in PEFT's format, trial.json, metrics.json, state.pt
                        (tuning/keep.py tells which stay)

It can be read while the sweep runs. A driver that was killed could not write that down: where its lock can be seen and
is free, the sweep reads as interrupted (lock.py).
"""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, cast, get_args

from pydantic import BaseModel, ValidationError

from cluster.errors import ABSENT, Fault, InputError, MachineError, NotFoundError
from cluster.schema import load_spec
from tuning.keep import best, ended, is_number, read_object, saved, write_text
from tuning.lock import is_held
from tuning.spec import SweepSpec, TrainSpec

State = Literal["waiting", "running", "finished", "stopped", "diverged", "failed"]
SPEC_FILE, SWEEP_FILE, BOARD_FILE = "sweep.yaml", "sweep.json", "leaderboard.csv"
COLUMNS = ("steps", "train_loss", "eval_loss", "tokens_per_second", "adapter_parameters")


class HostRoom(BaseModel):
    """How many trials share a base, and what they need by estimate, where that is known."""

    slots: int
    place: Literal["GPU", "node"]
    """What a host has to itself."""
    needed_gib: float | None = None
    """At most."""
    usable_gib: float | None = None
    """What the smallest place has for it."""
    warning: str | None = None
    """What the user must hear of it."""


class SweepRecord(BaseModel):
    """What sweep.json holds."""

    name: str
    state: Literal["running", "finished", "interrupted", "failed"]
    started_at: str
    """UTC, ISO 8601."""
    seconds: float | None = None
    """Wall time that trials ran, so far; of all runs together where the sweep was resumed."""
    resumed_at: list[str] = []
    """When it was gone on with, UTC, ISO 8601."""
    resumed_after: float = 0.0
    """What ``seconds`` was then."""
    trouble: str | None = None
    """What the user must mend, where that ended the sweep."""
    trials: int
    """As planned."""
    versions: dict[str, str]
    """Packages that results depend on."""
    base: dict[str, float] = {}
    """What the loaded base measured."""
    states: dict[str, State] = {}
    """How each trial ended; empty while the sweep runs."""
    data: dict[str, int] = {}
    """What became of the rows."""
    room: HostRoom | None = None
    """Slots of a host, and their memory."""


@dataclass(slots=True)
class TrialResult:
    """One trial as its folder tells it."""

    name: str
    folder: Path
    knobs: dict[str, Any]
    """What Tune was given: the searched knobs and rank, alpha, target modules, learning rate."""
    state: State = "waiting"
    reports: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """All reports, oldest first."""
    best: dict[str, Any] = field(default_factory=dict[str, Any])
    """The report of the best checkpoint; before there is one, the report with the lowest metric."""
    adapter: Path | None = None
    """PEFT folder of the best checkpoint; None where there is none, or where it was not kept."""
    ended: bool = False
    """It is done, and a resumed sweep does not touch it."""
    error: str | None = None

    def score(self, metric: str) -> float:
        """The best value of ``metric``; infinite where there is none."""
        value = self.best.get(metric)
        return float(value) if value is not None and is_number(value) else math.inf


@dataclass(frozen=True, slots=True)
class Sweep:
    """A sweep's folder, read."""

    folder: Path
    spec: SweepSpec
    record: SweepRecord
    trials: list[TrialResult]
    """Best first; those without a result last, in order of their names."""

    @property
    def winner(self) -> TrialResult | None:
        """The best trial that left an adapter."""
        return next((trial for trial in self.trials if trial.adapter and math.isfinite(trial.score(self.metric))), None)

    @property
    def metric(self) -> str:
        """What is minimised."""
        return self.spec.search.metric

    def trial(self, name: str) -> TrialResult:
        """A trial by its name.

        Raises:
            NotFoundError: the sweep has no such trial.
        """
        for trial in self.trials:
            if trial.name == name:
                return trial
        known = ", ".join(sorted(trial.name for trial in self.trials)) or "none yet"
        raise NotFoundError(f"{self.folder}: no trial {name!r}; there are {known}")


class ReadTrial(Protocol):
    """How a trial's folder is read: ``read_trial``, or what calls it when it must."""

    def __call__(self, folder: Path, metric: str, steps: int, *, over: bool, told: State | None = None) -> TrialResult:
        """As ``read_trial``."""
        ...


def read_sweep(folder: str | Path, read: ReadTrial | None = None) -> Sweep:
    """Read a sweep's folder, finished or not, its trials with ``read`` (default: ``read_trial``).

    Raises:
        NotFoundError: it is no sweep's folder.
        InputError: its sweep.yaml or sweep.json has been damaged.
        MachineError: one of them cannot be read.
    """
    folder = Path(folder)
    if not (folder / SPEC_FILE).is_file() or not (folder / SWEEP_FILE).is_file():
        raise NotFoundError(f"{folder}: not a sweep's folder (it has no {SPEC_FILE} and {SWEEP_FILE})")
    spec = load_spec(folder / SPEC_FILE, SweepSpec)
    record = _record(folder)
    read = read or read_trial
    trials = [
        read(
            path.parent,
            spec.search.metric,
            spec.train.steps,
            over=record.state != "running",
            told=record.states.get(path.parent.name),
        )
        for path in sorted(folder.glob("t*/params.json"))
    ]
    trials.sort(key=lambda trial: (trial.score(spec.search.metric), trial.name))
    return Sweep(folder, spec, record, trials)


def _record(folder: Path) -> SweepRecord:
    """What sweep.json says, corrected where its driver is dead."""
    record = _read_record(folder / SWEEP_FILE)
    while record.state == "running" and is_held(folder) is False:
        again = _read_record(folder / SWEEP_FILE)
        if again == record:
            return record.model_copy(update={"state": "interrupted"})
        record = again  # it ended, or was gone on with, between the two looks
    return record


def _read_record(path: Path) -> SweepRecord:
    try:
        return SweepRecord.model_validate_json(path.read_bytes())
    except OSError as error:
        raise MachineError(f"{path}: cannot be read ({error.strerror or error})") from None
    except ValidationError as error:
        rule = f"is damaged; must be the record that a sweep writes ({_first_fault(error)})"
        raise InputError([Fault(str(path), rule, ABSENT)]) from None


def _first_fault(error: ValidationError) -> str:
    detail = error.errors()[0]
    return ": ".join(filter(None, (".".join(map(str, detail["loc"])), detail["msg"])))


def read_trial(folder: Path, metric: str, steps: int, *, over: bool, told: State | None = None) -> TrialResult:
    """Read one trial's folder.

    ``told`` is its state where the sweep's record has it; else it is judged by its files, and ``over`` says that the
    sweep has ended, so that a trial without an end was stopped.
    """
    knobs = read_object(folder / "params.json") or {}
    trial = TrialResult(folder.name, folder, {knob: knobs[knob] for knob in TrainSpec.model_fields if knob in knobs})
    trial.reports = _read_reports(folder / "result.json")
    champion = best(saved(folder), metric)
    if champion is not None:
        # A report that came later, or was better, but left no adapter does not count: the numbers are the adapter's.
        trial.best, trial.adapter = champion.report, champion.folder / "adapter" if champion.has_adapter else None
    else:
        finite = [report for report in trial.reports if is_number(report.get(metric))]
        trial.best = min(finite, key=lambda report: report[metric], default={})
    end = ended(folder)
    trial.ended = end is not None
    errors = folder / "error.txt"
    last = trial.reports[-1] if trial.reports else {}
    if told is not None:
        trial.state = told
    elif end in get_args(State):
        trial.state = cast("State", end)
    elif last.get("diverged"):
        trial.state = "diverged"
    elif last.get("steps", 0) >= steps:
        trial.state = "finished"
    elif over:
        trial.state = "failed" if errors.is_file() else "stopped"
    elif trial.reports:
        trial.state = "running"
    if trial.state == "failed" and errors.is_file():
        trial.error = next(iter(reversed(errors.read_text(errors="replace").strip().splitlines())), None)
    return trial


def leaderboard(sweep: Sweep) -> list[dict[str, Any]]:
    """One flat record per trial, best first; numbers are of its best report."""
    rows: list[dict[str, Any]] = []
    for place, trial in enumerate(sweep.trials, 1):
        knobs = {key: "+".join(value) if isinstance(value, list) else value for key, value in trial.knobs.items()}
        numbers = {column: trial.best.get(column) for column in COLUMNS}
        adapter = str(trial.adapter.relative_to(sweep.folder)) if trial.adapter else None
        rows.append({"place": place, "trial": trial.name, "state": trial.state, **knobs, **numbers, "adapter": adapter})
    return rows


def write_leaderboard(sweep: Sweep) -> Path:
    """Write leaderboard.csv into the sweep's folder, whole or not at all, and return its path."""
    rows = leaderboard(sweep)
    path = sweep.folder / BOARD_FILE
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names)
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
    return path


def _read_reports(path: Path) -> list[dict[str, Any]]:
    """Tune's result.json: a JSON object a line; the last may be half written while the sweep runs."""
    reports: list[dict[str, Any]] = []
    if path.is_file():
        for line in path.read_bytes().splitlines():
            try:
                report = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(report, dict) and isinstance(report.get("steps"), int):
                reports.append(report)
    # A trial that was started again repeats the steps after its checkpoint: the later report of a step counts.
    return list({report.get("steps"): report for report in reports}.values())
