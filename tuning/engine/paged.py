"""bitsandbytes' paged optimizers, whose memory is used again.

Paged state is memory that CUDA manages: it moves between GPU and machine as either needs room. bitsandbytes (0.50) asks
for it with `cudaMallocManaged`, keeps every piece in a list of the process, and has no way to give one back. A host
lives through many trials, so here the state of a trial that has left serves the next one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from bitsandbytes import functional
from bitsandbytes.optim.adamw import PagedAdamW8bit, PagedAdamW32bit
from torch import Tensor

from tuning.memory import SMALLEST_PAGED

CLASSES_PER_DOUBLING = 4
"""Sizes that are held in stock between one power of two and the next: a piece is at most a quarter larger than asked
for, and trials of many ranks still use each other's."""


class Stock:
    """Pieces of paged memory that no trial needs at present. Used by one process; methods are atomic under the GIL."""

    def __init__(self, allocate: Callable[[int, torch.device], Tensor]) -> None:
        """``allocate(bytes, device)`` returns a new piece, uint8."""
        self._allocate = allocate
        self._free: dict[tuple[int, torch.device], list[Tensor]] = {}
        self.allocated = 0
        """Bytes asked for so far, in use or not."""

    def take(self, size: int, device: torch.device) -> Tensor:
        """A piece of at least ``size`` bytes, with whatever was in it."""
        size = rounded(size)
        try:
            return self._free[size, device].pop()
        except (KeyError, IndexError):
            piece = self._allocate(size, device)
            self.allocated += size
            return piece

    def give_back(self, piece: Tensor, device: torch.device) -> None:
        """Keep a piece for the next trial; nobody may use it any more."""
        self._free.setdefault((piece.numel(), device), []).append(piece)


def rounded(size: int) -> int:
    """``size`` bytes rounded up to a size that is held in stock."""
    step = 1 << max(0, (size - 1).bit_length() - 1 - (CLASSES_PER_DOUBLING.bit_length() - 1))
    return -(-size // step) * step


def _managed(size: int, device: torch.device) -> Tensor:
    return functional.get_paged(size, dtype=torch.uint8, device=device)


STOCK = Stock(_managed)


class _FromStock:
    """Mixed into bitsandbytes' optimizers: paged state comes from ``STOCK`` and goes back there.

    On a CPU, where there is nothing to page, state is in plain memory.
    """

    def get_state_buffer(self, p: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Zeros of p's shape, as in bitsandbytes."""
        if not p.is_cuda or p.numel() < SMALLEST_PAGED:
            return torch.zeros_like(p, dtype=dtype)
        piece = STOCK.take(p.numel() * dtype.itemsize, p.device)
        self._pieces().append((piece, p.device))
        buffer = as_paged(piece[: p.numel() * dtype.itemsize].view(dtype).view(p.shape), p.device)
        functional.fill(buffer, 0)  # which waits for the GPU
        return buffer

    def release(self) -> None:
        """Give the state's memory back; the optimizer is not to be used again."""
        own: Any = self
        own.state.clear()
        pieces = self._pieces()
        while pieces:
            STOCK.give_back(*pieces.pop())

    def _pieces(self) -> list[tuple[Tensor, torch.device]]:
        return self.__dict__.setdefault("pieces", [])


def as_paged(view: Tensor, device: torch.device) -> Tensor:
    """Marks that bitsandbytes looks for, which a view of a paged tensor does not take over."""
    marked: Any = view
    marked.is_paged, marked.page_deviceid = True, device.index
    return view


class PagedAdamW32(_FromStock, PagedAdamW32bit):
    """AdamW with 32-bit state."""


class PagedAdamW8(_FromStock, PagedAdamW8bit):
    """AdamW with 8-bit state, in blocks of 256."""
