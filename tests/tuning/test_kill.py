"""What dies takes no work with it: real processes are killed, a real disk fills up, and all ends as if nothing had.

One trial at a time where bits are compared: the float32 of a pass depends, in its last digits, on who shares it. What
single trials go through is in test_trial.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from cluster.errors import ConflictError, MachineError
from tests.tuning.driver import SESSION_ENDS_S, Driver, assert_same, finish, kill_driver, start_sweep
from tests.tuning.limits import file_limit
from tests.tuning.make import sweep_document, sweep_spec, write_rows
from tests.tuning.watcher import Watcher, processes_named
from tests.waiting import wait_until
from tuning.keep import saved
from tuning.results import Sweep, read_sweep
from tuning.resume import resume_sweep
from tuning.spec import SweepSpec
from tuning.sweep import run_sweep

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SPACE = {
    "rank": {"choice": [2, 8]},
    "optimizer": {"choice": ["paged_adamw_32bit", "paged_adamw_8bit"]},
    "learning_rate": {"loguniform": [1e-3, 1e-2]},
}
TRAIN = {"steps": 8, "eval_every": 2, "batch_size": 2, "accumulation": 2, "dropout": 0.2, "schedule": "cosine"}
FOUR: dict[str, Any] = {"space": SPACE, "train": TRAIN, "search": {"trials": 4}}
Guests = Callable[[dict[str, Any] | None, Path], Driver]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")


@pytest.fixture(scope="module")
def four(tiny_base: Path, data: Path) -> SweepSpec:
    """Four trials at once."""
    return sweep_spec(tiny_base, data, **FOUR)


@pytest.fixture(scope="module")
def whole(local_ray: str, four: SweepSpec, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """Those four, undisturbed."""
    return run_sweep(four, tmp_path_factory.mktemp("whole") / "s")


@pytest.fixture
def guests() -> Iterator[Guests]:
    """Starts drivers that join ``local_ray``, and ends those that a test has left."""
    with contextlib.ExitStack() as left:

        def start(document: dict[str, Any] | None, folder: Path) -> Driver:
            guest = left.enter_context(start_sweep(document, folder, RAY_AUTH_MODE="token"))
            left.callback(guest.kill)
            return guest

        yield start


def adapters(sweep: Sweep) -> dict[str, bytes | None]:
    return {
        trial.name: trial.adapter and (trial.adapter / "adapter_model.safetensors").read_bytes()
        for trial in sweep.trials
    }


def leftovers(folder: Path) -> list[Path]:
    """States and half-written things: none where all trials have ended."""
    return [*folder.glob("t*/checkpoint_*/state.pt"), *folder.glob("t*/.*"), *folder.glob("t*/checkpoint_*/.*")]


def reports(folder: Path) -> dict[str, bytes]:
    """What the trials that have ended have reported, by their names."""
    return {
        trial.name: (trial.folder / "result.json").read_bytes() for trial in read_sweep(folder).trials if trial.ended
    }


def test_hosts_thin_trials_and_brokers_that_are_killed_cost_no_trial(
    whole: Sweep, four: SweepSpec, tmp_path: Path
) -> None:
    """Kill -9: the host after the first report, then a thin trial in the middle of its work, then the broker, which
    takes the next host along.
    """
    killed: list[str] = []

    def disturb(rows: list[dict[str, Any]]) -> None:
        done = sum(row["steps"] or 0 for row in rows)
        wanted = {0: ("Host", 1), 1: ("LoraTrial", 10), 2: ("Broker", 18)}.get(len(killed))
        if wanted and done >= wanted[1]:
            hosts = processes_named("ray::Host")
            processes_named(f"ray::{wanted[0]}")[0].kill()
            killed.append(wanted[0])
            if wanted[0] == "Broker":
                assert hosts
                assert psutil.wait_procs(hosts, timeout=SESSION_ENDS_S)[1] == []

    broken = run_sweep(four, tmp_path / "s", progress=Watcher(disturb))
    assert killed == ["Host", "LoraTrial", "Broker"]
    assert {trial.state for trial in broken.trials} == {"finished"}
    assert_same(broken, whole)
    assert leftovers(broken.folder) == []


def test_a_full_disk_ends_the_sweep_with_everything_kept(whole: Sweep, four: SweepSpec, small_disk: Path) -> None:
    """It fills up after the first reports, to the last byte."""
    ballast = small_disk / "ballast"

    def fill(rows: list[dict[str, Any]]) -> None:
        if ballast.exists() or not all(row["steps"] for row in rows):
            return
        with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(2**12)):
                pass

    folder = small_disk / "s"
    with pytest.raises(MachineError, match=r"No space left on device.*mend that, then loraloom sweep --resume"):
        run_sweep(four, folder, progress=Watcher(fill))
    before = read_sweep(folder)
    assert before.record.state in ("running", "interrupted")
    assert not any(trial.ended for trial in before.trials)
    ballast.unlink()
    assert_same(resume_sweep(folder), whole)
    assert leftovers(folder) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "loraloom-test", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)  # a host still has its rows mapped


def test_where_checkpoints_find_no_room_training_goes_on_and_the_sweep_is_resumed(
    whole: Sweep, four: SweepSpec, tmp_path: Path
) -> None:
    """The kernel refuses every file of the host beyond some bytes: that needs no rights, and no disk of its own.
    Reports still fit, so it is told once, and training goes on until a trial's last checkpoint cannot be written.
    """
    limited: list[int] = []

    def limit(rows: list[dict[str, Any]]) -> None:
        if not limited and any(row["steps"] for row in rows):
            (host,) = processes_named("ray::Host")
            resource.prlimit(host.pid, resource.RLIMIT_FSIZE, (10_000, 10_000))
            limited.append(host.pid)

    folder, watcher = tmp_path / "s", Watcher(limit)
    with pytest.raises(MachineError, match=r"File too large.*mend that, then loraloom sweep --resume"):
        run_sweep(four, folder, progress=watcher)
    (note,) = watcher.notes
    assert note.endswith("File too large; training goes on, and the last checkpoints stay")
    assert not any(trial.ended for trial in read_sweep(folder).trials)
    record = (folder / "sweep.json").read_bytes()
    with file_limit(100), pytest.raises(MachineError, match=r"cannot write .*File too large"):
        resume_sweep(folder)  # nothing has been mended, and now the driver has no room either
    assert (folder / "sweep.json").read_bytes() == record
    assert_same(resume_sweep(folder), whole)
    assert leftovers(folder) == []


def test_a_guest_that_is_killed_frees_the_cluster_which_goes_on_and_is_resumed(
    whole: Sweep, local_ray: str, guests: Guests, tiny_base: Path, data: Path, tmp_path: Path
) -> None:
    """Two drivers in one Ray share no host. Kill -9 of one, which has joined it, leaves the other alone."""
    # Stopped, it hears of nothing, and its broker must not end an idle host.
    resources = {"slots": 8, "max_concurrent": 1, "idle_host_s": 600}
    folder, sections = tmp_path / "guest", {**FOUR, "resources": resources}
    guest = guests(sweep_document(tiny_base, data, **sections, cluster={"address": local_ray}), folder)
    wait_until(lambda: list(folder.glob("t*/end.json")) and list(folder.glob("t*/*/state.pt")), guest)
    os.kill(guest.pid, signal.SIGSTOP)  # until the other one is at work
    theirs = [one for title in ("Host", "Broker", "LoraTrial") for one in processes_named(f"ray::{title}")]
    hosts: set[int] = set()
    alive: list[psutil.Process] = theirs

    def kill(rows: list[dict[str, Any]]) -> None:
        nonlocal alive
        if not hosts and any(row["steps"] for row in rows):
            hosts.update(process.pid for process in processes_named("ray::Host"))
            guest.kill()
            _, alive = psutil.wait_procs(theirs, timeout=SESSION_ENDS_S)

    spec = sweep_spec(tiny_base, data, **FOUR, resources={"slots": 8})
    mine = run_sweep(spec, tmp_path / "mine", progress=Watcher(kill))
    assert len(theirs) >= 3
    assert len(hosts) == 2
    assert alive == []
    assert_same(mine, whole)
    wait_until(lambda: ray.available_resources().get("CPU") == 2.0, timeout_s=SESSION_ENDS_S)
    before = reports(folder)
    assert 1 <= len(before) < 4
    code, out, err = finish(guests(None, folder))
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["state"] == "finished"
    done = reports(folder)
    assert len(done) == 4
    assert before.items() <= done.items()  # no trial that had ended was touched
    assert_same(read_sweep(folder), whole)
    assert leftovers(folder) == []


@pytest.mark.full
def test_a_killed_driver_s_sweep_is_resumed_twice_and_ends_bit_for_bit_the_same(
    local_ray: str, guests: Guests, tiny_base: Path, data: Path, tmp_path: Path
) -> None:
    """Kill -9 of `loraloom sweep` in its second trial, and of `--resume` in its next; then a checkpoint is cut short.

    TPE and ASHA both decide by the results of earlier runs.
    """
    search = {"algorithm": "tpe", "trials": 4, "seed": 0, "asha": {"grace_steps": 4, "reduction_factor": 2}}
    train = {**TRAIN, "batch_size": 4, "accumulation": 16}  # some time between reports, to be killed in
    sections = {"space": SPACE, "train": train, "search": search, "resources": {"slots": 1, "max_concurrent": 1}}
    document = sweep_document(tiny_base, data, **sections)
    undisturbed = guests({**document, "cluster": {"address": local_ray}}, tmp_path / "whole")
    folder = tmp_path / "broken"
    kill_driver(start_sweep(document, folder), lambda: list(folder.glob("t001/checkpoint_000002/metrics.json")))
    before = reports(folder)
    assert list(before) == ["t000"]
    again = start_sweep(None, folder)
    wait_until(lambda: read_sweep(folder).record.resumed_at, again)
    with pytest.raises(ConflictError, match=rf"a sweep is running there \(process {again.pid} on"):
        resume_sweep(folder)
    kill_driver(again, lambda: list(folder.glob("t002/checkpoint_000006/metrics.json")))
    last = saved(folder / "t002")[-1].folder  # its host may have come further than the killed driver knew
    (last / "state.pt").write_bytes(b"PK")
    with (folder / "t002/result.json").open("a") as file:
        file.write('{"steps": 6, "eval_lo')

    code, out, err = finish(start_sweep(None, folder))
    assert code == 0, err
    assert f"t002/{last.name}/state.pt is damaged: cut short; passed over" in err
    assert "JSONDecodeError" not in err
    answer = json.loads(out.splitlines()[-1])
    assert (answer["state"], len(answer["resumed_at"])) == ("finished", 2)
    assert answer["seconds"] > answer["resumed_after"] > 0
    assert finish(undisturbed)[0] == 0
    done, expected = read_sweep(folder), read_sweep(tmp_path / "whole")
    assert_same(done, expected, rel=0)
    assert adapters(done) == adapters(expected)
    assert {trial.state for trial in done.trials} == {"finished", "stopped"}
    assert before.items() <= reports(folder).items()  # no trial that had ended was touched
    assert leftovers(folder) == []
    nothing_left = resume_sweep(folder)
    assert nothing_left.record == done.record
