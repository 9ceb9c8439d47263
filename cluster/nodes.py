"""Asks each node of a cluster whether it runs our code, before something long is sent there."""

from __future__ import annotations

import platform
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

_TIMEOUT_S = 120.0


def ask_nodes() -> list[dict[str, object]]:
    """One row a living node: address, resources, Python, and ``trouble`` (empty where there is none)."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    asked = [
        _greet.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], False)) for node in alive
    ]
    answers = [remote.remote() for remote in asked]
    return [_row(node, answer) for node, answer in zip(alive, answers, strict=True)]


@ray.remote(num_cpus=0, max_retries=0)
def _greet() -> str:
    from cluster import schema  # the code that was shipped, or that is installed there

    assert schema.StrictModel  # noqa: S101 -- our own bug if it is missing
    return platform.python_version()


def _row(node: dict[str, Any], answer: Any) -> dict[str, object]:
    resources = node["Resources"]
    row: dict[str, object] = {
        "address": node["NodeManagerAddress"],
        "cpus": resources.get("CPU", 0.0),
        "gpus": resources.get("GPU", 0.0),
        "memory_gib": round(resources.get("memory", 0.0) / 2**30, 1),
        "python": "",
        "trouble": "",
    }
    try:
        row["python"] = ray.get(answer, timeout=_TIMEOUT_S)
    except GetTimeoutError:
        row["trouble"] = f"no answer within {_TIMEOUT_S:.0f} s"
    except RayError as error:
        row["trouble"] = str(error).strip().splitlines()[-1]
    return row
