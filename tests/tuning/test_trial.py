"""Thin trials on real hosts, which die under them, as the broker does: what each of them ends with."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError
from ray.train._internal.storage import StorageContext
from ray.tune.experiment import Trial

from tests.tuning.make import sweep_spec, write_rows, write_sweep
from tests.tuning.watcher import processes_named
from tests.waiting import wait_until
from tuning.engine.data import prepare
from tuning.host import HostPlan, start_broker
from tuning.inspect import load_tokenizer
from tuning.ledger import Ledger
from tuning.past import Past
from tuning.results import read_sweep
from tuning.spec import SweepSpec
from tuning.trial import TRIAL_KEY, ThinTrial, Ticket, make_trainable
from tuning.watch import SweepWatch

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TRAIN = {"steps": 8, "eval_every": 2, "batch_size": 2, "accumulation": 2, "dropout": 0.2, "schedule": "cosine"}


@pytest.fixture(scope="module")
def spec(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> SweepSpec:
    return sweep_spec(tiny_base, write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl"), train=TRAIN)


@pytest.fixture(scope="module")
def make_trial(
    local_ray: str, spec: SweepSpec, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., ThinTrial]]:
    """Thin trials in this process, each of a name of its own, with what else is given, on real hosts that are idle
    after 2 s.
    """
    folder = tmp_path_factory.mktemp("trials")
    prepare(spec.data, load_tokenizer(spec.base), folder / "data", 0)
    plan = HostPlan("tests", spec.base, folder / "data", 1, "eval_loss", 2.0)
    fields = spec.train.model_dump() | {"alpha": 8.0, "alpha_over_rank": None, "rank": 4, "learning_rate": 1e-2}
    broker = start_broker(plan)
    cls: Any = make_trainable(Ticket(broker, folder, fields, 0, 0, reuse=False))
    yield lambda name, **knobs: cls({TRIAL_KEY: name, **knobs})
    ray.kill(broker)
    wait_until(lambda: not processes_named("ray::Host"), timeout_s=20)


@pytest.fixture(scope="module")
def alone(make_trial: Callable[[str], ThinTrial]) -> list[list[Any]]:
    """The numbers of a trial that nothing happens to; each trial is the same."""
    trial = make_trial("alone")
    results = [trial.train() for _ in range(4)]
    trial.stop()
    return numbers(results)


def numbers(results: list[dict[str, Any]]) -> list[list[Any]]:
    return [[result[key] for key in ("steps", "train_loss", "eval_loss")] for result in results]


def test_an_idle_host_is_ended_and_its_trial_goes_on(
    make_trial: Callable[[str], ThinTrial], alone: list[list[Any]]
) -> None:
    trial = make_trial("idle")
    results = [trial.train()]
    wait_until(lambda: not processes_named("ray::Host"), timeout_s=20)
    results += [trial.train() for _ in range(3)]
    assert numbers(results) == alone
    assert results[-1]["done"]
    trial.stop()
    wait_until(lambda: not processes_named("ray::Host"), timeout_s=20)


def test_trials_that_wait_go_on_when_the_broker_is_killed(
    make_trial: Callable[[str], ThinTrial], alone: list[list[Any]]
) -> None:
    """One waits for its turn, for a host has died and somebody else is being tried out; one waits for its host, from a
    broker that has stopped answering.
    """
    waiting = make_trial("waiting")
    results = [waiting.train()]
    assert ray.get(waiting._ticket.broker.take_turn.remote(waiting._place, "somebody"))
    (host,) = processes_named("ray::Host")
    host.kill()
    with ThreadPoolExecutor(2) as pool:
        going = pool.submit(lambda: results.extend(waiting.train() for _ in range(3)))
        wait_until(lambda: waiting._is_suspect)
        (broker,) = processes_named("ray::Broker")
        broker.suspend()
        coming = pool.submit(make_trial, "coming")
        time.sleep(0.5)
        assert not going.done()
        assert not coming.done()
        broker.kill()
        going.result(100)
        comer = coming.result(100)
    assert numbers(results) == alone
    waiting.stop()
    assert numbers([comer.train() for _ in range(4)]) == alone
    comer.stop()


def test_a_broker_that_is_killed_while_a_host_loads_costs_its_trial_nothing(
    make_trial: Callable[[str], ThinTrial], alone: list[list[Any]]
) -> None:
    """The host goes with it, unfinished: that is not the trial's doing."""
    wait_until(lambda: not processes_named("ray::Host"))
    trial = make_trial("loading")
    (host,) = wait_until(lambda: processes_named("ray::Host"))
    with ThreadPoolExecutor(1) as pool:
        going = pool.submit(lambda: [trial.train() for _ in range(4)])
        (broker,) = processes_named("ray::Broker")
        broker.kill()
        host.wait(10)
        assert numbers(going.result(100)) == alone
    trial.stop()


def test_a_trial_of_which_hosts_die_fails_and_its_neighbour_does_not(
    make_trial: Callable[..., ThinTrial], alone: list[list[Any]]
) -> None:
    """The host dies whenever the bad trial has its turn; the other one, which suffers each time, ends as if alone."""
    good = make_trial("good")
    bad = make_trial("bad", accumulation=64)  # its host is dead before it can report
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
    for one, other in zip(numbers(results), alone, strict=True):
        assert one == pytest.approx(other, rel=1e-4)  # it may have shared a pass with the bad one
    good.stop()


def test_a_trial_that_is_given_up_leaves_no_slot_behind(
    make_trial: Callable[[str], ThinTrial], spec: SweepSpec, tmp_path: Path
) -> None:
    """One whose process was killed cannot free its own."""
    other, given_up = make_trial("t000"), make_trial("t001")
    for trial in (other, given_up):
        trial.train()
    broker, folder = given_up._ticket.broker, write_sweep(tmp_path / "s", state="running")
    ledger = Ledger(folder, "eval_loss", None, Past())
    watch = SweepWatch(spec, read_sweep(folder).record, broker, ledger, lambda _: None, None, [])
    storage = StorageContext(str(tmp_path), experiment_dir_name="tune", trial_dir_name="t001")
    watch.on_trial_error(0, [], Trial("tests", config={TRIAL_KEY: "t001"}, stub=True, storage=storage))

    def slots_beside_a_new_one() -> int:
        return other._ask("detach", other._ask("attach", "t002", other._config, str(tmp_path / "t002"))[0])

    wait_until(lambda: slots_beside_a_new_one() == 1, timeout_s=20)
    other.stop()
