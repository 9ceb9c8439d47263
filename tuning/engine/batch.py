"""Rows of many trials side by side in one batch.

Shapes: b rows of the whole pack, t tokens (the longest row, rounded up), n targets of one trial.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from tuning.engine.data import IGNORED, Tokens

Key = TypeVar("Key", bound=Hashable)
TOKEN_MULTIPLE = 8
"""Sequence lengths are rounded up to this, so that kernels meet few different shapes."""


@dataclass(frozen=True, slots=True)
class Share:
    """One trial's part of a packed batch."""

    start: int
    stop: int
    tokens: int
    """Of its own longest row."""
    rows: Tensor
    """(n) batch row of each target, counted from the start of the pack."""
    positions: Tensor
    """(n) position whose features predict the target: the one before it."""
    targets: Tensor
    """(n) token ids to be predicted."""


@dataclass(frozen=True, slots=True)
class PackedBatch(Generic[Key]):
    """Token ids (b t), padded on the right, and the share of each trial."""

    ids: Tensor
    shares: dict[Key, Share]


def count_targets(data: Tokens, rows: Sequence[int]) -> int:
    """Tokens of ``rows`` that count in the loss."""
    return sum(int(np.count_nonzero(data.row(row)[1][1:] != IGNORED)) for row in rows)


def pack_rows(data: Tokens, wanted: Mapping[Key, Sequence[int]], device: torch.device) -> PackedBatch[Key]:
    """Put the rows that each trial wants into one batch, each trial's rows contiguous."""
    length = max(data.length(row) for rows in wanted.values() for row in rows)
    length = -(-length // TOKEN_MULTIPLE) * TOKEN_MULTIPLE
    ids = np.zeros((sum(len(rows) for rows in wanted.values()), length), np.int64)
    shares: dict[Key, Share] = {}
    line = 0
    for key, rows in wanted.items():
        start, places, positions, targets = line, list[np.ndarray](), list[np.ndarray](), list[np.ndarray]()
        for row in rows:
            row_ids, labels = data.row(row)
            ids[line, : len(row_ids)] = row_ids
            (counted,) = np.nonzero(labels[1:] != IGNORED)
            places.append(np.full(len(counted), line, np.int64))
            positions.append(counted)
            targets.append(labels[1:][counted].astype(np.int64))
            line += 1
        tokens = max(data.length(row) for row in rows)
        shares[key] = Share(start, line, tokens, *(_tensor(parts, device) for parts in (places, positions, targets)))
    return PackedBatch(torch.from_numpy(ids).to(device), shares)


def _tensor(parts: list[np.ndarray], device: torch.device) -> Tensor:
    return torch.from_numpy(np.concatenate(parts)).to(device)
