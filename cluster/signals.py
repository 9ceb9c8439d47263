"""SIGTERM, which SLURM, Kubernetes and ``timeout`` send, ends a program as Ctrl-C does: with everything cleaned up."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Generator


def handle_sigterm() -> None:
    """Have the first SIGTERM raise KeyboardInterrupt in the main thread, and ignore those after it: ``timeout`` sends
    two, and the second must not cut the clearing up short.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)


def ignore_sigterm() -> None:
    """Let SIGTERM do nothing until somebody sets a handler again."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextlib.contextmanager
def uninterrupted() -> Generator[None]:
    """Let a second Ctrl-C or SIGTERM wait until the block is done: an interrupted shutdown would leave processes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    ignore_sigterm()
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupt(_number: int, _frame: object) -> None:
    ignore_sigterm()
    raise KeyboardInterrupt
