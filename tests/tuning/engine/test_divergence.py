"""One trial of a pack is driven to NaN or infinity: it fails alone.

Two comparisons of its neighbours. Against a pack where the same trial in health stands in the sick one's place and ends
in the same pass, their weights are the same bit for bit: every matrix has the same shape in both, and no number of
one trial enters a sum of another. Against a pack without that trial the shapes differ, and with them the order in which
a matrix product adds up: there they are the same to WEIGHT_TOLERANCE of how far training moved them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.tuning.engine.alike import WEIGHT_TOLERANCE, apart, copied
from tests.tuning.engine.conftest import Data
from tests.tuning.engine.peft_loop import Weights
from tuning.engine.base import Base
from tuning.engine.slot import Slot
from tuning.engine.trainer import StepReport, Trainer
from tuning.spec import TrialConfig

MakeTrainer = Callable[[], Trainer]
Injury = Callable[[Slot], None]
HURT_AFTER = 3
"""Passes before the injury; the sick trial, of two micro-batches a step, is then in the middle of its second step."""


def config(**knobs: Any) -> TrialConfig:
    fields: dict[str, Any] = {"rank": 4, "alpha": 8.0, "learning_rate": 1e-2, "batch_size": 2, "steps": 6, **knobs}
    return TrialConfig(**fields)


NEIGHBOURS = {
    "the same shapes": config(accumulation=2, seed=1),
    "the same shapes and dropout": config(dropout=0.3, accumulation=2, seed=2),
    "another rank, as many rows": config(rank=7, seed=3),
    "other rows and targets": config(rank=16, batch_size=5, target_modules="mlp", seed=4),
    "8-bit state": config(rank=16, optimizer="paged_adamw_8bit", seed=5),
}
SICK = config(accumulation=2, steps=2, seed=9)


def set_weights(value: float) -> Injury:
    def injure(slot: Slot) -> None:
        slot.flat.data.fill_(value)

    return injure


def set_one(part: int, value: float) -> Injury:
    """A single element of the first layer's A (0) or B (1)."""

    def injure(slot: Slot) -> None:
        next(iter(slot.weights().values()))[part][3, 1] = value

    return injure


def set_gradient(value: float) -> Injury:
    def injure(slot: Slot) -> None:
        slot.grad[5] = value

    return injure


INJURIES: dict[str, Injury] = {
    "NaN weights": set_weights(math.nan),
    "infinite weights": set_weights(math.inf),
    "weights whose products overflow": set_weights(1e38),
    "one NaN in A": set_one(0, math.nan),
    "one infinity in A": set_one(0, math.inf),
    "one NaN in B": set_one(1, math.nan),
    "one negative infinity in B": set_one(1, -math.inf),
    "NaN gradient": set_gradient(math.nan),
    "infinite gradient": set_gradient(math.inf),
}


class Outcome:
    """What became of the neighbours and of the one in their midst."""

    def __init__(self) -> None:
        self.first: dict[str, Weights] = {}
        self.last: dict[str, Weights] = {}
        self.losses: dict[str, list[float]] = {}
        self.sick: list[StepReport] = []
        self.evaluations: dict[str, float] = {}


def run_pack(trainer: Trainer, sick: TrialConfig | None, place: int, injury: Injury | None) -> Outcome:
    """Train NEIGHBOURS to their ends with ``sick`` among them at ``place``, hurt after HURT_AFTER passes."""
    names = list(NEIGHBOURS)
    pack: list[tuple[str, TrialConfig]] = [(name, NEIGHBOURS[name]) for name in names]
    if sick is not None:
        pack.insert(place, ("sick", sick))
    ids = {name: trainer.attach(trial) for name, trial in pack}
    slots = {name: trainer.slots[slot] for name, slot in ids.items()}
    outcome, passes = Outcome(), 0
    outcome.first = {name: copied(slots[name].weights()) for name in names}
    outcome.losses = {name: [] for name in names}
    of = {slot: name for name, slot in ids.items()}
    while not all(slot.finished for slot in slots.values()):
        if injury is not None and passes == HURT_AFTER:
            injury(slots["sick"])
        for report in trainer.step():
            if of[report.slot] == "sick":
                outcome.sick.append(report)
            else:
                outcome.losses[of[report.slot]].append(report.loss)
        passes += 1
    outcome.last = {name: copied(slots[name].weights()) for name in names}
    losses = trainer.evaluate(list(ids.values()))
    outcome.evaluations = {name: losses[slot] for name, slot in ids.items()}
    return outcome


Healthy = Callable[[TrialConfig, int], Outcome]


def check_failed_alone(outcome: Outcome, steps: int) -> None:
    """One last report that says so, no step after it, no loss that could win a sweep."""
    assert [report.diverged for report in outcome.sick] == [False] * (len(outcome.sick) - 1) + [True]
    assert not math.isfinite(outcome.sick[-1].loss)
    assert outcome.sick[-1].step < steps
    assert outcome.evaluations["sick"] == math.inf
    assert all(math.isfinite(loss) for name, loss in outcome.evaluations.items() if name != "sick")


def check_bitwise(outcome: Outcome, other: Outcome) -> None:
    assert outcome.losses == other.losses
    for name, weights in outcome.last.items():
        for site, pair in weights.items():
            assert all(torch.equal(one, two) for one, two in zip(pair, other.last[name][site], strict=True)), name


@pytest.fixture(scope="module")
def healthy(base: Base, data: Data) -> Healthy:
    """The pack without an injury, once for each trial and place."""
    done: dict[str, Outcome] = {}

    def run(sick: TrialConfig, place: int) -> Outcome:
        key = f"{sick.model_dump_json()} {place}"
        if key not in done:
            done[key] = run_pack(Trainer(base, *data), sick, place, None)
        return done[key]

    return run


@pytest.mark.parametrize("place", [0, 2, len(NEIGHBOURS)], ids=["first", "in the middle", "last"])
@pytest.mark.parametrize("injury", INJURIES)
def test_neighbours_are_those_of_a_healthy_trial_bit_for_bit(
    make_trainer: MakeTrainer, injury: str, place: int, healthy: Healthy
) -> None:
    hurt = run_pack(make_trainer(), SICK, place, INJURIES[injury])
    check_failed_alone(hurt, SICK.steps)
    check_bitwise(hurt, healthy(SICK, place))


@pytest.mark.parametrize(
    "changes",
    [
        {"dropout": 0.3},
        {"optimizer": "paged_adamw_8bit", "rank": 16},
        {"rank": 32, "alpha": 640.0, "rslora": True, "batch_size": 6},
        {"target_modules": ["down_proj"], "max_grad_norm": None},
    ],
    ids=["dropout", "8-bit", "rank 32, 6 rows", "one target, no clipping"],
)
def test_so_they_are_beside_other_sick_trials(
    make_trainer: MakeTrainer, changes: dict[str, Any], healthy: Healthy
) -> None:
    sick = SICK.model_copy(update=changes)
    hurt = run_pack(make_trainer(), sick, 2, set_weights(math.nan))
    check_failed_alone(hurt, sick.steps)
    check_bitwise(hurt, healthy(sick, 2))


@pytest.mark.parametrize(
    ("sick", "injury"),
    [
        (config(learning_rate=1e30, max_grad_norm=None, steps=9), None),
        (config(learning_rate=1e18, max_grad_norm=None, dropout=0.3, rslora=True, steps=9), None),
        (config(steps=9), set_weights(math.nan)),
        (config(steps=9, accumulation=4), set_gradient(math.inf)),
    ],
    ids=["learning rate 1e30", "learning rate 1e18", "NaN weights", "infinite gradient"],
)
def test_neighbours_are_those_of_no_trial_to_rounding(
    make_trainer: MakeTrainer, sick: TrialConfig, injury: Injury | None
) -> None:
    hurt, without = run_pack(make_trainer(), sick, 2, injury), run_pack(make_trainer(), None, 2, None)
    check_failed_alone(hurt, sick.steps)
    for name in NEIGHBOURS:
        tolerance = 50 * WEIGHT_TOLERANCE if name == "8-bit state" else WEIGHT_TOLERANCE
        assert apart(hurt.last[name], without.last[name], without.first[name]) < tolerance, name
        assert hurt.losses[name] == pytest.approx(without.losses[name], rel=1e-4)
        assert hurt.evaluations[name] == pytest.approx(without.evaluations[name], rel=1e-4)
