"""The adapters of the slots that share a pass, stacked: small products of many slots become one batched product.

Slots with equally many rows and like ranks form a group. The rows of a group lie side by side, its adapters at a layer
are one stack, padded with zeros to the group's largest rank. What a slot itself holds, its flat float32 weights and
gradient, knows nothing of the padding: the stack has a copy in the compute dtype, made anew for every pass, and a
pass's gradients are added to the slot's own. So who shares a stack changes no optimizer's state and no checkpoint.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Generic

import torch
from torch import Tensor

from tuning.engine.batch import Cells, Key
from tuning.engine.lora import Dropout, Stack, Stretch
from tuning.engine.slot import Columns, Slot, columns_of, stable_seed

CHEAP_PADDING = {"cpu": 2_000, "cuda": 60_000}
"""Products that a slot may waste on padding, as ranks too many x tokens of a pass: about what launching the products of
another group costs (tens of us; found on a CPU at widths of some hundreds, estimated, not measured, for GPUs)."""


class Pack(Generic[Key]):
    """The stacks of some slots, for as long as these share passes."""

    def __init__(
        self, slots: Mapping[Key, Slot], rows: Mapping[Key, int], row_tokens: float, dtype: torch.dtype
    ) -> None:
        """``rows``: of each slot in a pass; ``row_tokens``: of a row on average."""
        self._slots, self._rows = dict(slots), dict(rows)
        self.groups = [Group(keys, slots, dtype) for keys in group_slots(slots, rows, row_tokens)]
        self.stacks: dict[str, list[Stack]] = {}
        for group in self.groups:
            for site, stack in group.stacks.items():
                self.stacks.setdefault(site, []).append(stack)

        self.keys = [key for group in self.groups for key in group.slots]
        """The slots in the order of their rows."""

    def fits(self, slots: Mapping[Key, Slot], rows: Mapping[Key, int]) -> bool:
        """True if it serves a pass of just these slots, with equally many rows wherever it needs that."""
        return self._slots == slots and (self._rows == rows or len(set(rows.values())) == 1)

    def place(self, tokens: Iterable[int]) -> None:
        """Lay the groups out for a pass: ``tokens`` of one slot's stretch in each group."""
        start = 0
        for group, stretch in zip(self.groups, tokens, strict=True):
            group.stretch.start, group.stretch.tokens = start, stretch
            start += stretch * len(group.slots)

    def prepare(self, cells: Mapping[Key, Cells] | None = None, *, copy: bool = True) -> dict[str, list[Stack]]:
        """The stacks of each site with the slots' present weights; for training with ``cells``, which place dropout.

        ``copy=False`` where the weights are those of the last time.
        """
        for group in self.groups:
            if copy:
                group.copy_weights()
            group.prepare(cells)
        return self.stacks

    def collect(self, keys: Collection[Key]) -> None:
        """Add what the backward pass left in the stacks to the gradients of the slots ``keys``."""
        for group in self.groups:
            group.collect(keys)


class Group(Generic[Key]):
    """Neighbours of a pack: equally many rows, like ranks. Their weights and gradients are two tensors (k r w), whose
    columns are laid out as a slot's own for the union of their layers.
    """

    def __init__(self, keys: Sequence[Key], slots: Mapping[Key, Slot], dtype: torch.dtype) -> None:
        self.slots = {key: slots[key] for key in keys}
        self.stretch = Stretch()
        members = list(self.slots.values())
        shapes = {site: shape for slot in members for site, shape in slot.shapes.items()}
        self._columns = columns_of(shapes)
        device = members[0].flat.device
        self._in_place = device.type == "cuda"
        rank, width = max(slot.config.rank for slot in members), sum(map(sum, shapes.values()))
        self._weights, self._gradients = (
            torch.zeros(len(members), rank, width, dtype=dtype, device=device) for _ in range(2)
        )
        self._runs = [_runs(slot, self._columns) for slot in members]
        scaling = torch.tensor([slot.config.scaling for slot in members], device=device).view(-1, 1, 1)
        self.stacks = {site: self._stack(site, scaling) for site in shapes}

    def copy_weights(self) -> None:
        """Fill the stacks with the slots' present weights."""
        for slot, rows, runs in zip(self.slots.values(), self._weights, self._runs, strict=True):
            own = slot.by_rank(slot.flat.data)
            for mine, theirs in runs:
                rows[: slot.config.rank, theirs] = own[:, mine]
        if self._in_place:
            return
        for site, stack in self.stacks.items():
            members, columns = slice(stack.first, stack.first + len(stack.a)), self._columns[site]
            stack.a.copy_(self._weights[members, :, columns.a])
            stack.b.copy_(self._weights[members, :, columns.b])

    def prepare(self, cells: Mapping[Key, Cells] | None) -> None:
        """See ``Pack.prepare``."""
        for site, stack in self.stacks.items():
            members = slice(stack.first, stack.first + len(stack.a))
            stack.has_gradient = False
            if stack.dropouts:
                present = list(self.slots.items())[members]
                stack.dropouts = [None if cells is None else _dropout(slot, site, cells[key]) for key, slot in present]

    def collect(self, keys: Collection[Key]) -> None:
        """See ``Pack.collect``."""
        for stack in self.stacks.values():
            if not stack.has_gradient:  # a layer that the forward pass went around
                stack.grad_a.zero_()
                stack.grad_b.zero_()
        for (key, slot), rows, runs in zip(self.slots.items(), self._gradients, self._runs, strict=True):
            if key not in keys:
                continue
            own = slot.by_rank(slot.grad)
            for mine, theirs in runs:
                own[:, mine] += rows[: slot.config.rank, theirs]

    def _stack(self, site: str, scaling: Tensor) -> Stack:
        """One stack for the slots from the first to the last that have an adapter at ``site``.

        One between them without an adapter there has zeros.
        """
        having = [index for index, slot in enumerate(self.slots.values()) if site in slot.shapes]
        members = slice(having[0], having[-1] + 1)
        columns = self._columns[site]
        a, b = self._weights[members, :, columns.a], self._weights[members, :, columns.b]
        dropped = any(slot.config.dropout for slot in list(self.slots.values())[members])
        return Stack(
            self.stretch,
            having[0],
            # On a CPU a product of matrices that are not contiguous takes twice as long, and a copy a tenth of that. On
            # a GPU memory counts for more, and cuBLAS takes strides (not measured there).
            a if self._in_place else a.contiguous(),
            b if self._in_place else b.contiguous(),
            scaling[members],
            self._gradients[members, :, columns.a],
            self._gradients[members, :, columns.b],
            [None] * len(a) if dropped else [],
        )


def _runs(slot: Slot, columns: Mapping[str, Columns]) -> list[tuple[slice, slice]]:
    """Stretches of columns that stand together both in the slot's own rows and in the group's."""
    runs: list[tuple[slice, slice]] = []
    for site, mine in columns_of(slot.shapes).items():
        theirs = slice(columns[site].a.start, columns[site].b.stop)
        own = slice(mine.a.start, mine.b.stop)
        if runs and runs[-1][1].stop == theirs.start:
            own, theirs = slice(runs[-1][0].start, own.stop), slice(runs[-1][1].start, theirs.stop)
            runs.pop()
        runs.append((own, theirs))
    return runs


def group_slots(slots: Mapping[Key, Slot], rows: Mapping[Key, int], row_tokens: float) -> list[list[Key]]:
    """The slots in groups of equally many rows and like ranks; in a group, those with like targets are neighbours."""
    groups: list[list[Key]] = []
    smallest = 0
    for key in sorted(slots, key=lambda key: (rows[key], slots[key].config.rank)):
        rank = slots[key].config.rank
        wasted = (rank - smallest) * rows[key] * row_tokens
        fits = groups and rows[groups[-1][0]] == rows[key] and wasted <= CHEAP_PADDING[slots[key].flat.device.type]
        if not fits:
            groups.append([])
            smallest = rank
        groups[-1].append(key)
    return [sorted(group, key=lambda key: (len(slots[key].shapes), *slots[key].shapes)) for group in groups]


def _dropout(slot: Slot, site: str, cells: Cells) -> Dropout | None:
    if not slot.config.dropout or site not in slot.shapes:
        return None
    seed = stable_seed("dropout", slot.config.seed, slot.micro_steps, site)
    return Dropout(slot.config.dropout, seed, cells.rows, cells.longest, cells.own, cells.places)
