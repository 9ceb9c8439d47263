"""`cluster start` as it is typed: a Ray that others join, and whose dashboard compares their trials."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import httpx
import psutil
import pytest
import yaml
from typer.testing import CliRunner

from loraloom import app
from tests.ports import free_port
from tests.tuning.make import sweep_document, write_rows
from tests.waiting import wait_until
from tuning.compare.jobs import ray_token

ROOT = Path(__file__).parent.parent.parent
run = CliRunner()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_sweeps_that_join_are_compared_and_nothing_is_left(tiny_base: Path, tmp_path: Path) -> None:
    before = {path for path in Path(tempfile.gettempdir()).iterdir() if path.name.startswith("loom-")}
    ports = free_port(), free_port()
    command = [sys.executable, str(ROOT / "loraloom.py")]
    settings = ("num_cpus=2", "num_gpus=0", f"dashboard_port={ports[1]}", "object_store_memory_mib=100")
    start = [*command, "cluster", "start", "--json", f"--port={ports[0]}"]
    for setting in settings:
        start += ["--set", setting]
    with subprocess.Popen(start, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as head:
        try:
            assert head.stdout
            told = json.loads(head.stdout.readline() or (head.stderr.read() if head.stderr else ""))
            assert told["address"].endswith(f":{ports[0]}")
            assert told["dashboard"] == f"127.0.0.1:{ports[1]}"
            headers = {"Authorization": f"Bearer {ray_token()}"}
            health = httpx.get(f"http://{told['dashboard']}/api/grafana_health", headers=headers, timeout=30).json()
            page = health["data"]["grafanaHost"]
            assert "No sweep has run" in httpx.get(f"{page}/data.json").json()["troubles"][0]

            cluster = {"address": told["address"], "ship_code": False}
            document = sweep_document(tiny_base, write_rows(tmp_path / "rows.jsonl"), cluster=cluster)
            (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(document))
            sweep = subprocess.run(
                [*command, "sweep", "sweep.yaml", "--dir", "joined"],
                cwd=tmp_path,
                # Not `auto`, which finds any Ray here: with an address Ray wants to hear that there is a token.
                env={**os.environ, "RAY_AUTH_MODE": "token"},
                capture_output=True,
                text=True,
                check=False,
            )
            assert sweep.returncode == 0, sweep.stderr
            assert f"dashboard  http://{told['dashboard']}" in sweep.stderr

            def shown() -> list[str]:
                sweeps = httpx.get(f"{page}/data.json").json()["sweeps"]
                return [trial["name"] for found in sweeps if found["id"] == "joined" for trial in found["trials"]]

            assert sorted(wait_until(shown)) == ["t000", "t001", "t002"]
        finally:
            family = psutil.Process(head.pid).children(recursive=True)
            head.send_signal(signal.SIGINT)
            _, errors = head.communicate(timeout=60)
    assert (head.returncode, errors) == (0, "")
    assert len(family) > 5
    assert not [child for child in family if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    assert {path for path in Path(tempfile.gettempdir()).iterdir() if path.name.startswith("loom-")} <= before


def test_mistakes_are_told_before_anything_starts(tmp_path: Path) -> None:
    for arguments, code, words in (
        (["--set", "num_cpus=0", "--set", "num_gpu=1"], 2, ("num_cpus", "num_gpu: unknown key")),
        (["--set", "address=auto"], 2, ("address: must not be given",)),
        ([str(tmp_path / "no.yaml")], 3, ("no such file",)),
        (["--port", "80"], 2, ()),
    ):
        outcome = run.invoke(app, ["cluster", "start", *arguments])
        assert outcome.exit_code == code, outcome.output
        for word in words:
            assert word in outcome.output
    with socket.create_server(("127.0.0.1", 0)) as taken:
        outcome = run.invoke(app, ["cluster", "start", "--port", str(taken.getsockname()[1])])
    assert outcome.exit_code == 5
    assert "is taken; choose another" in outcome.output
