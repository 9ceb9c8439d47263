from __future__ import annotations

import resource
from typing import Any

import pytest
from packaging.requirements import Requirement

from cluster import checks
from cluster.checks import Check
from cluster.doctor import ask
from cluster.machine import Gpu, Machine

H100 = Gpu("H100", 80.0, (9, 0), "570")
T4 = Gpu("T4", 15.0, (7, 5), "570")
K80 = Gpu("K80", 12.0, (3, 7), "470")


def machine(*gpus: Gpu, cores: float = 8, memory: float = 32, shm: float = 16) -> Machine:
    return Machine(cores, memory, shm, gpus)


def torch(cuda: str | None = None, devices: tuple[str, ...] = ()) -> dict[str, Any]:
    return {"version": "2.13.0", "cuda": cuda, "devices": list(devices)}


def vllm(device: str, *, kernels: bool = True) -> dict[str, Any]:
    return {"version": "0.29.0", "device": device, "kernels": kernels}


JUDGED: list[tuple[Check, str]] = [
    (checks.check_python((3, 11, 7), ">=3.11,<3.13"), "ok"),
    (checks.check_python((3, 13, 0), ">=3.11,<3.13"), "fail"),
    (checks.check_python((3, 11, 7), None), "warn"),
    (checks.check_packages([(Requirement("torch==2.13.0"), "2.13.0+cpu")]), "ok"),
    (checks.check_packages([(Requirement("torch==2.13.0"), "2.12.0")]), "fail"),
    (checks.check_packages([(Requirement("torch==2.13.0"), None)]), "fail"),
    (checks.check_packages([]), "fail"),
    (checks.check_torch(torch(), machine()), "ok"),
    (checks.check_torch(torch("13.0", ("H100",)), machine(H100)), "ok"),
    (checks.check_torch(torch(), machine(H100)), "fail"),
    (checks.check_torch(torch("13.0"), machine(H100)), "fail"),
    (checks.check_torch(torch("13.0"), machine()), "warn"),
    (checks.check_torch({"trouble": "crashed with signal 11"}, machine()), "fail"),
    (checks.check_bitsandbytes({"device": "cpu", "error": 0.092}), "ok"),
    (checks.check_bitsandbytes({"device": "cpu", "error": 0.4}), "fail"),
    (checks.check_bitsandbytes({"device": "cpu", "error": float("nan")}), "fail"),
    (checks.check_bitsandbytes({"trouble": "no libbitsandbytes"}), "fail"),
    (checks.check_vllm(vllm("cpu"), machine()), "ok"),
    (checks.check_vllm(vllm("cuda"), machine(H100)), "ok"),
    (checks.check_vllm(vllm("cpu"), machine(H100)), "fail"),
    (checks.check_vllm(vllm(""), machine()), "fail"),
    (checks.check_vllm(vllm("cpu", kernels=False), machine()), "fail"),
    (checks.check_vllm({"trouble": "no module named vllm"}, machine()), "fail"),
    (checks.check_import("ray", {"version": "2.60.0"}), "ok"),
    (checks.check_import("ray", {"trouble": "ImportError"}), "fail"),
    (checks.check_companions({"broken": {}}), "ok"),
    (checks.check_companions({"broken": {"torchvision": "operator torchvision::nms does not exist"}}), "fail"),
    (checks.check_companions({"trouble": "crashed with signal 11"}), "fail"),
    (checks.check_cores(machine(cores=2)), "ok"),
    (checks.check_cores(machine(cores=0.5)), "warn"),
    (checks.check_memory(machine(memory=8)), "ok"),
    (checks.check_memory(machine(memory=5)), "warn"),
    (checks.check_memory(machine(memory=2)), "fail"),
    (checks.check_disk("disk", 100), "ok"),
    (checks.check_disk("disk", 3), "warn"),
    (checks.check_disk("disk", 0.1), "fail"),
    (checks.check_shm(machine(shm=16)), "ok"),
    (checks.check_shm(machine(shm=0.0625)), "warn"),
    (checks.check_gpus(machine()), "ok"),
    (checks.check_gpus(machine(H100)), "ok"),
    (checks.check_gpus(machine(H100, T4)), "warn"),
    (checks.check_gpus(machine(K80)), "fail"),
    (checks.check_files(65536), "ok"),
    (checks.check_files(resource.RLIM_INFINITY), "ok"),
    (checks.check_files(1024), "warn"),
    (checks.check_ports({8265: True, 8000: True}), "ok"),
    (checks.check_ports({8265: True, 8000: False}), "warn"),
    (checks.check_auth({}, 0o100600), "ok"),
    (checks.check_auth({}, None), "ok"),
    (checks.check_auth({"RAY_AUTH_MODE": "token"}, None), "ok"),
    (checks.check_auth({"RAY_AUTH_MODE": "disabled"}, 0o100600), "warn"),
    (checks.check_auth({}, 0o100644), "warn"),
    (checks.check_address({}), "ok"),
    (checks.check_address({"RAY_ADDRESS": "10.0.0.1:6379"}), "warn"),
    (checks.check_hub({"endpoint": "https://hub", "status": 200}), "ok"),
    (checks.check_hub({"endpoint": "https://hub", "status": 502}), "warn"),
    (checks.check_hub({"trouble": "ConnectError"}), "warn"),
]


@pytest.mark.parametrize(("check", "status"), JUDGED, ids=lambda item: item.name if isinstance(item, Check) else item)
def test_judgements(check: Check, status: str) -> None:
    assert check.status == status
    assert check.found
    if status == "ok":
        assert (check.meaning, check.mend) == ("", "")
    else:
        assert check.meaning
        assert check.mend


def test_a_wrong_package_is_named_with_what_it_must_be() -> None:
    check = checks.check_packages([(Requirement("ray[tune]==2.60.0"), "2.59.0"), (Requirement("typer>=0.29"), None)])
    assert check.found == "ray 2.59.0 (must be ==2.60.0), typer missing (must be >=0.29)"


def test_a_broken_companion_is_named_with_the_command_that_removes_it() -> None:
    check = checks.check_companions({"broken": {"torchvision": "no nms", "torchcodec": "no ffmpeg"}})
    assert check.found == "torchvision: no nms; torchcodec: no ffmpeg"
    assert check.mend.endswith("-m pip uninstall -y torchvision torchcodec")


def test_a_probe_that_fails_is_a_finding() -> None:
    assert ask("nonsense") == {"trouble": "KeyError: 'probe_nonsense'"}
