"""The shipped configurations that a machine without a GPU can run, run as a user does: the demo, and the search."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from serving.registry import Registry

ROOT = Path(__file__).parents[2]


def run(*arguments: str | Path, temporary: Path) -> dict[str, Any]:
    """Run a command to its end; returns its JSON. Fails if a process or a temporary folder of it is left."""
    out, left = run_watched(
        [sys.executable, "-m", "loraloom", *map(str, arguments), "--json"], temporary=temporary, cwd=ROOT
    )
    assert left == []
    return json.loads(out.splitlines()[-1])


def run_watched(command: list[str], temporary: Path, **options: Any) -> tuple[str, list[psutil.Process]]:
    """Run a command with ``temporary`` as its folder for temporary files, which is made; returns its standard output,
    and which processes of its Ray it has left. Those of another Ray on this machine are none of its.
    """
    temporary.mkdir()
    # Short, since Ray keeps its sockets below it; of its own, to see what is left in it, and who inherited it.
    env = {**os.environ, "TMPDIR": str(temporary)}
    mine: set[psutil.Process] = set()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, **options
    ) as process:
        while True:
            # Looked for while their parents live: Ray's workers overwrite their environment with their title.
            mine |= _descendants(process.pid)
            try:
                out, err = process.communicate(timeout=1)
                break
            except subprocess.TimeoutExpired:
                continue
    assert process.returncode == 0, out + err
    assert "Traceback" not in err
    mine |= {one for one in psutil.process_iter() if _temporary_of(one) == str(temporary)}
    return out, [one for one in mine if _is_ray(one)]


def _descendants(pid: int) -> set[psutil.Process]:
    try:
        return set(psutil.Process(pid).children(recursive=True))
    except psutil.Error:
        return set()


def _temporary_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get("TMPDIR")
    except (psutil.Error, OSError):
        return None


def _is_ray(process: psutil.Process) -> bool:
    try:
        words = " ".join(process.cmdline()) if process.is_running() else ""
    except psutil.Error:
        return False
    return any(word in words for word in ("ray::", "raylet", "gcs_server", "VLLM::", "haproxy"))


RAYLET = "import pathlib, sys, time; pathlib.Path(sys.argv[2]).touch(); time.sleep(100)"
LEAVES_ONE = """
import pathlib, subprocess, sys, time
raylet, other, mine = sys.argv[1:]
while not pathlib.Path(other).exists():
    time.sleep(0.05)
subprocess.Popen([sys.executable, "-c", raylet, "raylet", mine], start_new_session=True, stdout=-3, stderr=-3)
while not pathlib.Path(mine).exists():
    time.sleep(0.05)
"""


def test_what_a_command_leaves_is_found_and_what_others_run_is_not_taken_for_it(tmp_path: Path) -> None:
    def start_other() -> subprocess.Popen[bytes]:
        """When the command runs already, so that not only the order tells them apart."""
        while not (tmp_path / "t").exists():
            time.sleep(0.01)
        return subprocess.Popen([sys.executable, "-c", RAYLET, "raylet", tmp_path / "other"])

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(start_other)
        command = [sys.executable, "-c", LEAVES_ONE, RAYLET, str(tmp_path / "other"), str(tmp_path / "mine")]
        left: list[psutil.Process] = []
        try:
            _, left = run_watched(command, tmp_path / "t")
            assert [process.cmdline()[-1] for process in left] == [str(tmp_path / "mine")]
        finally:
            for process in (*left, other.result()):
                process.kill()
                process.wait()


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
    assert Registry(tmp_path / "demo" / "registry").versions("support") == [1]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.full
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
