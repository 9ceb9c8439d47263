"""Bytes by arithmetic; against real quantised weights and optimizers in engine/test_dry_run.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tuning.memory import (
    CODE_BYTES,
    CUDA_CONTEXT_BYTES,
    GIB,
    HOST_PROCESS_BYTES,
    TRIAL_PROCESS_BYTES,
    Device,
    HostBytes,
    base_bytes,
    fits_paged,
    slot_bytes,
    slots_that_fit,
    spread,
)

PARTS = dict.fromkeys(
    ("weights", "constants", "unquantised", "adapters", "gradients", "optimizer", "paged"), 0
) | dict.fromkeys(("activations", "logits", "layer", "evaluation"), 0)


def host(slots: int = 1, **parts: int) -> HostBytes:
    return HostBytes(slots=slots, **{**PARTS, **parts})


def growing(base: int, slot: int) -> Callable[[int], HostBytes]:
    return lambda count: host(count, weights=base, adapters=count * slot)


def test_nf4_takes_4_127_bits_a_parameter() -> None:
    sizes = base_bytes([(4096, 4096), (14336, 4096)], 0, 2)
    parameters = 4096 * 4096 + 14336 * 4096
    assert sizes.weights == parameters // 2
    assert 8 * (sizes.weights + sizes.constants - 2 * CODE_BYTES) / parameters == pytest.approx(4.127, abs=5e-4)


def test_blocks_that_are_not_full_have_constants_too() -> None:
    odd = base_bytes([(3, 43)], 3 * 43 + 10, 4)  # 129 parameters: three blocks of 64
    assert (odd.weights, odd.constants, odd.unquantised) == (65, 3 + 4 + CODE_BYTES, 40)
    assert odd.total == 65 + 3 + 4 + CODE_BYTES + 40


def test_a_slot_of_each_optimizer_and_type() -> None:
    shapes = [(1000, 1500), (500, 1000)]
    size = 100 * (2500 + 1500)
    exact = slot_bytes(shapes, 100, "paged_adamw_32bit", 4)
    assert (exact.adapters, exact.gradients, exact.optimizer, exact.paged) == (8 * size, 8 * size, 8 * size, 8 * size)
    assert slot_bytes(shapes, 100, "paged_adamw_32bit", 4, "cpu").adapters == 12 * size
    mixed = slot_bytes(shapes, 100, "paged_adamw_8bit", 2)
    assert (mixed.adapters, mixed.gradients) == (6 * size, 6 * size)
    assert 2 * size < mixed.optimizer < 2.1 * size
    assert mixed.paged == 2 * size
    assert mixed.total == mixed.adapters + mixed.gradients + mixed.optimizer


def test_small_states_are_neither_paged_nor_in_8_bits() -> None:
    small = slot_bytes([(100, 100)], 100, "paged_adamw_32bit", 2)  # 20,000 elements
    assert (small.optimizer, small.paged) == (160_000, 0)
    tiny = slot_bytes([(100, 100)], 20, "paged_adamw_8bit", 2)  # 4,000 elements
    assert tiny.optimizer == 32_000


def test_what_is_not_needed_at_the_same_time_is_not_added() -> None:
    assert host(activations=10, logits=5, layer=3, evaluation=12).total == 15
    assert host(activations=10, logits=1, layer=3, evaluation=12).total == 13
    assert host(weights=100, activations=10, logits=1, layer=3, evaluation=20).total == 120
    assert host(activations=10, step=30).total == 30
    paged = host(weights=100, optimizer=30, paged=25, activations=10)
    assert (paged.total, paged.least, paged.resident) == (140, 115, 130)
    assert paged.as_dict()["total"] == 140


def test_a_gpu_keeps_some_for_itself_and_a_node_for_its_processes() -> None:
    gpu, node = Device("gpu", 80.0), Device("cpu", 16.0, cores=2)
    assert gpu.usable(1) == gpu.usable(9) == int(80 * GIB * 0.95) - CUDA_CONTEXT_BYTES
    assert node.usable(3) == 16 * GIB - HOST_PROCESS_BYTES - 3 * TRIAL_PROCESS_BYTES
    assert node.most_slots == 8
    assert Device("cpu", 16.0, cores=0.2).most_slots == 1


@pytest.mark.parametrize("most", [1, 3, 64])
@pytest.mark.parametrize("slots", [0, 1, 2, 5, 63, 64, 200])
def test_the_largest_number_that_fits(slots: int, most: int) -> None:
    gpu = Device("gpu", 10.0)
    room = gpu.usable(1)
    slot = GIB // 100
    base = room - slots * slot - slot // 2
    assert slots_that_fit(growing(base, slot), gpu, most) == min(slots, most)


def test_exactly_full_fits_and_a_byte_more_does_not() -> None:
    gpu = Device("gpu", 10.0)
    assert slots_that_fit(growing(gpu.usable(1) - 7, 7), gpu) == 1
    assert slots_that_fit(growing(gpu.usable(1) - 6, 7), gpu) == 0


def test_only_a_gpu_pages() -> None:
    gpu, node = Device("gpu", 10.0), Device("cpu", 10.0, cores=4)
    for device in (gpu, node):
        tight = host(weights=device.usable(1) - GIB, optimizer=2 * GIB, paged=2 * GIB)
        assert fits_paged(tight, device) == (device is gpu)
    assert not fits_paged(host(weights=gpu.usable(1) + 1, optimizer=5, paged=5), gpu)


def test_slots_are_spread_over_the_gpus() -> None:
    gpu, node = Device("gpu", 80.0), Device("cpu", 64.0, cores=2)
    assert spread(12, gpu, trials=24, places=1) == 12
    assert spread(12, gpu, trials=24, places=8) == 3
    assert spread(12, gpu, trials=25, places=8) == 4
    assert spread(12, gpu, trials=2, places=8) == 1
    assert spread(200, gpu, trials=1000, places=1) == 64
    assert spread(200, node, trials=1000, places=1) == 8


def test_what_a_device_cannot_spare_is_not_below_nothing() -> None:
    assert Device("gpu", 0.5).usable(1) == Device("cpu", 1.0, cores=2).usable(64) == 0
    assert slots_that_fit(growing(1, 1), Device("gpu", 0.5)) == 0
