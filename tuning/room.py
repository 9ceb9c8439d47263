"""How many slots a host gets on this cluster: what its smallest GPU or node has room for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from cluster.errors import Fault, InputError, MachineError
from cluster.machine import find_gpus
from tuning.engine.counting import ArchitectureError
from tuning.estimate import Estimator, RowShape
from tuning.fit import changes, fit, refusal
from tuning.memory import GIB, Device, gib, spread
from tuning.results import HostRoom
from tuning.spec import SweepSpec


@dataclass(frozen=True, slots=True)
class Room:
    """Where hosts can run."""

    place: Literal["GPU", "node"]
    places: int
    """GPUs of the cluster, or nodes where there is none."""
    device: Device | None
    """The smallest of them; None if its memory is not known."""


def find_room(nodes: list[dict[str, Any]]) -> Room:
    """Ask the nodes (``ray.nodes()``) that have GPUs how large they are; what a node without has, Ray knows."""
    alive = [node for node in nodes if node["Alive"]]
    with_gpus = [node for node in alive if node["Resources"].get("GPU", 0) >= 1]
    if with_gpus:
        places = sum(int(node["Resources"]["GPU"]) for node in with_gpus)
        sizes = _ask_for_gpus([node["NodeID"] for node in with_gpus])
        smallest = min((min(memories, default=0.0) for memories in sizes), default=0.0)
        return Room("GPU", places, Device("gpu", smallest) if smallest else None)
    workers = [node["Resources"] for node in alive if node["Resources"].get("CPU", 0) > 0]
    memory = min((node.get("memory", 0) for node in workers), default=0)
    cores = min((node["CPU"] for node in workers), default=0)
    return Room("node", len(workers), Device("cpu", memory / GIB, cores) if memory else None)


def _ask_for_gpus(node_ids: list[str]) -> list[list[float]]:
    """GiB of each GPU that the driver of each node lists."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ask = ray.remote(num_cpus=0)(gpu_memories)
    return ray.get(
        [
            ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote()
            for node in node_ids
        ]
    )


def gpu_memories() -> list[float]:
    """GiB of each GPU of this machine."""
    return [gpu.memory_gib for gpu in find_gpus()]


def choose_slots(spec: SweepSpec, rows: RowShape, room: Room) -> HostRoom:
    """The slots of a host, and their memory.

    Raises:
        InputError: not even one trial fits; or `auto` for a base whose memory cannot be counted.
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
    return HostRoom(
        slots=slots,
        place=room.place,
        needed_gib=round(gib(estimator.host(case, slots).total), 4),
        usable_gib=round(gib(room.device.usable(slots)), 4),
    )
