"""The process behind the tab Metrics (see tab.py): serves until its standard input ends, with the program that started
it.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading

import uvicorn

from tuning.compare.jobs import JobsShelf
from tuning.compare.reader import Comparer
from tuning.compare.server import FRESH_S, make_app
from tuning.compare.source import open_shelf

NICE = 15
"""Trials that train on the same cores go first: a page can wait."""


def main() -> None:
    """Read one line of JSON (a listening socket's descriptor, the secret, a folder or a dashboard), then serve."""
    os.nice(NICE)
    task = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_input, daemon=True).start()
    shelf = JobsShelf(task["dashboard"]) if task["folder"] is None else open_shelf(task["folder"])
    comparer = Comparer([shelf], fresh_s=FRESH_S)
    app = make_app(comparer.document, secret=task["secret"])
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", timeout_graceful_shutdown=1))
    with socket.socket(fileno=task["fd"]) as listener:
        server.run(sockets=[listener])


def _end_with_input() -> None:
    sys.stdin.read()
    os._exit(0)  # nothing here needs clearing up, and the program that wanted it is gone


if __name__ == "__main__":
    main()
