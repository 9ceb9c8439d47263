from __future__ import annotations

import socket

import pytest

from cluster.machine import Gpu, count_gpus, find_gpus, look, parse_gpus, port_is_free, torch_is_for_cpus


def test_this_machine_has_something() -> None:
    machine = look()
    assert machine.cores > 0
    assert machine.memory_gib > 0.5


def test_gpus_are_read_from_the_drivers_table() -> None:
    table = "NVIDIA H100 80GB HBM3, 81559, 9.0, 570.86.15\nTesla T4, 15360, 7.5, 570.86.15\n"
    assert parse_gpus(table) == (
        Gpu("NVIDIA H100 80GB HBM3", 81559 / 1024, (9, 0), "570.86.15"),
        Gpu("Tesla T4", 15.0, (7, 5), "570.86.15"),
    )


@pytest.mark.parametrize("table", ["", "No devices were found", "A, [N/A], 9.0, 1", "A, 1, 9, 1", "a,b\n\n"])
def test_rows_of_another_form_are_skipped(table: str) -> None:
    assert parse_gpus(table) == ()


def test_torch_tells_what_it_is_for_without_being_imported() -> None:
    import torch

    assert torch_is_for_cpus() == (torch.version.cuda is None)
    assert count_gpus() >= len(find_gpus())


def test_a_port_that_somebody_listens_on_is_not_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert not port_is_free(port)
    assert port_is_free(port)
