"""Bytes of a trial host, by arithmetic: weights, slots, what a GPU keeps for itself, and how many slots fit.

What a pass needs beside weights and slots is counted by ``engine/dry_run.py``; ``estimate.py`` puts both together.
Sizes of NF4 and of its constants: Dettmers et al. 2023, section 3 (https://arxiv.org/abs/2305.14314); of the
optimizers: bitsandbytes.optim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Literal

GIB = 2**30
BLOCK = 64
"""Parameters that share one scale, a byte after double quantisation."""
SUPER_BLOCK = 256
"""Scales that share one float32; 8-bit optimizers have one for as many state values."""
CODE_BYTES = 4 * (16 + 256 + 1)
"""The lookup tables and the offset of one quantised layer."""
SMALLEST_8BIT = 4096
"""bitsandbytes keeps the state of fewer elements in 32 bits."""
SMALLEST_PAGED = 100_000
"""bitsandbytes keeps the state of fewer elements in plain memory."""
CPU_8BIT_STEP_BYTES = 20
"""Work space of an 8-bit optimizer's step on a CPU, for each parameter of one trial, written out in float32 there.
Measured; the kernels of GPUs, and 32-bit optimizers, work in place."""
CUDA_CONTEXT_BYTES = 640 * 2**20
"""Of a process on a GPU: driver, kernels, cuBLAS' workspaces. By experience; differs by GPU and driver."""
RESERVE = 0.05
"""Share of a GPU that is left free: the caching allocator loses some between blocks that do not fit each other."""
HOST_PROCESS_BYTES = 640 * 2**20
"""A host's process on a node without GPUs, before it loads a base: Python, Ray, torch, transformers. Measured."""
TRIAL_PROCESS_BYTES = 192 * 2**20
"""The thin process of one trial: Python and Ray. Measured."""
MAX_AUTO_SLOTS = 64
"""Passes get no faster with more, and each trial is a process."""
AUTO_SLOTS_PER_CORE = 4
"""Without GPUs: what packing gains is gone long before, and each trial's process wants some time of a core."""

Shape = tuple[int, int]


@dataclass(frozen=True, slots=True)
class BaseBytes:
    """The frozen base."""

    weights: int
    """Linear layers in NF4, half a byte a parameter."""
    constants: int
    """Their scales."""
    unquantised: int
    """Embeddings, head and norms in the compute dtype."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.constants + self.unquantised


def base_bytes(layers: Iterable[Shape], parameters: int, dtype_bytes: int) -> BaseBytes:
    """A base of so many ``parameters`` in all whose linear ``layers`` (output, input features) are in NF4."""
    weights = constants = quantised = 0
    for outputs, inputs in layers:
        size = outputs * inputs
        blocks = -(-size // BLOCK)
        quantised += size
        weights += -(-size // 2)
        constants += blocks + 4 * -(-blocks // SUPER_BLOCK) + CODE_BYTES
    return BaseBytes(weights, constants, (parameters - quantised) * dtype_bytes)


@dataclass(frozen=True, slots=True)
class SlotBytes:
    """One trial's own state."""

    adapters: int
    """A and B in float32, and a copy in the compute dtype, stacked with the neighbours'; on CPUs two (engine/pack.py).
    """
    gradients: int
    """In float32, and those of a pass in the compute dtype."""
    optimizer: int
    """Two moments."""
    paged: int
    """The part of ``optimizer`` that a GPU may page out to the machine's memory, at the price of speed."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.adapters + self.gradients + self.optimizer


def slot_bytes(
    layers: Iterable[Shape], rank: int, optimizer: str, dtype_bytes: int, kind: Literal["gpu", "cpu"] = "gpu"
) -> SlotBytes:
    """An adapter of ``rank`` on ``layers`` with bitsandbytes' AdamW."""
    size = rank * sum(outputs + inputs for outputs, inputs in layers)
    if optimizer == "paged_adamw_8bit" and size >= SMALLEST_8BIT:
        states, scales = 2 * size, 2 * 4 * -(-size // SUPER_BLOCK) + 2 * 4 * 256
    else:
        states, scales = 8 * size, 0
    return SlotBytes(
        adapters=(4 + (1 if kind == "gpu" else 2) * dtype_bytes) * size,
        gradients=(4 + dtype_bytes) * size,
        optimizer=states + scales,
        paged=states if size >= SMALLEST_PAGED else 0,
    )


@dataclass(frozen=True, slots=True)
class HostBytes:
    """A host with its base and all its slots, at its fullest moment."""

    slots: int
    weights: int
    constants: int
    unquantised: int
    adapters: int
    gradients: int
    optimizer: int
    paged: int
    """Part of ``optimizer`` that can be paged out."""
    activations: int
    """What a forward pass keeps for the backward pass."""
    logits: int
    """Of one trial's loss, with their gradient."""
    layer: int
    """Work space of one layer, forward or backward, with its weights dequantised."""
    evaluation: int
    """Everything that an evaluation needs instead of the last three."""
    step: int = 0
    """Work space of one trial's optimizer step, which comes when a pass is over."""

    @property
    def resident(self) -> int:
        """What is there all the time."""
        return self.weights + self.constants + self.unquantised + self.adapters + self.gradients + self.optimizer

    @property
    def passing(self) -> int:
        """What comes and goes, at most: the logits are gone when the backward pass begins, training when an evaluation
        does.
        """
        return max(self.activations + max(self.logits, self.layer), self.evaluation, self.step)

    @property
    def total(self) -> int:
        """Most bytes at one time."""
        return self.resident + self.passing

    @property
    def least(self) -> int:
        """Most bytes at one time with the optimizer's state paged out meanwhile: it steps when a pass is over."""
        return self.total - self.paged

    def as_dict(self) -> dict[str, int]:
        """All parts and their sums."""
        return {**asdict(self), "resident": self.resident, "total": self.total}


@dataclass(frozen=True, slots=True)
class Device:
    """What a host runs on."""

    kind: Literal["gpu", "cpu"]
    memory_gib: float
    cores: float = 0.0
    """Of a node without GPUs."""

    @property
    def memory_bytes(self) -> int:
        """All of its memory."""
        return int(self.memory_gib * GIB)

    def usable(self, slots: int) -> int:
        """Bytes for the host with so many slots: without the context and the reserve of a GPU, or the processes of a
        node; 0 where these alone take all.
        """
        if self.kind == "gpu":
            return max(0, int(self.memory_bytes * (1 - RESERVE)) - CUDA_CONTEXT_BYTES)
        return max(0, self.memory_bytes - HOST_PROCESS_BYTES - slots * TRIAL_PROCESS_BYTES)

    @property
    def most_slots(self) -> int:
        """Slots beyond which there is nothing to gain, whatever the memory."""
        return MAX_AUTO_SLOTS if self.kind == "gpu" else max(1, int(AUTO_SLOTS_PER_CORE * self.cores))


def slots_that_fit(host: Callable[[int], HostBytes], device: Device, most: int = MAX_AUTO_SLOTS) -> int:
    """The largest number of slots, up to ``most``, whose host fits ``device`` with all its optimizers' states; 0 if not
    one does. ``host`` must not shrink with the number.
    """
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if host(middle).total <= device.usable(middle):
            low = middle
        else:
            high = middle - 1
    return low


def fits_paged(host: HostBytes, device: Device) -> bool:
    """Whether a GPU holds ``host`` when optimizer state is paged out to the machine's memory during a pass."""
    return device.kind == "gpu" and host.least <= device.usable(host.slots)


def spread(fitting: int, device: Device, trials: int, places: int) -> int:
    """Slots for each of ``places`` GPUs or nodes: as many as fit and are of use, and no more than all trials at once
    need. Ray fills one GPU before the next, so that more slots would leave some without work.
    """
    return max(1, min(fitting, device.most_slots, -(-trials // places)))


def gib(count: int) -> float:
    """Bytes in GiB."""
    return count / GIB
