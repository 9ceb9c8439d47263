"""The ledger as a real actor."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import ray

from serving.access.key_file import KeyLimits
from serving.access.keys import Key
from serving.access.ledger import EXCHANGE_S, find_ledger, share
from serving.access.limits import Limiter
from serving.http.api_error import ApiError

ALICE = Key("alice", KeyLimits(requests_per_minute=20), True, False, re.compile("x"), float("inf"))


def burst(limiter: Limiter) -> int:
    passed = 0
    while True:
        try:
            limiter.admit(ALICE, 0).settle(0)
        except ApiError:
            return passed
        passed += 1


def levels(replicas: list[Limiter]) -> list[float]:
    """How many requests each takes for used."""
    return [vars(limiter)["_accounts"]["alice"].level.requests for limiter in replicas]


async def until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 -- what is waited for happens in another process
            await asyncio.sleep(0.05)


async def work() -> None:
    find = partial(find_ledger, "limits")
    where: list[Callable[[], Any]] = [find]

    def current() -> Any:
        return where[0]()

    replicas = [Limiter(2), Limiter(2)]
    tasks = [
        asyncio.create_task(share(limiter, f"replica {number}", current)) for number, limiter in enumerate(replicas)
    ]
    try:
        await until(lambda: all(vars(limiter)["_ledger"] and not limiter.is_alone for limiter in replicas))
        # Between two exchanges none knows of the other: the limit on each, which is the bound.
        assert [burst(limiter) for limiter in replicas] == [20, 20]
        await until(lambda: min(levels(replicas)) > 30)  # 40, less what drains meanwhile: 20 a minute
        assert max(levels(replicas)) <= 40
        assert [burst(limiter) for limiter in replicas] == [0, 0]

        # It dies and starts again without its memory, and is told.
        ray.kill(find(), no_restart=False)
        ledger = vars(replicas[0])["_ledger"]
        await until(lambda: all(vars(limiter)["_ledger"] not in (None, ledger) for limiter in replicas))
        await asyncio.sleep(4 * EXCHANGE_S)
        await until(lambda: not any(limiter.is_alone for limiter in replicas))
        assert min(levels(replicas)) > 20
        assert [burst(limiter) for limiter in replicas] == [0, 0]

        # It is away: each goes on with its part.
        def missing() -> Any:
            return ray.get_actor("nobody")

        where[0] = missing
        ray.kill(find())
        await until(lambda: all(limiter.is_alone for limiter in replicas))
        other = Key("bob", KeyLimits(requests_per_minute=20), True, False, re.compile("x"), float("inf"))
        passed = 0
        for limiter in replicas:
            for _ in range(20):
                try:
                    limiter.admit(other, 0).settle(0)
                except ApiError:
                    break
                passed += 1
        assert passed == 20

        where[0] = find  # and back
        await until(lambda: not any(limiter.is_alone for limiter in replicas))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_replicas_share_a_limit_through_a_real_actor() -> None:
    try:
        asyncio.run(work())
    finally:
        ray.kill(find_ledger("limits"))
