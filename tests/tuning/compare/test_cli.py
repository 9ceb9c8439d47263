"""`compare` and `dashboard` as they are typed."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from loraloom import app
from tests.serving.s3 import S3Server
from tests.tuning.compare.bucket import Bucket
from tests.tuning.compare.make import make_sweep

ROOT = Path(__file__).parent.parent.parent.parent
run = CliRunner()


@contextlib.contextmanager
def start(*arguments: str, cwd: Path) -> Generator[subprocess.Popen[str]]:
    command = [sys.executable, str(ROOT / "loraloom.py"), "dashboard", *arguments]
    with subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()  # where a test has failed before it ended it


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_dashboard_serves_until_it_is_told_to_end(tmp_path: Path, number: signal.Signals) -> None:
    make_sweep(tmp_path / "runs" / "sweeps" / "made", 3)
    with start("--port", "0", "--json", cwd=tmp_path) as process:
        assert process.stdout
        url = json.loads(process.stdout.readline())["url"]
        assert [sweep["id"] for sweep in httpx.get(f"{url}data.json", timeout=30).json()["sweeps"]] == ["made"]
        process.send_signal(number)
        _, errors = process.communicate(timeout=20)
        assert (process.returncode, errors) == (0, "")


def test_on_another_address_the_page_s_own_is_a_secret(tmp_path: Path) -> None:
    make_sweep(tmp_path / "made", 3)
    with start("made", "--host", "127.0.0.2", "--port", "0", "--json", cwd=tmp_path) as process:
        assert process.stdout
        url = httpx.URL(json.loads(process.stdout.readline())["url"])
        assert url.host == "127.0.0.2"
        assert len(url.path.strip("/")) >= 24
        assert httpx.get(url.join("data.json"), timeout=30).status_code == 200
        assert httpx.get(url.copy_with(path="/data.json"), timeout=30).status_code == 404
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)


def test_dashboard_of_a_bucket(tmp_path: Path, s3: S3Server) -> None:
    bucket = Bucket(s3, "dashboard")
    for name in ("one", "two"):
        bucket.copy(make_sweep(tmp_path / name, 3), f"{name}/")
    with start(bucket.uri, "--port", "0", cwd=tmp_path) as process:
        assert process.stdout
        told = process.stdout.readline()
        place = "s3://bucket/dashboard"
        assert told.startswith(f"comparing {place} at http://127.0.0.1:"), "no credentials"
        url = told.split()[-1]
        document = httpx.get(f"{url}data.json", timeout=30).json()
        assert document["troubles"] == []
        shown = {sweep["id"]: (sweep["folder"], len(sweep["trials"])) for sweep in document["sweeps"]}
        assert shown == {name: (f"{place}/{name}", 3) for name in ("one", "two")}
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=20)
        assert (process.returncode, errors) == (0, "")


def test_mistakes_of_dashboard_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "runs/sweeps: no such folder" in run.invoke(app, ["dashboard"]).output
    assert run.invoke(app, ["dashboard", "nowhere"]).exit_code == 3
    assert run.invoke(app, ["dashboard", "ftp://x/y"]).exit_code == 2
    make_sweep(tmp_path / "made", 3)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        outcome = run.invoke(app, ["dashboard", "made", "--port", port])
    assert outcome.exit_code == 5
    assert f"127.0.0.1:{port}" in outcome.output
    assert "--port" in outcome.output
    outcome = run.invoke(app, ["dashboard", "made", "--host", "no.such.host.invalid"])
    assert outcome.exit_code == 5


def test_compare_writes_a_page(tmp_path: Path) -> None:
    make_sweep(tmp_path / "one", 12)
    make_sweep(tmp_path / "two", 3)
    target = tmp_path / "page.html"
    outcome = run.invoke(
        app, ["compare", str(tmp_path / "one"), str(tmp_path / "two"), "--html", str(target), "--json"]
    )
    assert outcome.exit_code == 0, outcome.output
    assert json.loads(outcome.output) == {"file": str(target), "sweeps": 2, "trials": 15}
    assert '"PED-ANOVA' in target.read_text(), "importances are computed before it is written"


def test_compare_writes_a_page_of_a_bucket(tmp_path: Path, s3: S3Server) -> None:
    folder = make_sweep(tmp_path / "made", 3)
    bucket = Bucket(s3, "compare")
    bucket.copy(folder)
    target = tmp_path / "page.html"
    outcome = run.invoke(app, ["compare", bucket.uri, "--html", str(target)])
    assert (outcome.exit_code, outcome.output) == (0, f"{target}\n")
    page = target.read_text()
    document = json.loads(re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)[0])
    (shown,) = document["sweeps"]
    assert shown["folder"] == "s3://bucket/compare"
    assert sorted(trial["name"] for trial in shown["trials"]) == ["t000", "t001", "t002"]
    assert "key:secret" not in page


def test_mistakes_of_compare_are_told_and_nothing_is_written(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "one", 3)
    target = tmp_path / "page.html"
    unwritable = tmp_path / "no" / "page.html"
    for arguments, code, words in (
        ([folder, folder], 2, "--html: is required to compare several sweeps"),
        ([tmp_path / "no", "--html", target], 3, "no such folder"),
        ([folder, "--html", tmp_path], 2, "must be a file, but is a folder"),
        ([folder, "--html", unwritable], 5, f"cannot write {unwritable} (No such"),
        ([tmp_path / "no", "--html", unwritable], 5, "--html: cannot write"),  # asked for first
        ([tmp_path / "one" / "t000", "--html", target], 3, "no sweep's folder"),
        ([tmp_path / "one" / "t000"], 3, "not a sweep's folder"),
    ):
        outcome = run.invoke(app, ["compare", *map(str, arguments)])
        assert outcome.exit_code == code, outcome.output
        assert words in outcome.output
    assert not target.exists()


def test_one_broken_sweep_does_not_keep_the_others_from_the_page(tmp_path: Path) -> None:
    make_sweep(tmp_path / "sweeps" / "good", 3)
    broken = make_sweep(tmp_path / "sweeps" / "broken", 3)
    (broken / "sweep.yaml").write_text("train: {steps: none}")
    target = tmp_path / "page.html"
    outcome = run.invoke(app, ["compare", str(tmp_path / "sweeps"), "--html", str(target), "--json"])
    assert outcome.exit_code == 0, outcome.output
    assert json.loads(outcome.stdout) == {"file": str(target), "sweeps": 1, "trials": 3}
    assert outcome.stderr.startswith("note: ")
    assert "train.steps" in outcome.stderr
    assert "train.steps" in target.read_text(), "the page tells it too"


def test_where_no_sweep_can_be_read_its_own_error_is_told(tmp_path: Path) -> None:
    broken = make_sweep(tmp_path / "broken", 3)
    (broken / "sweep.yaml").write_text("train: {steps: none}")
    target = tmp_path / "page.html"
    outcome = run.invoke(app, ["compare", str(broken), "--html", str(target)])
    assert outcome.exit_code == 2
    assert "error: " in outcome.stderr
    assert "train.steps" in outcome.stderr
    assert not target.exists()


def test_the_schema_of_the_page_s_data_is_printed() -> None:
    outcome = run.invoke(app, ["schema", "comparison"])
    assert outcome.exit_code == 0
    schema = json.loads(outcome.output)
    assert "data.json?after=REVISION" in schema["description"], "how to ask only for what has changed"
    assert "revision" in schema["properties"]
    assert "eval_loss" in schema["$defs"]["TrialView"]["properties"]
