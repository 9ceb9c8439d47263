"""The way into the engine: a bounded queue with a fair order, for one replica and one event loop."""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Callable

from serving.access.fairness import FairQueue, Job, State, cost
from serving.http.api_error import QUEUE_FULL, QUEUE_TIMEOUT, SHUTTING_DOWN, ApiError, overloaded, too_many

MAX_RETRY_AFTER_S = 60.0
_RATE_WINDOW_S = 10.0
_REMEMBERED_TENANTS = 1024
_NEW_TENANT_ANSWER = 64.0
"""Tokens that an answer is expected to have before any has been seen."""
_NEWEST_ANSWER_WEIGHT = 0.2

_Waiter = asyncio.Future[ApiError | None]
_Job = Job[_Waiter]


class Place:
    """A request's place in the engine. ``leave`` must be called once it is over, however it ended; a second call does
    nothing.
    """

    __slots__ = ("_admission", "_answers", "_job", "_tenant", "waited_s")

    def __init__(self, admission: Admission, job: _Job, answers: int, waited_s: float) -> None:
        self._admission = admission
        self._answers = answers
        self._job = job
        self._tenant = job.tenant.name
        self.waited_s = waited_s
        """How long it waited for this place."""

    def leave(self, prompt_tokens: int, answer_tokens: int) -> None:
        """Free the place.

        Args:
            prompt_tokens: Tokens of the prompt that the engine read, 0 where it never began.
            answer_tokens: Tokens that it wrote, also those of answers that were broken off, all together.
        """
        self._admission.release(self._job, self._tenant, self._answers, prompt_tokens, answer_tokens)


class Admission:
    """Lets at most ``running`` requests into the engine and keeps at most ``waiting`` others, in the order of
    ``serving.access.fairness``.

    All methods are for one event loop. A request whose task is cancelled while it waits is gone from the queue when the
    task ends, and one that is cancelled in the moment in which it gets its place hands that on.
    """

    def __init__(
        self, *, running: int, waiting: int, timeout_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._queue = FairQueue[_Waiter](running, waiting)
        self._timeout_s = timeout_s
        self._clock = clock
        self._ends = Rate(clock())
        self._answers = AnswerForecast()
        self._is_closed = False

    @property
    def running(self) -> int:
        """Requests in the engine."""
        return self._queue.running

    @property
    def has_room(self) -> bool:
        """True if ``enter`` would not wait now."""
        return self._queue.running < self._queue.max_running

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return self._queue.waiting

    async def enter(
        self,
        tenant: str,
        *,
        weight: float = 1.0,
        prompt_tokens: int = 0,
        max_tokens: int | None = None,
        answers: int = 1,
    ) -> Place:
        """Wait for a place.

        Args:
            tenant: Who shares the engine with others; see ``serving.access.keys.Key.tenant``.
            weight: Its share against other tenants'.
            prompt_tokens: The prompt's length, or an estimate of it.
            max_tokens: Longest answer that the request allows.
            answers: How many it asks for.

        Raises:
            ApiError: 429 ``queue_full``: the queue is full and this tenant holds most of it. 503 ``queue_timeout``:
                no place in time. 503 ``shutting_down``: the replica ends.
        """
        if self._is_closed:
            raise _shutting_down()
        expected = cost(prompt_tokens, answers * self._answers.expected(tenant, max_tokens))
        job, evicted = self._queue.arrive(tenant, weight, expected)
        if evicted is job:
            raise self._full(tenant)
        if evicted is not None:
            _wake(evicted, self._full(evicted.tenant.name))
        if job.state is State.RUNNING:
            return Place(self, job, answers, 0.0)
        return Place(self, job, answers, await self._wait(job))

    def release(self, job: _Job, tenant: str, answers: int, prompt_tokens: int, answer_tokens: int) -> None:
        """What ``Place.leave`` does."""
        if job.state is not State.RUNNING:
            return
        self._ends.count(self._clock())
        if answer_tokens:
            self._answers.learn(tenant, answer_tokens / answers)
        self._hand_on(job, cost(prompt_tokens, answer_tokens))

    def close(self) -> None:
        """Refuse new requests and those that wait; those in the engine go on."""
        self._is_closed = True
        for job in self._queue.waiting_jobs():
            self._queue.withdraw(job)
            _wake(job, _shutting_down())

    async def _wait(self, job: _Job) -> float:
        """Wait for a place; the seconds that it took."""
        loop = asyncio.get_running_loop()
        began = self._clock()
        job.waiter = waiter = loop.create_future()
        timer = loop.call_later(self._timeout_s, self._expire, job)
        try:
            refusal = await waiter
        except asyncio.CancelledError:
            self._queue.withdraw(job)
            self._hand_on(job, cost(0, 0))  # it may have got its place in the meantime
            raise
        finally:
            timer.cancel()
        if refusal is not None:
            raise refusal
        return self._clock() - began

    def _hand_on(self, job: _Job, true_cost: float) -> None:
        for started in self._queue.leave(job, true_cost):
            _wake(started, None)

    def _expire(self, job: _Job) -> None:
        if job.state is not State.WAITING:
            return
        self._queue.withdraw(job)
        message = f"The server is busy: no place in the engine came free within {self._timeout_s:g} s"
        _wake(job, overloaded(message, QUEUE_TIMEOUT, self._drain_s(job.tenant.name)))

    def _full(self, tenant: str) -> ApiError:
        waiting = self._queue.waiting_of(tenant)
        message = f"The server is busy: its queue is full, and {waiting} requests of yours are waiting in it"
        return too_many(message, QUEUE_FULL, self._drain_s(tenant))

    def _drain_s(self, tenant: str) -> float:
        """Seconds until what a tenant has waiting now will have been served, at its share of the rate at which requests
        ended lately; from 1 to ``MAX_RETRY_AFTER_S``.
        """
        rate = self._ends.per_second(self._clock()) * self._queue.share_of(tenant)
        seconds = (self._queue.waiting_of(tenant) + 1) / rate if rate > 0 else math.inf
        return min(max(1.0, seconds), MAX_RETRY_AFTER_S)


class Rate:
    """Events a second, those of the last ``_RATE_WINDOW_S`` seconds weighing most (exponentially)."""

    def __init__(self, now: float) -> None:
        self._began = self._last = now
        self._count = 0.0

    def count(self, now: float) -> None:
        """One event."""
        self._count = self._decayed(now) + 1
        self._last = now

    def per_second(self, now: float) -> float:
        """The rate; a short past is not taken for a long one with few events."""
        seen_s = _RATE_WINDOW_S * -math.expm1(-max(now - self._began, 0.1) / _RATE_WINDOW_S)
        return self._decayed(now) / seen_s

    def _decayed(self, now: float) -> float:
        return self._count * math.exp((self._last - now) / _RATE_WINDOW_S)


class AnswerForecast:
    """How long answers will be: a running mean by tenant, kept for those that asked last."""

    def __init__(self) -> None:
        self._means: OrderedDict[str, float] = OrderedDict()

    def expected(self, tenant: str, max_tokens: int | None) -> float:
        """Tokens of the next answer, never more than the request allows."""
        mean = self._means.get(tenant, _NEW_TENANT_ANSWER)
        return mean if max_tokens is None else min(mean, max_tokens)

    def learn(self, tenant: str, answer_tokens: float) -> None:
        """An answer has ended."""
        mean = self._means.get(tenant)
        if mean is None:
            self._means[tenant] = float(answer_tokens)
            if len(self._means) > _REMEMBERED_TENANTS:
                self._means.popitem(last=False)
            return
        self._means[tenant] = mean + _NEWEST_ANSWER_WEIGHT * (answer_tokens - mean)
        self._means.move_to_end(tenant)


def _wake(job: _Job, refusal: ApiError | None) -> None:
    # A waiter that is done already is of a task that was cancelled, and that has not come round to saying so. The
    # refusal is a result, not an exception: nobody would ask such a waiter for that, and asyncio would complain.
    if job.waiter is not None and not job.waiter.done():
        job.waiter.set_result(refusal)


def _shutting_down() -> ApiError:
    return overloaded("This replica of the server is ending; ask again", SHUTTING_DOWN, 1.0)
