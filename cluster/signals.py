"""SIGTERM, which SLURM, Kubernetes and ``timeout`` send, ends a program as Ctrl-C does: with everything cleaned up."""

from __future__ import annotations

import signal
import threading


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


def _interrupt(_number: int, _frame: object) -> None:
    ignore_sigterm()
    raise KeyboardInterrupt
