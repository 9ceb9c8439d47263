"""What only a GPU can show: paging under pressure, and passes that do not fit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.tuning.engine.conftest import Data
from tuning.engine.base import Base
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


def stepped(data: Data, ballast_gib: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A slot of 0.2 billion parameters after two steps, with all but ``ballast_gib`` of the GPU taken meanwhile."""
    config = TrialConfig(rank=512, alpha=512.0, learning_rate=1e-2, steps=5)
    slot = Slot(config, {"x": (200_000, 200_000)}, data[0], torch.device("cuda"))
    free, _total = torch.cuda.mem_get_info()
    ballast = torch.empty(max(0, free - int(ballast_gib * GIB)), dtype=torch.uint8, device="cuda")
    for seed in range(2):
        generator = torch.Generator("cuda").manual_seed(seed)
        slot.grad.normal_(generator=generator)
        slot.optimizer_step()
    del ballast
    moments = slot.optimizer.state[slot.flat]["state1"]
    return slot.flat.data.cpu(), moments.cpu().flatten()


def test_paged_adamw_pages_under_pressure(data: Data) -> None:
    """Its state is 1.6 GiB; a GiB is free, of which clearing and clipping need some."""
    pressed, roomy = stepped(data, 1.0), stepped(data, 8.0)
    assert torch.equal(pressed[0], roomy[0])
    assert torch.equal(pressed[1], roomy[1])


def test_the_state_of_a_paged_optimizer_is_restored_bit_for_bit(data: Data) -> None:
    config = TrialConfig(rank=64, alpha=64.0, learning_rate=1e-2, steps=5)

    def step(slot: Slot, seed: int) -> None:
        slot.grad.normal_(generator=torch.Generator("cuda").manual_seed(seed))
        slot.optimizer_step()

    whole, again = (Slot(config, {"x": (4096, 4096)}, data[0], torch.device("cuda")) for _ in range(2))
    for seed in range(2):
        step(whole, seed)
    again.restore(whole.state())
    for slot in (whole, again):
        step(slot, 2)
    assert torch.equal(whole.flat.data, again.flat.data)


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
            room = torch.cuda.memory_reserved() + 256 * 2**20
            torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(0).total_memory)
        while not slot.finished:
            assert trainer.step()
        assert bool(trainer.notes) is limited
        ends.append((before.cpu(), slot.flat.data.cpu()))
        trainer.detach(slot_id)
    (before, roomy), (_, pressed) = ends
    assert float((pressed - roomy).norm() / (roomy - before).norm()) < 1e-3
