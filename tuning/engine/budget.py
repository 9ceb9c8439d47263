"""Passes that do not fit into memory are tried again in smaller ones, and the size that fitted is remembered.

A micro-batch may be cut anywhere between two rows: losses are sums over the targets of a whole optimizer step, so parts
add up to the same gradient, and dropout masks are drawn for the whole micro-batch. What a pass costs in memory goes by
its tokens, padding included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from tuning.engine.batch import Micro
from tuning.engine.data import Tokens
from tuning.engine.trouble import free_memory, is_out_of_memory

Key = TypeVar("Key", bound=int)


class TokenBudget:
    """How many tokens a pass may have; no bound until a pass runs out of memory."""

    def __init__(self, *, end_to_end: bool = False) -> None:
        """``end_to_end``: rows are not padded."""
        self.tokens: int | None = None
        self._end_to_end = end_to_end

    def run(
        self,
        micros: Sequence[Micro[Key]],
        data: Tokens,
        work: Callable[[list[Micro[Key]]], None],
        give_up: Callable[[Key, RuntimeError], None],
    ) -> str | None:
        """Call ``work`` on all of ``micros``, in as many parts as memory demands; each micro-batch's rows in order.

        A slot of which a single row does not fit is handed to ``give_up``, and the work goes on without the rest of its
        rows.

        Returns:
            What the user should hear: once, when memory was short for the first time.
        """
        note: str | None = None
        waiting = self.split(micros, data)
        while waiting:
            part = waiting.pop(0)
            trouble = _try(work, part)
            if trouble is None:
                continue
            trouble.__traceback__ = None  # its frames hold the tensors of the pass
            free_memory()
            if len(part) == 1 and len(part[0].rows) == 1:
                give_up(part[0].key, trouble)
                waiting = _without(waiting, part[0].key)
                continue
            size = self.cost(part, data)
            if self.tokens is None:
                note = f"a pass of {size:,} tokens did not fit into memory; from now on passes are smaller"
            self.tokens = size // 2
            waiting = [piece for rest in (part, *waiting) for piece in self.split(rest, data)]
        return note

    def cost(self, micros: Sequence[Micro[Key]], data: Tokens) -> int:
        """Tokens of a pass, with the padding that it has."""
        lengths = [data.length(row) for micro in micros for row in micro.rows]
        return sum(lengths) if self._end_to_end else max(lengths) * len(lengths)

    def split(self, micros: Sequence[Micro[Key]], data: Tokens) -> list[list[Micro[Key]]]:
        """``micros`` in few passes that keep their order, none above the bound unless it is a single row."""
        if self.tokens is None or self.cost(micros, data) <= self.tokens:
            return [list(micros)]
        if len(micros) > 1:
            middle = len(micros) // 2
            halves = micros[:middle], micros[middle:]
        elif len(micros[0].rows) > 1:
            first, second = micros[0].split()
            halves = [first], [second]
        else:
            return [list(micros)]
        return [part for half in halves for part in self.split(half, data)]


def _without(parts: list[list[Micro[Key]]], key: Key) -> list[list[Micro[Key]]]:
    left = [[micro for micro in part if micro.key != key] for part in parts]
    return [part for part in left if part]


def _try(work: Callable[[list[Micro[Key]]], None], part: list[Micro[Key]]) -> RuntimeError | None:
    """Do the work; the error, if memory ran out."""
    try:
        work(part)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return error
    return None
