"""SIGTERM as Ctrl-C, once."""

from __future__ import annotations

import signal
import subprocess
import sys

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
