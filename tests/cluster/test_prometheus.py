from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import cluster.prometheus as module
from cluster.prometheus import DISCOVERY, discovery_files, read_targets
from loraloom import app
from tests.waiting import wait_until

run = CliRunner()


def test_rays_are_found_by_their_processes_wherever_their_folders_are(tmp_path: Path) -> None:
    root = tmp_path / "r a y"
    root.mkdir()
    argument = f"--log-dir={root}/session_2026-01-01_00-00-00_1_2/logs"
    with subprocess.Popen([sys.executable, "-c", "input()", argument], stdin=subprocess.PIPE) as process:
        try:
            assert root / DISCOVERY not in discovery_files(), "it has not written it yet"
            (root / DISCOVERY).write_text("[]")
            wait_until(lambda: root / DISCOVERY in discovery_files())
        finally:
            process.communicate(b"\n")
    assert root / DISCOVERY not in discovery_files()


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
