"""What the driver does while Tune searches: keep the record, tell the display, and notice Ctrl-C."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.tune import Callback, Stopper
from ray.tune.experiment import Trial

from tuning.host import BrokerHandle
from tuning.results import COLUMNS, SweepRecord
from tuning.spec import SweepSpec
from tuning.trial import TRIAL_KEY

_interrupted = threading.Event()
"""Module state, because Tune pickles its stopper into the experiment's snapshots and an Event cannot be pickled."""


class InterruptStopper(Stopper):
    """Ends all trials once ``interrupt`` was called; their results and checkpoints stay."""

    def __init__(self) -> None:
        _interrupted.clear()

    def interrupt(self) -> None:
        """Safe in a signal handler."""
        _interrupted.set()

    @property
    def interrupted(self) -> bool:
        """True after ``interrupt``."""
        return _interrupted.is_set()

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """No trial is stopped alone."""
        return False

    def stop_all(self) -> bool:
        """Tune asks this between events."""
        return self.interrupted


class SweepWatch(Callback):
    """Follows the trials through Tune's callbacks and passes on one row for each, and what the base measures."""

    def __init__(
        self,
        spec: SweepSpec,
        record: SweepRecord,
        broker: BrokerHandle,
        write: Callable[[SweepRecord], None],
        progress: Callable[[SweepRecord, list[dict[str, Any]]], None] | None,
    ) -> None:
        self.record = record
        self.has_result = False
        self.first_error: Path | None = None
        self._metric, self._steps = spec.search.metric, spec.train.steps
        self._broker, self._write, self._progress = broker, write, progress
        self._rows: dict[str, dict[str, Any]] = {}
        self._asked: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """Empty: Tune pickles its callbacks into the experiment's snapshot, and a terminal does not go there."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial got its resources."""
        self._row(trial)["state"] = "running"
        self._tell()

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """A trial reported."""
        self.has_result = True
        self._learn_base(timeout_s=0)
        row = self._row(trial)
        row.update({column: result[column] for column in COLUMNS})
        if result["diverged"]:
            row["state"] = "diverged"
        self._tell()

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial came to its end, or was stopped."""
        row = self._row(trial)
        if row["state"] != "diverged":
            row["state"] = "finished" if (row.get("steps") or 0) >= self._steps else "stopped"
        self._tell()

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial failed for good."""
        self._row(trial)["state"] = "failed"
        if self.first_error is None and trial.error_file:
            self.first_error = Path(trial.error_file)
        self._tell()

    def finish(self) -> SweepRecord:
        """The record with what the base measured and how each trial ended."""
        if self.has_result:
            self._learn_base(timeout_s=10)
        # Tune does not say how trials ended that it stopped all at once.
        states = {
            name: "stopped" if row["state"] in ("waiting", "running") else row["state"]
            for name, row in self._rows.items()
        }
        return self.record.model_copy(update={"states": states})

    def _learn_base(self, timeout_s: float) -> None:
        """Ask a host once what the base measures, and take the answer when it is there: Tune must not wait for it."""
        if self.record.base:
            return
        if self._asked is None:
            self._asked = self._broker.base_report.remote()
        ready, _ = ray.wait([self._asked], timeout=timeout_s)
        if not ready:
            return
        try:
            report = ray.get(self._asked)
        except RayError:
            report = None  # that host is gone; ask again at the next result
        self._asked = None
        if report:
            self.record = self.record.model_copy(update={"base": report})
            self._write(self.record)

    def _row(self, trial: Trial) -> dict[str, Any]:
        """The trial's row, in the columns of ``results.leaderboard``."""
        name = str(trial.config[TRIAL_KEY])
        if name not in self._rows:
            knobs = {key: value for key, value in trial.config.items() if key != TRIAL_KEY}
            self._rows[name] = {"trial": name, "state": "waiting", **knobs, **dict.fromkeys(COLUMNS)}
        return self._rows[name]

    def _tell(self) -> None:
        if self._progress is not None:
            self._progress(self.record, [dict(row) for row in self._rows.values()])
