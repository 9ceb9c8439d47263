from __future__ import annotations

import json
import threading
import time
from collections.abc import Generator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from cluster.errors import NotFoundError
from serving.client import Answer, AskError, ask, ask_all, models, wait_ready


class Handler(BaseHTTPRequestHandler):
    """Answers in OpenAI's shape: the text is the question, later the earlier it was asked."""

    def do_GET(self) -> None:
        self._send(200, {"data": [{"id": "base"}, {"id": "support"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"]
        if body["model"] == "unknown":
            self._send(404, {"error": {"message": "no such model"}})
        elif body["model"] == "broken":
            self._send(500, {"error": {"message": "adapter broken@1 is corrupt"}})
        elif body["model"] == "odd":
            self._send(502, "<html>")
        else:
            time.sleep((9 - int(text)) * 0.01)
            choice = {"message": {"content": text}}
            self._send(
                200, {"model": "support@2", "choices": [choice], "usage": {"completion_tokens": 3}, "asked": body}
            )

    def _send(self, status: int, document: Any) -> None:
        content = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture(scope="module")
def url() -> Generator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()
        thread.join()


def question(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": str(number)}]


def test_one_question(url: str) -> None:
    answer = ask(url, "support", question(7), max_tokens=3)
    assert answer == Answer(text="7", model="support@2", tokens=3, seconds=answer.seconds)
    assert answer.seconds > 0


def test_many_answers_come_in_order(url: str) -> None:
    answers = ask_all(url, "support", [question(number) for number in range(10)], concurrency=4)
    assert [answer.text for answer in answers] == [str(number) for number in range(10)]
    assert ask_all(url, "support", []) == []


def test_models_and_wait(url: str) -> None:
    assert models(url + "/") == ["base", "support"]
    assert wait_ready(url) < 5


def test_errors_say_what_the_server_said(url: str) -> None:
    with pytest.raises(NotFoundError, match=r"404: no such model"):
        ask(url, "unknown", question(1))
    with pytest.raises(AskError, match="500: adapter broken@1 is corrupt"):
        ask_all(url, "broken", [question(1), question(2)])
    with pytest.raises(AskError, match=r"502: .*html"):
        ask(url, "odd", question(1))


def test_nobody_there() -> None:
    with pytest.raises(AskError, match="does not answer"):
        ask("http://127.0.0.1:9/v1", "support", question(1))
    with pytest.raises(AskError, match=r"no answer within 0\.1 s"):
        wait_ready("http://127.0.0.1:9/v1", timeout_s=0.1, poll_s=0.02)
