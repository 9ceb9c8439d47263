from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from loraloom import app
from serving.access.keys import KeyRing


def run(*arguments: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, ["keys", *(str(argument) for argument in arguments)], input=stdin)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.yaml"


def test_a_key_is_shown_once_and_opens_what_it_should(file: Path) -> None:
    made = run("add", file, "alice", "--adapter", "support", "--adapter", "sales-*", "--no-base", "--weight", 2)
    assert made.exit_code == 0, made.output
    key = made.stdout.strip()
    assert key not in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600
    found = KeyRing(file).authenticate(f"Bearer {key}")
    assert (found.id, found.limits.weight, found.base) == ("alice", 2, False)
    assert found.may_ask("sales-emea@3", "base")


def test_add_list_revoke_check(file: Path) -> None:
    key = json.loads(run("add", file, "bob", "--requests-per-minute", 60, "--days", 3, "--json").stdout)["key"]
    assert json.loads(run("check", file, "--stdin", "--json", stdin=f"{key}\n").stdout)["state"] == "valid"
    assert json.loads(run("check", file, "--json").stdout) == {"keys": 1, "valid": 1}
    assert run("revoke", file, "bob").exit_code == 0
    assert run("revoke", file, "bob").exit_code == 0
    checked = run("check", file, "--stdin", stdin=key)
    assert checked.exit_code == 4
    assert "revoked" in checked.stderr
    (listed,) = json.loads(run("list", file, "--json").stdout)
    assert (listed["id"], listed["state"], listed["limits"]["requests_per_minute"]) == ("bob", "revoked", 60)
    assert "sha256" not in listed
    table = run("list", file).stdout
    for part in ("bob", "revoked", "60 requests/min", "the base"):
        assert part in table


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("add", "FILE", "../x", "--weight", "0"), 2, "limits.weight"),
        (("add", "FILE", "x", "--no-base"), 2, "must allow something"),
        (("add", "FILE", "x", "--days", "0"), 2, "--days"),
        (("list", "FILE"), 3, "no such file"),
        (("revoke", "FILE", "x"), 3, "no such file"),
        (("check", "FILE"), 3, "no such file"),
    ],
)
def test_mistakes_are_told_and_leave_no_file(file: Path, arguments: tuple[str, ...], code: int, message: str) -> None:
    result = run(*(file if argument == "FILE" else argument for argument in arguments))
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert list(file.parent.iterdir()) == []


def test_an_id_is_taken_once(file: Path) -> None:
    assert run("add", file, "a").exit_code == 0
    assert run("add", file, "a").exit_code == 4
    assert run("revoke", file, "b").exit_code == 3
    assert run("check", file, "--stdin", stdin="ll-unknown\n").exit_code == 3
    assert run("check", file, "--stdin", stdin="\n").exit_code == 2


def test_a_broken_file_is_not_written_over(file: Path) -> None:
    file.write_text("keys: {a: {sha256: x, colour: red}}")
    result = run("add", file, "b")
    assert result.exit_code == 2
    assert "keys.a.sha256" in result.stderr
    assert "keys.a.colour" in result.stderr
    assert file.read_text() == "keys: {a: {sha256: x, colour: red}}"
