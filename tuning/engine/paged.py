"""bitsandbytes' paged optimizers, whose memory is used again.

Paged state is memory that CUDA manages: it moves between GPU and machine as either needs room. bitsandbytes (0.50) asks
for it with `cudaMallocManaged`, keeps every piece in a list of the process, and has no way to give one back. A host
lives through many trials, so here the state of a trial that has left serves the next one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from bitsandbytes import functional
from bitsandbytes.optim.adamw import PagedAdamW8bit, PagedAdamW32bit
from torch import Tensor

from tuning.memory import SMALLEST_PAGED

CLASSES_PER_DOUBLING = 4
"""Sizes of pieces between one power of two and the next: a piece is at most a quarter larger than asked for. What is
never written of it takes no memory."""


class Stock:
    """Pieces of paged memory that no trial needs at present; for any number of threads."""

    def __init__(self, allocate: Callable[[int, torch.device], Tensor]) -> None:
        """``allocate(bytes, device)`` returns a new piece, uint8."""
        self._allocate = allocate
        self._free: dict[torch.device, list[Tensor]] = {}
        self._lock = threading.Lock()
        self.allocated = 0
        """Bytes asked for so far, in use or not."""

    def take(self, size: int, device: torch.device) -> Tensor:
        """A piece of at least ``size`` bytes, with whatever was in it: the smallest there is, else a new one."""
        size = rounded(size)
        with self._lock:
            free = self._free.setdefault(device, [])
            fitting = [index for index, piece in enumerate(free) if piece.numel() >= size]
            if fitting:
                return free.pop(min(fitting, key=lambda index: free[index].numel()))
            piece = self._allocate(size, device)
            self.allocated += size
            return piece

    def give_back(self, piece: Tensor, device: torch.device) -> None:
        """Keep a piece for the next trial; nobody may use it any more."""
        with self._lock:
            self._free.setdefault(device, []).append(piece)


def rounded(size: int) -> int:
    """``size`` bytes rounded up to a size that is held in stock."""
    step = 1 << max(0, (size - 1).bit_length() - 1 - (CLASSES_PER_DOUBLING.bit_length() - 1))
    return -(-size // step) * step


def _managed(size: int, device: torch.device) -> Tensor:
    return functional.get_paged(size, dtype=torch.uint8, device=device)


STOCK = Stock(_managed)


class Pieces:
    """What one optimizer has of a stock."""

    def __init__(self, stock: Stock) -> None:
        self._stock = stock
        self._taken: list[tuple[Tensor, torch.device]] = []

    def zeros_like(self, p: Tensor, dtype: torch.dtype, fill: Callable[[Tensor, int], object]) -> Tensor:
        """Zeros of p's shape in paged memory, marked as bitsandbytes marks it; ``fill`` writes them."""
        size = p.numel() * dtype.itemsize
        piece = self._stock.take(size, p.device)
        self._taken.append((piece, p.device))
        buffer: Any = piece[:size].view(dtype).view(p.shape)
        buffer.is_paged, buffer.page_deviceid = True, p.device.index
        fill(buffer, 0)
        return buffer

    def release(self) -> None:
        """Give all of it back."""
        while self._taken:
            self._stock.give_back(*self._taken.pop())


class _FromStock:
    """Mixed into bitsandbytes' optimizers: paged state comes from ``STOCK`` and goes back there.

    On a CPU, where there is nothing to page, state is in plain memory.
    """

    state: Any

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.pieces = Pieces(STOCK)
        super().__init__(*arguments, **options)

    def get_state_buffer(self, p: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Zeros of p's shape, as in bitsandbytes."""
        if not p.is_cuda or p.numel() < SMALLEST_PAGED:
            return torch.zeros_like(p, dtype=dtype)
        return self.pieces.zeros_like(p, dtype, functional.fill)  # fill waits for the GPU

    def release(self) -> None:
        """Give the state's memory back; the optimizer is not to be used again."""
        self.state.clear()
        self.pieces.release()


class PagedAdamW32(_FromStock, PagedAdamW32bit):
    """AdamW with 32-bit state."""


class PagedAdamW8(_FromStock, PagedAdamW8bit):
    """AdamW with 8-bit state, in blocks of 256."""
