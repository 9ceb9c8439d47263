"""How much a key may do: requests a minute, tokens a minute, requests at a time, summed over all replicas.

Each limit is a leaky bucket as a meter (Turner, New Directions in Communications, 1986; the same decisions as ITU-T
I.371's generic cell rate algorithm): use raises its level, time lowers it at limit/60 a second, and a request passes if
the level stays within the limit. What a request used is known when it has ended; until then an estimate stands for it,
and where the truth is larger the level goes above the limit and is worked off before the next request.

The libraries for this (``limits``, ``throttled-py``) share a limit through Redis or the like, which would be a server
more to run and a round trip in each request, and cannot correct what was charged. Here a replica decides by itself, on
what all had used when it last asked (see ``serving.access.ledger``) and what it has admitted since.

**Bound.** With R replicas that exchange every T seconds, what they admit in between is known to none of the others: all
together admit at most R limits at once, where one limit was meant. That is a debt: it is worked off before the next
request passes, so that over any t seconds no more than ``R * limit + limit * t / 60`` pass, and in the long run limit
a minute. A replica that has not reached the ledger for ``ALONE_AFTER_S`` goes on with its R-th part of every limit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from serving.access.key_file import KeyLimits
from serving.access.keys import Key
from serving.http.api_error import RATE_LIMIT_EXCEEDED, ApiError, too_many

ALONE_AFTER_S = 2.0
_MINUTE_S = 60.0


@dataclass(slots=True)
class Use:
    """What a key has used: levels, or what is to be added to them."""

    requests: float = 0.0
    tokens: float = 0.0

    def drain(self, limits: KeyLimits, seconds: float) -> None:
        """Let time pass; what has no limit has no level."""
        minutes = seconds / _MINUTE_S
        rate = limits.requests_per_minute
        self.requests = 0.0 if rate is None else max(0.0, self.requests - rate * minutes)
        rate = limits.tokens_per_minute
        self.tokens = 0.0 if rate is None else max(0.0, self.tokens - rate * minutes)

    @property
    def is_nothing(self) -> bool:
        """Neither requests nor tokens."""
        return self.requests == 0 and self.tokens == 0


@dataclass(slots=True)
class Report:
    """What a replica tells the ledger of one key."""

    limits: KeyLimits
    added: Use
    """Used since the report before; tokens may be below 0, where an estimate was too high."""
    running: int
    """Its requests at this moment."""
    level: Use | None = None
    """All that it knows of, for a ledger that has lost its memory."""


@dataclass(slots=True)
class Standing:
    """What the ledger tells a replica of one key."""

    limits: KeyLimits
    level: Use
    """What all replicas have used and time has not yet drained, now."""
    running: int
    """Requests at this moment on other replicas, as they last reported."""


@dataclass(slots=True)
class Reply:
    """The ledger's answer."""

    ledger: str
    """Another one than before is a ledger that knows nothing of the time before."""
    is_whole: bool
    """``standings`` has all keys, not only those that changed since the replica last asked."""
    standings: dict[str, Standing]


@dataclass(slots=True)
class _Account:
    """One key on one replica."""

    limits: KeyLimits
    at: float
    level: Use = field(default_factory=Use)
    added: Use = field(default_factory=Use)
    """Used here and not yet in a batch."""
    running: int = 0
    running_elsewhere: int = 0
    reported_running: int = 0

    def drain(self, now: float, part: float) -> None:
        self.level.drain(self.limits, part * max(0.0, now - self.at))
        self.at = now

    def add(self, requests: float, tokens: float) -> None:
        level, added = self.level, self.added
        added.requests += requests
        added.tokens += tokens
        # A refund may be of use that time has drained already.
        level.requests = max(0.0, level.requests + requests)
        level.tokens = max(0.0, level.tokens + tokens)

    @property
    def is_idle(self) -> bool:
        return self.level.is_nothing and self.added.is_nothing and not self.running and not self.running_elsewhere


class Charge:
    """What a request that passed was charged; ends with ``settle`` or ``cancel``, of which the first counts."""

    __slots__ = ("_account", "_limiter", "_tokens")

    def __init__(self, limiter: Limiter, account: _Account | None, tokens: int) -> None:
        self._limiter = limiter
        self._account = account
        self._tokens = tokens

    def settle(self, tokens: int) -> None:
        """The request has ended, and has used ``tokens`` of prompt and answer."""
        self._end(0, tokens - self._tokens)

    def cancel(self) -> None:
        """The request was not served, and costs nothing."""
        self._end(-1, -self._tokens)

    def headers(self) -> dict[str, str]:
        """OpenAI's ``x-ratelimit-*`` headers as they are now; none for a key without limits."""
        return {} if self._account is None else self._limiter.headers(self._account)

    def _end(self, requests: int, tokens: int) -> None:
        account, self._account = self._account, None
        if account is not None:
            account.running -= 1
            account.add(requests, tokens)


class Limiter:
    """The limits of all keys on one replica. All methods are for one thread."""

    def __init__(self, replicas: int = 1, clock: Callable[[], float] = time.monotonic) -> None:
        self._replicas = replicas
        self._clock = clock
        self._accounts: dict[str, _Account] = {}
        self._asked = clock()
        self._ledger: str | None = None
        self._serial = 0
        self._batch: dict[str, Report] | None = None

    @property
    def is_alone(self) -> bool:
        """Whether this replica has not reached the others for so long that it keeps to its part of the limits."""
        return self._part(self._clock()) < 1

    def admit(self, key: Key, tokens: int) -> Charge:
        """Charge a request that is estimated to use ``tokens`` of prompt and answer.

        Raises:
            ApiError: 429 ``rate_limit_exceeded``, with Retry-After and OpenAI's x-ratelimit headers.
        """
        limits = key.limits
        if limits.requests_per_minute is None and limits.tokens_per_minute is None and limits.max_concurrent is None:
            return Charge(self, None, 0)
        now = self._clock()
        account = self._accounts.get(key.id)
        if account is None:
            account = self._accounts[key.id] = _Account(limits, now)
        part = self._part(now)
        account.drain(now, part)
        account.limits = limits  # the file of keys may have changed
        refusal = self._refusal(account, tokens, part)
        if refusal is not None:
            raise refusal
        account.add(1, tokens)
        account.running += 1
        return Charge(self, account, tokens)

    def headers(self, account: _Account) -> dict[str, str]:
        """What OpenAI's clients read: limit, rest, and the time until nothing is used."""
        now = self._clock()
        part = self._part(now)
        account.drain(now, part)
        limits, level = account.limits, account.level
        shown: dict[str, str] = {}
        for name, limit, used in (
            ("requests", limits.requests_per_minute, level.requests),
            ("tokens", limits.tokens_per_minute, level.tokens),
        ):
            if limit is not None:
                shown[f"x-ratelimit-limit-{name}"] = str(limit)
                shown[f"x-ratelimit-remaining-{name}"] = str(max(0, math.floor(_least_one(limit * part) - used)))
                shown[f"x-ratelimit-reset-{name}"] = duration(used * _MINUTE_S / (limit * part))
        return shown

    def take(self) -> tuple[int, dict[str, Report]]:
        """The next batch for the ledger, or again the one that it has not answered, with the batch's number."""
        if self._batch is None:
            self._serial += 1
            self._batch = {}
            now = self._clock()
            part = self._part(now)
            for name, account in list(self._accounts.items()):
                account.drain(now, part)
                if account.is_idle and account.reported_running == 0:
                    del self._accounts[name]
                    continue
                if account.added.is_nothing and account.running == account.reported_running and self._ledger:
                    continue
                level = None if self._ledger else Use(account.level.requests, account.level.tokens)
                self._batch[name] = Report(account.limits, account.added, account.running, level)
                account.added = Use()
                account.reported_running = account.running
        return self._serial, self._batch

    def learn(self, reply: Reply) -> None:
        """What the ledger answered to the batch."""
        now = self._clock()
        self._batch, self._asked = None, now
        if self._ledger is not None and reply.ledger != self._ledger:
            # It has forgotten what was used: the next batch tells it, and until then what is known counts.
            self._ledger = None
            return
        self._ledger = reply.ledger
        if reply.is_whole:
            for account in self._accounts.values():
                account.running_elsewhere = 0
        for name, standing in reply.standings.items():
            account = self._accounts.get(name)
            if account is None:
                account = self._accounts[name] = _Account(standing.limits, now)
            account.at = now
            account.level = Use(
                max(0.0, standing.level.requests + account.added.requests),
                max(0.0, standing.level.tokens + account.added.tokens),
            )
            account.running_elsewhere = standing.running

    def _part(self, now: float) -> float:
        """The part of every limit that this replica may use: all of it, on what it knows of the others, or its own."""
        return 1 / self._replicas if now - self._asked > ALONE_AFTER_S else 1.0

    def _refusal(self, account: _Account, tokens: int, part: float) -> ApiError | None:
        limits, level = account.limits, account.level
        if limits.max_concurrent is not None:
            running = account.running + (account.running_elsewhere if part == 1 else 0)
            if running + 1 > _least_one(limits.max_concurrent * part):
                message = f"This key may have {limits.max_concurrent} requests at a time, and has {running}"
                return too_many(message, RATE_LIMIT_EXCEEDED, 1.0, self.headers(account))
        limit = limits.requests_per_minute
        if limit is not None and level.requests + 1 > _least_one(limit * part):
            over = level.requests + 1 - _least_one(limit * part)
            return self._too_many(account, "requests", limit, over / (limit * part))
        limit = limits.tokens_per_minute
        if limit is not None and tokens > limit:
            # Waiting does not help; OpenAI's clients then leave off.
            message = f"The request is too large: about {tokens} tokens, and this key may use {limit} a minute"
            return ApiError(429, message, RATE_LIMIT_EXCEEDED, headers={"x-should-retry": "false"})
        if limit is not None and level.tokens + tokens > max(limit * part, tokens):
            over = level.tokens + tokens - max(limit * part, tokens)
            return self._too_many(account, "tokens", limit, over / (limit * part))
        return None

    def _too_many(self, account: _Account, what: str, limit: int, minutes: float) -> ApiError:
        message = f"This key may use {limit} {what} a minute, and has used them"
        return too_many(message, RATE_LIMIT_EXCEEDED, minutes * _MINUTE_S, self.headers(account))


def _least_one(limit: float) -> float:
    """A part of a limit on requests is at least one, or a key would be locked out."""
    return max(1.0, limit)


def duration(seconds: float) -> str:
    """Seconds as OpenAI's headers have them: ``250ms``, ``1.5s``, ``6m0s``."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(seconds, _MINUTE_S)
    return f"{minutes:.0f}m{rest:.0f}s" if minutes else f"{rest:.1f}s".replace(".0s", "s")
