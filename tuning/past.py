"""What earlier runs of a sweep have left: which trials are done, which go on, which are still to come."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from cluster.errors import ABSENT, Fault
from tuning.keep import END, ended, is_number, saved
from tuning.results import Sweep, TrialResult
from tuning.spec import SweepSpec

FREE = ("cluster", "resources", "track", "output", "search.time_budget_s", "search.keep_adapters")
"""Fields that may differ when a sweep is resumed: none of them changes a trial's result."""


def trial_name(index: int) -> str:
    """t000, t001, ...: short enough to type."""
    return f"t{index:03d}"


@dataclass(frozen=True, slots=True)
class Past:
    """The trials of earlier runs by their names; empty for a new sweep."""

    done: dict[str, TrialResult] = field(default_factory=dict[str, TrialResult])
    begun: dict[str, TrialResult] = field(default_factory=dict[str, TrialResult])
    """Started, and not at their end: interrupted, or failed."""

    @classmethod
    def of(cls, sweep: Sweep) -> Past:
        """Sort the trials of a sweep's folder."""
        trials = {trial.name: trial for trial in sorted(sweep.trials, key=lambda trial: trial.name) if trial.knobs}
        return cls(
            {name: trial for name, trial in trials.items() if trial.ended},
            {name: trial for name, trial in trials.items() if not trial.ended},
        )

    def left(self, total: int) -> list[str]:
        """The names of the trials that are still to be run, those that were begun first."""
        names = [trial_name(index) for index in range(total)]
        return [*(name for name in names if name in self.begun), *self.new(total)]

    def new(self, total: int) -> list[str]:
        """The names of the trials that were never begun."""
        names = [trial_name(index) for index in range(total)]
        return [name for name in names if name not in self.done and name not in self.begun]

    def scores(self, name: str, metric: str) -> dict[int, float]:
        """Steps -> ``metric``, of the reports that still stand: of a trial that goes on, those before its checkpoint,
        with which it will begin again.
        """
        trial = self.done.get(name) or self.begun.get(name)
        if trial is None:
            return {}
        until = None if name in self.done else resume_step(trial.folder)
        reports = sorted((report for report in trial.reports if is_number(report.get("steps"))), key=_steps)
        return {
            report["steps"]: report[metric]
            for report in reports
            if metric in report and (until is None or report["steps"] < until)
        }


def resume_step(trial: Path) -> int:
    """The step that a trial would go on from; 0 if it would start anew."""
    return max((one.steps for one in saved(trial) if one.has_state), default=0)


def damage(sweep: Sweep) -> list[Fault]:
    """What is damaged of trials that cannot be begun again without that being told: those that have ended, and those
    that are to go on from a checkpoint. A line of reports that was cut short by a crash is no damage: where it counted,
    the trial has not ended.
    """
    known = {trial.folder.name: trial for trial in sweep.trials}
    faults: list[Fault] = []
    for folder in sorted(path for path in sweep.folder.glob("t*") if path.is_dir()):
        faults += _damage(folder, known.get(folder.name), sweep.spec.train.steps)
    return faults


def _damage(folder: Path, trial: TrialResult | None, steps: int) -> list[Fault]:
    state, marked = ended(folder), (folder / END).exists()
    broken: list[tuple[str, str]] = []
    if marked and state is None:
        broken.append((END, "must tell how the trial ended"))
    if (marked or saved(folder)) and (trial is None or not trial.knobs):
        broken.append(("params.json", "must hold the configuration of the trial, which has been trained"))
    if state is not None and state != "failed" and trial is not None:
        last = max((report["steps"] for report in trial.reports), default=0)
        if not last or (state == "finished" and last < steps):
            told = f"to its end, step {steps}" if state == "finished" else "to its end"
            broken.append(("result.json", f"must hold the reports of the trial, {told}"))
    again = f"; is missing or damaged: put it back, or delete {folder} to have the trial run anew"
    return [Fault(str(folder / name), rule + again, ABSENT) for name, rule in broken]


def differences(before: SweepSpec, now: SweepSpec, where: str) -> list[Fault]:
    """What keeps a sweep that began as ``before`` from going on as ``now``: each field that makes other trials."""
    faults: list[Fault] = []
    if list(before.space) != list(now.space) and sorted(before.space) == sorted(now.space):
        rule = (
            f"must be in the order of the sweep that is resumed, which decides what is drawn: {', '.join(before.space)}"
        )
        faults.append(Fault(f"{where}: space", rule, ", ".join(now.space)))
    old, new = _flat(before), _flat(now)
    for name in dict.fromkeys((*old, *new)):
        if old.get(name, ABSENT) != new.get(name, ABSENT):
            rule = f"must be {_told(old.get(name, ABSENT))}, as in the sweep that is resumed"
            faults.append(Fault(f"{where}: {name}", rule, new.get(name, ABSENT)))
    return faults


def _told(value: object) -> str:
    return "left out" if value is ABSENT else repr(value)


def _flat(spec: SweepSpec) -> dict[str, object]:
    """Field -> value, two levels deep, of what trials depend on."""
    flat: dict[str, object] = {}
    for name, value in spec.model_dump(mode="json").items():
        inner = {f"{name}.{key}": one for key, one in value.items()} if isinstance(value, dict) else {name: value}
        flat.update({key: one for key, one in inner.items() if key not in FREE and name not in FREE})
    return flat


def _steps(report: dict[str, int]) -> int:
    return report["steps"]
