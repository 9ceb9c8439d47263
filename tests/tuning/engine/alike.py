"""How alike two trainings of a trial are: the bounds of the equivalence tests, and what they measure by them.

float32 compute on both sides, on the same NF4 weights. Every step's loss is compared to LOSS_TOLERANCE relative, and
every A and B to ``weight_tolerance`` of how far training moved it (Frobenius norms). Adam divides each element by its
own size, so elements whose gradient is rounding noise may move by a whole step in either direction: a bound on single
elements would say less than this one. With 8-bit state a last bit of rounding can tip an element into the next of its
256 codes, which is why that bound is wider.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from tests.tuning.engine.peft_loop import Mistakes, PeftLoop, Weights
from tuning.engine.base import Base
from tuning.engine.data import Tokens
from tuning.engine.slot import Slot
from tuning.engine.trainer import Trainer
from tuning.spec import BaseSpec, TrialConfig

LOSS_TOLERANCE = 1e-4
WEIGHT_TOLERANCE = 1e-4
WEIGHT_TOLERANCE_8BIT = 5e-3


def weight_tolerance(config: TrialConfig) -> float:
    return WEIGHT_TOLERANCE_8BIT if config.optimizer == "paged_adamw_8bit" else WEIGHT_TOLERANCE


class Trained(NamedTuple):
    losses: list[float]
    weights: Weights


class Distance(NamedTuple):
    loss: float
    """Largest relative difference of a step's loss."""
    weights: float
    """Largest distance of a matrix, relative to how far training moved it."""


def distance(ours: Trained, theirs: Trained, first: Weights) -> Distance:
    assert ours.weights.keys() == theirs.weights.keys()
    losses = max((abs(a - b) / abs(b) for a, b in zip(ours.losses, theirs.losses, strict=True)), default=0.0)
    return Distance(losses, apart(ours.weights, theirs.weights, first))


def apart(ours: Weights, theirs: Weights, first: Weights) -> float:
    """``Distance.weights``; infinite where one has moved and the other has not."""
    worst = 0.0
    for site, pair in theirs.items():
        for mine, yours, start in zip(ours[site], pair, first[site], strict=True):
            gap, moved = float((mine - yours).norm()), float((yours - start).norm())
            worst = max(worst, gap / moved if moved else float("inf") if gap else 0.0)
    return worst


def copied(weights: Weights) -> Weights:
    return {site: (a.clone(), b.clone()) for site, (a, b) in weights.items()}


def gradients(slot: Slot) -> Weights:
    """A slot's gradient, cut as its weights are cut from its parameters."""

    def cut(weight: Tensor) -> Tensor:
        return slot.grad.as_strided(weight.shape, weight.stride(), weight.storage_offset())

    assert slot.flat.storage_offset() == slot.grad.storage_offset() == 0
    return {site: (cut(a), cut(b)) for site, (a, b) in slot.weights().items()}


class Alone:
    """Trains single trials on a base by peft and bitsandbytes, from the weights that a slot of ours begins with."""

    def __init__(self, spec: BaseSpec, base: Base, data: tuple[Tokens, Tokens]) -> None:
        self._spec, self._base, self._data = spec, base, data
        self._done: dict[str, Trained] = {}

    def first(self, config: TrialConfig) -> Weights:
        """The weights before the first step."""
        trainer = Trainer(self._base, *self._data)
        slot = trainer.attach(config)
        return copied(trainer.slots[slot].weights())

    def loop(self, config: TrialConfig, wrong: Mistakes | None = None, first: Weights | None = None) -> PeftLoop:
        """The loop before its first step."""
        first = first or self.first(config)
        return PeftLoop(self._spec.model, config, self._data[0], first, wrong, device=self._base.device)

    def train(self, config: TrialConfig, wrong: Mistakes | None = None, steps: int | None = None) -> Trained:
        """The trial, or its first ``steps``; without mistakes only once."""
        key = f"{config.model_dump_json()} {steps}"
        if wrong is not None:
            return Trained(*self.loop(config, wrong).train(steps))
        if key not in self._done:
            self._done[key] = Trained(*self.loop(config).train(steps))
        return self._done[key]
