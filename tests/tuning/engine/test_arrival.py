"""What a search comes to does not depend on the order of arrival, nor on how many trials share a pass.

A few trials go through a trainer, and through its loop in threads, in many orders; in each, a trial ends with the same
evaluation loss to LOSS and the same weights to WEIGHT_TOLERANCE of how far training moved them, and the ranking is the
same. Who stands beside whom changes the shapes of matrix products, so float rounding, and nothing else. Measured:
weights agree to 2e-6, losses to 8e-7.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, NamedTuple

import pytest

from tests.tuning.engine.alike import WEIGHT_TOLERANCE, apart, copied
from tests.tuning.engine.conftest import Data
from tests.tuning.engine.peft_loop import Weights
from tuning.engine.base import Base
from tuning.engine.loop import TrainerLoop
from tuning.engine.trainer import SlotId, Trainer
from tuning.spec import TrialConfig

MakeTrainer = Callable[[], Trainer]
LOSS = 1e-5


def config(**knobs: Any) -> TrialConfig:
    fields: dict[str, Any] = {"rank": 4, "alpha": 8.0, "learning_rate": 1e-2, "batch_size": 2, "steps": 6, **knobs}
    return TrialConfig(**fields)


TRIALS = [
    config(seed=1),
    config(rank=16, target_modules="mlp", batch_size=4, learning_rate=2e-3, seed=2),
    config(rank=1, dropout=0.3, accumulation=2, learning_rate=3e-3, seed=3),
    config(rank=4, target_modules=["q_proj"], steps=4, schedule="cosine", seed=4),
    config(rank=32, rslora=True, alpha=2.0, batch_size=1, steps=5, learning_rate=5e-4, seed=5),
    config(rank=3, dropout=0.1, target_modules="attention", learning_rate=2e-2, seed=6),
]


class Ends(NamedTuple):
    first: Weights
    last: Weights
    loss: float


def search(trainer: Trainer, order: Sequence[int], slots: int) -> list[Ends]:
    """Run TRIALS as a sweep would: at most ``slots`` at once, the next of ``order`` when one ends."""
    waiting, ends = list(order), dict[int, Ends]()
    present: dict[SlotId, tuple[int, Weights]] = {}
    while waiting or present:
        while waiting and len(present) < slots:
            number = waiting.pop(0)
            slot = trainer.attach(TRIALS[number])
            present[slot] = number, copied(trainer.slots[slot].weights())
        trainer.step()
        for slot in [slot for slot in present if trainer.slots[slot].finished]:
            number, first = present.pop(slot)
            loss = trainer.evaluate([slot])[slot]
            ends[number] = Ends(first, copied(trainer.slots[slot].weights()), loss)
            trainer.detach(slot)
    return [ends[number] for number in range(len(TRIALS))]


def ranking(losses: Sequence[float]) -> list[int]:
    return sorted(range(len(losses)), key=lambda number: losses[number])


@pytest.fixture(scope="module")
def one_by_one(base: Base, data: Data) -> list[Ends]:
    found = search(Trainer(base, *data), range(len(TRIALS)), 1)
    losses = sorted(ends.loss for ends in found)
    # The ranking must not be a matter of rounding.
    assert all(two / one - 1 > 10 * LOSS for one, two in pairwise(losses)), losses
    return found


@pytest.mark.parametrize(
    ("order", "slots"),
    [
        ([0, 1, 2, 3, 4, 5], 2),
        ([0, 1, 2, 3, 4, 5], 4),
        ([0, 1, 2, 3, 4, 5], 6),
        ([5, 4, 3, 2, 1, 0], 3),
        ([3, 0, 5, 2, 4, 1], 4),
        ([2, 5, 1, 4, 0, 3], 5),
    ],
)
def test_every_order_and_number_of_slots_gives_the_trials_alone(
    make_trainer: MakeTrainer, order: list[int], slots: int, one_by_one: list[Ends]
) -> None:
    found = search(make_trainer(), order, slots)
    for number, (ours, alone) in enumerate(zip(found, one_by_one, strict=True)):
        assert apart(ours.last, alone.last, alone.first) < WEIGHT_TOLERANCE, number
        assert ours.loss == pytest.approx(alone.loss, rel=LOSS), number
    assert ranking([ends.loss for ends in found]) == ranking([ends.loss for ends in one_by_one])


@pytest.fixture
def loop(make_trainer: MakeTrainer) -> Iterator[TrainerLoop]:
    running = TrainerLoop(make_trainer)
    yield running
    running.stop()


@pytest.mark.parametrize("delays_s", [[0.0] * 6, [0.0, 0.02, 0.04, 0.06, 0.08, 0.1], [0.1, 0.0, 0.05, 0.0, 0.15, 0.02]])
@pytest.mark.parametrize("report_every", [1, 4])
def test_trials_that_arrive_at_the_loop_at_any_time(
    loop: TrainerLoop, one_by_one: list[Ends], delays_s: list[float], report_every: int
) -> None:
    """The delays are there to make packs differ, nothing is expected of when what happens."""

    def trial(number: int) -> float:
        time.sleep(delays_s[number])
        slot = loop.attach(TRIALS[number])
        report = loop.advance(slot, report_every)
        while report.steps < TRIALS[number].steps:
            report = loop.advance(slot, report_every)
        loop.detach(slot)
        return report.eval_loss

    with ThreadPoolExecutor(len(TRIALS)) as pool:
        losses = list(pool.map(trial, range(len(TRIALS))))
    assert losses == pytest.approx([ends.loss for ends in one_by_one], rel=LOSS)
    assert ranking(losses) == ranking([ends.loss for ends in one_by_one])
