"""What an evaluation leaves in a real registry: scores and a promotion. The models are a small HTTP server's."""

from __future__ import annotations

import json
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from loraloom import app
from serving.registry import Registry
from tests.serving.evaluate.flaky import Flaky, flaky_server
from tests.serving.make import identity, make_adapter

ROWS = 20
SHARES = {"tiny": 2, "support@1": 8, "support@2": 14, "support@3": 9}
"""How many of the rows each model answers rightly."""


@dataclass
class Place:
    """A server, its registry, and rows."""

    server: Flaky
    registry: Registry
    folder: Path

    @property
    def prod(self) -> object:
        self.registry.refresh()
        return self.registry.aliases("support").get("prod")

    def run(self, models: str, *options: str) -> Result:
        fixed = ["--data", str(self.folder / "rows.jsonl"), "--url", self.server.url, "--out", str(self.folder / "out")]
        fixed += ["--registry", str(self.folder / "registry"), "--json"]
        return CliRunner().invoke(app, ["evaluate", "--models", models, *fixed, *options])

    def evaluate(self, models: str, *options: str) -> dict[str, Any]:
        result = self.run(models, *options)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture
def place(tmp_path: Path, base: Path) -> Generator[Place]:
    registry = Registry(tmp_path / "registry")
    rows = [
        {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}"}]}
        for n in range(ROWS)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with flaky_server() as server:
        server.says = lambda model, question: f"a{question[1:]}" if int(question[1:]) < SHARES[model] else "?"
        for version in (1, 2, 3):
            adapter = make_adapter(tmp_path / f"adapter-{version}", base, seed=version)
            manifest = registry.publish("support", adapter, identity(base), metrics={}, lineage={})
            server.created[manifest.id] = int(manifest.created_at.timestamp())
        yield Place(server, registry, tmp_path)


def test_scores_are_kept_with_the_version(place: Place) -> None:
    document = place.evaluate("base,support@1,support@2", "--metric", "exact_match", "--metric", "contains")
    assert document["recorded"] == ["support@1", "support@2"]
    place.registry.refresh()
    found = place.registry.scores("support", 2)
    assert set(found) == {"exact_match", "contains"}
    score = found["exact_match"]
    assert (score.value, score.count, score.data) == (0.7, ROWS, "rows.jsonl")
    assert score.data_sha256 == document["data_sha256"]
    assert score.low is not None
    assert score.high is not None
    assert 0.4 < score.low < 0.7 < score.high < 0.9
    assert not place.registry.scores("support", 3)


def test_the_best_is_promoted(place: Place) -> None:
    document = place.evaluate("support@1,support@2,support@3", "--promote-if", "exact_match > prod")
    assert document["against"] == "tiny"  # no prod yet: the base takes its place
    assert document["promotion"]["winner"] == "support@2"
    assert place.prod == 2
    event = place.registry.history("support")[-1]
    assert "exact_match > prod" in str(event.note)
    again = place.evaluate("support@1,support@2,support@3", "--promote-if", "exact_match > prod")
    assert (again["promotion"]["winner"], again["against"]) == (None, "support@2")
    assert place.prod == 2


def test_prod_is_evaluated_too(place: Place) -> None:
    place.registry.move("support", "prod", 1)
    document = place.evaluate("support@3", "--promote-if", "exact_match >= prod + 0.05")
    assert [model["id"] for model in document["models"]] == ["support@1", "support@3"]
    assert document["promotion"]["winner"] == "support@3"
    assert not document["promotion"]["supported"]
    assert place.prod == 3


def test_confident_wants_more(place: Place) -> None:
    place.registry.move("support", "prod", 1)
    document = place.evaluate("support@3", "--promote-if", "exact_match > prod", "--confident")
    assert document["promotion"]["winner"] is None
    assert "beyond chance" in document["promotion"]["reason"]
    document = place.evaluate("support@2,support@3", "--promote-if", "exact_match > prod", "--confident")
    assert (document["promotion"]["winner"], document["promotion"]["supported"]) == ("support@2", True)
    assert place.prod == 2


def test_another_alias_a_number_and_a_reference(place: Place) -> None:
    place.evaluate("support@1,support@3", "--promote-if", "exact_match > 0.42", "--alias", "canary")
    assert place.registry.refresh() in (True, False)
    assert place.registry.aliases("support")["canary"] == 3
    place.evaluate("support@2", "--promote-if", "exact_match > canary", "--alias", "prod")
    assert place.prod == 2
    document = place.evaluate("support@3", "--promote-if", "exact_match > support@2")
    assert document["promotion"]["winner"] is None
    assert place.run("support@3", "--promote-if", "exact_match > nobody").exit_code == 3


def test_a_move_meanwhile_is_a_conflict(place: Place) -> None:
    place.registry.move("support", "prod", 1)
    moved: list[int] = []

    def interfere(*_: object) -> bool:
        if not moved:
            moved.append(3)
            Registry(place.folder / "registry").move("support", "prod", 3, by="somebody else")
        return False

    place.server.fault = interfere
    result = place.run("support@2", "--promote-if", "exact_match > prod", "--concurrency", "1")
    assert result.exit_code == 4
    assert "somebody else" in result.stderr
    assert place.prod == 3
    assert place.registry.scores("support", 2)  # what was measured is not lost


def test_what_cannot_be_promoted_is_told_before_anything_is_asked(place: Place) -> None:
    place.registry.move("support", "prod", {1: 0.5, 2: 0.5})
    for models, options, rule in (
        ("base", ("--promote-if", "exact_match > 0.1"), "promotes versions of one adapter"),
        ("support@3", ("--promote-if", "exact_match > prod"), "split by weight"),
    ):
        result = place.run(models, *options)
        assert result.exit_code == 2, result.output
        assert rule in result.stderr
    assert not place.server.asked


def test_another_registry_is_told_before_anything_is_asked(place: Place) -> None:
    place.server.created["support@2"] += 1
    result = place.run("support@2,support@7")
    assert result.exit_code == 2
    assert "published at another time" in result.stderr
    assert "must hold the versions that are evaluated" in result.stderr
    assert not place.server.asked


def test_all_bad_options_are_told_at_once(place: Place) -> None:
    result = place.run(
        " , ",
        "--url",
        "ftp://x",
        "--metric",
        "bleu",
        "--temperature",
        "nan",
        "--max-tokens",
        "0",
        "--concurrency",
        "1001",
        "--confident",
        "--data",
        str(place.folder),
    )
    assert result.exit_code == 2
    named = ("--models", "--url", "--temperature", "--max-tokens", "--concurrency", "--confident")
    for part in (*named, "--metric: must be one of exact_match", "folder"):
        assert part in result.stderr, part
    result = place.run("base", "--promote-if", "f1 > prod", "--alias", "latest", "--metric", "perplexity")
    assert "--alias" in result.stderr
    assert "its metric must be one of --metric" in result.stderr
    assert not place.server.asked


def test_text_has_perplexity_only(place: Place) -> None:
    (place.folder / "rows.jsonl").write_text('{"text": "x"}\n')
    result = place.run("base", "--metric", "f1")
    assert result.exit_code == 2
    assert "needs rows with a reference" in result.stderr


def test_registries_that_are_not_there(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    assert place.run("base", "--registry", str(place.folder / "none")).exit_code == 3
    monkeypatch.chdir(place.folder)
    fixed = ["--data", "rows.jsonl", "--url", place.server.url, "--models", "base,support@2"]
    result = CliRunner().invoke(app, ["evaluate", *fixed])  # there is no runs/registry here
    assert result.exit_code == 0, result.output
    for part in ("support@2", "70.0 %", "+60.0 %", "20", "less tiny"):
        assert part in result.stdout, part
    assert "no scores are recorded" in result.stderr
    result = CliRunner().invoke(app, ["evaluate", *fixed, "--promote-if", "exact_match > 0.1"])
    assert result.exit_code == 3
    assert "no registry is here" in result.stderr
