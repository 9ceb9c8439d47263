"""Waiting for what other processes do."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")
POLL_S = 0.05


def wait_until(condition: Callable[[], T], process: subprocess.Popen[str] | None = None, timeout_s: float = 100) -> T:
    """What ``condition`` returns once that is true; fails after ``timeout_s``, or where ``process`` ends before."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(POLL_S)
    return found


async def until(condition: Callable[[], Awaitable[bool]], timeout_s: float) -> None:
    """The same in a loop of asyncio."""
    deadline = time.monotonic() + timeout_s
    while not await condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(POLL_S)
