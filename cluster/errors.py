"""The exception tree, shared by every package.

Errors cross process borders (Ray pickles them), so each one keeps all its state in ``args``: an exception whose
``__init__`` takes other arguments than it hands to ``Exception.__init__`` fails when it is unpickled.
"""

from __future__ import annotations

from typing import NamedTuple


class LoraloomError(Exception):
    """Something that a user can act on: printed without a traceback; the command leaves with ``exit_code``."""

    exit_code = 1


class Fault(NamedTuple):
    """One broken rule of an input: where it is, what the rule says, and the value that was received."""

    where: str
    """File and field, such as ``demo.yaml: train.steps``; whatever leads the reader to the place."""
    rule: str
    value: object = None
    """The value received, or ``ABSENT`` where there was none."""

    def __str__(self) -> str:
        received = "" if self.value is ABSENT else f", got {_shorten(self.value)}"
        return f"{self.where}: {self.rule}{received}"


class _Absent:
    """The type of ``ABSENT``; a class with one instance, so that it survives pickling."""

    def __reduce__(self) -> str:
        return "ABSENT"

    def __repr__(self) -> str:
        return "ABSENT"


ABSENT = _Absent()


class InputError(LoraloomError):
    """Bad input: every fault that was found, not only the first. Nothing has been started or written."""

    exit_code = 2

    def __init__(self, faults: list[Fault]) -> None:
        super().__init__(faults)
        self.faults = faults

    def __str__(self) -> str:
        if len(self.faults) == 1:
            return str(self.faults[0])
        return f"{len(self.faults)} faults:\n" + "\n".join(f"  {fault}" for fault in self.faults)


class NotFoundError(LoraloomError):
    """A name that was asked for does not exist: an adapter, a version, a trial, a sweep folder."""

    exit_code = 3


class ConflictError(LoraloomError):
    """The request is well formed, but what is already there forbids it: a folder in use, a version with an alias."""

    exit_code = 4


class MachineError(LoraloomError):
    """The machine lacks something; the message says what, and the command that mends it."""

    exit_code = 5


def in_short(error: Exception, limit: int = 240) -> str:
    """An error in one line, which may come from afar."""
    lines = str(error).splitlines() or [""]
    text = f"{type(error).__name__}: {lines[0]}".removesuffix(": ")
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _shorten(value: object, limit: int = 200) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
