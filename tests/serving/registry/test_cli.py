"""``loraloom adapters …``, over a folder and over S3."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from loraloom import app
from serving.registry import Registry, Score
from tests.serving.conftest import Publish
from tests.serving.s3 import S3Server


@pytest.fixture
def shelf(registry: Registry, publish: Publish) -> Registry:
    for name in ("support", "support", "sales"):
        publish(name, metrics={"eval_loss": 0.25}, lineage={"trial": "t[1]", "note": None}, by="ann")
    return registry


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["adapters", *(str(argument) for argument in arguments)], env={"COLUMNS": "200"})


def last(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])


def refused(result: Result, code: int, *parts: str) -> None:
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    for part in parts:
        assert part in result.stderr


def test_promote_and_roll_back(shelf: Registry) -> None:
    at = "--registry", shelf.root
    moved = last(run("promote", "support@1", *at, "--by", "ann", "--note", "first", "--json"))
    assert (moved["alias"], moved["before"], moved["target"]) == ("prod", None, 1)
    result = run("promote", "support@latest", "--by", "bob", "--expect", "1", *at)
    assert result.exit_code == 0
    assert "bob  moved support@prod: 1 -> 2" in result.stdout
    refused(run("promote", "support@1", "--expect", "1", *at), 4, "points to 2, not to 1 as expected: bob moved it at")
    refused(run("promote", "support@1", "--expect", "none", *at), 4, "not to nothing as expected")
    assert run("rollback", "support", *at, "-q").stdout == "6\n"
    assert Registry(shelf.root).aliases("support") == {"latest": 2, "prod": 1}
    refused(run("rollback", "support", *at), 4, "there is nothing earlier to go back to")
    shown = last(run("show", "support@1", *at, "--json"))
    assert [(event["kind"], event["by"], event["note"]) for event in shown["history"]][2:4] == [
        ("moved", "ann", "first"),
        ("moved", "bob", None),
    ]
    told = run("show", "support@1", *at).stdout
    for part in ("ann  moved support@prod: nothing -> 1 (first)", "rolled back support@prod: 2 -> 1", "t[1]"):
        assert part in told


def test_a_canary(shelf: Registry) -> None:
    at = "--registry", shelf.root
    moved = last(run("promote", "support@1", "--split", "2=0.1", "--alias", "beta", *at, "--json"))
    assert moved["target"] == {"1": 0.9, "2": 0.1}
    listed = {one["id"]: one["aliases"] for one in last(run("list", *at, "--json"))}
    assert listed == {"sales@1": {"latest": 1}, "support@1": {"beta": 0.9}, "support@2": {"latest": 1, "beta": 0.1}}
    assert "beta:0.9" in run("list", *at).stdout
    refused(run("show", "support@beta", *at), 2, "must be one version; it splits over 1 (0.9), 2 (0.1)")
    assert run("remove", "support@beta", *at).exit_code == 0
    assert Registry(shelf.root).aliases("support") == {"latest": 2}


def test_what_is_no_promotion(shelf: Registry) -> None:
    at = "--registry", shelf.root
    wrong = ("--split", "2=1.5", "--split", "x=0.1", "--split", "2", "--expect", "-1")
    refused(run("promote", "support", *wrong, *at), 2, "'2=1.5'", "'x=0.1'", "got '2'", "--expect", "say which version")
    refused(run("promote", "support@1", "--split", "1=0.1", *at), 2, "must name another version than support@1")
    refused(run("promote", "support@1", "--split", "2=0.6", "--split", "3=0.6", *at), 2, "must leave something")
    refused(run("promote", "support@1", "--split", "3=0.5", *at), 3, "there are: 1, 2")
    refused(run("promote", "support@1", "--alias", "latest", *at), 2, "always the highest version")
    refused(run("promote", "support@9", *at), 3, "there are: 1, 2")
    refused(run("promote", "../x@1", *at), 2, "the name must")
    assert len(Registry(shelf.root).history("support")) == 2


def test_remove(shelf: Registry) -> None:
    at = "--registry", shelf.root
    last(run("promote", "support@1", *at, "--json"))
    refused(run("remove", "support@1", *at), 4, "support@1 is what prod points to")
    refused(run("remove", "support", *at), 2, "must say what to remove")
    removed = last(run("remove", "support@1", "--force", "--note", "leaks", *at, "--json"))
    assert (removed["version"], removed["aliases"]) == (1, ["prod"])
    refused(run("show", "support@1", *at), 3, "it was removed by", "leaks")
    assert run("list", *at, "-q").stdout == "sales@1\nsupport@2\n"


def test_verify(shelf: Registry, tmp_path: Path) -> None:
    at = "--registry", shelf.root
    assert last(run("verify", *at, "--json"))["verified"] == ["sales@1", "support@1", "support@2"]
    (tmp_path / "bad").write_bytes(b"bad")
    folder = f"sales/{shelf.resolve('sales').digest[:16]}"
    shelf._store.upload(tmp_path / "bad", f"{folder}/adapter_config.json")
    result = run("verify", *at)
    refused(result, 1, "sales@1 is corrupt: adapter_config.json has changed")
    assert "2 of 3 versions are whole" in result.stdout
    assert run("verify", *at, "-q").stdout == "sales@1\n"
    assert run("verify", "support", "support@1", *at).exit_code == 0
    refused(run("pull", "sales@1", tmp_path / "copy", *at), 1, "sales@1 is corrupt")
    assert {path.name for path in tmp_path.iterdir()} <= {"adapter", "bad", "registry"}


def test_pull(shelf: Registry, adapter: Path, tmp_path: Path) -> None:
    at = "--registry", shelf.root
    assert last(run("pull", "support", tmp_path / "a" / "copy", *at, "--json"))["path"] == str(tmp_path / "a" / "copy")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / "copy" / file).read_bytes() == (adapter / file).read_bytes()
    refused(run("pull", "support", tmp_path / "a" / "copy", *at), 4, "already holds something")
    (tmp_path / "empty").mkdir()
    assert run("pull", "support@1", tmp_path / "empty", *at).exit_code == 0
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["copy"]


def test_scores_are_shown(shelf: Registry) -> None:
    score = Score(value=0.8125, low=0.75, high=0.875, count=32, data="eval.jsonl", at=datetime.now(UTC))
    shelf.record_scores("support@2", {"exact_match": score}, by="ci")
    at = "--registry", shelf.root
    assert "exact_match=0.8125 [0.75, 0.875]" in run("list", *at).stdout
    shown = run("show", "support@2", *at).stdout
    assert "score.exact_match" in shown
    assert "ci  scored support@2: exact_match" in shown
    assert last(run("show", "support@2", *at, "--json"))["scores"]["exact_match"]["count"] == 32


def test_votes_are_shown(shelf: Registry) -> None:
    shelf.record_vote(["support@1", "support@2", "base"], "support@2", by="alice")
    shelf.record_vote(["support@1", "support@2"], None, by="bob")
    at = "--registry", shelf.root
    assert "preferred=0.8333" in run("list", *at).stdout
    shown = run("show", "support@2", *at).stdout
    assert "alice  preferred support@2 to support@1, base" in shown
    assert "bob  preferred none of support@1, support@2" in shown
    assert re.search(r"votes\.support@1 +1 won, 0 lost, 1 tied", shown)
    assert last(run("show", "support@1", *at, "--json"))["votes"] == {"support@2": {"won": 0, "lost": 1, "tied": 1}}
    for _ in range(10):
        shelf.record_vote(["support@1", "support@2"], "support@1", by="carol")
    shelf.move("support", "prod", 2)
    shown = run("show", "support@2", *at).stdout
    assert "12 votes  by alice, bob, carol" in shown
    assert "preferred" not in shown.partition("history of support:")[2]
    assert "moved support@prod: nothing -> 2" in shown


@pytest.mark.parametrize(
    "command",
    [("list",), ("show", "x"), ("promote", "x@1"), ("rollback", "x"), ("remove", "x@1"), ("verify",), ("pull", "x")],
)
def test_places_that_are_no_registry(s3: S3Server, tmp_path: Path, command: tuple[str, ...]) -> None:
    refused(run(*command, "--registry", tmp_path / "none"), 3, "no registry is here")
    refused(run(*command, "--registry", "ftp://x/y"), 2, "must be a folder, or a URI that starts with one of s3://")
    refused(run(*command, "--registry", s3.uri("nowhere")), 2, "its bucket must exist, got 's3://nowhere'")
    gone = "s3://k:secret@bucket/x?endpoint_override=127.0.0.1:9&scheme=http"
    result = run(*command, "--registry", gone)
    refused(result, 5, "the registry s3://bucket/x does not answer")
    assert "secret" not in result.output
    assert run(*command, "--help").exit_code == 0
