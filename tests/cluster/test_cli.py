from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from cluster import cli
from cluster.errors import InputError, NotFoundError
from cluster.schema import parse_spec, parse_yaml
from cluster.spec import ClusterSpec

app = typer.Typer()
cli.register(app)


def test_check_prints_the_spec_with_its_defaults(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text("num_cpus: 2\n")
    done = CliRunner().invoke(app, ["cluster", "check", str(path), "--set", "dashboard=false"])
    assert done.exit_code == 0
    expected = ClusterSpec(num_cpus=2, dashboard=False)
    assert parse_spec(parse_yaml(done.stdout, "out"), ClusterSpec, "out") == expected
    done = CliRunner().invoke(app, ["cluster", "check", str(path), "--json", "--set", "dashboard=false"])
    assert json.loads(done.stdout) == {"spec": expected.model_dump(mode="json"), "nodes": []}
    done = CliRunner().invoke(app, ["cluster", "check", str(path), "--quiet"])
    assert (done.exit_code, done.stdout) == (0, "")


def test_check_tells_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("num_cpus: none\ncpus: 2\n")
    done = CliRunner().invoke(app, ["cluster", "check", str(path)])
    assert isinstance(done.exception, InputError)
    assert len(done.exception.faults) == 2
    done = CliRunner().invoke(app, ["cluster", "check", str(tmp_path / "none.yaml")])
    assert isinstance(done.exception, NotFoundError)


@pytest.mark.ray
def test_check_connects_and_asks_the_nodes() -> None:
    path = Path(__file__).parents[2] / "configs" / "cluster" / "local.yaml"
    done = CliRunner().invoke(app, ["cluster", "check", str(path), "--connect", "--json", "--set", "num_cpus=1"])
    assert done.exit_code == 0, done.exception
    (node,) = json.loads(done.stdout.splitlines()[-1])["nodes"]
    assert node["cpus"] == 1.0
    assert node["trouble"] == ""


@pytest.mark.slow
def test_doctor_finds_this_environment_sound() -> None:
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert done.exit_code == 0, done.stdout
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["ok"] is True
    assert all(set(check) == {"name", "status", "found", "meaning", "mend"} for check in answer["checks"])
    assert {"python", "packages", "torch", "bitsandbytes", "vllm", "ray", "gpu"} <= {
        check["name"] for check in answer["checks"]
    }
