from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serving.access.fairness import FairQueue, Job, State, cost

TENANTS = ("a", "b", "c", "d")
WEIGHTS = {"a": 1.0, "b": 1.0, "c": 2.0, "d": 0.5}


@dataclass
class SlowJob:
    tenant: str
    expected: float
    serial: int
    state: State = State.WAITING


class SlowQueue:
    """The slow twin: the rules of the module's head as they stand there, every one a scan over everything."""

    def __init__(self, max_running: int, max_waiting: int) -> None:
        self.max_running, self.max_waiting = max_running, max_waiting
        self.jobs: list[SlowJob] = []
        self.served: dict[str, float] = {}
        self.floor = 0.0
        self.serial = 0

    def of(self, state: State, tenant: str | None = None) -> list[SlowJob]:
        return [job for job in self.jobs if job.state is state and tenant in (None, job.tenant)]

    def arrive(self, tenant: str, expected: float) -> tuple[SlowJob, SlowJob | None]:
        self.serial += 1
        job = SlowJob(tenant, expected, self.serial)
        waiting = self.of(State.WAITING)
        if not self.of(State.WAITING, tenant):
            lift = self.served[self.next().tenant] if waiting else self.floor
            self.served[tenant] = max(self.served.get(tenant, 0.0), lift)
        self.jobs.append(job)
        if len(self.of(State.RUNNING)) < self.max_running:
            self.start(job)
            return job, None
        if len(waiting) < self.max_waiting:
            return job, None
        newest = {other.tenant: other for other in self.of(State.WAITING)}.values()
        evicted = max(
            newest, key=lambda other: (len(self.of(State.WAITING, other.tenant)) / WEIGHTS[other.tenant], other.serial)
        )
        self.withdraw(evicted)
        return job, evicted

    def next(self) -> SlowJob:
        heads = {other.tenant: other for other in reversed(self.of(State.WAITING))}.values()
        return min(heads, key=lambda other: (self.counter(other.tenant), other.serial))

    def counter(self, tenant: str) -> float:
        running = sum(job.expected for job in self.of(State.RUNNING, tenant))
        return self.served[tenant] + running / WEIGHTS[tenant]

    def start(self, job: SlowJob) -> None:
        job.state = State.RUNNING
        self.floor = max(self.floor, self.served[job.tenant])

    def withdraw(self, job: SlowJob) -> None:
        job.state = State.GONE
        self.forget(job.tenant)

    def leave(self, job: SlowJob, true_cost: float) -> list[SlowJob]:
        job.state = State.GONE
        self.served[job.tenant] += true_cost / WEIGHTS[job.tenant]
        self.forget(job.tenant)
        started: list[SlowJob] = []
        while len(self.of(State.RUNNING)) < self.max_running and self.of(State.WAITING):
            started.append(self.next())
            self.start(started[-1])
        return started

    def forget(self, tenant: str) -> None:
        if not self.of(State.RUNNING) and not self.of(State.WAITING):
            self.served.clear()
            self.floor = 0.0
        is_idle = not any(job.tenant == tenant and job.state is not State.GONE for job in self.jobs)
        if is_idle and self.served.get(tenant, 0.0) <= self.floor:
            self.served.pop(tenant, None)


class FastAndSlow(RuleBasedStateMachine):
    """The same arrivals, ends and cancellations for both: every decision must be the same."""

    def __init__(self) -> None:
        super().__init__()
        self.fast = FairQueue[None](2, 5)
        self.slow = SlowQueue(2, 5)
        self.pairs: list[tuple[Job[None], SlowJob]] = []

    # Whole costs, and weights that are powers of two: sums are exact, so that ties are ties in both.
    @rule(tenant=st.sampled_from(TENANTS), expected=st.integers(1, 50))
    def arrive(self, tenant: str, expected: int) -> None:
        fast, fast_evicted = self.fast.arrive(tenant, WEIGHTS[tenant], expected)
        slow, slow_evicted = self.slow.arrive(tenant, expected)
        self.pairs.append((fast, slow))
        assert (fast_evicted and fast_evicted.serial) == (slow_evicted and slow_evicted.serial)

    @precondition(lambda self: self.alive(State.RUNNING))
    @rule(data=st.data(), true_cost=st.integers(1, 80))
    def leave(self, data: st.DataObject, true_cost: int) -> None:
        fast, slow = data.draw(st.sampled_from(self.alive(State.RUNNING)))
        started = [job.serial for job in self.fast.leave(fast, true_cost)]
        assert started == [job.serial for job in self.slow.leave(slow, true_cost)]
        assert self.fast.leave(fast, true_cost) == []

    @precondition(lambda self: self.alive(State.WAITING))
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        fast, slow = data.draw(st.sampled_from(self.alive(State.WAITING)))
        self.fast.withdraw(fast)
        self.slow.withdraw(slow)

    def alive(self, state: State) -> list[tuple[Job[None], SlowJob]]:
        return [pair for pair in self.pairs if pair[0].state is state]

    @invariant()
    def the_same(self) -> None:
        assert [fast.state for fast, _ in self.pairs] == [slow.state for _, slow in self.pairs]
        for name, counter in self.fast.counters().items():
            assert counter == self.slow.served[name]

    @invariant()
    def bounds_are_kept_and_no_place_is_idle(self) -> None:
        running, waiting = len(self.alive(State.RUNNING)), len(self.alive(State.WAITING))
        assert (running, waiting) == (self.fast.running, self.fast.waiting)
        assert running <= 2
        assert waiting <= 5
        assert running == 2 or waiting == 0


TestFastAndSlow = FastAndSlow.TestCase
TestFastAndSlow.settings = settings(max_examples=150, stateful_step_count=60, deadline=None, database=None)

COSTS = st.lists(st.floats(1, 1000), min_size=1, max_size=20)


@settings(max_examples=100, deadline=None, database=None)
@given(
    weights=st.lists(st.floats(0.1, 10), min_size=2, max_size=5),
    costs=COSTS,
    places=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_tenants_that_always_wait_are_within_one_request_of_their_shares(
    weights: list[float], costs: list[float], places: int, seed: int
) -> None:
    chance = random.Random(seed)
    queue = FairQueue[None](places, 10_000)
    served = dict.fromkeys(range(len(weights)), 0.0)
    running = [queue.arrive("warm", 1.0, 1.0)[0] for _ in range(places)]

    def ask(tenant: int) -> None:
        queue.arrive(str(tenant), weights[tenant], chance.choice(costs))

    for _ in range(3 + places):
        for tenant in served:
            ask(tenant)
    bound = max(costs) / min(weights)
    for _ in range(300):
        ended = running.pop(chance.randrange(len(running)))
        for job in queue.leave(ended, ended.expected_cost):
            tenant = int(job.tenant.name)
            served[tenant] += job.expected_cost / job.tenant.weight
            running.append(job)
            ask(tenant)
        assert max(served.values()) - min(served.values()) <= bound * (1 + 1e-9)


@settings(max_examples=60, deadline=None, database=None)
@given(flood=st.integers(1, 60), seed=st.integers(0, 1000))
def test_a_newcomer_waits_for_one_request_of_the_flood_a_place_at_most(flood: int, seed: int) -> None:
    chance = random.Random(seed)
    queue = FairQueue[None](2, 10_000)
    running = [queue.arrive("flood", 1.0, chance.randint(1, 9))[0] for _ in range(2)]
    for _ in range(flood):
        queue.arrive("flood", 1.0, chance.randint(1, 9))
    for _ in range(chance.randrange(flood)):
        ended = running.pop(0)
        running += queue.leave(ended, ended.expected_cost)
    mine, _ = queue.arrive("quiet", 1.0, 5)
    assert mine.state is State.WAITING or queue.running < 2
    starts: list[Job[None]] = []
    while mine.state is State.WAITING:
        ended = running.pop(0)
        started = queue.leave(ended, ended.expected_cost)
        running += started
        starts += started
    assert sum(job is not mine for job in starts) <= 1


def test_a_newcomer_does_not_pay_for_what_others_were_expected_to_use() -> None:
    queue = FairQueue[None](8, 1000)
    running = [queue.arrive("flood", 1.0, 1000)[0] for _ in range(8)]
    for _ in range(100):
        queue.arrive("flood", 1.0, 1000)
    mine = [queue.arrive("quiet", 1.0, 1000)[0] for _ in range(2)]
    for ended in running[:2]:
        queue.leave(ended, 1)
    assert [job.state for job in mine] == [State.RUNNING, State.RUNNING]


def test_idle_time_is_not_saved_up() -> None:
    queue = FairQueue[None](1, 1000)
    running = [queue.arrive("busy", 1.0, 10)[0]]
    for _ in range(100):
        queue.arrive("busy", 1.0, 10)
    for _ in range(50):
        running = queue.leave(running[0], 10)
    for _ in range(50):
        queue.arrive("late", 1.0, 10)
    order: list[str] = []
    for _ in range(20):
        running = queue.leave(running[0], 10)
        order.append(running[0].tenant.name)
    assert order.count("late") == 10


def test_an_answer_that_was_longer_than_expected_is_paid_for() -> None:
    queue = FairQueue[None](1, 1000)
    running = [queue.arrive("long", 1.0, 10)[0]]
    for _ in range(100):
        queue.arrive("long", 1.0, 10)
        queue.arrive("short", 1.0, 10)
    served = {"long": 0, "short": 0}
    for _ in range(100):
        name = running[0].tenant.name
        running = queue.leave(running[0], 40 if name == "long" else 10)
        served[name] += 1
    assert served["short"] == pytest.approx(4 * served["long"], abs=5)


def test_a_full_queue_takes_its_place_from_the_longest() -> None:
    queue = FairQueue[None](1, 4)
    queue.arrive("flood", 1.0, 1)
    flood = [queue.arrive("flood", 1.0, 1)[0] for _ in range(4)]
    quiet, evicted = queue.arrive("quiet", 1.0, 1)
    assert quiet.state is State.WAITING
    assert evicted is flood[-1]
    assert flood[-1].state is State.GONE
    again, refused = queue.arrive("flood", 1.0, 1)
    assert refused is again
    assert queue.waiting == 4
    other, evicted = queue.arrive("quiet", 1.0, 1)
    assert evicted is flood[-2]
    third, evicted = queue.arrive("quiet", 1.0, 1)  # two each: nobody has more than the newcomer's tenant would
    assert evicted is third
    assert other.state is State.WAITING


def test_a_heavier_tenant_may_hold_more_places() -> None:
    queue = FairQueue[None](1, 6)
    queue.arrive("light", 1.0, 1)
    for _ in range(6):
        queue.arrive("light", 1.0, 1)
    kept = [queue.arrive("heavy", 2.0, 1)[0] for _ in range(6)]
    assert sum(job.state is State.WAITING for job in kept) == 4
    assert (queue.waiting_of("heavy"), queue.waiting_of("light")) == (4, 2)
    assert queue.share_of("heavy") == pytest.approx(2 / 3)
    assert queue.share_of("nobody") == pytest.approx(1 / 4)


def test_what_is_remembered_stays_small() -> None:
    chance = random.Random(0)
    queue = FairQueue[None](4, 8)
    running: list[Job[None]] = []
    for number in range(50_000):
        job, _ = queue.arrive(f"address {number}", 1.0, chance.randint(1, 200))
        if job.state is State.RUNNING:
            running.append(job)
        if chance.random() < 0.9 and running:
            running += queue.leave(running.pop(chance.randrange(len(running))), chance.randint(1, 400))
        assert queue.tenants <= 2 * (1024 + 4 + 8)
    sizes: Any = vars(queue)
    assert len(sizes["_order"]) < 8192
    while running:
        running += queue.leave(running.pop(), 1)
    assert (queue.tenants, queue.counters()) == (0, {})


def test_the_cost_is_never_nothing() -> None:
    assert cost(0, 0) == 1
    assert cost(10, 5) == 20
    with pytest.raises(ValueError, match="max_running"):
        FairQueue[None](0, 1)
