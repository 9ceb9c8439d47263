"""What only a GPU can show: paging under pressure, and passes that do not fit."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.tuning.engine.alike import LOSS_TOLERANCE, Alone, distance, weight_tolerance
from tests.tuning.engine.conftest import Data
from tests.tuning.engine.test_equivalence import TRIALS, train_packed
from tuning.engine.base import Base
from tuning.engine.paged import STOCK, rounded
from tuning.engine.slot import Slot
from tuning.engine.trainer import Trainer
from tuning.spec import BaseSpec, TrialConfig

pytestmark = pytest.mark.gpu
GIB = 2**30


@pytest.fixture(autouse=True)
def empty_gpu() -> Iterator[None]:
    torch.cuda.empty_cache()
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def stepped(data: Data, left_gib: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A slot of 0.2 billion parameters after two steps, with all of the GPU but ``left_gib`` taken meanwhile."""
    config = TrialConfig(rank=512, alpha=512.0, learning_rate=1e-2, steps=5)
    slot = Slot(config, {"x": (200_000, 200_000)}, data[0], torch.device("cuda"))
    torch.cuda.empty_cache()
    free, _total = torch.cuda.mem_get_info()
    assert free > left_gib * GIB
    ballast = torch.empty(free - int(left_gib * GIB), dtype=torch.uint8, device="cuda")
    for seed in range(2):
        slot.grad.normal_(generator=torch.Generator("cuda").manual_seed(seed))
        slot.optimizer_step()
    del ballast
    torch.cuda.empty_cache()
    moments = slot.optimizer.state[slot.flat]["state1"]
    ends = slot.flat.data.cpu(), moments.clone().flatten()
    slot.release()
    return ends


def test_paged_adamw_pages_under_pressure(data: Data) -> None:
    """Its state is 1.6 GiB; a GiB is free, of which clearing and clipping need some."""
    pressed, roomy = stepped(data, 1.0), stepped(data, 8.0)
    assert torch.equal(pressed[0], roomy[0])
    assert torch.equal(pressed[1], roomy[1])


def test_trials_that_come_and_go_leave_little_memory_behind(data: Data) -> None:
    """Which bitsandbytes' own paged optimizers do not: these would keep some 2.6 GiB."""
    before, rng = STOCK.allocated, random.Random(0)
    for _ in range(50):
        config = TrialConfig(rank=rng.randint(1, 64), alpha=64.0, learning_rate=1e-2, steps=5)
        slot = Slot(config, {"x": (100_000, 100_000)}, data[0], torch.device("cuda"))
        slot.grad.normal_()
        slot.optimizer_step()
        assert slot.optimizer.state[slot.flat]["state1"].is_paged
        slot.release()
    assert STOCK.allocated - before <= 4 * rounded(64 * 200_000 * 4)


@pytest.mark.parametrize("optimizer", ["paged_adamw_32bit", "paged_adamw_8bit"])
def test_the_state_of_a_paged_optimizer_is_restored_bit_for_bit(data: Data, optimizer: str, tmp_path: Path) -> None:
    """Into memory that another trial has used, by way of a checkpoint on the disk."""
    config = TrialConfig.model_validate(
        {"rank": 64, "alpha": 64.0, "learning_rate": 1e-2, "steps": 5, "optimizer": optimizer}
    )

    def make() -> Slot:
        return Slot(config, {"x": (4096, 4096)}, data[0], torch.device("cuda"))

    def step(slot: Slot, seed: int) -> None:
        slot.grad.normal_(generator=torch.Generator("cuda").manual_seed(seed))
        slot.optimizer_step()

    whole, again, other = make(), make(), make()
    step(other, 7)
    other.release()
    for seed in range(2):
        step(whole, seed)
    torch.save(whole.state(), tmp_path / "state.pt")
    again.restore(torch.load(tmp_path / "state.pt", weights_only=True))
    for slot in (whole, again):
        step(slot, 2)
    assert torch.equal(whole.flat.data, again.flat.data)


def test_trials_in_a_pack_are_the_trials_alone_with_peft(base_spec: BaseSpec, data: Data) -> None:
    """As test_equivalence.py on CPUs; bounds ten times as wide, for what peft's and this engine's kernels sum in other
    orders.
    """
    base = Base(base_spec, "cuda")
    alone = Alone(base_spec, base, data)
    done = train_packed(Trainer(base, *data), list(TRIALS))
    for name, trained in done.items():
        apart = distance(trained, alone.train(TRIALS[name]), alone.first(TRIALS[name]))
        assert apart.loss < 10 * LOSS_TOLERANCE, name
        assert apart.weights < 10 * weight_tolerance(TRIALS[name]), name


def test_a_pass_that_does_not_fit_is_done_in_smaller_ones(base_spec: BaseSpec, data: Data) -> None:
    """Weights to 1e-3 of their movement: other products, other rounding."""
    trial = TrialConfig(rank=4, alpha=8.0, batch_size=512, steps=2, learning_rate=1e-2)
    ends: list[tuple[torch.Tensor, torch.Tensor]] = []
    for limited in (False, True):
        trainer = Trainer(Base(base_spec, "cuda"), *data)
        slot_id = trainer.attach(trial)
        slot = trainer.slots[slot_id]
        before = slot.flat.data.clone()
        if limited:
            torch.cuda.empty_cache()
            room = torch.cuda.memory_reserved() + 96 * 2**20  # the whole pass takes some 300 MiB
            torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(0).total_memory)
        while not slot.finished:
            assert trainer.step()
        assert bool(trainer.notes) is limited
        ends.append((before.cpu(), slot.flat.data.cpu()))
        trainer.detach(slot_id)
    (before, roomy), (_, pressed) = ends
    assert float((pressed - roomy).norm() / (roomy - before).norm()) < 1e-3
