"""`loraloom sweep` as a process of its own, to be killed; and whether its results are those of another."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.waiting import wait_until
from tuning.results import Sweep, leaderboard

SESSION_ENDS_S = 15
"""Seconds in which everything that a killed driver has started must have ended."""


def start_sweep(document: dict[str, Any] | None, folder: Path, **variables: str) -> subprocess.Popen[str]:
    """`loraloom sweep` in a process group of its own; without a document `--resume`."""
    command = [sys.executable, "-m", "loraloom", "sweep", "--json"]
    if document is None:
        command += ["--resume", str(folder)]
    else:
        config = folder.with_suffix(".yaml")
        config.write_text(yaml.safe_dump(document, sort_keys=False))
        command += [str(config), "--dir", str(folder)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, **variables},
    )


def finish(driver: subprocess.Popen[str], timeout_s: float = 120) -> tuple[int, str, str]:
    """Wait for its end: the exit code, and what it has printed."""
    with driver:
        try:
            out, err = driver.communicate(timeout=timeout_s)
        finally:
            driver.kill()
    return driver.returncode, out, err


def kill_driver(driver: subprocess.Popen[str], when: Callable[[], Any]) -> None:
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
