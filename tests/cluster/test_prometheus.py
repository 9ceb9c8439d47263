from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import httpx
import psutil
import pytest
from typer.testing import CliRunner

import cluster.prometheus as module
from cluster.errors import MachineError
from cluster.prometheus import DISCOVERY, Prometheus, discovery_files, read_targets
from loraloom import app
from tests.ports import free_port
from tests.waiting import wait_until

ROOT = Path(__file__).parent.parent.parent
run = CliRunner()


@contextlib.contextmanager
def ray_like(root: str) -> Generator[None]:
    """A process with the arguments of one of Ray's, whose folder is ``root``."""
    argument = f"--log-dir={root}/session_2026-01-01_00-00-00_1_2/logs"
    command = [sys.executable, "-c", "print(flush=True); input()", argument]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        try:
            yield
        finally:
            process.communicate(b"\n")


def test_rays_are_found_by_their_processes_wherever_their_folders_are(tmp_path: Path) -> None:
    root = tmp_path / "r a y"
    root.mkdir()
    with ray_like(str(root)):
        assert root / DISCOVERY not in discovery_files(), "it has not written it yet"
        (root / DISCOVERY).write_text("[]")
        assert root / DISCOVERY in discovery_files()
    assert root / DISCOVERY not in discovery_files()


def test_what_may_not_be_looked_at_and_what_others_run_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / DISCOVERY).write_text("[]")
    # A name that is too long is refused to root too, whom no folder's mode keeps out.
    with ray_like(str(tmp_path)), ray_like(f"/{'x' * 300}"):
        assert tmp_path / DISCOVERY in discovery_files()
        monkeypatch.setattr(module.os, "getuid", lambda: os.geteuid() + 1)
        assert discovery_files() == []


def test_targets_are_put_together_and_half_a_file_is_left_out(tmp_path: Path) -> None:
    groups = [{"labels": {"job": "ray"}, "targets": [f"127.0.0.1:{port}"]} for port in (1, 2)]
    contents = json.dumps(groups[:1]), json.dumps(groups[1:]), '[{"tar', '{"targets": 3}', '[{"targets": 3}, 5]'
    files = [tmp_path / str(index) for index in range(len(contents) + 1)]
    for path, content in zip(files, contents, strict=False):
        path.write_text(content)
    assert read_targets(files) == groups


def test_a_dashboard_for_grafana_is_written(tmp_path: Path) -> None:
    target = tmp_path / "dashboard.json"
    outcome = run.invoke(app, ["metrics", "--grafana", str(target), "--json"])
    assert json.loads(outcome.output) == {"file": str(target)}
    document = json.loads(target.read_text())
    assert len({panel["id"] for panel in document["panels"]}) == len(document["panels"]) > 5
    outcome = run.invoke(app, ["metrics", "--grafana", str(tmp_path)])
    assert outcome.exit_code == 5
    assert "--grafana: cannot write" in outcome.output


def test_no_query_of_the_dashboard_mixes_sweeps_of_the_same_name() -> None:
    """A minimum over time would be that of an earlier run."""
    document = json.loads(module.GRAFANA.read_text())
    assert [variable["name"] for variable in document["templating"]["list"]] == ["datasource", "sweep", "run"]
    for panel in document["panels"]:
        for target in panel["targets"]:
            query = target["expr"]
            assert query.count("(sweep, run") == query.count("(sweep") > 0, query
            assert query.count('{sweep=~"$sweep", run=~"$run"') == query.count("{") > 0, query
            assert "{{run}}" in target["legendFormat"], query


def test_what_is_missing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    outcome = run.invoke(app, ["metrics"])
    assert outcome.exit_code == 5
    assert "apt-get install prometheus" in outcome.output
    monkeypatch.setattr(module.shutil, "which", lambda name: "/bin/false")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        outcome = run.invoke(app, ["metrics", "--port", port])
    assert outcome.exit_code == 5
    assert "is taken; choose another" in outcome.output
    outcome = run.invoke(app, ["metrics", "--port", port])
    assert outcome.exit_code == 5
    assert "has ended by itself (exit code 1)" in outcome.output
    (tmp_path / "file").write_text("")
    outcome = run.invoke(app, ["metrics", "--dir", "file"])
    assert outcome.exit_code == 5
    assert "--dir: cannot write" in outcome.output


def test_targets_that_cannot_be_written_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "discovery_files", list)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        server = Prometheus("", process, tmp_path / "gone" / "targets.json")
        try:
            with pytest.raises(MachineError, match="--dir: cannot write"):
                server.watch(lambda count: None)
        finally:
            process.communicate(b"\n")


@pytest.mark.prometheus
@pytest.mark.parametrize("end", [signal.SIGHUP, signal.SIGTERM, signal.SIGKILL])
def test_prometheus_ends_with_the_command_whatever_ends_it(end: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "loraloom.py"), "metrics", "--json", "--port", str(free_port())]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as metrics:
        assert metrics.stdout
        url = json.loads(metrics.stdout.readline())["url"]
        children = psutil.Process(metrics.pid).children()
        try:
            assert "prometheus" in {child.name() for child in children}
            wait_until(lambda: answers(f"{url}/-/ready"), metrics)
            for _ in range(2):  # a shell may send it once more, and must not cut the clearing short
                metrics.send_signal(end)
            _, errors = metrics.communicate(timeout=30)
            assert (metrics.returncode, errors) == (-signal.SIGKILL if end == signal.SIGKILL else 0, "")
        finally:
            metrics.kill()
            _, alive = psutil.wait_procs(children, timeout=15)
            for child in alive:
                child.kill()
    assert not alive


def answers(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(url).status_code == 200
    return False
