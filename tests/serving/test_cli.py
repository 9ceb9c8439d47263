from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from loraloom import app
from serving.registry import Registry
from tests.serving.make import identity, make_adapter


@pytest.fixture
def registry(tmp_path: Path, base: Path) -> Registry:
    registry = Registry(tmp_path / "registry")
    adapter = make_adapter(tmp_path / "adapter", base)
    for name in ("support", "support", "sales"):
        registry.publish(
            name, adapter, identity(base), metrics={"eval_loss": 0.25}, lineage={"trial": "t[1]", "note": None}
        )
    return registry


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def last(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])


def test_list(registry: Registry) -> None:
    result = run("adapters", "list", "--registry", registry.root)
    assert result.exit_code == 0
    for part in ("support@1", "support@2", "sales@1", "0.25", "down_proj, …"):
        assert part in result.stdout
    listed = last(run("adapters", "list", "--registry", registry.root, "--json"))
    assert [adapter["id"] for adapter in listed] == ["sales@1", "support@1", "support@2"]
    assert listed[0]["metrics"] == {"eval_loss": 0.25}


def test_quiet_prints_ids_only(registry: Registry) -> None:
    listed = run("adapters", "list", "--registry", registry.root, "--quiet")
    assert listed.stdout.split("\n") == ["sales@1", "support@1", "support@2", ""]
    assert run("adapters", "show", "support@latest", "--registry", registry.root, "-q").stdout == "support@2\n"


def test_quiet_prints_nothing_where_there_is_nothing(tmp_path: Path) -> None:
    assert run("adapters", "list", "--registry", tmp_path, "-q").stdout == ""


def test_list_goes_on_past_a_damaged_log(registry: Registry) -> None:
    Path(registry.root, "_log", "000000000001.json").write_text("{")
    result = run("adapters", "list", "--registry", registry.root, "--json")
    assert [adapter["id"] for adapter in last(result)] == ["sales@1", "support@2"]
    assert "_log/000000000001.json cannot be read" in result.stderr


def test_list_of_nothing(tmp_path: Path) -> None:
    assert "is empty" in run("adapters", "list", "--registry", tmp_path).stdout
    assert last(run("adapters", "list", "--registry", tmp_path, "--json")) == []
    result = run("adapters", "list", "--registry", tmp_path / "none")
    assert result.exit_code == 3
    assert "no registry is here" in result.stderr


def test_show(registry: Registry) -> None:
    result = run("adapters", "show", "support", "--registry", registry.root)
    assert result.exit_code == 0
    for part in (
        "support@2",
        "eval_loss",
        "t[1]",
        str(registry.path(registry.resolve("support"))),
        "adapter_model.safetensors",
    ):
        assert part in result.stdout
    shown = last(run("adapters", "show", "support@1", "--registry", registry.root, "--verify", "--json"))
    assert (shown["id"], shown["versions"], shown["verified"]) == ("support@1", [1, 2], True)


@pytest.mark.parametrize(
    ("reference", "code", "message"),
    [
        ("nobody", 3, "there are: sales, support"),
        ("support@9", 3, "there are: 1, 2"),
        ("../x", 2, "the name must"),
        ("a@b@c", 2, "'@'"),
    ],
)
def test_show_what_is_not_there(registry: Registry, reference: str, code: int, message: str) -> None:
    result = run("adapters", "show", reference, "--registry", registry.root)
    assert result.exit_code == code
    assert message in result.stderr


def test_verify_finds_damage(registry: Registry) -> None:
    path = registry.path(registry.resolve("support")) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert run("adapters", "show", "support", "--registry", registry.root).exit_code == 0
    result = run("adapters", "show", "support", "--registry", registry.root, "--verify")
    assert result.exit_code == 1
    assert "support@2 is corrupt: adapter_model.safetensors has changed" in result.stderr


def test_serve_says_what_is_wrong_before_anything_starts(tmp_path: Path) -> None:
    config = tmp_path / "serve.yaml"
    assert run("serve", config).exit_code == 3
    config.write_text(
        "base: {model: ./base}\nregistry: ./registry\nengine: {max_lora_rank: 7, max_loras: 0}\ncolour: red\n"
    )
    result = run("serve", config, "--set", "http.port=none", "--set", "oops")
    assert result.exit_code == 2
    for part in ("--set oops", "engine.max_lora_rank", "engine.max_loras", "colour: unknown key", "http.port"):
        assert part in result.stderr


def test_help() -> None:
    for command in (("serve",), ("evaluate",), ("adapters",), ("adapters", "list"), ("adapters", "show")):
        result = run(*command, "--help")
        assert result.exit_code == 0
