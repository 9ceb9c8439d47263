"""Memory of paged state: how pieces go round. That bitsandbytes pages them is in test_gpu.py."""

from __future__ import annotations

import pytest
import torch

from tests.tuning.engine.conftest import Data
from tuning.engine.paged import Stock, rounded
from tuning.engine.slot import Slot
from tuning.spec import TrialConfig

CPU = torch.device("cpu")


def make_stock() -> Stock:
    return Stock(lambda size, device: torch.empty(size, dtype=torch.uint8, device=device))


@pytest.mark.parametrize("size", [1, 2, 7, 8, 9, 100, 129, 400_000, 2**20, 2**20 + 1, 3 * 2**30 + 5])
def test_a_piece_is_large_enough_and_at_most_a_quarter_larger(size: int) -> None:
    assert size <= rounded(size) <= size * 1.25
    assert rounded(rounded(size)) == rounded(size)


def test_few_sizes_serve_trials_of_every_rank() -> None:
    assert len({rounded(4 * rank * 100_000) for rank in range(1, 65)}) <= 4 * 7


def test_what_came_back_is_used_again() -> None:
    stock = make_stock()
    for _ in range(50):
        pieces = [stock.take(size, CPU) for size in (400_000, 400_000, 500_000)]
        assert len({piece.data_ptr() for piece in pieces}) == 3
        for piece in pieces:
            stock.give_back(piece, CPU)
    assert stock.allocated == 2 * rounded(400_000) + rounded(500_000)


def test_nobody_gets_a_piece_that_is_in_use() -> None:
    stock = make_stock()
    first = stock.take(1000, CPU)
    second = stock.take(1000, CPU)
    assert first.data_ptr() != second.data_ptr()
    stock.give_back(first, CPU)
    assert stock.take(1000, CPU).data_ptr() == first.data_ptr()
    assert stock.take(1000, CPU).data_ptr() not in {first.data_ptr(), second.data_ptr()}


def test_a_slot_that_is_released_holds_no_state(data: Data) -> None:
    slot = Slot(TrialConfig(rank=4, alpha=8.0), {"x": (8, 8)}, data[0], CPU)
    slot.grad.fill_(1.0)
    slot.optimizer_step()
    assert slot.optimizer.state
    slot.release()
    assert not slot.optimizer.state
