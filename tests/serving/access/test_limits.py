from __future__ import annotations

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.access.key_file import KeyLimits
from serving.access.keys import ANONYMOUS, Key
from serving.access.ledger import Book
from serving.access.limits import ALONE_AFTER_S, Charge, Limiter, duration
from serving.http.api_error import ApiError


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def key(name: str = "alice", **limits: int) -> Key:
    return Key(name, KeyLimits(**limits), True, False, re.compile("x"), float("inf"))


def refused(limiter: Limiter, who: Key, tokens: int = 0) -> ApiError:
    with pytest.raises(ApiError) as caught:
        limiter.admit(who, tokens)
    assert (caught.value.status, caught.value.code) == (429, "rate_limit_exceeded")
    return caught.value


def burst(limiter: Limiter, who: Key, most: int = 10_000) -> int:
    """How many requests pass at once."""
    for number in range(most):
        try:
            limiter.admit(who, 0).settle(0)
        except ApiError:
            return number
    return most


def exchange(book: Book, *limiters: Limiter) -> None:
    for number, limiter in enumerate(limiters):
        limiter.learn(book.exchange(f"replica {number}", *limiter.take()))


def test_a_key_without_limits_is_not_counted(clock: Clock) -> None:
    limiter = Limiter(clock=clock)
    charge = limiter.admit(ANONYMOUS, 10**9)
    assert charge.headers() == {}
    charge.settle(5)
    assert limiter.take()[1] == {}


def test_requests_a_minute(clock: Clock) -> None:
    limiter, alice = Limiter(clock=clock), key(requests_per_minute=6)
    assert burst(limiter, alice) == 6
    error = refused(limiter, alice)
    assert error.headers["Retry-After"] == "10"
    assert error.headers["x-ratelimit-limit-requests"] == "6"
    assert error.headers["x-ratelimit-remaining-requests"] == "0"
    assert error.headers["x-ratelimit-reset-requests"] == "1m0s"
    clock.now += 9.99
    refused(limiter, alice)
    clock.now += 0.02
    assert burst(limiter, alice) == 1
    assert burst(limiter, key("bob", requests_per_minute=6)) == 6
    clock.now += 3600
    assert burst(limiter, alice) == 6


def test_tokens_are_estimated_then_settled(clock: Clock) -> None:
    limiter, alice = Limiter(clock=clock), key(tokens_per_minute=100)
    charge = limiter.admit(alice, 60)
    assert charge.headers()["x-ratelimit-remaining-tokens"] == "40"
    refused(limiter, alice, 50)
    charge.settle(10)
    charge.settle(99)  # counts once
    charge = limiter.admit(alice, 50)
    charge.settle(300)  # the truth is more than was allowed: worked off before the next
    error = refused(limiter, alice, 1)
    assert int(error.headers["Retry-After"]) == pytest.approx((310 + 1 - 100) * 60 / 100, abs=1)
    clock.now += float(error.headers["Retry-After"])
    limiter.admit(alice, 1)


def test_what_was_not_served_costs_nothing(clock: Clock) -> None:
    limiter, alice = Limiter(clock=clock), key(requests_per_minute=1, tokens_per_minute=100, max_concurrent=1)
    for _ in range(5):
        charge = limiter.admit(alice, 80)
        charge.cancel()
        charge.settle(80)
    assert limiter.admit(alice, 100).headers()["x-ratelimit-remaining-tokens"] == "0"


def test_a_refund_of_what_time_has_drained_is_no_credit(clock: Clock) -> None:
    limiter, alice = Limiter(clock=clock), key(requests_per_minute=3, tokens_per_minute=100)
    charge = limiter.admit(alice, 100)
    clock.now += 3600
    charge.cancel()
    assert burst(limiter, alice) == 3
    refused(limiter, key(tokens_per_minute=100), 101)


def test_a_request_that_never_fits_is_not_to_be_sent_again(clock: Clock) -> None:
    error = refused(Limiter(clock=clock), key(tokens_per_minute=100), 101)
    assert "too large" in error.message
    assert error.headers == {"x-should-retry": "false"}


def test_requests_at_a_time(clock: Clock) -> None:
    limiter, alice = Limiter(clock=clock), key(max_concurrent=2)
    first = limiter.admit(alice, 0)
    limiter.admit(alice, 0)
    refused(limiter, alice)
    first.settle(0)
    assert burst(limiter, alice, most=5) == 5  # one at a time beside the other


def test_a_changed_limit_counts_at_once(clock: Clock) -> None:
    limiter = Limiter(clock=clock)
    assert burst(limiter, key(requests_per_minute=2)) == 2
    assert burst(limiter, key(requests_per_minute=5)) == 3


def test_replicas_share_a_limit_and_their_overshoot_is_worked_off(clock: Clock) -> None:
    book, replicas, alice = Book(clock), [Limiter(3, clock) for _ in range(3)], key(requests_per_minute=10)
    exchange(book, *replicas)
    assert [burst(limiter, alice) for limiter in replicas] == [10, 10, 10]
    exchange(book, *replicas)
    exchange(book, *replicas)
    passed = 0
    for _ in range(4 * 119):  # 20 too many are worked off in two minutes, less a moment
        clock.now += 0.25
        exchange(book, *replicas)
        passed += sum(burst(limiter, alice) for limiter in replicas)
    assert passed == 0
    for _ in range(4 * 60 * 5):
        clock.now += 0.25
        exchange(book, *replicas)
        passed += burst(replicas[passed % 3], alice)
    assert passed == pytest.approx(50, abs=2)


def test_tokens_and_concurrency_are_shared_too(clock: Clock) -> None:
    book, alice = Book(clock), key(tokens_per_minute=100, max_concurrent=2)
    here, there = Limiter(2, clock), Limiter(2, clock)
    first = here.admit(alice, 30)
    here.admit(alice, 30)
    exchange(book, here, there)
    assert "at a time" in refused(there, alice, 1).message
    first.settle(90)
    exchange(book, here, there)
    refused(there, alice, 1)
    clock.now += 30
    exchange(book, here, there)
    assert there.admit(alice, 30).headers()["x-ratelimit-remaining-tokens"] == "0"
    exchange(book, here, there)
    exchange(book, here, there)
    refused(here, alice)


def test_a_batch_whose_answer_is_lost_counts_once(clock: Clock) -> None:
    book, here, there, alice = Book(clock), Limiter(2, clock), Limiter(2, clock), key(requests_per_minute=10)
    exchange(book, here, there)
    here.admit(alice, 0)
    for _ in range(3):
        book.exchange("replica 0", *here.take())
        here.admit(alice, 0)  # goes with the next batch
    exchange(book, here, there)
    exchange(book, here, there)
    assert burst(there, alice) == 6


def test_alone_a_replica_keeps_to_its_part(clock: Clock) -> None:
    alone, alice = Limiter(4, clock), key(requests_per_minute=20)
    assert not alone.is_alone
    clock.now += ALONE_AFTER_S + 0.1
    assert alone.is_alone
    assert burst(alone, alice) == 5
    passed = 0
    for _ in range(600):
        clock.now += 1
        passed += burst(alone, alice)
    assert passed == pytest.approx(50, abs=1)
    assert burst(alone, key("bob", requests_per_minute=1)) == 1
    clock.now += 3600
    alone.admit(key("carol", tokens_per_minute=100), 90)  # more than its part, but not more than the limit
    exchange(Book(clock), alone)
    assert not alone.is_alone
    assert not Limiter(1, Clock()).is_alone


def test_a_ledger_that_lost_its_memory_is_told(clock: Clock) -> None:
    here, there, alice = Limiter(2, clock), Limiter(2, clock), key(requests_per_minute=10)
    book = Book(clock)
    exchange(book, here, there)
    assert burst(here, alice, 6) == 6
    exchange(book, here, there)
    book = Book(clock)
    for _ in range(3):
        exchange(book, here, there)
    assert burst(there, alice) == 4
    exchange(book, here, there)
    exchange(book, here, there)
    assert burst(here, alice) == 0


def test_the_requests_of_a_replica_that_died_are_let_go(clock: Clock) -> None:
    book, dead, alive, alice = Book(clock), Limiter(2, clock), Limiter(2, clock), key(max_concurrent=1)
    dead.admit(alice, 0)
    book.exchange("dead", *dead.take())
    alive.learn(book.exchange("alive", *alive.take()))
    refused(alive, alice)
    for _ in range(24):
        clock.now += 0.25
        alive.learn(book.exchange("alive", *alive.take()))
    assert burst(alive, alice, most=5) == 5


def test_nothing_is_kept_of_idle_keys(clock: Clock) -> None:
    book, replicas = Book(clock), [Limiter(2, clock) for _ in range(2)]
    for number in range(3000):
        replicas[number % 2].admit(key(f"k{number}", requests_per_minute=60), 0).settle(0)
        if number % 10 == 0:
            clock.now += 1
            exchange(book, *replicas)
    for _ in range(12):
        clock.now += 10
        exchange(book, *replicas)
    assert vars(book)["_entries"] == {}
    assert [vars(limiter)["_accounts"] for limiter in replicas] == [{}, {}]


@settings(max_examples=60, deadline=None, database=None)
@given(replicas=st.integers(1, 4), limit=st.integers(1, 50), seed=st.integers(0, 10_000))
def test_the_bound_that_is_promised(replicas: int, limit: int, seed: int) -> None:
    chance, clock, alice = random.Random(seed), Clock(), key(requests_per_minute=limit)
    book, limiters = Book(clock), [Limiter(replicas, clock) for _ in range(replicas)]
    passed: list[float] = []
    open_charges: list[Charge] = []
    for _ in range(400):
        clock.now += chance.choice((0.01, 0.25, 1.0))
        for number, limiter in enumerate(limiters):
            if chance.random() < 0.7:
                limiter.learn(book.exchange(f"replica {number}", *limiter.take()))
            for _ in range(chance.choice((0, 1, limit))):
                try:
                    open_charges.append(limiter.admit(alice, 0))
                except ApiError:
                    break
                passed.append(clock.now)
        while open_charges and chance.random() < 0.8:
            open_charges.pop().settle(0)
    for first in range(0, len(passed), 7):
        for last in range(first, len(passed), 5):
            most = replicas * limit + limit * (passed[last] - passed[first]) / 60
            assert last - first + 1 <= most + replicas * 1e-6


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0ms"), (0.25, "250ms"), (1, "1s"), (1.5, "1.5s"), (59.9, "59.9s"), (360, "6m0s")]
)
def test_durations_are_written_as_openai_does(seconds: float, text: str) -> None:
    assert duration(seconds) == text
