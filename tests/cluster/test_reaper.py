"""The process that clears up after a program that was killed; with a real Ray it is tested in test_connect.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil

from cluster.reaper import SESSION_VARIABLE, session_processes
from tests.waiting import wait_until

DIES = """
import os, sys
from pathlib import Path
from cluster.reaper import reaper

with reaper("none", Path(sys.argv[1])):
    os._exit(0)
"""
HAS_CHILDREN = """
import os, subprocess, sys

child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
subprocess.run([sys.executable, "-c", child], env={"PATH": os.environ["PATH"]})
"""


def test_a_folder_of_the_user_s_with_the_package_s_name_is_not_taken_for_it(tmp_path: Path) -> None:
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "__init__.py").write_text("raise SystemExit('not this one')")
    folder = tmp_path / "ray"
    folder.mkdir()
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-P", "-c", DIES, str(folder)], cwd=tmp_path, env=env, check=True)
    wait_until(lambda: not folder.exists(), timeout_s=20)


def test_processes_of_a_session_are_found_at_any_depth_and_no_others() -> None:
    session = f"test-{os.getpid()}"
    env = {**os.environ, SESSION_VARIABLE: session}
    with subprocess.Popen([sys.executable, "-c", HAS_CHILDREN], env=env, stdin=subprocess.PIPE) as process:
        try:
            root = psutil.Process(process.pid)
            wait_until(lambda: len(root.children(recursive=True)) == 2, timeout_s=20)
            assert session_processes(session) == {root, *root.children(recursive=True)}
        finally:
            process.communicate(b"\n")
    assert session_processes(session) == set()
