"""A small real HTTP server in OpenAI's shape that fails on purpose: what no healthy server can be brought to do."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

CREATED = 1_700_000_000
Fault = Callable[["Handler", str, int], bool]
"""Called with the question and how often it was asked; answers itself and returns True, or returns False."""


@dataclass
class Flaky:
    """What the server is to do, and what it has seen."""

    url: str = ""
    root: str = "support@2"
    """What the alias ``support`` leads to."""
    split: dict[str, float] | None = None
    """Versions and shares, where the alias is split by weight."""
    created: dict[str, int] = field(default_factory=dict[str, int])
    """Version -> when it was published; ``CREATED`` for the others."""
    answers_as: str | None = None
    """Lie about the model that answered."""
    says: Callable[[str, str], str] = lambda _model, question: question
    """What a model answers to a question."""
    fault: Fault = lambda _handler, _question, _time: False
    asked: Counter[tuple[str, str]] = field(default_factory=Counter[tuple[str, str]])
    """(model, question) -> requests."""
    keys: set[str] = field(default_factory=set[str])
    most_at_once: int = 0


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    flaky: Flaky
    lock = threading.Lock()
    now = 0

    def do_GET(self) -> None:
        name = self.path.removeprefix("/v1/models/").replace("%40", "@")
        base = {"id": "tiny", "root": "/models/tiny", "parent": None, "created": CREATED + 5}
        if name == "/v1/models":
            self.answer(200, {"object": "list", "data": [base, self.card("support")]})
        elif name == "tiny":
            self.answer(200, base)
        elif name.startswith("support"):
            self.answer(200, self.card(name))
        else:
            self.answer(404, {"error": {"message": f"The model `{name}` does not exist"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][-1]["content"]
        with self.lock:
            type(self).now += 1
            self.flaky.most_at_once = max(self.flaky.most_at_once, type(self).now)
            self.flaky.asked[body["model"], question] += 1
            self.flaky.keys.add(self.headers["Authorization"])
            time = self.flaky.asked[body["model"], question]
        try:
            if not self.flaky.fault(self, question, time):
                message = {"role": "assistant", "content": self.flaky.says(body["model"], question)}
                choice = {"index": 0, "finish_reason": "stop", "message": message}
                self.answer(200, {"id": "x", "model": self.flaky.answers_as or body["model"], "choices": [choice]})
        finally:
            with self.lock:
                type(self).now -= 1

    def card(self, name: str) -> dict[str, Any]:
        fixed = name[-1].isdigit()
        root = name if fixed else self.flaky.root
        metadata = {"split": self.flaky.split} if self.flaky.split and not fixed else {}
        return {
            "metadata": metadata,
            "id": name,
            "root": root,
            "parent": "tiny",
            "created": self.flaky.created.get(root, CREATED),
        }

    def answer(self, status: int, document: Any, **headers: str) -> None:
        content = json.dumps(document).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def drop(self) -> None:
        """Break the connection in the middle of an answer."""
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"{")
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


class Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves is what some tests are about: not told of amid the results."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextlib.contextmanager
def flaky_server() -> Generator[Flaky]:
    flaky = Flaky()
    handler = type("FlakyHandler", (Handler,), {"flaky": flaky})
    with Server(("127.0.0.1", 0), handler) as server:
        flaky.url = f"http://127.0.0.1:{server.server_port}/v1"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield flaky
        finally:
            server.shutdown()
            thread.join()
