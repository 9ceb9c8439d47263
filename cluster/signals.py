"""SIGTERM, which SLURM, Kubernetes and ``timeout`` send, ends a program as Ctrl-C does: with everything cleaned up.

So does SIGHUP, which a terminal sends that is closed, where a program asks for that.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Coroutine, Generator
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")


def handle_sigterm() -> None:
    """Have the first SIGTERM raise KeyboardInterrupt in the main thread, and ignore those after it: ``timeout`` sends
    two, and the second must not cut the clearing up short.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)


def handle_hangup() -> None:
    """Have SIGHUP do as SIGTERM does. Where it is ignored, as ``nohup`` has it, or does something else, it stays so."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        signal.signal(signal.SIGHUP, _interrupt)


def ignore_sigterm() -> None:
    """Let SIGTERM, and SIGHUP where it does the same, do nothing until somebody sets a handler again."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if signal.getsignal(signal.SIGHUP) is _interrupt:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)


@contextlib.contextmanager
def uninterrupted() -> Generator[None]:
    """Let a second Ctrl-C do nothing in the block, and SIGTERM nothing from here on, as after the first one: an
    interrupted shutdown would leave processes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    ignore_sigterm()
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """``asyncio.run``, with SIGTERM as Ctrl-C is there: the task is cancelled, and then comes KeyboardInterrupt.

    Raised by the handler it would end whatever task runs at that moment, and asyncio would print that task's traceback.

    Raises:
        KeyboardInterrupt: it was told to end.
    """
    import asyncio  # not for every command

    if signal.getsignal(signal.SIGTERM) is not _interrupt:
        return asyncio.run(work)

    def interrupt(number: int, frame: FrameType | None) -> None:
        of_the_loop = signal.getsignal(signal.SIGINT)
        if not callable(of_the_loop):  # Ctrl-C is ignored, as a shell has it for what it starts in the background
            _interrupt(number, frame)
            return
        ignore_sigterm()
        of_the_loop(signal.SIGINT, frame)

    signal.signal(signal.SIGTERM, interrupt)
    try:
        return asyncio.run(work)
    finally:
        if signal.getsignal(signal.SIGTERM) is interrupt:
            signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(_number: int, _frame: object) -> None:
    ignore_sigterm()
    raise KeyboardInterrupt
