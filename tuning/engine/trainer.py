"""Trains a pack: several trials on one frozen base, one forward and backward pass for all. Knows nothing of Ray.

Each pass takes one micro-batch of every slot that is given work. A slot's loss is divided by the number of targets of
its whole optimizer step (all its micro-batches), its gradient is its own, and it steps when its own accumulation is
full; who shares the pass changes nothing but float rounding. Slots join and leave between passes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cluster.errors import Fault, InputError
from tuning.engine import checkpoint
from tuning.engine.base import Base, select_targets
from tuning.engine.batch import Micro, PackedBatch, count_targets, pack_rows
from tuning.engine.budget import TokenBudget
from tuning.engine.data import Tokens
from tuning.engine.losses import losses_and_gradients, summed_losses
from tuning.engine.pack import Pack
from tuning.engine.slot import Slot, gradient_norms
from tuning.engine.trouble import free_memory
from tuning.spec import TrialConfig

SlotId = int


@dataclass(slots=True)
class StepReport:
    """What one optimizer step of one slot was like."""

    slot: SlotId
    step: int
    """Optimizer steps taken so far."""
    loss: float
    """Mean over the step's targets; not finite if the trial diverged."""
    grad_norm: float
    """Before clipping."""
    tokens: int
    """Tokens of the step, targets or not, without padding."""
    seconds: float
    """Wall time of the step's passes, shared with the rest of the pack."""
    diverged: bool


@dataclass(slots=True)
class _Running:
    """A slot and the optimizer step that it is in."""

    slot: Slot
    rows: list[list[int]] = field(default_factory=list[list[int]])
    """Micro-batches of this step that are still to come."""
    targets: int = 0
    """Targets of all micro-batches of this step."""
    loss_sum: float = 0.0
    tokens: int = 0
    seconds: float = 0.0

    def give_up(self) -> None:
        """Be as before the step that was begun."""
        self.rows = []
        self.slot.rewind()


class Trainer:
    """One base and the slots on it. Not thread-safe: one thread attaches, steps and detaches."""

    def __init__(self, base: Base, train: Tokens, evaluation: Tokens, *, packing: bool = False) -> None:
        """``packing``: lay rows end to end.

        Raises:
            InputError: this base would carry one row into the next.
        """
        if packing and not base.can_lie_end_to_end:
            rule = "must be false for this base: rows laid end to end give other results than rows apart"
            raise InputError([Fault("data.packing", rule, packing)])
        self.base, self.train, self.evaluation = base, train, evaluation
        self._end_to_end = packing
        self._budget = TokenBudget(end_to_end=packing)
        self._eval_budget = TokenBudget(end_to_end=packing)
        self.failures: dict[SlotId, Exception] = {}
        """What went wrong with single slots, and with nobody else, in the last ``step`` or ``evaluate``."""
        self.filled = 0, 0
        """Tokens in the training passes so far, and places for tokens; what held none was padding."""
        self.notes: list[str] = list(base.notes)
        """What the user should hear; whoever tells it takes it from here."""
        self._packs: list[Pack[SlotId]] = []
        """Those of the last passes; a slot is in one of them at most, so that they are never more memory than one of
        all slots."""
        self._filled: list[Pack[SlotId]] = []
        """Those whose stacks hold the present weights, during an evaluation."""
        self._shapes = {name: _shape(site.base) for name, site in base.sites.items()}
        self._running: dict[SlotId, _Running] = {}
        self._next_id = 0

    @property
    def slots(self) -> dict[SlotId, Slot]:
        """The attached slots."""
        return {slot_id: running.slot for slot_id, running in self._running.items()}

    def attach(self, config: TrialConfig, state: dict[str, Any] | None = None) -> SlotId:
        """Give a trial a slot, fresh or from a checkpoint's state; between passes only.

        Raises:
            ValueError: a target module matches nothing.
        """
        return self.add(self.make_slot(config, state))

    def make_slot(self, config: TrialConfig, state: dict[str, Any] | None = None) -> Slot:
        """A slot that is not in any pass yet; from any thread, at any time.

        Raises:
            ValueError: a target module matches nothing.
        """
        targets = select_targets(self.base.sites, config.target_modules)
        shapes = {name: self._shapes[name] for name in targets}
        slot = Slot(config, shapes, self.train, self.base.device)
        if state is not None:
            try:
                slot.restore(state)
            except BaseException:
                slot.release()
                raise
        return slot

    def add(self, slot: Slot) -> SlotId:
        """Let a slot take part in the passes from now on; between passes only."""
        self._next_id += 1
        self._running[self._next_id] = _Running(slot)
        return self._next_id

    def detach(self, slot_id: SlotId) -> None:
        """Free a slot; a slot that is gone already is no error."""
        running = self._running.pop(slot_id, None)
        self._keep_packs(lambda keys: slot_id not in keys)
        if running is not None:
            running.slot.release()

    def free_memory(self) -> None:
        """Give back all that is not needed between two passes; between passes only."""
        self._packs, self._filled = [], []
        free_memory()

    def step(self, slot_ids: Collection[SlotId] | None = None) -> list[StepReport]:
        """One pass for the given slots (default: all that have steps left); reports of the slots that finished an
        optimizer step. A slot that fails alone is in ``failures``.

        Whatever is raised is of the whole pass: then its slots have given up the step that they were in.
        """
        self.failures = {}
        chosen = list(self._running) if slot_ids is None else list(slot_ids)
        pack = {slot_id: self._running[slot_id] for slot_id in chosen if not self._running[slot_id].slot.finished}
        if not pack:
            return []
        began = time.perf_counter()
        for running in pack.values():
            self._begin_step(running)
        micros = [Micro(slot_id, running.rows[0]) for slot_id, running in pack.items()]
        with _given_up_on_error(pack.values()):
            self._note(self._budget.run(micros, self.train, self._forward_backward, self._fail))
        seconds = time.perf_counter() - began
        full: dict[SlotId, _Running] = {}
        for slot_id, running in pack.items():
            if slot_id in self.failures:
                continue
            running.seconds += seconds
            running.tokens += sum(self.train.length(row) for row in running.rows.pop(0))
            running.slot.micro_steps += 1
            if not running.rows or running.slot.diverged:
                full[slot_id] = running
        with _given_up_on_error(pack.values()):
            norms = gradient_norms([running.slot for running in full.values()])
        reports: list[StepReport] = []
        for (slot_id, running), norm in zip(full.items(), norms, strict=True):
            try:
                reports.append(self._end_step(slot_id, running, norm))
            except Exception as error:  # noqa: BLE001 - such as no memory for its optimizer's state; not the others' fault
                self._fail(slot_id, error)
        return reports

    def evaluate(self, slot_ids: Sequence[SlotId]) -> dict[SlotId, float]:
        """Mean loss of each slot over the targets of the evaluation rows; infinite where the trial diverged.

        Slots with the same evaluation batch size share passes, as in training. A slot that fails alone is in
        ``failures``.
        """
        self.failures = {}
        self._filled = []  # by an evaluation that was broken off
        losses = dict.fromkeys(slot_ids, math.inf)
        sizes: dict[int, list[SlotId]] = {}
        for slot_id in slot_ids:
            slot = self._running[slot_id].slot
            if not slot.diverged:
                sizes.setdefault(slot.config.eval_batch_size, []).append(slot_id)
        # Rows of like length together: less padding. The order does not change a sum.
        order = sorted(range(len(self.evaluation)), key=self.evaluation.length)
        for size, members in sizes.items():
            sums = dict.fromkeys(members, 0.0)
            for first in range(0, len(order), size):
                rows = order[first : first + size]
                for slot_id, loss in self._evaluate_together(rows, members).items():
                    sums[slot_id] += loss
            total = count_targets(self.evaluation, order)
            for slot_id, loss in sums.items():
                losses[slot_id] = loss / total if math.isfinite(loss) else math.inf
        self._filled = []
        return losses

    def snapshot(self, slot_id: SlotId) -> checkpoint.Snapshot:
        """Copy the slot's state, to be written while training goes on; between passes only."""
        return checkpoint.Snapshot.of(self._running[slot_id].slot)

    def save(self, slot_id: SlotId, folder: Path, base_model: str, revision: str | None) -> None:
        """Write the slot's adapter and state to ``folder`` (see ``checkpoint``)."""
        checkpoint.save(self.snapshot(slot_id), folder, base_model, revision, self.base.sites)

    def _evaluate_together(self, rows: list[int], members: list[SlotId]) -> dict[SlotId, float]:
        """Summed loss of each member over the same rows."""
        sums = dict.fromkeys(members, 0.0)

        def add(micros: list[Micro[SlotId]]) -> None:
            for slot_id, loss in self._evaluate_rows(micros).items():
                sums[slot_id] += loss

        micros = [Micro(slot_id, rows) for slot_id in members if slot_id not in self.failures]
        if micros:
            self._note(self._eval_budget.run(micros, self.evaluation, add, self._fail))
        return sums

    def _fail(self, slot_id: SlotId, error: Exception) -> None:
        self.failures[slot_id] = error
        self._running[slot_id].give_up()

    def _note(self, note: str | None) -> None:
        if note is not None:
            self.notes.append(note)

    def _begin_step(self, running: _Running) -> None:
        """Draw all micro-batches of the next optimizer step, unless the slot is in the middle of one."""
        if running.rows:
            return
        config = running.slot.config
        running.rows = [running.slot.stream.take(config.batch_size) for _ in range(config.accumulation)]
        running.targets = sum(count_targets(self.train, rows) for rows in running.rows)
        running.loss_sum, running.tokens, running.seconds = 0.0, 0, 0.0

    def _end_step(self, slot_id: SlotId, running: _Running, norm: float) -> StepReport:
        slot = running.slot
        norm = math.nan if slot.diverged else slot.optimizer_step(norm)
        if slot.diverged:
            running.rows.clear()
            slot.grad.zero_()
        loss = running.loss_sum / running.targets
        if slot.diverged and math.isfinite(loss):  # the gradient was not
            loss = math.inf
        return StepReport(slot_id, slot.step, loss, norm, running.tokens, running.seconds, slot.diverged)

    def _forward_backward(self, micros: list[Micro[SlotId]]) -> None:
        """Add the loss and the gradient of one micro-batch, or a part of it, to each slot's own.

        A slot whose loss is not finite is marked and gets no gradient. Nothing is added where this raises.
        """
        pack, batch = self._pack_up(micros, self.train)
        shares = {key: batch.shares[key] for key in pack.keys}
        self.base.set_stacks(pack.prepare({key: share.cells for key, share in shares.items()}))
        try:
            with self.base.laid_end_to_end(batch.rows):
                features = self.base.features(batch.ids, batch.positions)
                totals = [self._running[key].targets for key in pack.keys]
                losses, grads = losses_and_gradients(self.base.head, features.detach(), list(shares.values()), totals)
                sound = {key: math.isfinite(loss) for key, loss in zip(pack.keys, losses, strict=True)}
                grad_features = torch.zeros_like(features)
                flat = grad_features.view(-1, features.shape[-1])
                for key, grad in zip(pack.keys, grads, strict=True):
                    if sound[key]:
                        flat[shares[key].places] = grad
                features.backward(grad_features)
            pack.collect({key for key, is_sound in sound.items() if is_sound})
        finally:
            self.base.set_stacks({})
        tokens = sum(self.train.length(row) for micro in micros for row in micro.rows)
        self.filled = self.filled[0] + tokens, self.filled[1] + batch.ids.numel()  # at one stroke: others read it
        for key, loss in zip(pack.keys, losses, strict=True):
            running = self._running[key]
            running.loss_sum += loss * running.targets
            running.slot.diverged |= not sound[key]

    def _pack_up(self, micros: list[Micro[SlotId]], data: Tokens) -> tuple[Pack[SlotId], PackedBatch[SlotId]]:
        """The stacks of the slots and their batch, laid out alike."""
        by_key = {micro.key: micro for micro in micros}
        slots = {key: self._running[key].slot for key in by_key}
        rows = {key: len(micro.rows) for key, micro in by_key.items()}
        pack = next((pack for pack in self._packs if pack.fits(slots, rows)), None)
        if pack is None:
            # Those of other company go first: the memory of both is never needed at once.
            self._keep_packs(slots.keys().isdisjoint)
            pack = Pack(slots, rows, data.mean_length, self.base.dtype)
            self._packs.append(pack)
        groups = [[by_key[key] for key in group.slots] for group in pack.groups]
        batch = pack_rows(data, groups, self.base.device, end_to_end=self._end_to_end)
        pack.place(batch.stretches)
        return pack, batch

    def _keep_packs(self, is_kept: Callable[[list[SlotId]], bool]) -> None:
        self._packs = [pack for pack in self._packs if is_kept(pack.keys)]
        self._filled = [pack for pack in self._filled if is_kept(pack.keys)]

    @torch.no_grad()
    def _evaluate_rows(self, micros: list[Micro[SlotId]]) -> dict[SlotId, float]:
        """Summed loss of each slot over its rows."""
        pack, batch = self._pack_up(micros, self.evaluation)
        is_filled = any(pack is one for one in self._filled)
        self.base.set_stacks(pack.prepare(copy=not is_filled))
        if not is_filled:
            self._filled.append(pack)
        try:
            with self.base.laid_end_to_end(batch.rows):
                features = self.base.features(batch.ids, batch.positions)
            losses = summed_losses(self.base.head, features, [batch.shares[key] for key in pack.keys])
            return dict(zip(pack.keys, losses, strict=True))
        finally:
            self.base.set_stacks({})


@contextmanager
def _given_up_on_error(running: Collection[_Running]) -> Generator[None]:
    """What is raised in the block finds the slots as they were before the step that they are in."""
    try:
        yield
    except BaseException:
        for one in running:
            one.give_up()
        raise


def _shape(linear: Any) -> tuple[int, int]:
    return int(linear.out_features), int(linear.in_features)
