from __future__ import annotations

import json
import socket
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import MachineError, NotFoundError
from tests.ports import free_port
from tests.tuning.compare.make import make_sweep
from tuning.compare import jobs
from tuning.compare.jobs import MOST_SWEEPS, SWEEP_KEY, JobsShelf, ray_token, sweep_folders
from tuning.compare.reader import Comparer


def job(folder: Path | str | None, start: int) -> dict[str, Any]:
    return {"start_time": start, "metadata": None if folder is None else {"job_name": "x", SWEEP_KEY: str(folder)}}


def test_folders_of_jobs_newest_first_and_each_once() -> None:
    told = [job("/a", 1), job("/b", 3), job(None, 5), {"start_time": None, "metadata": {}}, job("/a", 4)]
    assert sweep_folders(told) == [Path("/a"), Path("/b")]


class Dashboard(HTTPServer):
    """Answers as Ray's does when it is asked for its jobs, by whom it may."""

    answer: bytes = b"[]"
    token: str = ""
    asked: int = 0


class Handler(BaseHTTPRequestHandler):
    server: Dashboard  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        self.server.asked += 1
        is_allowed = self.path == "/api/jobs/" and self.headers["Authorization"] == f"Bearer {self.server.token}"
        self.send_response(200 if is_allowed else 401)
        self.end_headers()
        self.wfile.write(self.server.answer)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - as http.server names it
        pass


@pytest.fixture
def dashboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[Dashboard]:
    monkeypatch.setattr(jobs, "ASK_EVERY_S", 0.0)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "token")
    server = Dashboard(("127.0.0.1", 0), Handler)
    server.token = "token"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_sweeps_are_found_as_they_begin(dashboard: Dashboard, tmp_path: Path) -> None:
    shelf = JobsShelf(f"127.0.0.1:{dashboard.server_port}")
    with pytest.raises(NotFoundError, match="No sweep has run in this Ray yet"):
        shelf.sources()
    folder = make_sweep(tmp_path / "made", 1)
    dashboard.answer = json.dumps([job(folder, 1), job(tmp_path / "gone", 2)]).encode()
    assert [source.place for source in shelf.sources()] == [str(folder)]


def test_what_is_left_out_is_told(dashboard: Dashboard, tmp_path: Path) -> None:
    shelf = JobsShelf(f"127.0.0.1:{dashboard.server_port}")
    gone = [job(tmp_path / f"gone-{index}", 1000 + index) for index in range(MOST_SWEEPS)]
    # A name that is too long stands for a folder that may not be looked at.
    dashboard.answer = json.dumps([*gone, job("/" + "x" * 300, 1)]).encode()
    with pytest.raises(NotFoundError, match=f"folders of {MOST_SWEEPS + 1} sweeps of this Ray cannot be seen"):
        shelf.sources()
    made = [make_sweep(tmp_path / str(index), 1) for index in range(MOST_SWEEPS + 2)]
    told = [job(folder, index) for index, folder in enumerate(made)]
    dashboard.answer = json.dumps([*told, *gone]).encode()
    document = Comparer([shelf]).document()
    assert {sweep.folder for sweep in document.sweeps} == {str(folder) for folder in made[2:]}
    assert [trouble.split(" sweeps")[0] for trouble in document.left_out] == [
        f"The folders of {MOST_SWEEPS}",
        f"Only the newest {MOST_SWEEPS}",
    ]


def test_sweeps_that_were_submitted_tell_their_folders_where_their_users_say_so(
    dashboard: Dashboard, tmp_path: Path
) -> None:
    shelf = JobsShelf(f"127.0.0.1:{dashboard.server_port}")
    submitted = {"type": "SUBMISSION", "start_time": 1, "metadata": None}
    commands = "loraloom sweep a.yaml", "python loraloom.py sweep a.yaml", "loraloom serve sweep.yaml"
    dashboard.answer = json.dumps([{**submitted, "entrypoint": command} for command in commands]).encode()
    with pytest.raises(NotFoundError, match="does not tell the folders of 2 sweeps"):
        shelf.sources()
    folder = make_sweep(tmp_path / "made", 1)
    told = {**submitted, "entrypoint": commands[0], "metadata": {SWEEP_KEY: str(folder)}}
    dashboard.answer = json.dumps([told]).encode()
    assert [source.place for source in shelf.sources()] == [str(folder)]
    assert shelf.left_out() == []


def test_a_dashboard_that_refuses_or_is_gone(dashboard: Dashboard) -> None:
    dashboard.token = "another"
    with pytest.raises(MachineError, match="401"):
        JobsShelf(f"127.0.0.1:{dashboard.server_port}").sources()
    with pytest.raises(MachineError, match="does not tell its jobs"):
        JobsShelf(f"127.0.0.1:{free_port()}").sources()


def test_a_dashboard_that_does_not_answer_is_given_time(dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "ASK_EVERY_S", 1e9)
    shelf = JobsShelf(f"127.0.0.1:{dashboard.server_port}")
    dashboard.token = "another"
    for _ in range(3):
        with pytest.raises(MachineError, match="401"):
            shelf.sources()
    assert dashboard.asked == 1


def test_the_token_goes_to_no_proxy(dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urllib.request, "_opener", None)  # it may have been made before, by the variables of then
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{dashboard.server_port}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with pytest.raises(MachineError, match="does not tell its jobs"):
        JobsShelf(f"127.0.0.1:{free_port()}").sources()
    assert dashboard.asked == 0


def test_what_speaks_no_http_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"what?\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(MachineError, match=r"does not tell its jobs \(what"):
            JobsShelf(f"127.0.0.1:{server.getsockname()[1]}").sources()
        thread.join()


def test_the_token_is_looked_for_where_ray_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    assert ray_token() is None
    (tmp_path / "token").write_text("from a file\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert ray_token() == "from a file"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "from a variable")
    assert ray_token() == "from a variable"
