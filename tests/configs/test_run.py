"""The shipped configurations that a machine without a GPU can run, run as a user does: the demo, and the search."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).parents[2]


def run(*arguments: str | Path, temporary: Path) -> dict[str, Any]:
    """Run a command to its end; returns its JSON. Fails if a process or a temporary folder of it is left."""
    temporary.mkdir()
    before = {process.pid for process in psutil.process_iter()}
    done = subprocess.run(
        [sys.executable, "-m", "loraloom", *map(str, arguments), "--json"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        # Short, since Ray keeps its sockets below it; of its own, to see what is left in it.
        env={**os.environ, "TMPDIR": str(temporary)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    left = [process for process in psutil.process_iter() if process.pid not in before and _is_ours(process)]
    assert left == []
    return json.loads(done.stdout.splitlines()[-1])


def _is_ours(process: psutil.Process) -> bool:
    try:
        words = " ".join(process.cmdline())
    except psutil.Error:
        return False
    return any(word in words for word in ("ray::", "raylet", "gcs_server", "VLLM::", "haproxy"))


@pytest.mark.ray
@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_demo_shows_what_it_promises(tmp_path: Path) -> None:
    temporary = Path("/tmp") / f"lld-{os.getpid()}"
    try:
        outcome = run("demo", "--dir", tmp_path / "demo", temporary=temporary)
        assert [path.name for path in temporary.iterdir() if path.name.startswith(("loom-", "loraloom"))] == []
    finally:
        subprocess.run(["rm", "-rf", str(temporary)], check=True)
    assert outcome["trials"] >= 8
    assert outcome["base"]["exact_match"] < 0.1
    assert outcome["adapters"]["support"]["exact_match"] > 0.8
    # The first and the last of the leaderboard: the ranking means something.
    assert outcome["adapters"]["support-last"]["exact_match"] < outcome["adapters"]["support"]["exact_match"] - 0.4
    assert (tmp_path / "demo" / "sweep" / "leaderboard.csv").is_file()
    assert (tmp_path / "demo" / "registry" / "support" / "1" / "manifest.json").is_file()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_search_finds_an_adapter_and_stops_the_losers(tmp_path: Path) -> None:
    temporary = Path("/tmp") / f"lls-{os.getpid()}"
    try:
        done = run("sweep", "configs/sweep/search.yaml", "--dir", tmp_path / "search", temporary=temporary)
    finally:
        subprocess.run(["rm", "-rf", str(temporary)], check=True)
    assert done["state"] == "finished"
    states = [row["state"] for row in done["leaderboard"]]
    assert len(states) == 12
    assert "stopped" in states
    assert done["leaderboard"][0]["eval_loss"] < 0.5
