from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import loraloom
from cluster.errors import ConflictError, Fault, InputError, LoraloomError, MachineError, NotFoundError

COMMANDS = {
    "sweep", "estimate", "compare", "dashboard", "publish", "demo", "serve", "evaluate", "doctor", "metrics", "schema",
    "adapters", "keys", "cluster",
}  # fmt: skip
runner = CliRunner()


def leaves(error: BaseException) -> typer.Typer:
    """An app like ours, whose one command ends with ``error``."""
    app = typer.Typer(cls=loraloom.FrontDoor, pretty_exceptions_enable=False)

    @app.command()
    def fail() -> None:
        raise error

    @app.command()
    def other() -> None: ...

    return app


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (LoraloomError("no"), 1),
        (InputError([Fault("f: x", "must be y", 3)]), 2),
        (NotFoundError("no"), 3),
        (ConflictError("no"), 4),
        (MachineError("no"), 5),
    ],
)
def test_errors_become_one_line_and_an_exit_code(error: LoraloomError, code: int) -> None:
    done = runner.invoke(leaves(error), ["fail"])
    assert done.exit_code == code
    assert done.stderr == f"error: {error}\n"
    assert done.stdout == ""


def test_ctrl_c_leaves_with_130() -> None:
    done = runner.invoke(leaves(KeyboardInterrupt()), ["fail"])
    assert (done.exit_code, done.stderr) == (130, "interrupted\n")


def test_our_own_bugs_keep_their_traceback() -> None:
    done = runner.invoke(leaves(ZeroDivisionError("bug")), ["fail"])
    assert isinstance(done.exception, ZeroDivisionError)


def test_the_console_script_works() -> None:
    script = Path(sys.executable).with_name("loraloom")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith("loraloom 0.")
    done = subprocess.run(
        [script, "cluster", "check", "none.yaml"], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, "", "error: none.yaml: no such file\n")


def test_help_lists_every_command() -> None:
    done = runner.invoke(loraloom.app, ["--help"])
    assert done.exit_code == 0
    assert {name for name in COMMANDS if f" {name} " in done.stdout} == COMMANDS
    assert {command[0] for command in commands(loraloom.app)} == COMMANDS, "those that there are"


def commands(app: typer.Typer, *above: str) -> Iterator[list[str]]:
    """Every command, as it is typed."""
    for command in app.registered_commands:
        yield [*above, command.name or (command.callback.__name__ if command.callback else "")]
    for group in app.registered_groups:
        if group.typer_instance is not None:
            yield from commands(group.typer_instance, *above, str(group.name))


def test_help_says_nothing_of_exceptions() -> None:
    found = list(commands(loraloom.app))
    assert ["cluster", "start"] in found
    for arguments in found:
        done = runner.invoke(loraloom.app, [*arguments, "--help"])
        assert done.exit_code == 0, done.output
        assert "Raises" not in done.stdout, arguments


@pytest.mark.parametrize("arguments", [["nonsense"], ["--nonsense"], ["schema", "nonsense"], ["schema"]])
def test_wrong_usage_leaves_with_2(arguments: list[str]) -> None:
    assert runner.invoke(loraloom.app, arguments).exit_code == 2


@pytest.mark.parametrize("kind", ["sweep", "serve", "cluster"])
def test_schemas_are_strict_and_describe_every_field(kind: str) -> None:
    done = runner.invoke(loraloom.app, ["schema", kind])
    assert done.exit_code == 0
    schema: dict[str, Any] = json.loads(done.stdout)
    for name, model in {"": schema, **schema.get("$defs", {})}.items():
        if model.get("type") != "object":
            continue
        assert model["additionalProperties"] is False, name
        # A field whose description is its model's own carries only the reference.
        silent = [field for field, rules in model["properties"].items() if not {"description", "$ref"} & set(rules)]
        assert silent == [], f"{kind} {name}: fields without a description"
