"""`cluster start` as it is typed: a Ray that others join, and whose dashboard compares their trials."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from typer.testing import CliRunner

import cluster.head
from cluster.head import head_spec
from cluster.spec import ClusterSpec
from loraloom import app
from tests.ports import free_port
from tests.tuning.make import sweep_document, write_rows
from tests.waiting import wait_until
from tuning.cluster_cli import _told
from tuning.compare.jobs import SWEEP_KEY

ROOT = Path(__file__).parent.parent.parent
COMMAND = [sys.executable, str(ROOT / "loraloom.py")]
run = CliRunner()


def clean_environment(home: Path) -> dict[str, str]:
    """That of a user who has never run Ray."""
    home.mkdir(exist_ok=True)
    return {**{name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}, "HOME": str(home)}


@dataclass
class Running:
    """A `cluster start`."""

    process: subprocess.Popen[str]
    address: str
    dashboard: str
    temp: Path
    """Its `temp_dir`."""

    def end(self, *signals: signal.Signals) -> set[psutil.Process]:
        """Send them, one after another; returns those of its processes that are left when it has ended well."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        assert len(family) > 5
        for number in signals:
            self.process.send_signal(number)
            time.sleep(0.3)
        _, errors = self.process.communicate(timeout=60)
        assert (self.process.returncode, errors) == (0, "")
        return {child for child in family if child.is_running() and child.status() != psutil.STATUS_ZOMBIE}


@contextlib.contextmanager
def head_process(
    folder: Path, environment: dict[str, str], *options: str
) -> Generator[tuple[subprocess.Popen[str], Path]]:
    """Start one in ``folder``, and end it where it still runs; the process and its `temp_dir`."""
    temp = Path(tempfile.mkdtemp(prefix="h-", dir="/tmp"))
    command = [*COMMAND, "cluster", "start", *options]
    for setting in ("num_cpus=2", "num_gpus=0", "object_store_memory_mib=100", f"temp_dir={temp}"):
        command += ["--set", setting]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=folder, env=environment, **pipes) as process:
        try:
            yield process, temp
        finally:
            process.terminate()
            process.wait(timeout=60)
            shutil.rmtree(temp)


@contextlib.contextmanager
def running_head(folder: Path, environment: dict[str, str], *options: str) -> Generator[Running]:
    """One that has said where it is."""
    with head_process(folder, environment, "--json", *options) as (process, temp):
        assert process.stdout
        assert process.stderr
        told = json.loads(process.stdout.readline() or process.stderr.read())
        yield Running(process, told["address"], told["dashboard"], temp)


@pytest.mark.ray
@pytest.mark.slow
def test_a_head_asks_for_a_token_and_makes_it_where_there_is_none(tmp_path: Path) -> None:
    home = tmp_path / "home"
    ports = free_port(), free_port()
    options = f"--port={ports[0]}", "--set", f"dashboard_port={ports[1]}"
    with running_head(tmp_path, clean_environment(home), *options) as head:
        assert head.address.endswith(f":{ports[0]}")
        assert head.dashboard == f"127.0.0.1:{ports[1]}"
        token = home / ".ray" / "auth_token"
        assert token.stat().st_mode & 0o777 == 0o600
        for header, code in ((None, 401), ("Bearer None", 403), (f"Bearer {token.read_text()}", 200)):
            headers = {"Authorization": header} if header else {}
            assert httpx.get(f"http://{head.dashboard}/api/jobs/", headers=headers, timeout=30).status_code == code
        assert not head.end(signal.SIGINT, signal.SIGINT, signal.SIGTERM), "impatient"
        assert not list(head.temp.iterdir())


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_sweeps_that_join_are_compared(tiny_base: Path, tmp_path: Path) -> None:
    environment = {**clean_environment(tmp_path), "RAY_AUTH_TOKEN": "a" * 40}
    options = f"--port={free_port()}", "--set", f"dashboard_port={free_port()}"
    with running_head(tmp_path, environment, *options) as head:
        headers = {"Authorization": f"Bearer {environment['RAY_AUTH_TOKEN']}"}
        health = httpx.get(f"http://{head.dashboard}/api/grafana_health", headers=headers, timeout=30).json()
        page = health["data"]["grafanaHost"]

        def data() -> dict[str, Any]:
            return httpx.get(f"{page}/data.json", timeout=30).json()

        wait_until(lambda: "No sweep has run" in data()["troubles"][0])

        document = sweep_document(
            tiny_base, write_rows(tmp_path / "rows.jsonl"), cluster={"address": head.address, "ship_code": False}
        )
        (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(document))
        sweep = subprocess.run(
            [*COMMAND, "sweep", "sweep.yaml", "--dir", "joined"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert sweep.returncode == 0, sweep.stderr
        assert f"dashboard  http://{head.dashboard}" in sweep.stderr

        def shown(name: str) -> list[str]:
            sweeps = data()["sweeps"]
            return [trial["name"] for found in sweeps if found["id"] == name for trial in found["trials"]]

        assert sorted(wait_until(lambda: shown("joined"))) == ["t000", "t001", "t002"]

        shutil.copytree(tmp_path / "joined", tmp_path / "submitted")
        submit = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--no-wait"]
        submit += ["--address", f"http://{head.dashboard}", "--metadata-json"]
        metadata = {"job_name": "sweep submitted", SWEEP_KEY: str(tmp_path / "submitted")}
        submit += [json.dumps(metadata), "--", "true"]
        subprocess.run(submit, cwd=tmp_path, env={**environment, "RAY_AUTH_MODE": "token"}, check=True)
        assert wait_until(lambda: shown("submitted"))
        jobs = httpx.get(f"http://{head.dashboard}/api/jobs/", headers=headers, timeout=30).json()
        names = {job["type"]: job["metadata"]["job_name"] for job in jobs}  # the name in the dashboard's list of jobs
        assert names == {"DRIVER": f"sweep {document['name']}", "SUBMISSION": "sweep submitted"}
        assert not head.end(signal.SIGHUP)


TAB = "; its tab Metrics compares the trials (from afar, tunnel port 5 too)"
OPEN_TO_ALL = "token            none: RAY_AUTH_MODE has it so, and whoever reaches that port may run anything here"


def test_what_a_person_is_told() -> None:
    how = "(with this token in ~/.ray/auth_token, RAY_AUTH_MODE=token)"
    assert _told("10.0.0.1:6379", "127.0.0.1:8265", TAB, asks=True) == [
        "Ray runs at 10.0.0.1:6379",
        "sweep here       loraloom sweep CONFIG --set cluster.address=10.0.0.1:6379",
        f"other machines   ray start --address=10.0.0.1:6379   {how}",
        f"dashboard        http://127.0.0.1:8265{TAB}",
        "token            ray get-auth-token",
        "Ctrl-C ends it.",
    ]
    assert _told("10.0.0.1:6379", None, "", asks=False) == [
        "Ray runs at 10.0.0.1:6379",
        "sweep here       loraloom sweep CONFIG --set cluster.address=10.0.0.1:6379",
        "other machines   ray start --address=10.0.0.1:6379",
        OPEN_TO_ALL,
        "Ctrl-C ends it.",
    ]


@pytest.mark.ray
@pytest.mark.slow
def test_a_head_that_asks_for_no_token_says_so(tmp_path: Path) -> None:
    port = free_port()
    options = f"--port={free_port()}", "--set", f"dashboard_port={port}", "--set", "env.RAY_AUTH_MODE=disabled"
    with head_process(tmp_path, clean_environment(tmp_path / "home"), *options) as (process, _):
        assert process.stdout
        *_, dashboard, token = takewhile(lambda line: line != "Ctrl-C ends it.\n", process.stdout)
        tab = r"; its tab Metrics compares the trials \(from afar, tunnel port \d+ too\)"
        assert re.fullmatch(rf"dashboard        http://127.0.0.1:{port}{tab}\n", dashboard)
        assert token == f"{OPEN_TO_ALL}\n"
        assert httpx.get(f"http://127.0.0.1:{port}/api/jobs/", timeout=30).status_code == 200, "as it says"


def test_mistakes_are_told_before_anything_starts(tmp_path: Path) -> None:
    for arguments, code, words in (
        (["--set", "num_cpus=0", "--set", "num_gpu=1"], 2, ("num_cpus", "num_gpu: unknown key")),
        (["--set", "address=auto"], 2, ("address: must not be given",)),
        ([str(tmp_path / "no.yaml")], 3, ("no such file",)),
        (["--port", "80"], 2, ()),
        (["--port", "8265", "--set", "dashboard_port=8265"], 2, ("dashboard_port: must be another than",)),
    ):
        outcome = run.invoke(app, ["cluster", "start", *arguments])
        assert outcome.exit_code == code, outcome.output
        for word in words:
            assert word in outcome.output
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, words in (
            (["--port", port], f"--port {port} is taken; choose another"),
            (
                ["--set", f"dashboard_port={port}"],
                f"dashboard_port {port} is taken; choose another by `--set dashboard_p",
            ),
        ):
            outcome = run.invoke(app, ["cluster", "start", f"--port={free_port()}", *arguments])
            assert outcome.exit_code == 5
            assert words in outcome.output


def test_a_dashboard_gets_the_next_free_port_where_none_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    monkeypatch.setattr(cluster.head, "DASHBOARD_PORT", port)
    assert head_spec(ClusterSpec(), free_port()).dashboard_port == port
    assert (head_spec(ClusterSpec(), port).dashboard_port or 0) > port
    with socket.create_server(("127.0.0.1", port)):
        assert (head_spec(ClusterSpec(), free_port()).dashboard_port or 0) > port
    assert head_spec(ClusterSpec(dashboard=False), port).dashboard_port is None


@pytest.mark.ray
@pytest.mark.slow
def test_two_heads_beside_each_other_on_ports_of_ray_s_own(tmp_path: Path) -> None:
    environment = clean_environment(tmp_path / "home")
    with (
        running_head(tmp_path, environment, "--port=10001") as one,
        running_head(tmp_path, environment, "--port=12000") as other,
    ):
        assert one.address.endswith(":10001")
        assert other.address.endswith(":12000")
        assert one.dashboard != other.dashboard


@pytest.mark.ray
def test_of_a_ray_that_does_not_start_the_reason_is_told(tmp_path: Path) -> None:
    start = [*COMMAND, "cluster", "start", f"--port={free_port()}", "--set", "object_store_memory_mib=1000000000"]
    environment = clean_environment(tmp_path / "home")
    done = subprocess.run(start, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 5
    first, second = done.stderr.splitlines()
    assert first.startswith("error: Ray does not start: ")
    assert "Error: " in first
    assert second == "Try `loraloom doctor`."
