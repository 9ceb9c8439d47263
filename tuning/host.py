"""The actors of a sweep: a host that owns one GPU's base, and the broker through which trials find their host.

The broker belongs to the driver and the hosts to the broker, so when the driver goes, however it goes, Ray ends them
all and the GPUs are free. A host asks Ray for no GPU of its own: the trials on it hold the fractions, and it uses the
device they were given; before it loads anything, it waits until no other host is on it (``claim``). One that nobody has
asked for anything for ``idle_s`` is ended; a trial that comes just then finds it dead, asks the broker for another and
goes on from its checkpoint, as after any other death of a host.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tuning.claim import claim
from tuning.gauges import HostGauges
from tuning.keep import checkpoint_name, prune
from tuning.spec import BaseSpec, TrialConfig

HostHandle = Any
"""Ray's handle of a ``Host``: its methods are called with ``.remote``, which Ray's types do not follow."""
BrokerHandle = Any
"""Ray's handle of a ``Broker``."""
UNSAVED, UNDELETED = "unsaved", "undeleted"
"""Keys of what ``Host.save`` answers, and of the result that it belongs to."""
TURN_S = 30.0
"""A turn ends by itself, should its trial have died."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HostPlan:
    """What a host needs to know to start; the same for all hosts of a sweep."""

    sweep: str
    base: BaseSpec
    data: Path
    """Folder with train.arrow and eval.arrow."""
    threads: int | None
    """CPU threads where there is no GPU; None: as ``engine/threads.py`` chooses, or in float32 all cores but one."""
    metric: str
    """What is minimised: a trial's best checkpoint is kept by it."""
    idle_s: float
    """Seconds without work after which a host is ended."""
    packing: bool = False
    """Lay rows end to end."""
    slots: int = 1
    """Trials that share a host at most."""
    run: str = ""
    """The tag of the gauges that tells sweeps of one name apart (``gauges.run_tag``)."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a host runs: a node, and one of its GPUs or none."""

    node: str
    gpu: str | None


class Host:
    """One quantised base and the trials on it (an actor; ``TrainerLoop`` does the work)."""

    def __init__(self, plan: HostPlan, place: Place, broker: BrokerHandle | None = None, serial: str = "") -> None:
        """``broker`` is told when the host has been idle, with its ``serial``; without one it lives on."""
        # Before torch is imported: the device that the trials' fractions belong to, or none.
        os.environ["CUDA_VISIBLE_DEVICES"] = "" if place.gpu is None else place.gpu
        # Passes differ in shape from one to the next: without it, memory in pieces of the wrong size would be lost.
        if not os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}:
            os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
        self._plan, self._place = plan, place
        self._slots: dict[str, int] = {}
        self._calls = 0
        self._last_call = time.monotonic()
        self._lock = threading.Lock()
        if place.gpu is not None:
            owner = f"sweep {plan.sweep}, process {os.getpid()}"
            self._claim = claim(place.gpu, owner, lambda holder: self._tell_of_wait(broker, holder))
        import torch

        from tuning.engine.base import Base
        from tuning.engine.data import EVAL_FILE, TRAIN_FILE, Tokens
        from tuning.engine.dtype import compute_dtype
        from tuning.engine.loop import TrainerLoop
        from tuning.engine.threads import ThreadTuner
        from tuning.engine.trainer import Trainer

        if place.gpu is None:
            # OpenMP's threads wait for each other at the end of every product: one that shares its core with Ray's
            # processes holds up all. Measured on two cores under load: two threads took 9.3 s a pass, one 0.5 s.
            torch.set_num_threads(plan.threads or max(1, (os.cpu_count() or 1) - 1))
        is_free = place.gpu is None and plan.threads is None and compute_dtype(plan.base, "cpu") != torch.float32

        def make_trainer() -> Trainer:
            base = Base(plan.base, "cpu" if place.gpu is None else "cuda:0")
            return Trainer(base, Tokens(plan.data / TRAIN_FILE), Tokens(plan.data / EVAL_FILE), packing=plan.packing)

        self._loop = TrainerLoop(make_trainer, ThreadTuner() if is_free else None, partial(end_process, broker))
        # A base that does not load ends the actor, so that the broker starts another for the next trial.
        self._loop.ready.result()
        self._last_call = time.monotonic()
        self._seen = 0, 0
        self._efficiency: float | None = None
        HostGauges(plan.sweep, plan.run, self._device(), self._measure)
        if broker is not None:
            threading.Thread(target=self._watch, args=(broker, serial), name="idle", daemon=True).start()

    def __repr__(self) -> str:
        """What Ray's dashboard calls this process. Ray asks once, when it is new, and writes its own titles over a
        process's at every call: so the slots are those that there are, and those in use are a gauge.
        """
        device = self._device()
        if self._place.gpu is not None:
            import torch

            device += f" ({torch.cuda.get_device_name()})"
        return f"host {device} slots={self._plan.slots} sweep={self._plan.sweep}"

    def _device(self) -> str:
        return "cpu" if self._place.gpu is None else f"gpu={self._place.gpu}"

    def _measure(self) -> dict[str, float]:
        """What Prometheus is told of the host (``gauges.HOST_NUMBERS``)."""
        tokens, places = self._loop.ready.result().filled
        if places > self._seen[1]:
            self._efficiency = (tokens - self._seen[0]) / (places - self._seen[1])
            self._seen = tokens, places
        measured = {"slots_used": float(len(self._slots)), "memory_bytes": self._memory_bytes()}
        return measured if self._efficiency is None else {**measured, "pack_efficiency": self._efficiency}

    def _memory_bytes(self) -> float:
        if self._place.gpu is None:
            return float(psutil.Process().memory_info().rss)
        import torch

        return float(torch.cuda.memory_reserved())

    def report(self) -> dict[str, float]:
        """What the loaded base measures (``BaseReport``); waits until it is loaded."""
        return {name: float(value) for name, value in asdict(self._loop.ready.result().base.report).items()}

    def attach(self, name: str, config: TrialConfig, folder: str) -> tuple[int, dict[str, Any] | None, list[str]]:
        """Give a trial a slot that goes on from the last good checkpoint in ``folder``, the trial's.

        A slot that the trial has already, whose actor must have died, is freed first.

        Returns:
            The slot; the report of the checkpoint, None where there is none; what was passed over, and why.
        """
        from tuning.engine.checkpoint import newest

        with self._at_work():
            stale = self._slots.pop(name, None)
            if stale is not None:
                self._loop.detach(stale)
            found, state, passed_over = newest(Path(folder))
            slot = self._loop.attach(config, state)
            with self._lock:
                stale = self._slots.get(name)
                self._slots[name] = slot
            if stale is not None:  # of an actor of the trial that died while its slot was being made
                self._loop.detach(stale)
            return slot, None if found is None else found.report, passed_over

    def advance(self, slot: int, steps: int) -> dict[str, Any]:
        """Train and evaluate (``TrialReport``); returns when the steps are done."""
        with self._at_work():
            return self._loop.advance(slot, steps).as_dict()

    def save(self, slot: int, folder: str, report: dict[str, Any]) -> dict[str, str]:
        """Write the slot's checkpoint to ``folder``, the trial's, and delete those that it makes superfluous.

        Returns:
            Empty, or ``unsaved``: why it could not be written; then those before it are as they were, and training can
            go on. Or ``undeleted``: it was written, and why others could not be deleted.
        """
        with self._at_work():
            target = Path(folder) / checkpoint_name(report["steps"])
            try:
                self._loop.save(slot, target, self._plan.base.model, self._plan.base.revision, report)
            except OSError as error:
                return {UNSAVED: f"cannot write {target}: {error.strerror or error}"}
            undeleted = prune(Path(folder), self._plan.metric)
            return {} if undeleted is None else {UNDELETED: undeleted}

    def detach(self, slot: int) -> int:
        """Free the slot; returns how many are left."""
        with self._at_work():
            for name in [name for name, held in self._slots.items() if held == slot]:
                del self._slots[name]
            return self._loop.detach(slot)

    def detach_trial(self, name: str) -> None:
        """Free the slot of a trial that has none to free it, for its process is dead; no error where it has no slot."""
        slot = self._slots.get(name)
        if slot is not None:
            self.detach(slot)

    def idle_for(self) -> float:
        """Seconds since the last call ended; 0 during one."""
        with self._lock:
            return 0.0 if self._calls else time.monotonic() - self._last_call

    @contextmanager
    def _at_work(self) -> Generator[None]:
        with self._lock:
            self._calls += 1
        try:
            yield
        finally:
            with self._lock:
                self._calls -= 1
                self._last_call = time.monotonic()

    def _tell_of_wait(self, broker: BrokerHandle | None, holder: str) -> None:
        note = f"GPU {self._place.gpu} is in use ({holder}); this sweep's trials on it wait until it is free"
        logger.warning(note)
        if broker is not None:
            broker.hear.remote(note)

    def _watch(self, broker: BrokerHandle, serial: str) -> None:
        while self.idle_for() < self._plan.idle_s:
            time.sleep(max(0.1, self._plan.idle_s - self.idle_for()))
        broker.retire.remote(self._place, serial)  # which ends this process


def end_process(broker: BrokerHandle | None, error: BaseException) -> None:
    """End this host, whose GPU is lost to its process: the trials get another host, and go on from their checkpoints.

    At once and without cleaning up, which would want the GPU; ``broker`` hears why, for Ray's logs do not stay.
    """
    note = f"a host ends, for its GPU is lost to it: {str(error).partition(chr(10))[0]}"
    logger.error(note)
    if broker is not None:
        with suppress(Exception):  # a broker that is gone as well
            ray.get(broker.hear.remote(note), timeout=5)
    logging.shutdown()
    os._exit(1)


class Broker:
    """Finds or starts the host of a place (an actor, one for each sweep)."""

    def __init__(self, plan: HostPlan) -> None:
        self._plan = plan
        self._hosts: dict[Place, tuple[str, HostHandle]] = {}
        self._turns: dict[Place, tuple[str, float]] = {}
        self._notes: list[str] = []
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"broker sweep={self._plan.sweep}"

    def host(self, place: Place, broken: str | None = None) -> tuple[str, HostHandle]:
        """The host of ``place`` and its serial; a new one if there is none, or if the caller found that with the serial
        ``broken`` dead.
        """
        with self._lock:
            serial, host = self._hosts.get(place, (None, None))
            if host is None or serial == broken:
                if host is not None:
                    logger.warning("the host on %s died; starting another", place)
                    ray.kill(host)  # where it only seemed dead: two would not fit
                serial = uuid.uuid4().hex
                self._hosts[place] = serial, self._start(place, serial)
            return self._hosts[place]

    def take_turn(self, place: Place, name: str) -> bool:
        """Whether the trial may be the one that is tried out on ``place``; for ``TURN_S``, unless it asks again.

        Trials under which a host died come back one after another: so the next death shows whose doing it is.
        """
        with self._lock:
            holder, until = self._turns.get(place, (name, 0.0))
            if holder != name and time.monotonic() < until:
                return False
            self._turns[place] = name, time.monotonic() + TURN_S
            return True

    def end_turn(self, place: Place, name: str) -> None:
        """Let the next trial have its turn."""
        with self._lock:
            if self._turns.get(place, ("", 0.0))[0] == name:
                del self._turns[place]

    def detach_trial(self, name: str) -> None:
        """Have whichever host holds a slot for the trial free it; not waited for, and a host that dies frees it too."""
        for _, host in list(self._hosts.values()):
            host.detach_trial.remote(name)

    def retire(self, place: Place, serial: str) -> None:
        """End a host that has been idle; the next trial on its place gets a new one."""
        with self._lock:
            found, host = self._hosts.get(place, (None, None))
            if host is not None and found == serial:
                del self._hosts[place]
                ray.kill(host)

    def hear(self, note: str) -> None:
        """A host has something to say, and no trial yet to say it with its report."""
        with self._lock:
            self._notes.append(note)

    def notes(self) -> list[str]:
        """What hosts have said since this was asked last."""
        with self._lock:
            notes, self._notes = self._notes, []
            return notes

    def base_report(self) -> dict[str, float] | None:
        """What the base measures, from any host; None before the first is asked for."""
        for _, host in list(self._hosts.values()):
            return ray.get(host.report.remote())
        return None

    def _start(self, place: Place, serial: str) -> HostHandle:
        return (
            ray.remote(Host)
            .options(
                num_cpus=0,
                num_gpus=0,
                # Every trial's advance waits in a thread of its own.
                max_concurrency=1000,
                scheduling_strategy=NodeAffinitySchedulingStrategy(place.node, soft=False),
            )
            .remote(self._plan, place, ray.get_runtime_context().current_actor, serial)
        )


def start_broker(plan: HostPlan) -> BrokerHandle:
    """Start the sweep's broker on this node; it lives until the driver ends or kills it."""
    here = ray.get_runtime_context().get_node_id()
    return (
        ray.remote(Broker)
        .options(
            num_cpus=0,
            # base_report may wait for a host to load while trials ask for theirs.
            max_concurrency=8,
            # Its hosts die with it, and the trials go on from their checkpoints on new ones.
            max_restarts=-1,
            max_task_retries=-1,
            scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=True),
        )
        .remote(plan)
    )
