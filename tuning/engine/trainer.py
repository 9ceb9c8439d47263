"""Trains a pack: several trials on one frozen base, one forward and backward pass for all. Knows nothing of Ray.

Each pass takes one micro-batch of every slot that is given work. A slot's loss is divided by the number of targets of
its whole optimizer step (all its micro-batches), its gradient is its own, and it steps when its own accumulation is
full; who shares the pass changes nothing but float rounding. Slots join and leave between passes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tuning.engine import checkpoint
from tuning.engine.base import Base, select_targets
from tuning.engine.batch import PackedBatch, Share, count_targets, pack_rows
from tuning.engine.data import Tokens
from tuning.engine.lora import Lane
from tuning.engine.slot import Slot
from tuning.spec import TrialConfig

SlotId = int
LOGIT_ROWS = 2048
"""Targets whose logits are in memory at once, in float32: 1 GiB at a vocabulary of 128,000."""


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


class Trainer:
    """One base and the slots on it. Not thread-safe: one thread attaches, steps and detaches."""

    def __init__(self, base: Base, train: Tokens, evaluation: Tokens) -> None:
        self.base, self.train, self.evaluation = base, train, evaluation
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
        targets = select_targets(self.base.sites, config.target_modules)
        shapes = {name: self._shapes[name] for name in targets}
        slot = Slot(config, shapes, self.train, self.base.dtype, self.base.device)
        if state is not None:
            slot.restore(state)
        self._next_id += 1
        self._running[self._next_id] = _Running(slot)
        return self._next_id

    def detach(self, slot_id: SlotId) -> None:
        """Free a slot; a slot that is gone already is no error."""
        self._running.pop(slot_id, None)

    def step(self, slot_ids: Collection[SlotId] | None = None) -> list[StepReport]:
        """One pass for the given slots (default: all that have steps left); reports of the slots that finished an
        optimizer step.
        """
        chosen = list(self._running) if slot_ids is None else list(slot_ids)
        pack = {slot_id: self._running[slot_id] for slot_id in chosen if not self._running[slot_id].slot.finished}
        if not pack:
            return []
        began = time.perf_counter()
        for running in pack.values():
            self._begin_step(running)
        batch = pack_rows(self.train, {slot_id: running.rows[0] for slot_id, running in pack.items()}, self.base.device)
        self._forward_backward(pack, batch)
        seconds = time.perf_counter() - began
        reports: list[StepReport] = []
        for slot_id, running in pack.items():
            running.seconds += seconds
            running.tokens += sum(self.train.length(row) for row in running.rows.pop(0))
            running.slot.micro_steps += 1
            if not running.rows or running.slot.diverged:
                reports.append(self._end_step(slot_id, running))
        return reports

    def evaluate(self, slot_ids: Sequence[SlotId]) -> dict[SlotId, float]:
        """Mean loss of each slot over the targets of the evaluation rows; infinite where the trial diverged.

        Slots with the same evaluation batch size share passes, as in training.
        """
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
                for slot_id, loss in self._evaluate_rows(rows, members).items():
                    sums[slot_id] += loss
            total = count_targets(self.evaluation, order)
            for slot_id, loss in sums.items():
                losses[slot_id] = loss / total if math.isfinite(loss) else math.inf
        return losses

    def snapshot(self, slot_id: SlotId) -> checkpoint.Snapshot:
        """Copy the slot's state, to be written while training goes on; between passes only."""
        return checkpoint.Snapshot.of(self._running[slot_id].slot)

    def save(self, slot_id: SlotId, folder: Path, base_model: str, revision: str | None) -> None:
        """Write the slot's adapter and state to ``folder`` (see ``checkpoint``)."""
        checkpoint.save(self.snapshot(slot_id), folder, base_model, revision, self.base.sites)

    def _begin_step(self, running: _Running) -> None:
        """Draw all micro-batches of the next optimizer step, unless the slot is in the middle of one."""
        if running.rows:
            return
        config = running.slot.config
        running.rows = [running.slot.stream.take(config.batch_size) for _ in range(config.accumulation)]
        running.targets = sum(count_targets(self.train, rows) for rows in running.rows)
        running.loss_sum, running.tokens, running.seconds = 0.0, 0, 0.0

    def _end_step(self, slot_id: SlotId, running: _Running) -> StepReport:
        slot = running.slot
        norm = math.nan if slot.diverged else slot.optimizer_step()
        if slot.diverged:
            running.rows.clear()
            slot.grad.zero_()
        loss = running.loss_sum / running.targets
        if slot.diverged and math.isfinite(loss):  # the gradient was not
            loss = math.inf
        return StepReport(slot_id, slot.step, loss, norm, running.tokens, running.seconds, slot.diverged)

    def _forward_backward(self, pack: dict[SlotId, _Running], batch: PackedBatch[SlotId]) -> None:
        """Add the gradients of one micro-batch to each slot's own; a slot whose loss is not finite is marked and adds
        none.
        """
        slots = {slot_id: running.slot for slot_id, running in pack.items()}
        self.base.set_lanes(_lanes(slots, batch.shares, training=True))
        try:
            features = self.base.features(batch.ids)
            grad_features = torch.zeros_like(features)
            for slot_id, running in pack.items():
                share = batch.shares[slot_id]
                loss, grad = self._loss_and_gradient(features.detach(), share, running.targets)
                running.loss_sum += loss * running.targets
                if math.isfinite(loss):
                    grad_features[share.rows, share.positions] = grad
                else:
                    running.slot.diverged = True
            features.backward(grad_features)
        finally:
            self.base.set_lanes({})

    def _loss_and_gradient(self, features: Tensor, share: Share, total: int) -> tuple[float, Tensor]:
        """A slot's summed loss over ``total``, and its gradient by the features of its targets (n d).

        One slot at a time, targets only: the logits of a whole pack would be its largest tensor.
        """
        picked = features[share.rows, share.positions]
        grads, summed = list[Tensor](), 0.0
        for part, targets in zip(picked.split(LOGIT_ROWS), share.targets.split(LOGIT_ROWS), strict=True):
            part.requires_grad_()
            loss = functional.cross_entropy(self.base.head(part).float(), targets, reduction="sum") / total
            grads += torch.autograd.grad(loss, part)
            summed += float(loss.detach())
        return summed, torch.cat(grads)

    @torch.no_grad()
    def _evaluate_rows(self, rows: list[int], members: list[SlotId]) -> dict[SlotId, float]:
        """Summed loss of each member over the same rows."""
        batch = pack_rows(self.evaluation, dict.fromkeys(members, rows), self.base.device)
        slots = {slot_id: self._running[slot_id].slot for slot_id in members}
        self.base.set_lanes(_lanes(slots, batch.shares, training=False))
        try:
            features = self.base.features(batch.ids)
            losses: dict[SlotId, float] = {}
            for slot_id in members:
                share = batch.shares[slot_id]
                picked = features[share.rows, share.positions]
                parts = zip(picked.split(LOGIT_ROWS), share.targets.split(LOGIT_ROWS), strict=True)
                losses[slot_id] = sum(
                    float(functional.cross_entropy(self.base.head(part).float(), targets, reduction="sum"))
                    for part, targets in parts
                )
            return losses
        finally:
            self.base.set_lanes({})


def _lanes(slots: dict[SlotId, Slot], shares: dict[SlotId, Share], *, training: bool) -> dict[str, list[Lane]]:
    """Site -> the lanes of all slots that have an adapter there."""
    lanes: dict[str, list[Lane]] = {}
    for slot_id, slot in slots.items():
        share = shares[slot_id]
        for name, lane in slot.lanes(share.start, share.stop, share.tokens, training=training):
            lanes.setdefault(name, []).append(lane)
    return lanes


def _shape(linear: Any) -> tuple[int, int]:
    return int(linear.out_features), int(linear.in_features)
