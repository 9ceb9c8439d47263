"""How many slots the hosts of a cluster get."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import InputError, MachineError
from tests.tuning.make import sweep_spec
from tests.tuning.test_estimate import llama
from tests.tuning.watcher import Watcher
from tuning.estimate import Case, Estimator, RowShape
from tuning.fit import smallest
from tuning.ledger import Ledger
from tuning.memory import GIB, Device
from tuning.past import Past
from tuning.report import header_lines
from tuning.results import HostRoom, SweepRecord
from tuning.room import Room, choose_slots, find_room, gpu_memories, idle_nodes, trial_resources
from tuning.spec import SweepSpec
from tuning.watch import SweepWatch

ROWS = RowShape(512, 511, 512, 511, "the rows")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of 1.9 billion parameters without weights."""
    return llama(tmp_path_factory.mktemp("bases") / "2B", 2048, 8192, 24, vocab_size=64000)


def sweep(base: Path, slots: Any, trials: int = 100, **sections: Any) -> SweepSpec:
    train = {"steps": 4, "batch_size": 4, "eval_batch_size": 4, "rank": 32}
    space = {"learning_rate": {"loguniform": [1e-4, 1e-2]}}
    resources = {"slots": slots, **sections.pop("resources", {})}
    fixed: dict[str, Any] = {"train": train, "space": space, "search": {"trials": trials}, "resources": resources}
    return sweep_spec(base, Path("/rows.jsonl"), **{**fixed, **sections})


def gpus(gib: float, places: int = 1) -> Room:
    return Room("GPU", places, Device("gpu", gib))


def header(room: HostRoom) -> list[str]:
    record = SweepRecord(name="s", state="running", started_at="", trials=1, versions={}, room=room)
    return list(header_lines(record))


def sizes(room: HostRoom) -> tuple[float, float]:
    assert room.needed_gib is not None
    assert room.usable_gib is not None
    return room.needed_gib, room.usable_gib


# Where


def node(address: str, **resources: float) -> dict[str, Any]:
    """A node as ``ray.nodes()`` lists it."""
    return {"Alive": True, "NodeID": address, "NodeManagerAddress": address, "Resources": resources}


def test_the_smallest_node_without_gpus_decides() -> None:
    nodes = [node("a", CPU=8.0, memory=64 * GIB), node("b", CPU=4.0, memory=16 * GIB), node("head", memory=GIB)]
    assert find_room(nodes) == Room("node", 2, Device("cpu", 16.0, 4.0))
    assert find_room([node("a", CPU=2.0)]) == Room("node", 1, None)


def test_a_node_that_is_too_small_for_a_trial_does_not_decide() -> None:
    nodes = [node("a", CPU=64.0, memory=256 * GIB), node("b", CPU=4.0, memory=2 * GIB)]
    assert find_room(nodes, 4) == Room("node", 1, Device("cpu", 256.0, 64.0))
    assert find_room(nodes, 16) == Room("node", 2, Device("cpu", 2.0, 4.0))
    assert find_room(nodes, "auto") == Room("node", 2, Device("cpu", 2.0, 4.0))


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ([node("a", CPU=2.0)], (0.6666, 0.0)),
        ([node("a", CPU=8.0, GPU=2.0)], (0.0, 0.3333)),
        ([node("a", CPU=8.0), node("b", CPU=8.0, GPU=2.0)], (0.0, 0.3333)),
        ([node("a", CPU=8.0), node("b", CPU=4.0)], (2.6666, 0.0)),
        ([node("head"), node("b", CPU=3.0)], (1.0, 0.0)),
    ],
)
def test_a_trial_asks_for_its_share(nodes: list[dict[str, Any]], expected: tuple[float, float]) -> None:
    assert trial_resources(3, nodes) == expected


@given(st.lists(st.integers(0, 256), min_size=1).filter(any), st.integers(1, 64))
def test_no_host_gets_more_trials_than_slots(cpus: list[int], slots: int) -> None:
    """The largest node gets exactly ``slots``. A node of which Ray could give no trial a share is named."""
    nodes = [node(str(index), CPU=float(count)) for index, count in enumerate(cpus)]
    share, gpus = trial_resources(slots, nodes)
    trials = [math.floor(count / share) for count in cpus]
    assert gpus == 0.0
    assert max(trials) == slots
    named = {note.split()[1] for note in idle_nodes(share, nodes)}
    assert named == {str(index) for index, count in enumerate(cpus) if count and not trials[index]}


@pytest.mark.parametrize("nodes", [[], [node("10.0.0.1"), node("10.0.0.2", memory=GIB)]])
def test_a_cluster_without_a_place_for_trials_is_an_error(nodes: list[dict[str, Any]]) -> None:
    alive = ", ".join(each["NodeManagerAddress"] for each in nodes) or "none"
    rule = rf"no node of this cluster has a CPU or a GPU for trials \(alive: {alive}\)"
    with pytest.raises(MachineError, match=rule):
        find_room(nodes)
    with pytest.raises(MachineError, match=rule):
        trial_resources(2, nodes)


def test_a_node_that_gets_no_trial_is_named() -> None:
    nodes = [node("10.0.0.1", CPU=64.0), node("10.0.0.2", CPU=4.0), node("10.0.0.3")]
    (note,) = idle_nodes(16.0, nodes)
    assert note.startswith("node 10.0.0.2 gets no trial: it has 4 CPUs, and a trial takes 16,")
    assert idle_nodes(0.0, nodes) == []


@pytest.mark.gpu
def test_the_driver_and_torch_agree_on_the_memory_of_each_gpu() -> None:
    """But for the 2 % and less that the driver keeps from programs."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        pytest.skip("torch sees only some of the GPUs")
    seen = [torch.cuda.get_device_properties(index).total_memory / GIB for index in range(torch.cuda.device_count())]
    assert sorted(gpu_memories()) == pytest.approx(sorted(seen), rel=0.04)


# How many


def test_auto_is_as_many_as_fit(large: Path) -> None:
    small, more = (choose_slots(sweep(large, "auto"), ROWS, gpus(size)) for size in (24.0, 80.0))
    assert 1 <= small.slots < more.slots
    needed, usable = sizes(more)
    assert needed < usable < 80
    assert sizes(choose_slots(sweep(large, more.slots + 1), ROWS, gpus(80.0)))[0] > usable
    words = f", by estimate {needed:.3g} of the {usable:.3g} GiB that a GPU has"
    assert header(more) == [f"slots  {more.slots} on each base{words}"]


def test_auto_leaves_no_gpu_without_work(large: Path) -> None:
    assert choose_slots(sweep(large, "auto", trials=6), ROWS, gpus(141.0, places=3)).slots == 2
    few = sweep(large, "auto", resources={"max_concurrent": 4})
    assert choose_slots(few, ROWS, gpus(141.0)).slots == 4


def test_auto_on_a_node_without_gpus_minds_its_cores(tiny_base: Path) -> None:
    node = Room("node", 1, Device("cpu", 16.0, 2.0))
    assert choose_slots(sweep(tiny_base, "auto"), ROWS, node).slots == 8
    assert choose_slots(sweep(tiny_base, "auto", trials=3), ROWS, node).slots == 3
    tight = Room("node", 1, Device("cpu", 1.5, 16.0))
    assert 1 <= choose_slots(sweep(tiny_base, "auto"), ROWS, tight).slots < 8


def test_a_number_stays_what_it_is(large: Path) -> None:
    assert choose_slots(sweep(large, 3), ROWS, gpus(80.0)).slots == 3
    unknown = choose_slots(sweep(large, 3), ROWS, Room("GPU", 1, None))
    assert (unknown.slots, unknown.needed_gib) == (3, None)
    assert header(unknown) == ["slots  3 on each base"]


def test_more_than_fits_is_told_with_what_does(large: Path) -> None:
    auto = choose_slots(sweep(large, "auto"), ROWS, gpus(80.0))
    assert auto.warning is None
    assert choose_slots(sweep(large, auto.slots), ROWS, gpus(80.0)).warning is None
    crowded = choose_slots(sweep(large, auto.slots + 1), ROWS, gpus(80.0))
    assert crowded.slots == auto.slots + 1
    needed, usable = sizes(crowded)
    assert crowded.warning == (
        f"{crowded.slots} trials at once by estimate need {needed:.1f} GiB, and a GPU of 80.0 GiB has {usable:.1f} "
        "for a host: passes that run out of memory will be done in smaller ones, which takes time; "
        f"resources.slots={auto.slots}, or auto, fits"
    )
    # As many slots as there are, but never so many trials.
    assert choose_slots(sweep(large, 200, trials=auto.slots), ROWS, gpus(80.0)).warning is None
    few = sweep(large, 200, resources={"max_concurrent": auto.slots})
    assert choose_slots(few, ROWS, gpus(80.0)).warning is None


def test_a_warning_reaches_whoever_looks_on(tmp_path: Path) -> None:
    record = SweepRecord(name="s", state="running", started_at="", trials=1, versions={})
    told: list[list[str]] = []
    for warning in (None, "it is tight"):
        room = HostRoom(slots=2, place="GPU", warning=warning)
        watcher, ledger = Watcher(), Ledger(tmp_path, "eval_loss", None, Past())
        running = record.model_copy(update={"room": room})
        SweepWatch(sweep(tmp_path, 2), running, None, ledger, lambda _: None, watcher, [])
        told.append(watcher.notes)
    assert told == [[], ["it is tight"]]


def test_what_is_paged_out_and_what_a_node_does_is_told(large: Path) -> None:
    estimator, case = counted(large)
    host = estimator.host(case, 1)
    tight = next(size / 10 for size in range(10, 1000) if Device("gpu", size / 10).usable(1) > host.least)
    warning = choose_slots(sweep(large, "auto"), ROWS, gpus(tight)).warning
    assert warning is not None
    assert warning.startswith("1 trial at once by estimate needs ")
    assert warning.endswith("optimizers' states will be paged out to the machine's memory, which takes time")
    warning = choose_slots(sweep(large, 9), ROWS, Room("node", 1, Device("cpu", 48.0, 16))).warning
    assert warning is not None
    assert "the machine may swap, or end a host that takes too much; resources.slots=" in warning


def counted(base: Path) -> tuple[Estimator, Case]:
    estimator = Estimator(sweep(base, 1).base)
    return estimator, estimator.largest(sweep(base, 1), ROWS)


def test_what_no_smaller_pass_makes_fit_is_refused(large: Path) -> None:
    """The weights and states of so many trials alone are too much; one less is what the message says it is."""
    with pytest.raises(InputError) as caught:
        choose_slots(sweep(large, 256, trials=200), ROWS, gpus(24.0))
    (fault,) = caught.value.faults
    assert (fault.where, fault.value) == ("resources.slots", 256)
    assert fault.rule.startswith("must be at most ")
    most = int(fault.rule.removeprefix("must be at most ").split()[0])
    estimator, case = counted(large)
    usable = Device("gpu", 24.0).usable(1)
    for slots, fits in ((most, True), (most + 1, False)):
        host = estimator.host(case, slots)
        assert (host.resident - host.paged < usable) or not fits
        assert (smallest(estimator, case, slots, Device("gpu", 24.0)) <= usable) == fits
    assert choose_slots(sweep(large, most), ROWS, gpus(24.0)).warning is not None
    with pytest.raises(InputError, match=rf"must be at most {most} on a GPU of 24\.0 GiB"):
        choose_slots(sweep(large, most + 1), ROWS, gpus(24.0))


@pytest.mark.parametrize("slots", [4, "auto"])
def test_a_trial_that_does_not_fit_alone_is_refused_with_advice(large: Path, slots: Any) -> None:
    with pytest.raises(InputError) as caught:
        choose_slots(sweep(large, slots), ROWS, gpus(9.0))
    (fault,) = caught.value.faults
    assert fault.where == "base.model"
    assert "it fits with base.gradient_checkpointing=true" in fault.rule
    base = sweep(large, slots).base.model_copy(update={"gradient_checkpointing": True})
    helped = sweep(large, slots).model_copy(update={"base": base})
    assert choose_slots(helped, ROWS, gpus(9.0)).slots >= 1


def test_auto_needs_to_know_the_memory(large: Path, tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="give a number"):
        choose_slots(sweep(large, "auto"), ROWS, Room("GPU", 1, None))
    looking = llama(tmp_path / "moe", 256, 256, 2, model_type="jetmoe")
    with pytest.raises(InputError, match=r"resources\.slots: must be a number for this base"):
        choose_slots(sweep(looking, "auto"), ROWS, gpus(80.0))
    assert choose_slots(sweep(looking, 2), ROWS, gpus(80.0)) == HostRoom(slots=2, place="GPU")
