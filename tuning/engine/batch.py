"""Rows of many trials side by side in one batch, padded to one length or laid end to end.

Shapes: b rows and t tokens of a padded batch, n tokens of the whole pack, m real tokens and l targets of one trial.

Padded, every row has the length of the pack's longest. End to end (``data.packing``) the whole pack is one sequence:
each trial has a stretch for its rows, and the trials of a group stretches of one length, so what is padded is the end
of a stretch, not of every row.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tuning.engine.data import IGNORED, Tokens

Key = TypeVar("Key", bound=Hashable)
Places = NDArray[np.int64]
TOKEN_MULTIPLE = 8
"""Lengths are rounded up to this, so that kernels meet few different shapes."""


@dataclass(frozen=True, slots=True)
class RowIndex:
    """Rows laid end to end in one sequence of n tokens."""

    cells: Tensor
    """(b t) the token of each cell; a cell beyond its row's end has the row's first token."""
    tokens: Tensor
    """All tokens that belong to a row, in order."""
    places: Tensor
    """The cell of each of these tokens, counted through all rows."""


@dataclass(frozen=True, slots=True)
class Micro(Generic[Key]):
    """Rows of one trial for one pass: its whole micro-batch, or a part of it where memory is short."""

    key: Key
    rows: Sequence[int]
    """Places in the data."""
    first: int = 0
    """Place of the first of them in the micro-batch."""
    whole: Sequence[int] = ()
    """All rows of the micro-batch (empty: ``rows`` are all)."""

    def split(self) -> tuple[Micro[Key], Micro[Key]]:
        """Two halves; only where there are two rows or more."""
        middle, whole = len(self.rows) // 2, self.whole or self.rows
        return (
            Micro(self.key, self.rows[:middle], self.first, whole),
            Micro(self.key, self.rows[middle:], self.first + middle, whole),
        )


@dataclass(frozen=True, slots=True)
class Cells:
    """Where a trial's real tokens are: in its own micro-batch of ``rows`` x ``longest``, and in its stretch."""

    rows: int
    longest: int
    own: Tensor | None
    """(m) cells of the micro-batch; None: all of them, in the order of the stretch."""
    places: Tensor | None
    """(m) places in the stretch."""


@dataclass(frozen=True, slots=True)
class Share:
    """One trial's part of a packed batch."""

    places: Tensor
    """(l) token, counted through the pack, whose features predict the target: the one before it."""
    targets: Tensor
    """(l) token ids to be predicted."""
    cells: Cells


@dataclass(frozen=True, slots=True)
class PackedBatch(Generic[Key]):
    """Token ids (b t), or (1 n) with their positions where rows lie end to end, and the share of each trial."""

    ids: Tensor
    positions: Tensor | None
    rows: RowIndex | None
    stretches: list[int]
    """Tokens of a stretch of each group."""
    shares: dict[Key, Share]


def count_targets(data: Tokens, rows: Iterable[int]) -> int:
    """Tokens of ``rows`` that count in the loss."""
    return sum(int(np.count_nonzero(data.row(row)[1][1:] != IGNORED)) for row in rows)


def pack_rows(
    data: Tokens, groups: Sequence[Sequence[Micro[Key]]], device: torch.device, *, end_to_end: bool = False
) -> PackedBatch[Key]:
    """Put the rows of all trials into one batch, group by group; the trials of a group have equally many rows."""
    if end_to_end:
        stretches = [
            _rounded_coarsely(max(sum(map(data.length, micro.rows)) for micro in group)) if group else 0
            for group in groups
        ]
        width = 0
    else:
        width = _rounded(max(data.length(row) for group in groups for micro in group for row in micro.rows))
        stretches = [len(group[0].rows) * width if group else 0 for group in groups]
    ids = np.zeros(sum(stretch * len(group) for stretch, group in zip(stretches, groups, strict=True)), np.int64)
    starts: list[int] = []
    lengths: list[int] = []
    shares: dict[Key, Share] = {}
    begin = 0
    for group, stretch in zip(groups, stretches, strict=True):
        for micro in group:
            offsets = _offsets(data, micro.rows, width)
            shares[micro.key] = _share(data, micro, offsets, begin, stretch, ids, device)
            starts += [begin + offset for offset in offsets]
            lengths += [data.length(row) for row in micro.rows]
            begin += stretch
    if not end_to_end:
        return PackedBatch(_tensor(ids.reshape(-1, width), device), None, None, stretches, shares)
    positions, rows = _index_rows(len(ids), starts, lengths, device)
    return PackedBatch(_tensor(ids[None], device), positions, rows, stretches, shares)


def _share(
    data: Tokens,
    micro: Micro[Key],
    offsets: list[int],
    begin: int,
    stretch: int,
    ids: Places,
    device: torch.device,
) -> Share:
    """Write the trial's rows into ``ids`` and tell where they are."""
    whole = micro.whole or micro.rows
    longest = max(data.length(row) for row in whole)
    places, targets, own, inside = list[Places](), list[Places](), list[Places](), list[Places]()
    for line, (row, offset) in enumerate(zip(micro.rows, offsets, strict=True), micro.first):
        row_ids, labels = data.row(row)
        ids[begin + offset : begin + offset + len(row_ids)] = row_ids
        (counted,) = np.nonzero(labels[1:] != IGNORED)
        places.append(begin + offset + counted)
        targets.append(labels[1:][counted].astype(np.int64))
        own.append(np.arange(line * longest, line * longest + len(row_ids)))
        inside.append(np.arange(offset, offset + len(row_ids)))
    cells = np.concatenate(own)
    if len(cells) == len(whole) * longest == stretch:
        all_cells = Cells(len(whole), longest, None, None)
    else:
        all_cells = Cells(len(whole), longest, _tensor(cells, device), _tensor(np.concatenate(inside), device))
    return Share(_tensor(np.concatenate(places), device), _tensor(np.concatenate(targets), device), all_cells)


def _offsets(data: Tokens, rows: Sequence[int], width: int) -> list[int]:
    """Where each row begins in its trial's stretch: every ``width`` tokens, or (0) right after the row before."""
    if width:
        return [width * line for line in range(len(rows))]
    return [0, *np.cumsum([data.length(row) for row in rows[:-1]]).tolist()]


def _index_rows(total: int, starts: list[int], lengths: list[int], device: torch.device) -> tuple[Tensor, RowIndex]:
    """Positions (1 n), each row's from 0, and the cells that its attention is computed in."""
    first, length = np.asarray(starts)[:, None], np.asarray(lengths)[:, None]
    offsets = np.arange(_rounded(length.max()))[None]
    real = offsets < length
    cells = np.where(real, first + offsets, first)
    tokens, (places,) = cells[real], np.nonzero(real.ravel())
    positions = np.zeros(total, np.int64)
    positions[tokens] = np.broadcast_to(offsets, real.shape)[real]
    index = RowIndex(_tensor(cells, device), _tensor(tokens, device), _tensor(places, device))
    return _tensor(positions[None], device), index


def _rounded(tokens: int) -> int:
    return -(-tokens // TOKEN_MULTIPLE) * TOKEN_MULTIPLE


def _rounded_coarsely(tokens: int) -> int:
    """Up to the next of 8 sizes in each doubling, 6 % more on average: a sum of many lengths is hardly ever the same
    twice, and on a CPU a product of a new shape costs more to prepare than to compute.
    """
    step = max(TOKEN_MULTIPLE, 1 << max(0, tokens.bit_length() - 4))
    return -(-tokens // step) * step


def _tensor(values: Places, device: torch.device) -> Tensor:
    return torch.from_numpy(values).to(device)
