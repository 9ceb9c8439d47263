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
