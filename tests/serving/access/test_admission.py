from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Coroutine
from typing import Any

import pytest

from serving.access.admission import MAX_RETRY_AFTER_S, Admission, AnswerForecast, Place, Rate
from serving.http.api_error import ApiError


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 30), debug=False)


def admission(running: int = 1, waiting: int = 10, timeout_s: float = 20.0) -> Admission:
    return Admission(running=running, waiting=waiting, timeout_s=timeout_s)


async def settle() -> None:
    """Let every task go on until it waits."""
    for _ in range(5):
        await asyncio.sleep(0)


async def refusal(task: asyncio.Task[Place]) -> ApiError:
    with pytest.raises(ApiError) as caught:
        await task
    return caught.value


def test_an_idle_server_lets_in_at_once_and_a_place_is_left_once() -> None:
    async def work() -> None:
        gate = admission(running=2)
        first, second = await gate.enter("a"), await gate.enter("a")
        assert (first.waited_s, gate.running, gate.waiting) == (0.0, 2, 0)
        for _ in range(2):
            first.leave(3, 4)
            assert gate.running == 1
        second.leave(0, 0)
        assert gate.running == 0

    run(work())


def test_who_waits_gets_the_place_that_comes_free() -> None:
    async def work() -> None:
        gate = admission()
        first = await gate.enter("a")
        waiting = asyncio.create_task(gate.enter("b"))
        await settle()
        assert gate.waiting == 1
        first.leave(1, 1)
        place = await waiting
        assert place.waited_s > 0
        assert (gate.running, gate.waiting) == (1, 0)
        place.leave(1, 1)

    run(work())


def test_a_client_that_leaves_while_it_waits_is_gone_at_once() -> None:
    async def work() -> None:
        gate = admission()
        first = await gate.enter("a")
        gone, other = asyncio.create_task(gate.enter("b")), asyncio.create_task(gate.enter("b"))
        await settle()
        gone.cancel()
        await settle()
        assert gate.waiting == 1
        first.leave(1, 1)
        (await other).leave(1, 1)
        assert (gate.running, gate.waiting) == (0, 0)

    run(work())


def test_a_client_that_leaves_as_it_gets_its_place_hands_it_on() -> None:
    async def work() -> None:
        gate = admission()
        first = await gate.enter("a")
        gone, other = asyncio.create_task(gate.enter("b")), asyncio.create_task(gate.enter("c"))
        await settle()
        first.leave(1, 1)  # wakes `gone`, which is cancelled before it runs
        gone.cancel()
        (await other).leave(1, 1)
        with pytest.raises(asyncio.CancelledError):
            await gone
        gone, other = (asyncio.create_task(gate.enter("b")) for _ in range(2))
        await settle()
        other.cancel()  # and cancelled before the place is given
        (await gone).leave(1, 1)
        await settle()
        assert (gate.running, gate.waiting) == (0, 0)

    run(work())


def test_beyond_the_bound_the_flood_is_told_when_to_come_back() -> None:
    async def work() -> None:
        gate = admission(waiting=3)
        first = await gate.enter("flood")
        flood = [asyncio.create_task(gate.enter("flood")) for _ in range(5)]
        await settle()
        assert gate.waiting == 3
        quiet = asyncio.create_task(gate.enter("quiet"))
        refused = [await refusal(task) for task in (flood[4], flood[3], flood[2])]
        assert {(error.status, error.code) for error in refused} == {(429, "queue_full")}
        assert all(1 <= int(error.headers["Retry-After"]) <= MAX_RETRY_AFTER_S for error in refused)
        first.leave(10, 10)
        (await quiet).leave(10, 10)  # ahead of all of the flood, which has been served already
        for task in flood[:2]:
            (await task).leave(1, 1)
        assert (gate.running, gate.waiting) == (0, 0)

    run(work())


def test_the_wait_that_is_told_follows_the_measured_rate() -> None:
    async def work() -> None:
        now = [0.0]
        gate = Admission(running=1, waiting=4, timeout_s=20, clock=lambda: now[0])
        for _ in range(40):  # two a second
            place = await gate.enter("a")
            now[0] += 0.5
            place.leave(1, 1)
        place = await gate.enter("a")
        tasks = [asyncio.create_task(gate.enter("a")) for _ in range(4)]
        await settle()
        error = await refusal(asyncio.create_task(gate.enter("a")))
        assert int(error.headers["Retry-After"]) in (2, 3)  # five requests at two a second
        place.leave(1, 1)
        for task in tasks:
            (await task).leave(1, 1)

    run(work())


def test_a_wait_ends_after_its_time() -> None:
    async def work() -> None:
        gate = admission(timeout_s=0.05)
        first = await gate.enter("a")
        error = await refusal(asyncio.create_task(gate.enter("b")))
        assert (error.status, error.code) == (503, "queue_timeout")
        assert "Retry-After" in error.headers
        assert gate.waiting == 0
        first.leave(1, 1)
        (await gate.enter("b")).leave(1, 1)

    run(work())


def test_a_closed_gate_sends_away_who_waits_and_lets_finish_who_runs() -> None:
    async def work() -> None:
        gate = admission()
        first = await gate.enter("a")
        waiting = asyncio.create_task(gate.enter("b"))
        await settle()
        gate.close()
        for task in (waiting, asyncio.create_task(gate.enter("c"))):
            error = await refusal(task)
            assert (error.status, error.code) == (503, "shutting_down")
        first.leave(1, 1)
        assert (gate.running, gate.waiting) == (0, 0)

    run(work())


@pytest.mark.parametrize("seed", range(3))
def test_no_place_is_lost_or_given_twice_in_a_storm(seed: int) -> None:
    chance = random.Random(seed)
    outcomes: Counter[str] = Counter()

    async def work() -> None:
        gate = admission(running=3, waiting=20, timeout_s=0.03)
        inside, most = 0, 0

        async def client(name: str) -> None:
            nonlocal inside, most
            try:
                place = await gate.enter(name, prompt_tokens=chance.randint(1, 50), max_tokens=20)
            except ApiError as error:
                outcomes[error.code or ""] += 1
                return
            inside += 1
            most = max(most, inside)
            try:
                await asyncio.sleep(chance.random() * 0.004)
            finally:
                inside -= 1
                place.leave(10, chance.randint(0, 30))
            outcomes["served"] += 1

        tasks: list[asyncio.Task[None]] = []
        for number in range(600):
            tasks.append(asyncio.create_task(client(f"t{number % 7}")))
            if chance.random() < 0.3:
                chance.choice(tasks).cancel()
            if chance.random() < 0.3:
                await asyncio.sleep(0.001)
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (gate.running, gate.waiting, inside) == (0, 0, 0)
        assert most == 3
        (await gate.enter("after")).leave(1, 1)

    run(work())
    assert outcomes["served"] > 50
    assert outcomes["queue_full"] > 0


def test_the_rate_of_a_short_past_is_not_too_low() -> None:
    rate = Rate(0.0)
    for number in range(1, 11):
        rate.count(number / 10)
    assert rate.per_second(1.0) == pytest.approx(10, rel=0.15)
    assert rate.per_second(101.0) < 0.01
    for number in range(1, 3001):
        rate.count(101 + number / 100)
    assert rate.per_second(131.0) == pytest.approx(100, rel=0.1)


def test_answers_are_expected_as_they_were_and_never_longer_than_allowed() -> None:
    forecast = AnswerForecast()
    assert forecast.expected("a", 8) == 8
    for _ in range(30):
        forecast.learn("a", 500)
    assert forecast.expected("a", None) == pytest.approx(500)
    assert forecast.expected("a", 100) == 100
    assert forecast.expected("b", None) < 100
    for number in range(5000):
        forecast.learn(str(number), 1)
    assert len(vars(forecast)["_means"]) == 1024


def test_many_answers_are_expected_to_take_many_times_one() -> None:
    """Tenant a has learnt that an answer has 10 tokens, and so has b: the request with eight of them weighs eight times
    as much, so that b, which has one running, is next.
    """

    async def work() -> list[str]:
        gate = Admission(running=2, waiting=8, timeout_s=5)
        for tenant, answers in (("a", 8), ("b", 1)):
            place = await gate.enter(tenant, answers=answers, max_tokens=10)
            place.leave(0, 10 * answers)
        held = [await gate.enter("a", answers=8, max_tokens=10), await gate.enter("b", max_tokens=10)]
        forecast: Any = vars(gate)["_answers"]
        assert [forecast.expected(tenant, None) for tenant in "ab"] == [10, 10]
        started: list[str] = []

        async def ask(tenant: str) -> None:
            place = await gate.enter(tenant, max_tokens=10)
            started.append(tenant)
            place.leave(0, 10)

        asking = [asyncio.create_task(ask(tenant)) for tenant in ("a", "b")]
        await asyncio.sleep(0)
        held[1].leave(0, 10)
        await asyncio.gather(*asking)
        held[0].leave(0, 80)
        return started

    assert asyncio.run(work()) == ["b", "a"]
