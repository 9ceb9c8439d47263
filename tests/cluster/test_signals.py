"""SIGTERM as Ctrl-C, once."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

PROGRAM = """
import signal
from cluster.signals import handle_sigterm

handle_sigterm()
try:
    signal.raise_signal(signal.SIGTERM)
except KeyboardInterrupt:
    signal.raise_signal(signal.SIGTERM)  # while it clears up
    print("cleared")
    raise
"""

SHUTDOWN = """
import signal
from cluster.signals import handle_sigterm, uninterrupted

handle_sigterm()
with uninterrupted():
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.raise_signal(number)
    print("cleared")
signal.raise_signal(signal.SIGINT)
"""


def test_a_shutdown_is_not_interrupted() -> None:
    done = subprocess.run([sys.executable, "-c", SHUTDOWN], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGINT, "cleared\n")


def test_the_first_sigterm_interrupts_and_the_second_is_ignored() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGINT, "cleared\n")


ASYNC = """
import asyncio, os, signal, sys, time
from cluster.signals import handle_sigterm, run_async

async def busy():
    while True:
        time.sleep(0.02)
        await asyncio.sleep(0)

async def work():
    task = asyncio.create_task(busy())
    print("runs", flush=True)
    try:
        await asyncio.sleep(1000)
    finally:
        if "timeout" in sys.argv:  # it sends two
            os.kill(os.getpid(), signal.SIGTERM)
        print("cleared", flush=True)

handle_sigterm()
if "background" in sys.argv:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
try:
    run_async(work())
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.parametrize(("number", "end"), [(signal.SIGINT, ""), (signal.SIGTERM, "timeout")])
def test_in_a_loop_it_is_the_task_that_is_told_whichever_runs(number: signal.Signals, end: str) -> None:
    """Nearly all the time another one runs."""
    with subprocess.Popen(
        [sys.executable, "-c", ASYNC, end], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "runs\n"
        process.send_signal(number)
        said = process.communicate(timeout=60)
    assert said == ("cleared\ninterrupted\n", "")


def test_in_a_loop_where_ctrl_c_is_ignored_sigterm_still_ends_it() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", ASYNC, "background"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "runs\n"
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
    assert out.splitlines()[-1].startswith("interrupted")


HANGUP = """
import signal, sys
from cluster.signals import handle_hangup, handle_sigterm

if "nohup" in sys.argv:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
handle_sigterm()
handle_hangup()
try:
    signal.raise_signal(signal.SIGHUP)
    print("goes on")
except KeyboardInterrupt:
    for number in (signal.SIGHUP, signal.SIGTERM):
        signal.raise_signal(number)
    print("cleared")
"""


@pytest.mark.parametrize(("argument", "said"), [("", "cleared\n"), ("nohup", "goes on\n")])
def test_a_terminal_that_closes_interrupts_unless_nohup_says_otherwise(argument: str, said: str) -> None:
    done = subprocess.run([sys.executable, "-c", HANGUP, argument], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, said)
