"""Passes that do not fit into memory are tried again in smaller ones, and the size that fitted is remembered.

A micro-batch may be cut anywhere between two rows: losses are sums over the targets of a whole optimizer step, so parts
add up to the same gradient, and dropout masks are drawn for the whole micro-batch. What a pass costs in memory goes by
its tokens, padding included.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from tuning.engine.batch import Micro
from tuning.engine.data import Tokens

Key = TypeVar("Key", bound=int)
CPU_SIGNS = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")
_log = logging.getLogger(__name__)


class TokenBudget:
    """How many tokens a pass may have; no bound until a pass runs out of memory."""

    def __init__(self) -> None:
        self.tokens: int | None = None

    def run(self, micros: Sequence[Micro[Key]], data: Tokens, work: Callable[[list[Micro[Key]]], None]) -> None:
        """Call ``work`` on all of ``micros``, in as many parts as memory demands; each micro-batch's rows in order.

        Raises:
            torch.OutOfMemoryError, RuntimeError: a single row does not fit; the work of the parts before is done.
        """
        waiting = split(micros, data, self.tokens)
        while waiting:
            part = waiting.pop(0)
            trouble = _try(work, part)
            if trouble is None:
                continue
            if len(part) == 1 and len(part[0].rows) == 1:
                raise trouble
            trouble.__traceback__ = None  # its frames hold the tensors of the pass
            del trouble
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            size = cost(part, data)
            if self.tokens is None:
                _log.warning("a pass of %d tokens ran out of memory; from now on passes are smaller", size)
            self.tokens = size // 2
            waiting = [piece for rest in (part, *waiting) for piece in split(rest, data, self.tokens)]


def cost(micros: Sequence[Micro[Key]], data: Tokens) -> int:
    """Tokens of a pass, padded to its longest row."""
    return max(data.length(row) for micro in micros for row in micro.rows) * sum(len(micro.rows) for micro in micros)


def split(micros: Sequence[Micro[Key]], data: Tokens, tokens: int | None) -> list[list[Micro[Key]]]:
    """``micros`` in as few passes as their order allows, none of more than ``tokens`` unless it is a single row."""
    if tokens is None or cost(micros, data) <= tokens:
        return [list(micros)]
    if len(micros) > 1:
        middle = len(micros) // 2
        halves = micros[:middle], micros[middle:]
    elif len(micros[0].rows) > 1:
        first, second = micros[0].split()
        halves = [first], [second]
    else:
        return [list(micros)]
    return [part for half in halves for part in split(half, data, tokens)]


def is_out_of_memory(error: BaseException) -> bool:
    """True if torch could not get memory, of a GPU or of the machine."""
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in CPU_SIGNS)


def _try(work: Callable[[list[Micro[Key]]], None], part: list[Micro[Key]]) -> RuntimeError | None:
    """Do the work; the error, if memory ran out."""
    try:
        work(part)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return error
    return None
