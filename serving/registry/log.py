"""The log of a registry: one object for each event, added at one stroke, read in order.

    registry/
      _log/000000000001.json   the first event; its number is its name
      _log/000000000002.json
      support/0f…/             the files of a version, put there before the event that names them

**Contract.** An event exists once ``_log/N.json`` exists, which only one writer can bring about; whoever comes second
reads the first one's event, judges anew, and takes the next number. So every writer's decision rests on all events
before its own, without a lock that a dead process could keep (as Delta Lake commits: Armbrust et al., VLDB 2020, sec.
3.2). A crash before that leaves files that no event names: nobody sees them, and ``Registry.sweep`` removes them when
they are old.
"""

from __future__ import annotations

import contextlib
import getpass
import re
import secrets
import socket
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TypeVar

from pydantic import ValidationError

from serving.registry import legacy
from serving.registry.errors import CorruptRegistryError, RegistryUnreachableError
from serving.registry.events import EVENT, Adopted, Event, Stamp, State, fold
from serving.registry.store import LocalStore, Store

FOLDER = "_log"
_KEY = re.compile(FOLDER + r"/([0-9]{12})\.json")
AnyEvent = TypeVar("AnyEvent", bound=Event)


class EventLog:
    """The events below ``store``, and the state that they add up to. Threads may share it.

    ``state`` is replaced, never changed, so that readers need no lock and do not wait for the store.

    Args:
        store: Where the events are.
        reads_first: The first question reads the log. Otherwise only ``refresh`` does, and nothing is there before.
    """

    def __init__(self, store: Store, *, reads_first: bool = True) -> None:
        self.store = store
        self._state = State()
        self._is_read = False
        self._reads_first = reads_first
        self._reading = threading.Lock()

    @property
    def known(self) -> State:
        """As of the last refresh, if there was one."""
        return self._state

    @property
    def state(self) -> State:
        """As of the last refresh; the first time, the log is read.

        Raises:
            RegistryUnreachableError: it was never read, and the store does not answer.
        """
        if self._reads_first and not self._is_read:
            self.refresh()
        return self._state

    def refresh(self) -> bool:
        """Read what has been added; one request that finds nothing where there is nothing. True if there was something.

        Raises:
            RegistryUnreachableError: the store does not answer; ``state`` stays what it was.
        """
        with self._reading:
            if not self._is_read:
                self._state = self._open()
                self._is_read = True
                return True
            found = False
            while (content := self.store.read(_key(self._state.seq + 1))) is not None:
                self._state = _after(self._state, [content])
                found = True
            return found

    def append(self, by: str | None, note: str | None, decide: Callable[[State, Stamp], AnyEvent]) -> AnyEvent:
        """Add the event that ``decide`` makes of the newest state; called again for each writer that was faster.

        Raises:
            CorruptRegistryError: the log is damaged.
            CorruptAdapterError: see ``serving.registry.legacy``.
            RegistryUnreachableError: the store does not answer. If that happened in the last step, the event may be
                there: read again before doing it again.
            MachineError: the store cannot be written.
        """
        by = by or whoami()
        while True:
            self.refresh()
            state = self.state
            if state.damage:
                raise CorruptRegistryError(
                    f"{self.store.where} is not written to while its log is damaged: {'; '.join(state.damage)}"
                )
            if state.seq == 0 and state.shelves:
                self._adopt(state)
                continue
            event = decide(state, _stamp(state.seq + 1, by, note))
            if self._create(event):
                return event

    def _adopt(self, state: State) -> None:
        """Make the versions of a registry without a log its first event; another writer may do it instead."""
        manifests = [entry.manifest for shelf in state.shelves.values() for entry in shelf.entries.values()]
        self._create(Adopted(**_stamp(1, whoami(), None)._asdict(), manifests=tuple(manifests)))

    def _create(self, event: Event) -> bool:
        key, content = _key(event.seq), EVENT.dump_json(event)
        # A store whose answer was lost is asked again by the client, and then finds the event that it has just written.
        if not self.store.create(key, content) and self.store.read(key) != content:
            return False
        # It has happened. A store that does not answer now is not told of, or it would be done again.
        with contextlib.suppress(RegistryUnreachableError):
            self.refresh()
        return True

    def _open(self) -> State:
        """Read the whole log."""
        numbers = [int(match[1]) for stored in self.store.keys(FOLDER) if (match := _KEY.fullmatch(stored.key))]
        last = max(numbers, default=0)
        if last == 0 and isinstance(self.store, LocalStore):
            return legacy.read(self.store.folder)
        # Every number is asked for, listed or not: a listing that runs while events are added may leave some out.
        return _after(State(), self.store.read_many([_key(number) for number in range(1, last + 1)]))


def _after(state: State, contents: list[bytes | None]) -> State:
    """The state after the next events; those that cannot be read are damage."""
    if state.seq == 0:  # of a registry without a log, the first event says all that was found there before
        state = State()
    events: list[Event] = []
    damage: list[str] = []
    for seq, content in enumerate(contents, state.seq + 1):
        try:
            if content is None:
                damage.append(f"{_key(seq)} is missing")
                continue
            event = EVENT.validate_json(content)
            if event.seq == seq:
                events.append(event)
            else:
                damage.append(f"{_key(seq)} says that it is event {event.seq}")
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            damage.append(f"{_key(seq)} cannot be read ({place}{': ' if place else ''}{first['msg']})")
    return fold(state, events, state.seq + len(contents), damage)


def whoami() -> str:
    """Who runs this process: user@host."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        user = "unknown"
    return f"{user}@{socket.gethostname()}"


def _key(seq: int) -> str:
    return f"{FOLDER}/{seq:012}.json"


def _stamp(seq: int, by: str, note: str | None) -> Stamp:
    return Stamp(seq=seq, id=secrets.token_hex(8), at=datetime.now(UTC), by=by, note=note)
