"""Memory of paged state: how pieces go round. That bitsandbytes pages them is in test_gpu.py."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from tests.tuning.engine.conftest import Data
from tuning.engine.paged import Pieces, Stock, rounded
from tuning.engine.slot import Slot
from tuning.spec import TrialConfig

CPU = torch.device("cpu")


def make_stock() -> Stock:
    return Stock(lambda size, device: torch.empty(size, dtype=torch.uint8, device=device))


@pytest.mark.parametrize("size", [1, 2, 7, 8, 9, 100, 129, 400_000, 2**20, 2**20 + 1, 3 * 2**30 + 5])
def test_a_piece_is_large_enough_and_at_most_a_quarter_larger(size: int) -> None:
    assert size <= rounded(size) <= size * 1.25
    assert rounded(rounded(size)) == rounded(size)


def test_what_came_back_is_used_again() -> None:
    stock = make_stock()
    for _ in range(50):
        pieces = [stock.take(size, CPU) for size in (400_000, 400_000, 500_000)]
        assert len({piece.data_ptr() for piece in pieces}) == 3
        for piece in pieces:
            stock.give_back(piece, CPU)
    assert stock.allocated == 2 * rounded(400_000) + rounded(500_000)


def test_trials_of_many_sizes_ask_for_little_more_than_they_use_at_once() -> None:
    """400 trials of random ranks, eight at a time."""
    rng, stock = random.Random(0), make_stock()
    held: list[torch.Tensor] = []
    used = most = 0
    for _ in range(400):
        if len(held) == 8:
            stock.give_back(gone := held.pop(rng.randrange(8)), CPU)
            used -= gone.numel()
        held.append(stock.take(rng.randint(1, 64) * 10_000, CPU))
        used += held[-1].numel()
        most = max(most, used)
    assert stock.allocated <= 2 * most


def test_nobody_gets_a_piece_that_is_in_use() -> None:
    stock = make_stock()
    first, second, large = stock.take(1000, CPU), stock.take(1000, CPU), stock.take(9000, CPU)
    assert first.data_ptr() != second.data_ptr()
    stock.give_back(large, CPU)
    stock.give_back(first, CPU)
    assert stock.take(900, CPU).data_ptr() == first.data_ptr()
    assert stock.take(1000, CPU).data_ptr() == large.data_ptr()
    assert stock.take(1000, CPU).data_ptr() not in {first.data_ptr(), second.data_ptr(), large.data_ptr()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_state_is_zeros_in_a_piece_whatever_was_in_it(dtype: torch.dtype) -> None:
    stock = make_stock()
    pieces, others = Pieces(stock), Pieces(stock)
    p = torch.empty(1000)
    first = pieces.zeros_like(p, dtype, lambda buffer, value: buffer.fill_(value))
    where = first.data_ptr()
    first.fill_(7)
    pieces.release()
    again: Any = others.zeros_like(p, dtype, lambda buffer, value: buffer.fill_(value))
    assert (again.data_ptr(), again.shape, again.dtype) == (where, p.shape, dtype)
    assert not again.any()
    assert again.is_paged  # or bitsandbytes would not fetch it
    pieces.release()  # has nothing any more
    assert stock.take(1, CPU).data_ptr() != where


def test_a_slot_that_is_released_holds_no_state(data: Data) -> None:
    slot = Slot(TrialConfig(rank=4, alpha=8.0), {"x": (8, 8)}, data[0], CPU)
    slot.grad.fill_(1.0)
    slot.optimizer_step()
    assert slot.optimizer.state
    slot.release()
    assert not slot.optimizer.state
