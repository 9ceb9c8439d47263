"""Ends what a program has started in Ray when that program is killed: a process of its own, which waits for that.

Ray's processes watch for their driver too, but some wait a minute for others of them that have gone already, and
nobody removes Ray's folder. Needs psutil only, so that it starts at once.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Generator
from pathlib import Path

import psutil

# Set in the environment of a Ray that is started here, so that each of its processes can be told from all others,
# also one whose parent is gone.
SESSION_VARIABLE = "LORALOOM_SESSION"
_GRACE_S = 1.0
_ROUNDS = 5
_LOOK_EVERY_S = 2.0
_WELL = b"."


@contextlib.contextmanager
def reaper(session: str, folder: Path | None) -> Generator[None]:
    """Should this process die in the block, end all processes of ``session`` and remove ``folder``."""
    here = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    # In a session of its own: what kills this process's group must not take it along.
    with subprocess.Popen(
        # -P: a folder `cluster` where the user happens to be is not this package.
        [sys.executable, "-P", "-c", "from cluster.reaper import main; main()", session, str(folder or "")],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": path},
        start_new_session=True,
    ) as process:
        try:
            yield
        finally:
            with contextlib.suppress(BrokenPipeError):
                process.communicate(_WELL)


def main() -> None:
    """Wait for the end of the pipe from the program; nothing else closes it than a word from it, or its death."""
    session, folder = sys.argv[1:]
    # Remembered while their parents live: some overwrite their environment with their title, and so lose the variable.
    known: set[psutil.Process] = set()
    while not select.select([sys.stdin], [], [], _LOOK_EVERY_S)[0]:
        known = {process for process in known | session_processes(session) if process.is_running()}
    if os.read(sys.stdin.fileno(), 1) == _WELL:
        return
    for _ in range(_ROUNDS):  # those that end may have been starting others
        known |= session_processes(session)
        known = end_processes(known)
        if not known:
            break
    if folder:
        shutil.rmtree(folder, ignore_errors=True)


def session_processes(session: str) -> set[psutil.Process]:
    """The living processes that the Ray of ``session`` has started, at any depth.

    They inherit its variable; their children are counted too, for some overwrite their environment with their title.
    """
    children: defaultdict[int, list[psutil.Process]] = defaultdict(list)
    waiting: list[psutil.Process] = []
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        with contextlib.suppress(psutil.Error, OSError):
            children[process.ppid()].append(process)
            if process.environ().get(SESSION_VARIABLE) == session:
                waiting.append(process)
    found: set[psutil.Process] = set()
    while waiting:
        process = waiting.pop()
        if process not in found:
            found.add(process)
            waiting += children[process.pid]
    return found


def end_child(process: subprocess.Popen[bytes], patience_s: float) -> None:
    """Terminate a process of ours, and kill it where it takes longer; waits until it has ended."""
    process.terminate()
    try:
        process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def end_processes(processes: set[psutil.Process]) -> set[psutil.Process]:
    """Wait a moment for processes that are about to end; terminate, then kill, those that do not. Returns those that
    are still there.
    """
    _, alive = psutil.wait_procs(processes, timeout=_GRACE_S)
    for end in (psutil.Process.terminate, psutil.Process.kill):
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                end(process)
        _, alive = psutil.wait_procs(alive, timeout=_GRACE_S)
    return set(alive)
