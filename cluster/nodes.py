"""Questions to each node of a cluster, before something long is sent there."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.errors import MachineError

T = TypeVar("T")
Node = dict[str, Any]
"""A node as ``ray.nodes()`` lists it."""
_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Answer(Generic[T]):
    """What one node says: a value, or the trouble why there is none."""

    node: Node
    value: T | None
    trouble: str = ""

    @property
    def address(self) -> str:
        """The node's IP address."""
        return self.node["NodeManagerAddress"]


def living_nodes() -> list[Node]:
    """The nodes that Ray counts as alive."""
    return [node for node in ray.nodes() if node["Alive"]]


def ask_each(question: Callable[[], T], nodes: Sequence[Node]) -> list[Answer[T]]:
    """Call ``question`` in a process of each node, all at once, and return the answers in the order of ``nodes``.

    ``question`` may be any callable that pickles, bound methods included; ``ray.remote`` itself accepts functions only.
    """

    @ray.remote(num_cpus=0, max_retries=0)
    def ask() -> T:
        return question()

    asked = [
        ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote()
        for node in nodes
    ]
    return [_wait(node, answer) for node, answer in zip(nodes, asked, strict=True)]


def require_answers(question: Callable[[], T], nodes: Sequence[Node]) -> list[T]:
    """The values of ``ask_each``.

    Raises:
        MachineError: a node does not answer; the message names all such nodes and their trouble.
    """
    answers = ask_each(question, nodes)
    if troubled := [f"node {answer.address} does not answer: {answer.trouble}" for answer in answers if answer.trouble]:
        raise MachineError("; ".join(troubled))
    return [answer.value for answer in answers]  # pyright: ignore[reportReturnType]


def check_nodes() -> list[dict[str, object]]:
    """One row a living node: address, resources, Python, and ``trouble``, which is empty if our code runs there."""
    rows: list[dict[str, object]] = []
    for answer in ask_each(_greet, living_nodes()):
        resources = answer.node["Resources"]
        rows.append(
            {
                "address": answer.address,
                "cpus": resources.get("CPU", 0.0),
                "gpus": resources.get("GPU", 0.0),
                "memory_gib": round(resources.get("memory", 0.0) / 2**30, 1),
                "python": answer.value or "",
                "trouble": answer.trouble,
            }
        )
    return rows


def _greet() -> str:
    from cluster import schema  # the code that was shipped, or that is installed there

    assert schema.StrictModel  # noqa: S101 -- our own bug if it is missing
    return platform.python_version()


def _wait(node: Node, answer: Any) -> Answer[Any]:
    try:
        return Answer(node, ray.get(answer, timeout=_TIMEOUT_S))
    except GetTimeoutError:
        return Answer(node, None, f"no answer within {_TIMEOUT_S:.0f} s")
    except RayError as error:
        return Answer(node, None, str(error).strip().splitlines()[-1])
