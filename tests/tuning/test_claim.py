"""A GPU belongs to one host at a time, whatever Ray hands out."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ray
from ray.exceptions import RayActorError

from cluster.machine import find_gpus
from tests.tuning.make import sweep_spec
from tests.tuning.watcher import Watcher
from tuning.claim import claim, claim_path
from tuning.host import Host, HostPlan, Place, start_broker
from tuning.ledger import Ledger
from tuning.past import Past
from tuning.results import SweepRecord
from tuning.watch import SweepWatch

HOLD = """
import os, sys, time
from tuning.claim import claim
claim(sys.argv[1], f"{sys.argv[2]}, process {os.getpid()}", print)
print("has it", flush=True)
time.sleep(1000)
"""
GPU = f"tests-{os.getpid()}"
"""Of no machine: a real one might be in use."""


@pytest.fixture(autouse=True)
def tidy() -> Iterator[None]:
    yield
    claim_path(GPU).unlink(missing_ok=True)


@pytest.fixture
def holder() -> Iterator[subprocess.Popen[str]]:
    """Another process that has the GPU."""
    command = [sys.executable, "-c", HOLD, GPU, "sweep other"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "has it\n"
        yield process
        process.kill()


def test_a_gpu_is_waited_for_until_its_host_is_dead(holder: subprocess.Popen[str]) -> None:
    """Kill -9 is enough."""
    waiting, told = threading.Event(), list[str]()

    def hear(owner: str) -> None:
        told.append(owner)
        waiting.set()

    with ThreadPoolExecutor(1) as pool:
        mine = pool.submit(claim, GPU, "sweep mine", hear)
        assert waiting.wait(20)
        assert not mine.done()
        holder.kill()
        os.close(mine.result(20))
    assert told == [f"sweep other, process {holder.pid}"]
    assert claim_path(GPU).read_text() == "sweep mine\n"


def test_who_is_dead_is_not_told_of(holder: subprocess.Popen[str]) -> None:
    """Until its successor has written its own name, the file says the dead one's."""
    told = list[str]()
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        pass
    claim_path(GPU).write_text(f"sweep dead, process {dead.pid}\n")

    def hear(owner: str) -> None:
        told.append(owner)
        if len(told) == 1:
            claim_path(GPU).write_text(f"sweep other, process {holder.pid}\n")
        else:
            holder.kill()

    os.close(claim(GPU, "sweep mine", hear))
    assert told == ["another process", f"sweep other, process {holder.pid}"]


@pytest.mark.gpu
def test_a_gpu_s_number_and_its_uuid_are_one_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    for gpu in find_gpus():
        assert claim_path(str(gpu.index)) == claim_path(gpu.uuid)


def test_other_gpus_are_free(holder: subprocess.Popen[str]) -> None:
    free = f"{GPU}/1"
    os.close(claim(free, "sweep mine", pytest.fail))
    claim_path(free).unlink()
    assert holder.poll() is None


def test_a_claim_of_another_user_holds_though_it_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """As root one may write all, so the refusal is the kernel's answer of elsewhere."""
    claim_path(GPU).write_text("sweep theirs\n")
    real = os.open

    def refuse(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_RDWR:
            raise PermissionError
        return real(path, flags, mode)

    monkeypatch.setattr("tuning.claim.os.open", refuse)
    os.close(claim(GPU, "sweep mine", pytest.fail))
    assert claim_path(GPU).read_text() == "sweep theirs\n"


def test_a_host_loads_nothing_before_its_gpu_is_free(
    holder: subprocess.Popen[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # put back, which a host sets
    spec = sweep_spec(tmp_path / "no base", tmp_path / "no rows")
    plan = HostPlan("mine", spec.base, tmp_path / "no data", 1, "eval_loss", 60.0)
    with ThreadPoolExecutor(1) as pool:
        host = pool.submit(Host, plan, Place("here", GPU))
        with pytest.raises(TimeoutError):
            host.result(2)
        holder.kill()
        with pytest.raises(FileNotFoundError, match="no base"):
            host.result(100)
    assert claim_path(GPU).read_text().startswith("sweep mine, process ")


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_who_looks_on_is_told_what_a_sweep_waits_for(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    """Real actors: the host in its own process waits, the broker hears of it, and the driver asks the broker."""
    spec = sweep_spec(tmp_path / "no base", tmp_path / "no rows")
    plan = HostPlan("mine", spec.base, tmp_path / "no data", 1, "eval_loss", 60.0)
    record = SweepRecord(name="mine", state="running", started_at="", trials=1, versions={})
    watcher, ledger = Watcher(), Ledger(tmp_path, "eval_loss", None, Past())
    broker = start_broker(plan)
    watch = SweepWatch(spec, record, broker, ledger, lambda _: None, watcher, [])
    place = Place(ray.get_runtime_context().get_node_id(), GPU)
    _serial, host = ray.get(broker.host.remote(place))
    report = host.report.remote()
    deadline = time.monotonic() + 60
    while not watcher.notes:
        assert time.monotonic() < deadline
        watch.on_step_end(0, [])
        time.sleep(0.05)
    assert not ray.wait([report], timeout=0)[0]
    holder.kill()
    with pytest.raises(RayActorError, match="no base"):
        ray.get(report, timeout=60)
    ray.kill(broker)
    holds = f"in use (sweep other, process {holder.pid}); this sweep's trials on it wait until it is free"
    assert watcher.notes == [f"GPU {GPU} is {holds}"]
