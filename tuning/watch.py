"""What the driver does while Tune searches: keep the record, tell the display, and notice Ctrl-C."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.tune import Callback, Stopper
from ray.tune.experiment import Trial

from tuning.host import UNDELETED, UNSAVED, BrokerHandle
from tuning.ledger import Ledger
from tuning.live import Progress
from tuning.results import COLUMNS, SweepRecord
from tuning.spec import SweepSpec
from tuning.trial import NOTES, TRIAL_KEY

NOTES_EVERY_S = 2.0
RECORD_EVERY_S = 5.0
"""Seconds after which the record is written again when a trial reports; so much of a time budget a killed driver
forgets."""

logger = logging.getLogger(__name__)
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
    """Follows the trials through Tune's callbacks: enters what they do in the sweep's folder, and passes on one row for
    each, and what the base measures.

    A disk that is full does not stop the training: that is told once, and trials go on as long as their checkpoints are
    not needed. The sweep is ended, to be resumed, when a trial's last one cannot be written, or its reports.
    """

    def __init__(
        self,
        spec: SweepSpec,
        record: SweepRecord,
        broker: BrokerHandle,
        ledger: Ledger,
        write: Callable[[SweepRecord], None],
        progress: Progress | None,
        rows: list[dict[str, Any]],
    ) -> None:
        """``rows`` are those of trials that have ended before."""
        self.record = record
        self.has_result = bool(rows)
        self.first_error: Path | None = None
        self.trouble: str | None = None
        self._metric, self._steps = spec.search.metric, spec.train.steps
        self._broker, self._ledger, self._write, self._progress = broker, ledger, write, progress
        self._rows: dict[str, dict[str, Any]] = {row["trial"]: row for row in rows}
        self._told: set[str] = set()
        self._unsaved: set[str] = set()
        self._told_unsaved = self._told_undeleted = False
        self._asked: Any = None
        self._notes: Any = None
        self._notes_asked = 0.0
        self._began = self._written = time.monotonic()
        if record.room is not None and record.room.warning is not None:
            self.say(record.room.warning)

    def __getstate__(self) -> dict[str, Any]:
        """Empty: Tune pickles its callbacks into the experiment's snapshot, and a terminal does not go there."""
        return {}

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Tune has looked at all that happened; now and then, see what hosts say whose trials do not report yet."""
        if self._notes is None:
            if time.monotonic() - self._notes_asked < NOTES_EVERY_S:
                return
            self._notes_asked = time.monotonic()
            self._notes = self._broker.notes.remote()
        if ray.wait([self._notes], timeout=0)[0]:
            with contextlib.suppress(RayError):  # of a broker that is started again
                for note in ray.get(self._notes):
                    self.say(note)
            self._notes = None

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial got its resources."""
        row = self._row(trial)
        row["state"] = "running"
        with self._needs_disk():
            self._ledger.begin(row["trial"], trial.config)
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
        self._hear(row["trial"], result)
        with self._needs_disk():
            self._ledger.report(row["trial"], result)
            if time.monotonic() - self._written > RECORD_EVERY_S:
                self._written = time.monotonic()
                self._write(self._so_far())
        self._tell()

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial came to its end, or was stopped."""
        row = self._row(trial)
        if row["state"] != "diverged":
            row["state"] = "finished" if (row.get("steps") or 0) >= self._steps else "stopped"
        if row["state"] == "finished" and row["trial"] in self._unsaved:
            row["state"] = "stopped"  # it is to go on from its last checkpoint
        else:
            with self._needs_disk():
                self._hear_undeleted(self._ledger.end(row["trial"], row["state"]))
        self._tell()

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial failed for good; a resumed sweep tries it again."""
        row = self._row(trial)
        row["state"] = "failed"
        self._broker.detach_trial.remote(row["trial"])  # its process may have been killed, and left its slot taken
        if trial.error_file:
            with self._needs_disk():
                copy = self._ledger.fail(row["trial"], Path(trial.error_file))
                self.first_error = self.first_error or copy
        self._tell()

    def _hear(self, name: str, result: dict[str, Any]) -> None:
        """What a result says beside its numbers."""
        self._hear_undeleted(result.get(UNDELETED))
        unsaved: str | None = result.get(UNSAVED)
        notes: str = result.get(NOTES, "")
        for note in notes.splitlines():
            self.say(note)
        if unsaved is None:
            self._unsaved.discard(name)
            return
        if not self._told_unsaved:
            self._told_unsaved = True
            self.say(f"{unsaved}; training goes on, and the last checkpoints stay")
        self._unsaved.add(name)
        if result["done"]:
            self._give_up(unsaved)

    def _hear_undeleted(self, trouble: str | None) -> None:
        if trouble is not None and not self._told_undeleted:
            self._told_undeleted = True
            self.say(f"{trouble}; training goes on")

    def say(self, text: str) -> None:
        """Tell the user, once: every host may tell the same."""
        if text in self._told:
            return
        self._told.add(text)
        if self._progress is not None:
            self._progress.note(text)
        else:
            logger.warning(text)

    def _give_up(self, trouble: str) -> None:
        """End the sweep; what is there is kept."""
        self.trouble = self.trouble or trouble
        _interrupted.set()

    @contextmanager
    def _needs_disk(self) -> Generator[None]:
        try:
            yield
        except OSError as error:
            self._give_up(f"cannot write {error.filename or 'a result'}: {error.strerror or error}")

    def _so_far(self) -> SweepRecord:
        seconds = self.record.resumed_after + time.monotonic() - self._began
        self.record = self.record.model_copy(update={"seconds": round(seconds, 2)})
        return self.record

    def finish(self) -> SweepRecord:
        """The record with what the base measured and how each trial ended."""
        if self.has_result:
            self._learn_base(timeout_s=10)
        # Tune does not say how trials ended that it stopped all at once.
        states = {
            name: "stopped" if row["state"] in ("waiting", "running") else row["state"]
            for name, row in self._rows.items()
        }
        return self._so_far().model_copy(update={"states": states, "trouble": self.trouble})

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
            with self._needs_disk():
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
            self._progress.trials(self.record, [dict(row) for row in self._rows.values()])
