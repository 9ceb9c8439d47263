"""Packs drawn at random over every knob, whose trials join and leave at random: each is what peft makes of it alone.

The draws are seeded, so the test is the same every time. Bounds as in alike.py; over the first 60 seeds losses agree to
3e-7, weights to 2e-5 (32-bit) and 7e-4 (8-bit).
"""

from __future__ import annotations

import math
import random
from typing import Any, NamedTuple

import pytest

from tests.tuning.engine.alike import LOSS_TOLERANCE, Alone, Trained, copied, distance, weight_tolerance
from tests.tuning.engine.conftest import Data
from tuning.engine.base import Base
from tuning.engine.trainer import SlotId, Trainer
from tuning.spec import TrialConfig

pytestmark = pytest.mark.filterwarnings(
    "ignore:Paged optimizers are not supported on CPU:UserWarning",  # peft_loop's own optimizers
)

TARGETS = ["all-linear", "attention", "mlp", ["q_proj", "v_proj"], ["layers.0.mlp.down_proj"], ["o_proj", "up_proj"]]
SEEDS = range(8)


class Visit(NamedTuple):
    """A trial's time in the pack: from pass ``joins`` on until it has taken ``steps``, idle in ``pauses``."""

    config: TrialConfig
    joins: int
    steps: int
    pauses: frozenset[int]


def draw_config(rng: random.Random) -> TrialConfig:
    steps = rng.randint(2, 5)
    knobs: dict[str, Any] = {
        "rank": rng.choice([1, 2, 3, 4, 8, 12, 16, 32]),
        "alpha": math.exp(rng.uniform(math.log(0.5), math.log(64.0))),
        "rslora": rng.random() < 0.3,
        "dropout": rng.choice([0.0, 0.0, 0.1, 0.3]),
        "target_modules": rng.choice(TARGETS),
        "learning_rate": math.exp(rng.uniform(math.log(1e-4), math.log(2e-2))),
        "schedule": rng.choice(["constant", "cosine", "linear"]),
        "warmup_steps": rng.randrange(steps),
        "batch_size": rng.randint(1, 6),
        "accumulation": rng.choice([1, 1, 2, 3]),
        "max_grad_norm": rng.choice([None, 0.3, 1.0, 100.0]),
        "optimizer": rng.choice(["paged_adamw_32bit", "paged_adamw_8bit"]),
        "weight_decay": rng.choice([0.0, 0.0, 0.1, 1.0]),
        "beta1": rng.choice([0.9, 0.8, 0.0]),
        "beta2": rng.choice([0.999, 0.95]),
        "seed": rng.randrange(1000),
        "steps": steps,
    }
    return TrialConfig(**knobs)


def draw_pack(seed: int) -> list[Visit]:
    """Two to five trials; one in three leaves before its end, one in three pauses."""
    rng = random.Random(seed)
    pack: list[Visit] = []
    for _ in range(rng.randint(2, 5)):
        config = draw_config(rng)
        leaves = rng.randint(1, config.steps) if rng.random() < 1 / 3 else config.steps
        pauses = frozenset(rng.choices(range(12), k=4)) if rng.random() < 1 / 3 else frozenset[int]()
        pack.append(Visit(config, rng.randrange(4), leaves, pauses))
    return pack


def train_pack(trainer: Trainer, pack: list[Visit]) -> list[Trained]:
    """Pass by pass: who is due joins, who has done its steps leaves."""
    done: dict[int, Trained] = {}
    ids: dict[int, SlotId] = {}
    losses: dict[int, list[float]] = {number: [] for number in range(len(pack))}
    passes = 0
    while len(done) < len(pack):
        for number, visit in enumerate(pack):
            if visit.joins == passes:
                ids[number] = trainer.attach(visit.config)
        present = {slot: number for number, slot in ids.items() if number not in done}
        for report in trainer.step([slot for slot, number in present.items() if passes not in pack[number].pauses]):
            number = present[report.slot]
            losses[number].append(report.loss)
            if report.step == pack[number].steps:
                done[number] = Trained(losses[number], copied(trainer.slots[report.slot].weights()))
                trainer.detach(report.slot)
        passes += 1
    return [done[number] for number in range(len(pack))]


@pytest.mark.parametrize("seed", SEEDS)
def test_any_pack_is_its_trials_alone(base: Base, data: Data, alone: Alone, seed: int) -> None:
    pack = draw_pack(seed)
    for visit, ours in zip(pack, train_pack(Trainer(base, *data), pack), strict=True):
        theirs = alone.train(visit.config, steps=visit.steps)
        found = distance(ours, theirs, alone.first(visit.config))
        assert len(ours.losses) == visit.steps
        assert found.loss < LOSS_TOLERANCE, visit
        assert found.weights < weight_tolerance(visit.config), visit


def test_the_draws_cover_every_knob() -> None:
    """So that a change of the draws cannot empty the test above unseen."""
    visits = [visit for seed in SEEDS for visit in draw_pack(seed)]
    for knob in ("rslora", "schedule", "optimizer", "max_grad_norm", "accumulation", "weight_decay", "dropout"):
        assert len({getattr(visit.config, knob) for visit in visits}) > 1, knob
    assert {repr(visit.config.target_modules) for visit in visits} == {repr(targets) for targets in TARGETS}
    assert any(visit.steps < visit.config.steps for visit in visits)
    assert any(visit.pauses for visit in visits)
    assert len({visit.config.rank for visit in visits}) >= 6
    assert len({visit.joins for visit in visits}) == 4
