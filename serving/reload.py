"""SIGHUP: a running server reads its file again and replaces its replicas one after another, as nginx's workers are.

What cannot change without a new start is refused, and so is a file with faults: the server goes on as it was, and says
so.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Generator

from cluster.errors import ABSENT, Fault, InputError, LoraloomError
from serving.spec import ServeSpec

_FIXED = (
    "http.host",
    "http.port",
    "http.max_body_mib",
    "http.body_timeout_s",
    "base.served_name",
    "drain_s",
    "replicas",
    "cluster",
)
"""What HAProxy, Ray or the clients were told at the start. (``base.served_name`` is ``base.name``, or comes from
``base.model``: Ray Serve names the replicas' deployment after it.)"""


class Reload:
    """What a SIGHUP asks for.

    Args:
        spec: As the server runs.
        read: Reads the file again.
        restart: Replaces the replicas.
        rollout: Says how the replacement ended: "" if well, else why not; None while it is under way.
        tell: Called with a line for people.
    """

    def __init__(
        self,
        spec: ServeSpec,
        read: Callable[[], ServeSpec],
        restart: Callable[[ServeSpec], None],
        rollout: Callable[[], str | None],
        tell: Callable[[str], None],
    ) -> None:
        self._spec = spec
        self._before: ServeSpec | None = None
        """What to go back to if the replicas of ``spec`` do not start; None once they have."""
        self._read = read
        self._restart = restart
        self._rollout = rollout
        self._tell = tell
        self._is_wanted = threading.Event()

    def ask(self) -> None:
        """Do it at the next ``look``."""
        self._is_wanted.set()

    def look(self) -> None:
        """Do what was asked for, if anything was, and go back to what was before if that failed; to be called now and
        then by the main thread.
        """
        if self._before is not None:
            self._settle(self._before)
        if not self._is_wanted.is_set():
            return
        self._is_wanted.clear()
        try:
            spec = self._read()
            faults = fixed_faults(self._spec, spec)
            if faults:
                raise InputError(faults)
            self._restart(spec)
        except LoraloomError as error:
            self._tell(f"not reloaded, the server goes on as it was: {error}")
            return
        # Asked again while the replicas are being replaced: what has never run is nothing to go back to.
        self._before, self._spec = self._before or self._spec, spec
        self._tell("reloaded: the replicas are being replaced one after another")

    def _settle(self, before: ServeSpec) -> None:
        """Once the replacement has ended: keep to it, or go back to ``before``."""
        failure = self._rollout()
        if failure is None:
            return
        if not failure:
            self._before = None
            return
        self._tell(f"{failure}\ngoing back to what was served before")
        self._before, self._spec = None, before
        try:
            self._restart(before)
        except LoraloomError as error:
            self._tell(f"cannot go back: {error}")


@contextlib.contextmanager
def on_hangup(reload: Reload) -> Generator[None]:
    """Have SIGHUP ask for ``reload`` while the block runs."""
    before = signal.signal(signal.SIGHUP, lambda _number, _frame: reload.ask())
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL if before is None else before)


def fixed_faults(before: ServeSpec, after: ServeSpec) -> list[Fault]:
    """Fields that differ and that only a new start can change."""
    return [
        Fault(path, "needs a new start of the server to change", ABSENT)
        for path in _FIXED
        if _at(before, path) != _at(after, path)
    ]


def _at(spec: ServeSpec, path: str) -> object:
    value: object = spec
    for name in path.split("."):
        value = getattr(value, name)
    return value
