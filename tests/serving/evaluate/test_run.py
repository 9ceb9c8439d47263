"""Asking a server that fails: 429, 503, broken connections, wrong models, an evaluation that is ended and goes on."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.errors import ConflictError, InputError, NotFoundError
from serving.client import AskError
from serving.evaluate import endpoint
from serving.evaluate.data import read_data
from serving.evaluate.endpoint import Settings
from serving.evaluate.run import Plan, Report, evaluate, resolve_all
from tests.serving.evaluate.flaky import Flaky, Handler, flaky_server
from tests.waiting import wait_until

ROOT = Path(__file__).parents[3]
ROWS = 12


@pytest.fixture
def server() -> Generator[Flaky]:
    with flaky_server() as flaky:
        yield flaky


@pytest.fixture
def plan(server: Flaky, tmp_path: Path) -> Plan:
    data = read_data(write_rows(tmp_path / "rows.jsonl"))
    return Plan(server.url, data, ("exact_match",), Settings(8, 0.0, 0), tmp_path / "out", concurrency=4)


def write_rows(path: Path, rows: int = ROWS) -> Path:
    """Rows whose question is their answer, but for the last."""
    turns = [(f"q{number}", f"q{number}") for number in range(rows - 1)] + [("last", "other")]
    lines = [
        json.dumps({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]})
        for q, a in turns
    ]
    path.write_text("\n".join(lines))
    return path


def run(plan: Plan, references: Sequence[str] = ("support@1", "base")) -> Report:
    models = asyncio.run(resolve_all(plan, references))
    return asyncio.run(evaluate(plan, models, models[0].id))


def test_every_model_is_asked_every_row_once(server: Flaky, plan: Plan) -> None:
    together = threading.Barrier(plan.concurrency, timeout=60)

    def wait(_handler: Handler, _question: str, _time: int) -> bool:
        together.wait()  # nobody is answered before as many as may be are there
        return False

    server.fault = wait
    report = run(plan, ["base", "support", "support@2", "support@1"])
    assert [measured.model.id for measured in report.models] == ["tiny", "support@2", "support@1"]
    assert set(server.asked.values()) == {1}
    assert len(server.asked) == 3 * ROWS
    assert (report.asked, report.kept, report.retries) == (3 * ROWS, 0, 0)
    estimate = report.of("support@2").estimates["exact_match"]
    assert (estimate.value, estimate.count) == (pytest.approx(11 / 12), ROWS)
    assert report.of("support@2").differences["exact_match"].value == 0
    assert not report.models[0].differences
    assert server.most_at_once == plan.concurrency


def test_nothing_is_asked_twice(server: Flaky, plan: Plan) -> None:
    first = run(plan)
    server.asked.clear()
    again = run(replace(plan, metrics=("exact_match", "contains")))
    assert not server.asked
    assert (again.asked, again.kept) == (0, 2 * ROWS)
    assert again.of("support@1").estimates["exact_match"] == first.of("support@1").estimates["exact_match"]
    run(replace(plan, settings=Settings(9, 0.0, 0)))
    assert len(server.asked) == 2 * ROWS


def test_a_promotion_in_mid_run_changes_nothing(server: Flaky, plan: Plan) -> None:
    def promote(_handler: Handler, _question: str, _time: int) -> bool:
        server.root = "support@3"
        return False

    server.fault = promote
    report = run(plan, ["support"])
    assert [measured.model.id for measured in report.models] == ["support@2"]
    assert {model for model, _ in server.asked} == {"support@2"}


def test_an_answer_from_another_model_is_refused(server: Flaky, plan: Plan) -> None:
    server.answers_as = "support@9"
    with pytest.raises(AskError, match="support@1 was asked, but support@9 answered"):
        run(plan, ["support@1"])


def test_an_alias_that_is_split_names_no_version(server: Flaky, plan: Plan) -> None:
    server.split = {"support@1": 0.9, "support@2": 0.1}
    with pytest.raises(InputError, match="split by weight"):
        run(plan, ["support@prod"])
    run(plan, ["support@2"])


def test_overload_and_broken_connections_are_tried_again(
    server: Flaky, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    waits: dict[str, list[float]] = {}

    def fail(handler: Handler, question: str, time_asked: int) -> bool:
        waits.setdefault(question, []).append(time.monotonic())
        if question == "q1" and time_asked == 1:
            handler.answer(429, {"error": {"message": "slow down"}}, Retry_After="1")
        elif question == "q2" and time_asked <= 3:
            handler.answer(503, {"error": {"message": "no replica"}})
        elif question == "q3" and time_asked <= 2:
            handler.drop()
        else:
            return False
        return True

    server.fault = fail
    report = run(plan, ["support@1"])
    assert report.of("support@1").estimates["exact_match"].value == pytest.approx(11 / 12)
    assert {question: times for (_, question), times in server.asked.items() if times > 1} == {
        "q1": 2,
        "q2": 4,
        "q3": 3,
    }
    assert waits["q1"][1] - waits["q1"][0] >= 1
    assert report.retries == 1 + 3 + 2


def test_retries_have_an_end_and_the_answers_stay(server: Flaky, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.001)

    def fail(handler: Handler, question: str, _time: int) -> bool:
        if question == "q5":
            handler.answer(503, {"error": {"message": "no replica"}})
        return question == "q5"

    server.fault = fail
    with pytest.raises(AskError, match="answered 503: no replica"):
        run(replace(plan, concurrency=1), ["support@1"])
    assert server.asked["support@1", "q5"] == endpoint.RETRIES + 1
    server.fault = lambda _handler, _question, _time: False
    report = run(plan, ["support@1"])
    assert report.kept == 5
    assert server.asked["support@1", "q0"] == 1


def test_rows_that_the_server_refuses_are_told_together(server: Flaky, plan: Plan) -> None:
    def fail(handler: Handler, question: str, _time: int) -> bool:
        if question in ("q2", "q7"):
            handler.answer(400, {"error": {"message": "too long"}})
        return question in ("q2", "q7")

    server.fault = fail
    with pytest.raises(InputError) as caught:
        run(plan, ["support@1"])
    assert [fault.where.rpartition(": ")[2] for fault in caught.value.faults] == ["line 3", "line 8"]
    assert all("too long" in fault.rule for fault in caught.value.faults)
    assert len(server.asked) == ROWS


@pytest.mark.parametrize(("status", "message"), [(401, "answered 401: no key"), (403, "answered 403: no key")])
def test_other_errors_end_it(server: Flaky, plan: Plan, status: int, message: str) -> None:
    def fail(handler: Handler, _question: str, _time: int) -> bool:
        handler.answer(status, {"error": {"message": "no key"}})
        return True

    server.fault = fail
    with pytest.raises(AskError, match=message):
        run(plan, ["support@1"])


def test_the_key_is_sent(server: Flaky, plan: Plan) -> None:
    run(replace(plan, api_key="secret"), ["support@1"])
    assert server.keys == {"Bearer secret"}


def test_models_and_servers_that_are_not_there(plan: Plan) -> None:
    with pytest.raises(NotFoundError, match="`nobody` does not exist"):
        run(plan, ["support@1", "nobody"])
    with pytest.raises(AskError, match=r"127\.0\.0\.1:9/v1/ does not answer"):
        run(replace(plan, url="http://127.0.0.1:9/v1"))


def test_two_evaluations_at_once_are_told(server: Flaky, plan: Plan) -> None:
    def second(_handler: Handler, question: str, _time: int) -> bool:
        if question == "q0":
            with pytest.raises(ConflictError, match="another evaluation"):
                run(plan, ["support@1"])
            told.append(question)
        return False

    told: list[str] = []
    server.fault = second
    run(plan, ["support@1"])
    assert told == ["q0"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_goes_on_where_it_was(server: Flaky, tmp_path: Path, number: signal.Signals) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 60)
    options = ["--models", "base,support@1", "--data", str(rows), "--url", server.url, "--concurrency", "2"]
    command = [sys.executable, str(ROOT / "loraloom.py"), "evaluate", *options, "--out", str(tmp_path / "out")]

    def slow(_handler: Handler, _question: str, _time: int) -> bool:
        time.sleep(0.1)
        return False

    server.fault = slow
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_until(lambda: len(server.asked) > 10, process)
            process.send_signal(number)
            _, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, stderr
    assert "the same command goes on" in stderr
    assert "Traceback" not in stderr
    kept = sum(len(path.read_text().splitlines()) - 1 for path in (tmp_path / "out").glob("*.jsonl"))
    assert 8 < kept < 120
    server.fault = lambda _handler, _question, _time: False
    server.asked.clear()
    done = subprocess.run([*command, "--json"], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120)
    document = json.loads(done.stdout)
    assert document["requests"] == {"asked": 120 - kept, "kept": kept, "retried": 0}
    assert sum(server.asked.values()) == 120 - kept
