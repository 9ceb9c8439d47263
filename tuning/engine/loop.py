"""The thread that owns a trainer: trials ask from other threads, passes are packed from whoever is waiting.

A trial asks for some steps (``advance``), gets its report, and needs a moment to come back for more. So that a pack
does not run half empty meanwhile, the loop waits up to ``GATHER_S`` for a slot that has just reported; how long it
waits changes the speed, never a result.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tuning.engine import checkpoint
from tuning.engine.slot import Slot
from tuning.engine.trainer import SlotId, StepReport, Trainer
from tuning.engine.trouble import has_lost_device, is_out_of_memory
from tuning.spec import TrialConfig

GATHER_S = 0.3
T = TypeVar("T")


@dataclass(slots=True)
class TrialReport:
    """What a trial hears after some steps."""

    steps: int
    """Optimizer steps taken so far."""
    train_loss: float
    """Mean over the steps since the last report."""
    eval_loss: float
    """Mean over the evaluation targets; infinite if the trial diverged."""
    grad_norm: float
    """Of the last step, before clipping."""
    tokens_per_second: float
    """Training tokens of this trial over the wall time of its passes since the last report."""
    adapter_parameters: int
    diverged: bool
    notes: list[str] = field(default_factory=list[str])
    """What the user should hear, of whichever trial."""

    def as_dict(self) -> dict[str, Any]:
        """The report as Tune takes it."""
        return asdict(self)


class _Goal:
    """A slot on its way to the step that its trial asked for."""

    def __init__(self, target: int, future: Future[TrialReport]) -> None:
        self.target, self.future = target, future
        self.steps: list[StepReport] = []


class TrainerLoop:
    """Runs ``make_trainer()`` and then its passes in one thread of its own; every method may be called from any
    thread.
    """

    def __init__(
        self,
        make_trainer: Callable[[], Trainer],
        before_pass: Callable[[], None] | None = None,
        lost_device: Callable[[BaseException], None] | None = None,
    ) -> None:
        """``before_pass`` is called in the thread before each pass; ``lost_device`` at an error after which nothing in
        this process can use the device, and before anybody else hears of it.
        """
        self._before_pass, self._lost_device = before_pass, lost_device
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._goals: dict[SlotId, _Goal] = {}
        self._idle_since: dict[SlotId, float] = {}
        self._attaching, self._last_attached = threading.Lock(), threading.Event()
        self._last_attached.set()
        self._stopped = False
        self.ready: Future[Trainer] = Future()
        self._thread = threading.Thread(target=self._run, args=(make_trainer,), name="trainer", daemon=True)
        self._thread.start()

    def attach(self, config: TrialConfig, state: dict[str, Any] | None = None) -> SlotId:
        """Give a trial a slot, going on from a checkpoint's ``state`` if given.

        The slot is made in the caller's thread: the first weights of a large one take seconds, and passes go on. Slots
        join in the order in which they were asked for: whom ASHA stops depends on who reports first.

        Raises:
            ValueError: a target matches nothing.
        """
        with self._attaching:
            before, self._last_attached = self._last_attached, threading.Event()
            joined = self._last_attached
        try:
            trainer = self.ready.result()
            slot = self._make_slot(trainer, config, state)
            before.wait()
            return self._add(trainer, slot)
        finally:
            before.wait()  # also where this one could not be made: those behind it wait for all before it
            joined.set()

    def _add(self, trainer: Trainer, slot: Slot) -> SlotId:
        """Let it join between two passes."""

        def add() -> SlotId:
            slot_id = trainer.add(slot)
            self._idle_since[slot_id] = time.monotonic()
            return slot_id

        try:
            return self._call(add)
        except BaseException:
            slot.release()
            raise

    def _make_slot(self, trainer: Trainer, config: TrialConfig, state: dict[str, Any] | None) -> Slot:
        """Where memory is short, again between two passes, with what torch held in reserve."""
        try:
            return trainer.make_slot(config, state)
        except RuntimeError as error:
            self._look_at(error)
            if not is_out_of_memory(error):
                raise

        def again() -> Slot:
            trainer.free_memory()
            return trainer.make_slot(config, state)

        return self._call(again)

    def advance(self, slot_id: SlotId, steps: int) -> TrialReport:
        """Train a slot for ``steps`` more steps (fewer if its trial ends first), evaluate it, and report.

        Raises:
            KeyError: there is no such slot.
        """
        future: Future[TrialReport] = Future()

        def enqueue() -> None:
            slot = self._trainer.slots[slot_id]
            self._goals[slot_id] = _Goal(min(slot.step + steps, slot.config.steps), future)

        self._call(enqueue)
        return future.result()

    def save(
        self,
        slot_id: SlotId,
        folder: Path,
        base_model: str,
        revision: str | None,
        report: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a slot's checkpoint (``checkpoint.save``) as it is between two passes; the next passes do not wait for
        the disk.

        Raises:
            KeyError: there is no such slot.
            OSError: it could not be written.
        """
        snapshot = self._call(lambda: self._trainer.snapshot(slot_id))
        checkpoint.save(snapshot, folder, base_model, revision, self._trainer.base.sites, report)

    def detach(self, slot_id: SlotId) -> int:
        """Free a slot; returns how many are still attached."""

        def detach() -> int:
            self._trainer.detach(slot_id)
            self._idle_since.pop(slot_id, None)
            goal = self._goals.pop(slot_id, None)
            if goal is not None:
                goal.future.cancel()
            return len(self._trainer.slots)

        return self._call(detach)

    def stop(self) -> None:
        """End the thread after the pass that runs; waiting trials are cancelled."""
        self._calls.put(None)
        self._thread.join()

    def _call(self, work: Callable[[], T]) -> T:
        """Run ``work`` in the loop's thread between two passes and return what it returns."""
        self.ready.result()
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(work())
            except Exception as error:  # noqa: BLE001 - it belongs to the caller, in whose thread it is raised
                self._look_at(error)
                future.set_exception(error)

        self._calls.put(run)
        return future.result()

    def _run(self, make_trainer: Callable[[], Trainer]) -> None:
        try:
            self._trainer = make_trainer()
        except BaseException as error:  # noqa: BLE001 - every caller gets it
            self.ready.set_exception(error)
            return
        self.ready.set_result(self._trainer)
        while not self._stopped:
            self._serve_calls()
            if self._goals and not self._stopped:
                self._pass()
        for goal in self._goals.values():
            goal.future.cancel()

    def _serve_calls(self) -> None:
        """Answer the calls that wait; block while there is nothing to train, and a moment for slots that are due
        back.
        """
        while True:
            try:
                call = self._calls.get(timeout=self._patience())
            except queue.Empty:
                return
            if call is None:
                self._stopped = True
                return
            call()

    def _patience(self) -> float | None:
        """Seconds to wait for the next call; None: for ever."""
        if not self._goals:
            return None
        now = time.monotonic()
        waits = [GATHER_S - (now - since) for slot_id, since in self._idle_since.items() if slot_id not in self._goals]
        return max([0.0, *waits])

    def _pass(self) -> None:
        """One pass for all slots with a goal; those that reach it are evaluated together and answered."""
        trainer = self._trainer
        if self._before_pass is not None:
            self._before_pass()
        try:
            for report in trainer.step(list(self._goals)):
                self._goals[report.slot].steps.append(report)
            self._answer_failures()
            slots = trainer.slots
            reached = [
                key for key, goal in self._goals.items() if slots[key].finished or slots[key].step >= goal.target
            ]
            losses = trainer.evaluate(reached)
            self._answer_failures()
        except Exception as error:  # noqa: BLE001 - the trials of the pass hear of it; the next ones find a working loop
            self._look_at(error)
            for slot_id in list(self._goals):
                self._answer(slot_id).set_exception(error)
            return
        for slot_id in [key for key in reached if key in self._goals]:
            goal = self._goals[slot_id]
            report = _summarise(goal.steps, losses[slot_id], slots[slot_id])
            report.notes, trainer.notes = trainer.notes, []
            self._answer(slot_id).set_result(report)

    def _answer_failures(self) -> None:
        """Tell the trials that failed alone."""
        for slot_id, error in self._trainer.failures.items():
            self._look_at(error)
            if slot_id in self._goals:
                self._answer(slot_id).set_exception(error)

    def _look_at(self, error: BaseException) -> None:
        if self._lost_device is not None and has_lost_device(error):
            self._lost_device(error)

    def _answer(self, slot_id: SlotId) -> Future[TrialReport]:
        self._idle_since[slot_id] = time.monotonic()
        return self._goals.pop(slot_id).future


def _summarise(steps: list[StepReport], eval_loss: float, slot: Slot) -> TrialReport:
    """One report of the steps since the last; a trial that had ended already has none."""
    seconds = sum(step.seconds for step in steps)
    return TrialReport(
        steps=slot.step,
        train_loss=sum(step.loss for step in steps) / len(steps) if steps else math.nan,
        eval_loss=eval_loss,
        grad_norm=steps[-1].grad_norm if steps else math.nan,
        tokens_per_second=sum(step.tokens for step in steps) / seconds if seconds else 0.0,
        adapter_parameters=slot.num_parameters,
        diverged=slot.diverged,
    )
