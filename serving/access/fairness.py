"""Who is next: requests of many tenants for few places in an engine, shared by tokens and weight.

The Virtual Token Counter (Sheng et al., Fairness in Serving Large Language Models, OSDI 2024,
https://arxiv.org/abs/2401.00588), with weights and with expected lengths (their section 4.3 and 4.4). Each tenant i has
s_i, the service that it was given, in tokens of prompts plus twice those of answers, over its weight w_i, and r_i, what
its running requests are expected to add to that::

    arrives, i had none waiting    s_i <- max(s_i, s_j), where j is the waiting tenant that is next;
                                   or, where nobody waits, max(s_i, the largest s of one that was started)
    a place is free                start the oldest request of the waiting tenant with the smallest s_i + r_i: i is next
    is started, expected cost u    r_i <- r_i + u / w_i
    ends, true cost v              r_i <- r_i - u / w_i,  s_i <- s_i + v / w_i

So tenants that wait all the time are never further apart than one request in service over weight, but for what running
requests turn out to differ from what was expected. The lift at arrival keeps a tenant from saving up while it is idle.
It leaves r_j out, unlike the paper's: a newcomer that was lifted by what others are only expected to use would wait for
all of them where they use less. This way it gets the next place that comes free.

When the queue is full, whoever holds most places for its weight gives up its newest one (as in McKenney, Stochastic
Fairness Queueing, 1990): a flood can fill the queue while nobody else wants it, and yet keeps nobody out.

Everything here is a decision: no clock, no tasks. A step costs O(log tenants), and O(tenants) where the queue is full.
What is kept is bounded: the tenants of the requests that wait or run, and those that left ahead of the others, of whom
beyond ``_MAX_OWING`` the least far ahead are forgiven.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Generic, TypeVar

ANSWER_TOKEN_COST = 2.0
"""Cost of a token of an answer, where one of a prompt costs 1 (the paper's w_q and w_p)."""

_SPARE_ENTRIES = 64
_FIRST_SWEEP = 256
_MAX_OWING = 1024

Waiter = TypeVar("Waiter")


def cost(prompt_tokens: float, answer_tokens: float) -> float:
    """What a request costs, in tokens of prompts; at least 1, so that whoever is served falls back behind others."""
    return max(1.0, prompt_tokens + ANSWER_TOKEN_COST * answer_tokens)


class State(Enum):
    """Where a request is."""

    WAITING = auto()
    RUNNING = auto()
    GONE = auto()


class Tenant(Generic[Waiter]):
    """Whoever shares the engine with others."""

    __slots__ = ("expected", "name", "running", "served", "waiting", "weight")

    def __init__(self, name: str, weight: float) -> None:
        self.name = name
        self.weight = weight
        self.served = 0.0
        """Cost of its requests that have ended, over its weight (s_i)."""
        self.expected = 0.0
        """Expected cost of those that run, over its weight (r_i)."""
        self.running = 0
        self.waiting: OrderedDict[int, Job[Waiter]] = OrderedDict()

    @property
    def counter(self) -> float:
        """The tenant whose counter is smallest is next."""
        return self.served + self.expected


@dataclass(slots=True, eq=False)
class Job(Generic[Waiter]):
    """One request."""

    tenant: Tenant[Waiter]
    expected_cost: float
    serial: int
    """Numbers rise with the order of arrival."""
    state: State = State.WAITING
    charge: float = 0.0
    """What its start added to the tenant's ``expected``."""
    waiter: Waiter | None = field(default=None)
    """Whatever the caller wants to find again when the job's state changes."""


class FairQueue(Generic[Waiter]):
    """At most ``max_running`` jobs run and at most ``max_waiting`` wait; none waits while a place is free."""

    def __init__(self, max_running: int, max_waiting: int) -> None:
        if max_running < 1 or max_waiting < 0:
            raise ValueError(f"max_running must be at least 1 and max_waiting at least 0: {max_running}, {max_waiting}")
        self.max_running = max_running
        self.max_waiting = max_waiting
        self.running = 0
        self.waiting = 0
        self._tenants: dict[str, Tenant[Waiter]] = {}
        self._order: list[tuple[float, int, int, Tenant[Waiter]]] = []
        """Heap of (counter, serial of the oldest waiting job, number of the entry, tenant); what is out of date is
        skipped."""
        self._floor = 0.0
        """The largest ``served`` of a tenant that was started."""
        self._serial = 0
        self._entries = 0
        self._sweep_at = _FIRST_SWEEP

    def arrive(self, name: str, weight: float, expected_cost: float) -> tuple[Job[Waiter], Job[Waiter] | None]:
        """A request of the tenant ``name`` that is expected to cost ``expected_cost``, which is above 0.

        Returns:
            The request's job, and the job that lost its place for it, if one did. That is the request's own where its
            tenant holds most places already. A job that is RUNNING may go to the engine, one that is GONE may not.
        """
        self._serial += 1
        tenant = self._tenant(name, weight)
        job = Job[Waiter](tenant, expected_cost, self._serial)
        if not tenant.waiting:
            tenant.served = max(tenant.served, self._lift())
        if self.running < self.max_running:
            self._start(job)
            return job, None
        evicted = None
        if self.waiting >= self.max_waiting:
            evicted = self._longest(job)
            if evicted is job:
                job.state = State.GONE
                self._forget(tenant)
                return job, job
            self.withdraw(evicted)
        tenant.waiting[job.serial] = job
        self.waiting += 1
        if len(tenant.waiting) == 1:
            self._push(tenant)
        return job, evicted

    def withdraw(self, job: Job[Waiter]) -> None:
        """A waiting job is given up; does nothing to one that is not waiting."""
        if job.state is not State.WAITING:
            return
        job.state = State.GONE
        tenant = job.tenant
        del tenant.waiting[job.serial]
        self.waiting -= 1
        if tenant.waiting:
            self._push(tenant)  # its oldest job may be another one now
        else:
            self._forget(tenant)

    def leave(self, job: Job[Waiter], true_cost: float) -> list[Job[Waiter]]:
        """A running job has ended, at a cost above 0; does nothing to one that is not running.

        Returns:
            The jobs that may go to the engine in its stead; they are RUNNING.
        """
        if job.state is not State.RUNNING:
            return []
        job.state = State.GONE
        tenant = job.tenant
        tenant.running -= 1
        self.running -= 1
        tenant.served += true_cost / tenant.weight
        tenant.expected = tenant.expected - job.charge if tenant.running else 0.0  # sums of floats do not cancel out
        if tenant.waiting:
            self._push(tenant)
        else:
            self._forget(tenant)
        return self._fill()

    def waiting_of(self, name: str) -> int:
        """How many requests of a tenant wait."""
        tenant = self._tenants.get(name)
        return len(tenant.waiting) if tenant else 0

    def waiting_jobs(self) -> list[Job[Waiter]]:
        """All requests that wait, by tenant."""
        return [job for tenant in self._tenants.values() for job in tenant.waiting.values()]

    def share_of(self, name: str) -> float:
        """A tenant's part of the service, as long as those wait that wait now; 1 where no other does."""
        waiting = [tenant for tenant in self._tenants.values() if tenant.waiting and tenant.name != name]
        tenant = self._tenants.get(name)
        weight = tenant.weight if tenant else 1.0
        return weight / (weight + sum(other.weight for other in waiting))

    @property
    def tenants(self) -> int:
        """How many tenants are remembered."""
        return len(self._tenants)

    def counters(self) -> dict[str, float]:
        """Service over weight of the tenants that are remembered, for tests and for people."""
        return {name: tenant.served for name, tenant in self._tenants.items()}

    def _tenant(self, name: str, weight: float) -> Tenant[Waiter]:
        tenant = self._tenants.get(name)
        if tenant is None:
            if len(self._tenants) >= self._sweep_at:
                self._sweep()
            tenant = self._tenants[name] = Tenant[Waiter](name, weight)
        tenant.weight = weight  # the file of keys may have changed
        return tenant

    def _start(self, job: Job[Waiter]) -> None:
        tenant = job.tenant
        job.state = State.RUNNING
        self._floor = max(self._floor, tenant.served)
        job.charge = job.expected_cost / tenant.weight
        tenant.expected += job.charge
        tenant.running += 1
        self.running += 1

    def _fill(self) -> list[Job[Waiter]]:
        """Start jobs while there are places."""
        started: list[Job[Waiter]] = []
        while self.running < self.max_running and (tenant := self._first()) is not None:
            _, job = tenant.waiting.popitem(last=False)
            self.waiting -= 1
            self._start(job)
            started.append(job)
            if tenant.waiting:
                self._push(tenant)
        return started

    def _lift(self) -> float:
        first = self._first()
        return self._floor if first is None else first.served

    def _first(self) -> Tenant[Waiter] | None:
        """The waiting tenant with the smallest counter; of several the one whose request is oldest."""
        order = self._order
        while order:
            counter, serial, _, tenant = order[0]
            if tenant.waiting and tenant.counter == counter and next(iter(tenant.waiting)) == serial:
                return tenant
            heapq.heappop(order)
        return None

    def _push(self, tenant: Tenant[Waiter]) -> None:
        """Put a waiting tenant where its counter belongs."""
        if len(self._order) > 2 * len(self._tenants) + _SPARE_ENTRIES:
            self._order = [self._entry(other) for other in self._tenants.values() if other.waiting]
            heapq.heapify(self._order)
        heapq.heappush(self._order, self._entry(tenant))

    def _entry(self, tenant: Tenant[Waiter]) -> tuple[float, int, int, Tenant[Waiter]]:
        self._entries += 1  # no two entries are equal, for tenants have no order
        return tenant.counter, next(iter(tenant.waiting)), self._entries, tenant

    def _longest(self, newcomer: Job[Waiter]) -> Job[Waiter]:
        """The job that goes where one must: the newest of the tenant with most places for its weight, the newcomer's
        counted; of several such jobs the newest.
        """
        victim, most = newcomer, (len(newcomer.tenant.waiting) + 1) / newcomer.tenant.weight
        for tenant in self._tenants.values():
            places = len(tenant.waiting) / tenant.weight
            if tenant is newcomer.tenant or not tenant.waiting or places < most:
                continue
            newest = tenant.waiting[next(reversed(tenant.waiting))]
            if places > most or newest.serial > victim.serial:
                victim, most = newest, places
        return victim

    def _forget(self, tenant: Tenant[Waiter]) -> None:
        """Forget a tenant that has nothing here and is not ahead of others."""
        if self.running == 0 and self.waiting == 0:  # the end of a busy period, of which nothing is owed
            self._tenants.clear()
            self._order.clear()
            self._floor = 0.0
            self._sweep_at = _FIRST_SWEEP
        elif not tenant.waiting and not tenant.running and tenant.served <= self._floor:
            self._tenants.pop(tenant.name, None)

    def _sweep(self) -> None:
        """Forget all such tenants, for those that left ahead of others have been caught up with since; and the least
        ahead, where clients that come once each are so many that nobody catches up.
        """
        idle = [tenant for tenant in self._tenants.values() if not tenant.waiting and not tenant.running]
        owing = [tenant for tenant in idle if tenant.served > self._floor]
        kept = {tenant.name for tenant in heapq.nlargest(_MAX_OWING, owing, key=lambda tenant: tenant.served)}
        for tenant in idle:
            if tenant.name not in kept:
                del self._tenants[tenant.name]
        self._sweep_at = max(_FIRST_SWEEP, 2 * len(self._tenants))
