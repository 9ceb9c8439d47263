"""A small MLflow server on loopback: as much of its REST interface as Ray's callback asks for, and an end at will."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

_API = "/api/2.0/mlflow/"


class MlflowServer(ThreadingHTTPServer):
    """Serves while the block runs, or until it has heard of ``dies_after`` numbers: then its port is closed."""

    daemon_threads = True

    def __init__(self, dies_after: int | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.dies_after = dies_after
        self.runs: dict[str, str] = {}
        """Their names, by their ids."""
        self.numbers: list[tuple[str, str, int]] = []
        """What was told: run, name of the number, step."""
        self.lock = threading.Lock()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.die()
        self._thread.join(10)

    def die(self) -> None:
        """As a process that was killed: connections are refused."""
        self.shutdown()
        self.server_close()

    def answer(self, method: str, asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        with self.lock:
            if method == "experiments/get-by-name":
                return 404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such experiment"}
            if method == "experiments/create":
                return 200, {"experiment_id": "1"}
            if method == "runs/create":
                run = f"{len(self.runs):032x}"
                self.runs[run] = asked["run_name"]
                return 200, self._run(run)
            if method == "runs/get":
                return 200, self._run(asked["run_id"])
            if method == "runs/log-metric":
                self.numbers.append((self.runs[asked["run_id"]], asked["key"], int(asked.get("step", 0))))
                if len(self.numbers) == self.dies_after:
                    threading.Thread(target=self.die, daemon=True).start()
            return 200, {}

    def _run(self, run: str) -> dict[str, Any]:
        info = {"run_id": run, "run_name": self.runs[run], "experiment_id": "1", "status": "RUNNING"}
        more = {"start_time": 0, "artifact_uri": "", "lifecycle_stage": "active"}
        return {"run": {"info": {**info, **more}, "data": {}}}


class _Handler(BaseHTTPRequestHandler):
    """One request."""

    server: MlflowServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        self._send({name: values[0] for name, values in query.items()})

    def do_POST(self) -> None:
        self._send(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _send(self, asked: dict[str, Any]) -> None:
        path = urlsplit(self.path).path
        status, answer = self.server.answer(path.removeprefix(_API), asked) if path.startswith(_API) else (404, {})
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - as its base has it
        """Nothing on the terminal."""
