from __future__ import annotations

import socket

import pytest

from cluster.machine import Gpu, count_gpus, find_gpus, look, parse_gpus, port_is_free, torch_is_for_cpus, uuid_of


def test_this_machine_has_something() -> None:
    machine = look()
    assert machine.cores > 0
    assert machine.memory_gib > 0.5


def test_gpus_are_read_from_the_drivers_table() -> None:
    table = "NVIDIA H100 80GB HBM3, 81559, 9.0, 570.86.15, 0, GPU-1a2b\nTesla T4, 15360, 7.5, 570.86.15, 1, GPU-3c4d\n"
    assert parse_gpus(table) == (
        Gpu("NVIDIA H100 80GB HBM3", 81559 / 1024, (9, 0), "570.86.15", 0, "GPU-1a2b"),
        Gpu("Tesla T4", 15.0, (7, 5), "570.86.15", 1, "GPU-3c4d"),
    )


@pytest.mark.parametrize(
    "table", ["", "No devices were found", "A, [N/A], 9.0, 1, 0, G", "A, 1, 9, 1, 0, G", "a,b\n\n"]
)
def test_rows_of_another_form_are_skipped(table: str) -> None:
    assert parse_gpus(table) == ()


def gpus_of(*names: str) -> list[Gpu]:
    return [Gpu(name, 80.0, (9, 0), "570", index, f"GPU-{index}a2b") for index, name in enumerate(names)]


@pytest.mark.parametrize("name", ["1", "GPU-1a2b", "GPU-1a"])
def test_all_names_of_a_gpu_are_one(name: str) -> None:
    assert uuid_of(name, gpus_of("H100", "H100"), by_bus=False) == "GPU-1a2b"
    assert uuid_of(name, gpus_of("T4", "H100"), by_bus=True) == "GPU-1a2b"


@pytest.mark.parametrize("name", ["1", "2", "GPU-", "GPU-7", "MIG-1a2b", ""])
def test_a_gpu_that_is_not_sure_has_no_uuid(name: str) -> None:
    """Of two kinds, CUDA calls the faster one 0."""
    assert uuid_of(name, gpus_of("T4", "H100"), by_bus=False) is None
    assert uuid_of(name, [], by_bus=True) is None


@pytest.mark.gpu
def test_this_machine_s_gpus_are_told_apart() -> None:
    gpus = find_gpus()
    assert [uuid_of(str(gpu.index), gpus, by_bus=True) for gpu in gpus] == [gpu.uuid for gpu in gpus]
    assert len({gpu.uuid for gpu in gpus}) == len(gpus)


def test_torch_tells_what_it_is_for_without_being_imported() -> None:
    import torch

    assert torch_is_for_cpus() == (torch.version.cuda is None)
    assert count_gpus() >= len(find_gpus())


def test_a_port_that_somebody_listens_on_is_not_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert not port_is_free(port)
    assert port_is_free(port)
