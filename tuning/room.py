"""How many slots a host gets on this cluster: what its smallest GPU or node has room for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.errors import Fault, InputError, MachineError
from cluster.machine import find_gpus
from cluster.nodes import Node, require_answers
from tuning.engine.counting import ArchitectureError
from tuning.estimate import Case, Estimator, RowShape
from tuning.fit import changes, fit, refusal, smallest
from tuning.memory import GIB, Device, fits_paged, gib, spread
from tuning.results import HostRoom
from tuning.spec import SweepSpec

_GRAINS = 10_000
"""Ray counts resources in steps of ``1 / _GRAINS``."""


@dataclass(frozen=True, slots=True)
class Room:
    """Where hosts can run."""

    place: Literal["GPU", "node"]
    places: int
    """GPUs of the cluster, or nodes where there is none."""
    device: Device | None
    """The smallest of them; None if its memory is not known."""


def find_room(nodes: Sequence[Node], slots: int | Literal["auto"] = "auto") -> Room:
    """Ask the living ``nodes`` that have GPUs how large they are; Ray knows the memory of a node without.

    With GPUs in the cluster, trials run on them only. Otherwise a node that is too small for a trial does not count
    (see ``trial_resources``); with `auto`, where no share is known yet, each node counts.

    Raises:
        MachineError: no node has a CPU or a GPU, or a node with GPUs does not answer.
    """
    with_gpus = [node for node in nodes if _has_gpu(node)]
    if with_gpus:
        places = sum(int(node["Resources"]["GPU"]) for node in with_gpus)
        sizes = require_answers(gpu_memories, with_gpus)
        smallest = min((min(memories, default=0.0) for memories in sizes), default=0.0)
        return Room("GPU", places, Device("gpu", smallest) if smallest else None)
    most = _most_cpus(nodes)
    share = 1 / _GRAINS if slots == "auto" else _share(most, slots)
    workers = [node["Resources"] for node in nodes if _cpus(node) >= share]
    memory = min(node.get("memory", 0) for node in workers)
    cores = min(node["CPU"] for node in workers)
    return Room("node", len(workers), Device("cpu", memory / GIB, cores) if memory else None)


def trial_resources(slots: int, nodes: Sequence[Node]) -> tuple[float, float]:
    """CPUs and GPUs that one trial asks Ray for: ``1/slots`` of a GPU, or without GPUs ``1/slots`` of the largest node.

    So a host never gets more than ``slots`` trials. A smaller node gets proportionally fewer of them.

    Raises:
        MachineError: no node has a CPU or a GPU.
    """
    if any(_has_gpu(node) for node in nodes):
        return 0.0, _share(1, slots)
    return _share(_most_cpus(nodes), slots), 0.0


def idle_nodes(cpus: float, nodes: Sequence[Node]) -> list[str]:
    """One warning for each node whose CPUs are fewer than the ``cpus`` of one trial. None for trials on GPUs."""
    return [
        f"node {node['NodeManagerAddress']} gets no trial: it has {_cpus(node):g} CPUs, and a trial takes {cpus:g}, "
        "its share of the largest node; more resources.slots make the share smaller"
        for node in nodes
        if 0 < _cpus(node) < cpus
    ]


def _share(whole: float, slots: int) -> float:
    """``whole / slots``, rounded down to a step that Ray can count, so that ``slots`` trials always fit."""
    return math.floor(_GRAINS * whole / slots) / _GRAINS


def _most_cpus(nodes: Sequence[Node]) -> float:
    most = max(map(_cpus, nodes), default=0.0)
    if not most:
        alive = ", ".join(node["NodeManagerAddress"] for node in nodes) or "none"
        raise MachineError(
            f"no node of this cluster has a CPU or a GPU for trials (alive: {alive}); start a node that has some"
        )
    return most


def _cpus(node: Node) -> float:
    return node["Resources"].get("CPU", 0.0)


def _has_gpu(node: Node) -> bool:
    return node["Resources"].get("GPU", 0.0) >= 1


def gpu_memories() -> list[float]:
    """GiB of each GPU of this machine."""
    return [gpu.memory_gib for gpu in find_gpus()]


def choose_slots(spec: SweepSpec, rows: RowShape, room: Room) -> HostRoom:
    """The slots of a host, and their memory.

    A number that is above what fits is taken, with a warning, as long as smaller passes can make it fit: an estimate
    errs, and a pass that runs out of memory is done in smaller ones.

    Raises:
        InputError: not even one trial fits; so many do not, however small their passes; or `auto` for a base whose
            memory cannot be counted.
        MachineError: `auto`, and the memory of the GPUs is not known.
    """
    wanted = spec.resources.slots
    if room.device is None:
        if wanted == "auto":
            raise MachineError(
                f"resources.slots: the memory of a {room.place} is not known here (`nvidia-smi` on a node with GPUs "
                "tells it); give a number"
            )
        return HostRoom(slots=wanted, place=room.place)
    try:
        estimator = Estimator(spec.base, room.device.kind, packing=spec.data.packing)
        case = estimator.largest(spec, rows)
        now = fit(estimator, case, room.device)
    except ArchitectureError as error:
        if wanted == "auto":
            rule = f"must be a number for this base, whose memory cannot be counted beforehand ({error})"
            raise InputError([Fault("resources.slots", rule, wanted)]) from None
        return HostRoom(slots=wanted, place=room.place)
    if not now.runs:
        rule = refusal(now, changes(estimator, spec, case, room.device))
        raise InputError([Fault("base.model", rule, spec.base.model)])
    trials = min(spec.num_trials, spec.resources.max_concurrent or spec.num_trials)
    slots = spread(now.runs, room.device, trials, room.places) if wanted == "auto" else wanted
    at_once = min(slots, trials)
    return HostRoom(
        slots=slots,
        place=room.place,
        needed_gib=round(gib(estimator.host(case, at_once).total), 4),
        usable_gib=round(gib(room.device.usable(at_once)), 4),
        warning=_crowded(estimator, case, at_once, room.device, wanted),
    )


def _crowded(estimator: Estimator, case: Case, slots: int, device: Device, wanted: int | str) -> str | None:
    """What is to be said of so many trials at once; None where they fit.

    Raises:
        InputError: they do not, however small their passes.
    """
    found = fit(estimator, case, device, slots)
    if found.slots == slots:
        return None
    host, usable, is_gpu = estimator.host(case, slots), device.usable(slots), device.kind == "gpu"
    place = f"a {'GPU' if is_gpu else 'node'} of {device.memory_gib:.1f} GiB"
    least = smallest(estimator, case, slots, device)
    if least > usable:
        most = max((count for count in range(1, slots) if _may_run(estimator, case, count, device)), default=1)
        rule = (
            f"must be at most {most} on {place}, of which {gib(usable):.1f} can be used: with more, the base and what "
            f"its trials keep fill it, whatever the size of a pass ({gib(least):.1f} GiB for {slots}); auto takes what "
            f"fits with whole passes, {found.runs}"
        )
        raise InputError([Fault("resources.slots", rule, wanted)])
    if fits_paged(host, device):
        answer = "optimizers' states will be paged out to the machine's memory, which takes time"
    elif is_gpu:
        answer = "passes that run out of memory will be done in smaller ones, which takes time"
    else:
        answer = "the machine may swap, or end a host that takes too much"
    room = "" if found.runs == slots else f"; resources.slots={found.runs}, or auto, fits"
    return (
        f"{slots} trial{'s' if slots > 1 else ''} at once by estimate need{'' if slots > 1 else 's'} "
        f"{gib(host.total):.1f} GiB, and {place} has {gib(usable):.1f} for a host: {answer}{room}"
    )


def _may_run(estimator: Estimator, case: Case, slots: int, device: Device) -> bool:
    return smallest(estimator, case, slots, device) <= device.usable(slots)
