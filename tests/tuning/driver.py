"""`loraloom sweep` as a process of its own, to be killed; and whether its results are those of another."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import pytest
import yaml

from tests.waiting import wait_until
from tuning.results import Sweep, leaderboard

SESSION_ENDS_S = 15
"""Seconds in which everything that a killed driver has started must have ended."""


class Driver(subprocess.Popen[str]):
    """Prints into files: a pipe that nobody reads would stop it after 64 KiB."""

    def __init__(self, command: list[str], **options: Any) -> None:
        self._out, self._err = (tempfile.TemporaryFile("w+") for _ in range(2))  # noqa: SIM115 - closed on exit
        super().__init__(command, stdout=self._out, stderr=self._err, text=True, **options)

    def communicate(self, input: str | None = None, timeout: float | None = None) -> tuple[str, str]:  # noqa: A002
        """Wait for its end; what it has printed."""
        assert input is None
        self.wait(timeout)
        for file in (self._out, self._err):
            file.seek(0)
        return self._out.read(), self._err.read()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, traceback)
        self._out.close()
        self._err.close()


def start_sweep(document: dict[str, Any] | None, folder: Path, **variables: str) -> Driver:
    """`loraloom sweep` in a process group of its own; without a document `--resume`."""
    command = [sys.executable, "-m", "loraloom", "sweep", "--json"]
    if document is None:
        command += ["--resume", str(folder)]
    else:
        config = folder.with_suffix(".yaml")
        config.write_text(yaml.safe_dump(document, sort_keys=False))
        command += [str(config), "--dir", str(folder)]
    return Driver(command, start_new_session=True, env={**os.environ, **variables})


def finish(driver: Driver, timeout_s: float = 120) -> tuple[int, str, str]:
    """Wait for its end: the exit code, and what it has printed."""
    with driver:
        try:
            out, err = driver.communicate(timeout=timeout_s)
        finally:
            driver.kill()
    return driver.returncode, out, err


def kill_driver(driver: Driver, when: Callable[[], Any]) -> None:
    """Kill -9 once ``when`` is true; then everything that it has started ends by itself."""
    with driver:
        try:
            wait_until(when, driver)
            mine = psutil.Process(driver.pid).children(recursive=True)
        finally:
            driver.kill()
        assert len(mine) > 5
        _, alive = psutil.wait_procs(mine, timeout=SESSION_ENDS_S)
        assert alive == []


def assert_same(one: Sweep, other: Sweep, *, rel: float = 1e-4) -> None:
    """The same trials in the same order with the same numbers, up to the speed."""
    for row, expected in zip(leaderboard(one), leaderboard(other), strict=True):
        for column in expected.keys() - {"tokens_per_second"}:
            value = expected[column]
            assert row[column] == (pytest.approx(value, rel=rel) if isinstance(value, float) else value), column
