"""What dies takes no work with it: real processes are killed, a real disk fills up, and all ends as if nothing had.

One trial at a time where bits are compared: the float32 of a pass depends, in its last digits, on who shares it.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import yaml
from ray.exceptions import RayActorError
from ray.train._internal.storage import StorageContext
from ray.tune.experiment import Trial

from cluster.connect import connect
from cluster.errors import ConflictError, MachineError
from cluster.schema import parse_spec
from cluster.spec import ClusterSpec
from tests.tuning.make import sweep_document, sweep_spec, write_rows, write_sweep
from tests.tuning.watcher import Watcher, processes_named
from tuning.engine.data import prepare
from tuning.host import HostPlan, start_broker
from tuning.inspect import load_tokenizer
from tuning.ledger import Ledger
from tuning.past import Past
from tuning.results import Sweep, leaderboard, read_sweep
from tuning.resume import resume_sweep
from tuning.spec import SweepSpec
from tuning.sweep import run_sweep
from tuning.trial import TRIAL_KEY, ThinTrial, Ticket, make_trainable
from tuning.watch import SweepWatch

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SPACE = {
    "rank": {"choice": [2, 8]},
    "optimizer": {"choice": ["paged_adamw_32bit", "paged_adamw_8bit"]},
    "learning_rate": {"loguniform": [1e-3, 1e-2]},
}
TRAIN = {"steps": 8, "eval_every": 2, "batch_size": 2, "accumulation": 2, "dropout": 0.2, "schedule": "cosine"}
SESSION_ENDS_S = 15
"""Seconds in which everything that a killed driver has started must have ended."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    with connect(ClusterSpec(dashboard=False, num_cpus=2, num_gpus=0), job_name="tests"):
        yield


@pytest.fixture(scope="module")
def four(tiny_base: Path, data: Path) -> SweepSpec:
    """Four trials at once."""
    return sweep_spec(tiny_base, data, space=SPACE, train=TRAIN, search={"trials": 4})


@pytest.fixture(scope="module")
def whole(ray_here: None, four: SweepSpec, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """Those four, undisturbed."""
    return run_sweep(four, tmp_path_factory.mktemp("whole") / "s")


def assert_same(one: Sweep, other: Sweep, *, rel: float = 1e-4) -> None:
    """The same trials in the same order with the same numbers, up to the speed."""
    for row, expected in zip(leaderboard(one), leaderboard(other), strict=True):
        for column in expected.keys() - {"tokens_per_second"}:
            value = expected[column]
            assert row[column] == (pytest.approx(value, rel=rel) if isinstance(value, float) else value), column


def adapters(sweep: Sweep) -> dict[str, bytes | None]:
    return {
        trial.name: trial.adapter and (trial.adapter / "adapter_model.safetensors").read_bytes()
        for trial in sweep.trials
    }


def leftovers(folder: Path) -> list[Path]:
    """States and half-written things: none where all trials have ended."""
    return [*folder.glob("t*/checkpoint_*/state.pt"), *folder.glob("t*/.*"), *folder.glob("t*/checkpoint_*/.*")]


def test_hosts_and_thin_trials_that_are_killed_cost_no_trial(whole: Sweep, four: SweepSpec, tmp_path: Path) -> None:
    """Kill -9: the host after the first report, then a thin trial in the middle of its work, then the host again."""
    killed: list[str] = []

    def disturb(rows: list[dict[str, Any]]) -> None:
        done = sum(row["steps"] or 0 for row in rows)
        wanted = {0: ("Host", 1), 1: ("LoraTrial", 10), 2: ("Host", 18)}.get(len(killed))
        if wanted and done >= wanted[1]:
            processes_named(f"ray::{wanted[0]}")[0].kill()
            killed.append(wanted[0])

    broken = run_sweep(four, tmp_path / "s", progress=Watcher(disturb))
    assert killed == ["Host", "LoraTrial", "Host"]
    assert {trial.state for trial in broken.trials} == {"finished"}
    assert_same(broken, whole)
    assert leftovers(broken.folder) == []


@pytest.mark.parametrize("room", [0, 2**16], ids=["nothing fits", "reports fit"])
def test_a_full_disk_ends_the_sweep_with_everything_kept(
    room: int, whole: Sweep, four: SweepSpec, small_disk: Path, tmp_path: Path
) -> None:
    """It fills up after the first reports. Where small files still fit, that is told once, and training goes on until a
    trial's last checkpoint cannot be written.
    """
    ballast = small_disk / "ballast"

    def fill(rows: list[dict[str, Any]]) -> None:
        if ballast.exists() or not all(row["steps"] for row in rows):
            return
        with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(2**12)):
                pass
        os.truncate(ballast, ballast.stat().st_size - room)

    watcher, folder = Watcher(fill), small_disk / "s"
    with pytest.raises(MachineError, match=r"No space left on device.*mend that, then loraloom sweep --resume"):
        run_sweep(four, folder, progress=watcher)
    assert all("training goes on" in note for note in watcher.notes)
    assert len(watcher.notes) == 1 or (not room and not watcher.notes)
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


def test_two_sweeps_on_one_cluster_share_no_host(whole: Sweep, tiny_base: Path, data: Path, tmp_path: Path) -> None:
    """A second driver joins the Ray of the first, both search at the same time."""
    sections: dict[str, Any] = {"space": SPACE, "train": TRAIN, "search": {"trials": 4}, "resources": {"slots": 8}}
    address = ray.get_runtime_context().gcs_address
    document = sweep_document(tiny_base, data, **sections, cluster={"address": address})
    hosts: set[int] = set()

    def meet(_rows: list[dict[str, Any]]) -> None:
        """Wait until both have begun."""
        deadline = time.monotonic() + 100
        while len(hosts) < 2 and time.monotonic() < deadline:
            hosts.update(process.pid for process in processes_named("ray::Host"))
            time.sleep(0.1)

    guest = start_sweep(document, tmp_path / "guest", RAY_AUTH_MODE="token")
    try:
        mine = run_sweep(sweep_spec(tiny_base, data, **sections), tmp_path / "mine", progress=Watcher(meet))
        out, err = guest.communicate(timeout=120)
    finally:
        guest.kill()
    assert guest.returncode == 0, err
    assert json.loads(out.splitlines()[-1])["state"] == "finished"
    assert len(hosts) == 2
    for sweep in (mine, read_sweep(tmp_path / "guest")):
        assert_same(sweep, whole)


@pytest.fixture
def make_trial(ray_here: None, four: SweepSpec, tmp_path: Path) -> Iterator[Callable[[str], ThinTrial]]:
    """Thin trials in this process, on real hosts that are idle after 2 s."""
    prepare(four.data, load_tokenizer(four.base), tmp_path / "data", 0)
    plan = HostPlan("tests", four.base, tmp_path / "data", 1, "eval_loss", 2.0)
    fields = four.train.model_dump() | {"alpha": 8.0, "alpha_over_rank": None, "rank": 4, "learning_rate": 1e-2}
    broker = start_broker(plan)
    cls: Any = make_trainable(Ticket(broker, tmp_path, fields, 0, 0, reuse=False))
    yield lambda name: cls({TRIAL_KEY: name})
    ray.kill(broker)


def numbers(results: list[dict[str, Any]]) -> list[list[Any]]:
    return [[result[key] for key in ("steps", "train_loss", "eval_loss")] for result in results]


def test_an_idle_host_is_ended_and_its_trial_goes_on(make_trial: Callable[[str], ThinTrial]) -> None:
    def wait() -> None:
        (host,) = processes_named("ray::Host")
        host.wait(timeout=20)

    undisturbed = make_trial("a")
    expected = [undisturbed.train() for _ in range(4)]
    undisturbed.stop()
    trial = make_trial("b")
    results = [trial.train()]
    wait()
    results += [trial.train() for _ in range(3)]
    assert numbers(results) == numbers(expected)
    assert results[-1]["done"]
    trial.stop()
    wait()


def test_a_trial_of_which_hosts_die_fails_and_its_neighbour_does_not(make_trial: Callable[[str], ThinTrial]) -> None:
    """The host dies whenever the bad trial has its turn; the other one, which suffers each time, ends as if alone."""
    good, bad = make_trial("good"), make_trial("bad")
    expected = make_trial("alone")
    whole = [expected.train() for _ in range(4)]
    expected.stop()
    results: list[dict[str, Any]] = []
    over = threading.Event()
    deaths: list[int] = []

    def kill() -> None:
        while not over.wait(0.05):
            if bad._slot is not None and (hosts := processes_named("ray::Host")):
                deaths.append(hosts[0].pid)
                hosts[0].kill()
                hosts[0].wait(10)

    with ThreadPoolExecutor(2) as pool:
        pool.submit(kill)
        going = pool.submit(lambda: results.extend(good.train() for _ in range(4)))
        try:
            with pytest.raises(RayActorError):
                list(iter(bad.train, None))
        finally:
            over.set()
        bad.stop()
        going.result(100)
    assert 2 <= len(set(deaths)) <= 3
    for one, other in zip(numbers(results), numbers(whole), strict=True):
        assert one == pytest.approx(other, rel=1e-4)  # it may have shared a pass with the bad one
    good.stop()


def test_a_trial_that_is_given_up_leaves_no_slot_behind(
    make_trial: Callable[[str], ThinTrial], four: SweepSpec, tmp_path: Path
) -> None:
    """One whose process was killed cannot free its own."""
    other, given_up = make_trial("t000"), make_trial("t001")
    for trial in (other, given_up):
        trial.train()
    broker, folder = given_up._ticket.broker, write_sweep(tmp_path / "s", state="running")
    ledger = Ledger(folder, "eval_loss", None, Past())
    watch = SweepWatch(four, read_sweep(folder).record, broker, ledger, lambda _: None, None, [])
    storage = StorageContext(str(tmp_path), experiment_dir_name="tune", trial_dir_name="t001")
    watch.on_trial_error(0, [], Trial("tests", config={TRIAL_KEY: "t001"}, stub=True, storage=storage))
    deadline = time.monotonic() + 20
    while other._ask("detach", other._ask("attach", "t002", other._config, str(tmp_path / "t002"))[0]) > 1:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    other.stop()


def test_a_killed_driver_s_sweep_is_resumed_twice_and_ends_bit_for_bit_the_same(
    ray_here: None, tiny_base: Path, data: Path, tmp_path: Path
) -> None:
    """Kill -9 of `loraloom sweep` in its second trial, and of `--resume` in its next; then a checkpoint is cut short.

    TPE and ASHA both decide by the results of earlier runs.
    """
    search = {"algorithm": "tpe", "trials": 4, "seed": 0, "asha": {"grace_steps": 4, "reduction_factor": 2}}
    train = {**TRAIN, "batch_size": 4, "accumulation": 8}  # half a second between reports: time to kill
    resources = {"slots": 1, "max_concurrent": 1}
    document = sweep_document(tiny_base, data, space=SPACE, train=train, search=search, resources=resources)
    expected = run_sweep(parse_spec(document, SweepSpec, "x.yaml"), tmp_path / "whole")

    folder = tmp_path / "broken"
    kill_driver(start_sweep(document, folder), lambda: list(folder.glob("t001/checkpoint_000002/metrics.json")))
    assert [trial.name for trial in read_sweep(folder).trials if trial.ended] == ["t000"]
    first = (folder / "t000" / "result.json").read_bytes()
    again = start_sweep(None, folder)
    deadline = time.monotonic() + 60
    while "resumed_after" not in (folder / "sweep.json").read_text() or not read_sweep(folder).record.resumed_at:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    with pytest.raises(ConflictError, match=rf"a sweep is running there \(process {again.pid} on"):
        resume_sweep(folder)
    kill_driver(again, lambda: list(folder.glob("t002/checkpoint_000006/metrics.json")))
    (folder / "t002/checkpoint_000006/state.pt").write_bytes(b"PK")
    with (folder / "t002/result.json").open("a") as file:
        file.write('{"steps": 6, "eval_lo')

    with start_sweep(None, folder) as last:
        out, err = last.communicate(timeout=200)
    assert last.returncode == 0, err
    assert "t002/checkpoint_000006/state.pt is damaged: cut short; passed over" in err
    answer = json.loads(out.splitlines()[-1])
    assert (answer["state"], len(answer["resumed_at"])) == ("finished", 2)
    assert answer["seconds"] > answer["resumed_after"] > 0
    done = read_sweep(folder)
    assert_same(done, expected, rel=0)
    assert adapters(done) == adapters(expected)
    assert {trial.state for trial in done.trials} == {"finished", "stopped"}
    assert (folder / "t000" / "result.json").read_bytes() == first  # no trial that had ended was touched
    assert leftovers(folder) == []
    nothing_left = resume_sweep(folder)
    assert nothing_left.record == done.record


def start_sweep(document: dict[str, Any] | None, folder: Path, **variables: str) -> subprocess.Popen[str]:
    """`loraloom sweep` in a process group of its own; without a document `--resume`."""
    command = [sys.executable, "-m", "loraloom", "sweep", "--json"]
    if document is None:
        command += ["--resume", str(folder)]
    else:
        config = folder.with_suffix(".yaml")
        config.write_text(yaml.safe_dump(document, sort_keys=False))
        command += [str(config), "--dir", str(folder)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, **variables},
    )


def kill_driver(driver: subprocess.Popen[str], when: Callable[[], Any]) -> None:
    """Kill -9 once ``when`` is true; then everything that it has started ends by itself."""
    with driver:
        deadline = time.monotonic() + 100
        mine: list[psutil.Process] = []
        while not when():
            assert driver.poll() is None, driver.communicate()[1]
            assert time.monotonic() < deadline
            mine = psutil.Process(driver.pid).children(recursive=True)
        driver.kill()
        assert len(mine) > 5
        _, alive = psutil.wait_procs(mine, timeout=SESSION_ENDS_S)
        assert alive == []
