"""The ledger: one small actor that adds up what all replicas have let their keys use; see ``serving.access.limits``."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError

from serving.access.key_file import KeyLimits
from serving.access.limits import Limiter, Reply, Report, Standing, Use

EXCHANGE_S = 0.25
_TIMEOUT_S = 1.0
_SILENT_AFTER_S = 5.0
_FORGET_REPLICA_S = 600.0

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Entry:
    """One key, over all replicas."""

    limits: KeyLimits
    at: float
    changed: int = 0
    """Number of the change that was its last."""
    level: Use = field(default_factory=Use)
    running: dict[str, int] = field(default_factory=dict[str, int])
    """Replica -> its requests at a time; without zeros."""

    def drain(self, now: float) -> None:
        self.level.drain(self.limits, now - self.at)
        self.at = now


@dataclass(slots=True)
class _Replica:
    heard: float
    serial: int = 0
    """The last batch that was added: one that comes again, because its answer was lost, is not added again."""
    knows: int = 0
    """Number of the last change that it was told of."""


class Book:
    """What the actor does, without Ray."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._id = uuid.uuid4().hex
        self._entries: dict[str, _Entry] = {}
        self._replicas: dict[str, _Replica] = {}
        self._changes = 0

    def exchange(self, replica: str, serial: int, reports: dict[str, Report]) -> Reply:
        """Add a batch of a replica, and tell it what has changed since it last asked, its own use included."""
        now = self._clock()
        self._forget(now)
        record = self._replicas.get(replica)
        is_whole = record is None or now - record.heard > _SILENT_AFTER_S
        if record is None:
            record = self._replicas[replica] = _Replica(now)
        record.heard = now
        if serial != record.serial:
            record.serial = serial
            for name, report in reports.items():
                self._add(name, replica, report, now)
        knows, record.knows = (0 if is_whole else record.knows), self._changes
        return Reply(self._id, is_whole, self._standings(replica, knows, now))

    def _add(self, name: str, replica: str, report: Report, now: float) -> None:
        entry = self._entries.get(name)
        if entry is None:
            entry = self._entries[name] = _Entry(report.limits, now)
        entry.drain(now)
        entry.limits = report.limits
        requests = entry.level.requests + report.added.requests
        tokens = entry.level.tokens + report.added.tokens
        if report.level is not None:
            # Its level holds what it added, and what others did that have told it: the larger is nearer the truth.
            requests, tokens = max(requests, report.level.requests), max(tokens, report.level.tokens)
        entry.level = Use(max(0.0, requests), max(0.0, tokens))
        if report.running:
            entry.running[replica] = report.running
        else:
            entry.running.pop(replica, None)
        self._touch(entry)

    def _standings(self, replica: str, knows: int, now: float) -> dict[str, Standing]:
        told: dict[str, Standing] = {}
        for name, entry in self._entries.items():
            if entry.changed > knows:
                entry.drain(now)
                elsewhere = sum(running for other, running in entry.running.items() if other != replica)
                told[name] = Standing(entry.limits, Use(entry.level.requests, entry.level.tokens), elsewhere)
        return told

    def _forget(self, now: float) -> None:
        """Let go of the requests of replicas that are silent, and of keys that are idle and of which all were told."""
        silent = {name for name, record in self._replicas.items() if now - record.heard > _SILENT_AFTER_S}
        told = min((record.knows for name, record in self._replicas.items() if name not in silent), default=0)
        for name, entry in list(self._entries.items()):
            for replica in silent & entry.running.keys():
                del entry.running[replica]
                self._touch(entry)
            entry.drain(now)
            if not entry.running and entry.level.is_nothing and entry.changed <= told:
                del self._entries[name]
        for name in silent:
            if now - self._replicas[name].heard > _FORGET_REPLICA_S:
                del self._replicas[name]

    def _touch(self, entry: _Entry) -> None:
        self._changes += 1
        entry.changed = self._changes


class Ledger:
    """The actor's class: ``Book`` as messages."""

    def __init__(self) -> None:
        self._book = Book()

    def exchange(self, replica: str, serial: int, reports: dict[str, Report]) -> Reply:
        """See ``Book.exchange``."""
        return self._book.exchange(replica, serial, reports)


def find_ledger(name: str) -> Any:
    """A handle of the ledger ``name`` of this Ray namespace, which is made where there is none.

    Ray ends it with the replica that made it, and starts it again where it dies by itself; the replicas that are left
    then make another, and tell it what they know to have been used.
    """
    actor: Any = ray.remote(num_cpus=0, max_restarts=-1)(Ledger)
    return actor.options(name=name, get_if_exists=True).remote()


async def share(limiter: Limiter, replica: str, find: Callable[[], Any], interval_s: float = EXCHANGE_S) -> None:
    """Exchange use with the ledger for ever; to be cancelled at the end.

    Args:
        limiter: This replica's.
        replica: A name that no other replica has, in this life or another: the ledger knows batches by it.
        find: Returns the ledger's handle, such as a partial of ``find_ledger``; called in a thread, and again when the
            ledger does not answer.
        interval_s: Pause between two exchanges.
    """
    handle: Any = None
    while True:
        try:
            if handle is None:
                handle = await asyncio.to_thread(find)
            serial, batch = limiter.take()
            limiter.learn(await asyncio.wait_for(handle.exchange.remote(replica, serial, batch), _TIMEOUT_S))
        except TimeoutError:
            # It may be starting still, or the machine be busy. Without its handle Ray would end it, and start another.
            _log.warning("the ledger of limits does not answer within %g s", _TIMEOUT_S)
        except (RayError, ValueError) as error:  # ValueError: Ray's, for an actor that is not there
            if handle is not None:
                _log.warning("the ledger of limits is lost (%s)", type(error).__name__)
            handle = None
        await asyncio.sleep(interval_s)
