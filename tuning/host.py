"""The actors of a sweep: a host that owns one GPU's base, and the broker through which trials find their host.

The broker belongs to the driver and the hosts to the broker, so when the driver goes, however it goes, Ray ends them
all and the GPUs are free. A host asks Ray for no GPU of its own: the trials on it hold the fractions, and it uses the
device they were given.
"""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tuning.spec import BaseSpec, TrialConfig

HostHandle = Any
"""Ray's handle of a ``Host``: its methods are called with ``.remote``, which Ray's types do not follow."""
BrokerHandle = Any
"""Ray's handle of a ``Broker``."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HostPlan:
    """What a host needs to know to start; the same for all hosts of a sweep."""

    sweep: str
    base: BaseSpec
    data: Path
    """Folder with train.arrow and eval.arrow."""
    packing: bool
    """Lay rows end to end."""
    threads: int | None
    """CPU threads where there is no GPU; None: all cores but one."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a host runs: a node, and one of its GPUs or none."""

    node: str
    gpu: str | None


class Host:
    """One quantised base and the trials on it (an actor; ``TrainerLoop`` does the work)."""

    def __init__(self, plan: HostPlan, place: Place) -> None:
        # Before torch is imported: the device that the trials' fractions belong to, or none.
        os.environ["CUDA_VISIBLE_DEVICES"] = "" if place.gpu is None else place.gpu
        self._plan, self._place = plan, place
        import torch

        from tuning.engine.base import Base
        from tuning.engine.data import EVAL_FILE, TRAIN_FILE, Tokens
        from tuning.engine.loop import TrainerLoop
        from tuning.engine.trainer import Trainer

        if place.gpu is None:
            # OpenMP's threads wait for each other at the end of every product: one that shares its core with Ray's
            # processes holds up all. Measured on two cores under load: two threads took 9.3 s a pass, one 0.5 s.
            torch.set_num_threads(plan.threads or max(1, (os.cpu_count() or 1) - 1))

        def make_trainer() -> Trainer:
            base = Base(plan.base, "cpu" if place.gpu is None else "cuda:0")
            return Trainer(base, Tokens(plan.data / TRAIN_FILE), Tokens(plan.data / EVAL_FILE), packing=plan.packing)

        self._loop = TrainerLoop(make_trainer)
        # A base that does not load ends the actor, so that the broker starts another for the next trial.
        self._loop.ready.result()

    def __repr__(self) -> str:
        device = "cpu" if self._place.gpu is None else f"gpu={self._place.gpu}"
        return f"host {device} sweep={self._plan.sweep}"

    def report(self) -> dict[str, float]:
        """What the loaded base measures (``BaseReport``); waits until it is loaded."""
        return {name: float(value) for name, value in asdict(self._loop.ready.result().base.report).items()}

    def attach(self, config: TrialConfig, state: str | None) -> int:
        """Give a trial a slot; ``state`` is a checkpoint folder on this node to go on from."""
        return self._loop.attach(config, None if state is None else Path(state))

    def advance(self, slot: int, steps: int) -> dict[str, Any]:
        """Train and evaluate (``TrialReport``); returns when the steps are done."""
        return self._loop.advance(slot, steps).as_dict()

    def save(self, slot: int, folder: str) -> None:
        """Write the slot's checkpoint to a folder on this node."""
        self._loop.save(slot, Path(folder), self._plan.base.model, self._plan.base.revision)

    def detach(self, slot: int) -> int:
        """Free the slot; returns how many are left."""
        return self._loop.detach(slot)


class Broker:
    """Finds or starts the host of a place (an actor, one for each sweep)."""

    def __init__(self, plan: HostPlan) -> None:
        self._plan = plan
        self._hosts: dict[Place, tuple[int, HostHandle]] = {}
        self._started = 0
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"broker sweep={self._plan.sweep}"

    def host(self, place: Place, broken: int | None = None) -> tuple[int, HostHandle]:
        """The host of ``place`` and its serial number; a new one if there is none, or if the caller found that with the
        number ``broken`` dead.
        """
        with self._lock:
            serial, host = self._hosts.get(place, (None, None))
            if host is None or serial == broken:
                if host is not None:
                    logger.warning("the host on %s died; starting another", place)
                self._started += 1
                self._hosts[place] = self._started, self._start(place)
            return self._hosts[place]

    def base_report(self) -> dict[str, float] | None:
        """What the base measures, from any host; None before the first is asked for."""
        for _, host in self._hosts.values():
            return ray.get(host.report.remote())
        return None

    def _start(self, place: Place) -> HostHandle:
        return (
            ray.remote(Host)
            .options(
                num_cpus=0,
                num_gpus=0,
                # Every trial's advance waits in a thread of its own.
                max_concurrency=1000,
                scheduling_strategy=NodeAffinitySchedulingStrategy(place.node, soft=False),
            )
            .remote(self._plan, place)
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
            scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=True),
        )
        .remote(plan)
    )
