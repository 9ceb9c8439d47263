"""Processes that write to one registry at the same moment."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Generator
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from serving.manifest import BaseIdentity
from serving.registry import Registry


def publisher(begin: Barrier, root: str, adapter: Path, base: BaseIdentity, times: int) -> None:
    registry = Registry(root)
    begin.wait()
    for _ in range(times):
        registry.publish("support", adapter, base, metrics={}, lineage={})


def mover(begin: Barrier, root: str, who: str, times: int) -> None:
    registry = Registry(root)
    begin.wait()
    for number in range(times):
        registry.move("support", "prod", number % 2 + 1, by=who)


def crashing_publisher(reached: Any, root: str, adapter: Path, base: BaseIdentity) -> None:
    """Stops for good where the files are there and the event is not."""
    import time

    registry = Registry(root)

    def stop(*_: object) -> None:
        reached.set()
        time.sleep(60)

    registry._log.append = stop  # pyright: ignore[reportAttributeAccessIssue]
    registry.publish("support", adapter, base, metrics={}, lineage={})


def context() -> Any:
    """Fresh processes, without the threads of this one; what takes long to import is imported once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch", "safetensors.torch", "serving.registry.registry", "serving.weights.checks"]
    )
    return context


@contextlib.contextmanager
def at_once(jobs: list[tuple[Callable[..., None], tuple[object, ...]]]) -> Generator[list[Any]]:
    """One process for each job, all let go at the same moment; none is left."""
    spawn = context()
    begin = spawn.Barrier(len(jobs))
    processes = [spawn.Process(target=job, args=(begin, *arguments)) for job, arguments in jobs]
    try:
        for process in processes:
            process.start()
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()
            process.close()
