"""A sweep over two nodes of one Ray that see the same folder."""

from __future__ import annotations

import os
import platform
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray.cluster_utils import Cluster

from cluster.connect import connect, ensure_token
from cluster.errors import MachineError
from cluster.nodes import Node, ask_each, check_nodes, living_nodes, require_answers
from cluster.spec import ClusterSpec
from tests.tuning.driver import assert_same
from tests.tuning.make import sweep_spec, write_rows
from tests.tuning.watcher import Watcher, processes_named
from tuning.memory import Device
from tuning.results import SPEC_FILE, Sweep
from tuning.room import Room, find_room, gpu_memories
from tuning.spec import SweepSpec
from tuning.sweep import require_shared, run_sweep

pytestmark = pytest.mark.ray

SLOTS, TRIALS = 2, 4


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head with two CPUs. A test adds the second node."""
    ensure_token()
    maybe_enable_token_auth_if_token_available()  # Ray's own commands do that; Cluster does not
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="module")
def joined(cluster: Cluster) -> Iterator[Cluster]:
    with connect(ClusterSpec(address=cluster.address), job_name="tests"):
        yield cluster


@pytest.fixture(scope="module")
def spec(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> SweepSpec:
    data = write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")
    return sweep_spec(tiny_base, data, search={"trials": TRIALS}, resources={"slots": SLOTS})


@pytest.fixture(scope="module")
def alone(joined: Cluster, spec: SweepSpec, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """The sweep on the head alone."""
    (head,) = living_nodes()
    claimed = {**head, "Resources": {**head["Resources"], "GPU": 2.0}}
    here = gpu_memories()
    # Ray's GPUs are mere numbers on a machine without a driver, so their memory is unknown.
    assert find_room([claimed]) == Room("GPU", 2, Device("gpu", min(here)) if here else None)
    return run_sweep(spec, tmp_path_factory.mktemp("one") / "s")


@pytest.fixture(scope="module")
def nodes(joined: Cluster, alone: Sweep) -> list[Node]:
    """The head, and a second node with one CPU."""
    joined.add_node(num_cpus=1, include_dashboard=False)
    return living_nodes()


def node_of(process: psutil.Process) -> int:
    """The raylet that a Ray process belongs to, which stands for the node."""
    return process.ppid()


def test_trials_spread_over_both_nodes_and_end_as_on_one(
    nodes: list[Node], alone: Sweep, spec: SweepSpec, tmp_path: Path
) -> None:
    """The second node gets one trial at a time, and the head no more than its two slots."""
    assert len(nodes) == 2
    hosts: dict[int, set[int]] = {}
    most: Counter[int] = Counter()

    def count(_: list[dict[str, Any]]) -> None:
        for host in processes_named("ray::Host"):
            hosts.setdefault(node_of(host), set()).add(host.pid)
        for node, trials in Counter(map(node_of, processes_named("ray::LoraTrial"))).items():
            most[node] = max(most[node], trials)

    both = run_sweep(spec, tmp_path / "s", progress=Watcher(count))
    assert both.record.state == "finished"
    assert len(both.trials) == TRIALS
    assert_same(both, alone)
    assert [len(pids) for pids in hosts.values()] == [1, 1]
    assert sorted(most.values()) == [1, SLOTS]


def test_every_node_is_asked(nodes: list[Node]) -> None:
    assert require_answers(os.getpid, nodes) != require_answers(os.getpid, nodes[::-1])
    rows = check_nodes()
    assert sorted(row["cpus"] for row in rows) == [1.0, 2.0]  # pyright: ignore[reportArgumentType]
    assert {row["python"] for row in rows} == {platform.python_version()}
    assert {row["trouble"] for row in rows} == {""}


def test_a_folder_that_nodes_cannot_read_is_an_error(nodes: list[Node], tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"must be on storage that all nodes share, but .+, .+ cannot read it"):
        require_shared(tmp_path, nodes)
    (tmp_path / SPEC_FILE).touch()
    require_shared(tmp_path, nodes)


def test_a_node_that_is_gone_is_named(cluster: Cluster, nodes: list[Node]) -> None:
    """The last test: it ends the second node."""
    (second,) = cluster.worker_nodes
    cluster.remove_node(second)
    answers = {answer.node["NodeID"]: answer for answer in ask_each(platform.python_version, nodes)}
    gone = answers.pop(second.node_id)
    (head,) = answers.values()
    assert (head.value, head.trouble) == (platform.python_version(), "")
    assert gone.value is None
    assert gone.trouble
    with pytest.raises(MachineError, match=rf"^node {re.escape(gone.address)} does not answer: "):
        require_answers(platform.python_version, nodes)
