from __future__ import annotations

import json
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from serving.adapters.catalogue import Catalogue, ServedBase
from serving.http.api_error import ApiError
from serving.manifest import BaseIdentity
from serving.registry import Registry
from serving.registry.events import Score
from tests.serving.make import identity, make_adapter


@pytest.fixture
def registry(tmp_path: Path, base: Path) -> Registry:
    registry = Registry(tmp_path / "registry")
    adapter = make_adapter(tmp_path / "adapter", base)
    big = make_adapter(tmp_path / "big", base, rank=32)
    stranger = BaseIdentity(model="elsewhere", fingerprint="0" * 64)
    for name, folder, trained_on in (
        ("support", adapter, identity(base)),
        ("support", adapter, identity(base)),
        ("big", big, identity(base)),
    ):
        registry.publish(name, folder, trained_on, metrics={"eval_loss": 1.0}, lineage={"trial": 7})
    registry.publish("stranger", adapter, identity(base), metrics={}, lineage={})
    path = Path(registry.root, "_log", "000000000004.json")
    event = json.loads(path.read_text())
    event["manifest"]["base"] = stranger.model_dump()
    path.write_text(json.dumps(event))
    return Registry(registry.root)


@pytest.fixture
def catalogue(registry: Registry, base: Path) -> Catalogue:
    started = datetime(2026, 1, 1, tzinfo=UTC)
    registry.refresh()
    return Catalogue(ServedBase("tiny", identity(base), max_rank=16, max_model_len=128, started_at=started), registry)


def error(catalogue: Catalogue, model: str) -> tuple[int, str | None]:
    with pytest.raises(ApiError) as caught:
        catalogue.find(model)
    assert model in caught.value.message
    assert caught.value.param == "model"
    return caught.value.status, caught.value.code


def found(catalogue: Catalogue, model: str) -> str:
    manifest = catalogue.find(model)
    assert manifest is not None
    return manifest.id


def cards(catalogue: Catalogue, *hidden: str) -> dict[str, dict[str, Any]]:
    document = json.loads(catalogue.cards(lambda model: model not in hidden))
    assert document["object"] == "list"
    return {card["id"]: card for card in document["data"]}


def test_what_a_request_gets(catalogue: Catalogue, registry: Registry) -> None:
    assert catalogue.find("tiny") is None
    assert found(catalogue, "support") == found(catalogue, "support@latest") == "support@2"
    assert found(catalogue, "support@1") == "support@1"
    registry.move("support", "prod", 1)
    assert found(catalogue, "support") == found(catalogue, "support@prod") == "support@1"
    registry.move("support", "prod", 2)
    assert found(catalogue, "support") == "support@2"


def test_a_split_alias_is_sticky(catalogue: Catalogue, registry: Registry) -> None:
    registry.move("support", "prod", {1: 0.5, 2: 0.5})
    users = [f"user-{number}" for number in range(200)]
    first = [catalogue.find("support", user) for user in users]
    assert [catalogue.find("support", user) for user in users] == first
    shares = Counter(manifest.id for manifest in first if manifest)
    assert set(shares) == {"support@1", "support@2"}
    assert min(shares.values()) > 60


@pytest.mark.parametrize(
    "model",
    ["nobody", "support@3", "support@prod", "../support", "..", "tiny:support@2", "support@2:x", "TINY", "a\nb", " "],
)
def test_unknown_models(catalogue: Catalogue, model: str) -> None:
    assert error(catalogue, model) == (404, "model_not_found")


def test_a_name_of_ten_thousand_characters_is_not_said_again(catalogue: Catalogue) -> None:
    with pytest.raises(ApiError) as caught:
        catalogue.find("a" * 10_000)
    assert len(caught.value.message) < 300


@pytest.mark.parametrize("model", ["big", "stranger", "stranger@1"])
def test_adapters_that_do_not_fit(catalogue: Catalogue, model: str) -> None:
    assert error(catalogue, model) == (422, "adapter_unfit")


def test_a_damaged_log(registry: Registry, catalogue: Catalogue) -> None:
    Path(registry.root, "_log", "000000000002.json").write_text("{")
    damaged = Registry(registry.root)
    damaged.refresh()
    catalogue = Catalogue(catalogue.base, damaged)
    assert error(catalogue, "support@2") == (503, "adapter_corrupt")
    assert list(cards(catalogue)) == ["tiny", "support", "support@latest", "support@1"]


def test_cards(catalogue: Catalogue, registry: Registry) -> None:
    shown = cards(catalogue)
    assert list(shown) == ["tiny", "support", "support@latest", "support@1", "support@2"]
    assert (shown["support"]["root"], shown["support"]["parent"]) == ("support@2", "tiny")
    assert shown["support"]["object"] == "model"
    assert shown["support"]["metadata"]["metrics"] == {"eval_loss": 1.0}
    assert shown["support"]["metadata"]["rank"] == 4
    assert (shown["tiny"]["parent"], shown["tiny"]["max_model_len"]) == (None, 128)
    assert json.loads(catalogue.card("support@latest", catalogue.find("support@latest"))) == shown["support@latest"]
    assert json.loads(catalogue.card("tiny", None)) == shown["tiny"]
    assert list(cards(catalogue, "tiny", "support@1")) == ["support", "support@latest", "support@2"]


def test_cards_know_splits_and_scores_once_they_are_told(catalogue: Catalogue, registry: Registry) -> None:
    cards(catalogue)
    registry.move("support", "prod", {1: 3, 2: 1})
    registry.record_scores("support@1", {"f1": Score(value=0.5, count=10, data="x.jsonl", at=datetime.now(UTC))})
    assert "support@prod" not in cards(catalogue)
    catalogue.forget()
    shown = cards(catalogue)
    assert shown["support@prod"]["metadata"]["split"] == {"support@1": 0.75, "support@2": 0.25}
    assert shown["support@1"]["metadata"]["scores"]["f1"]["value"] == 0.5


def test_cards_that_were_made_while_the_registry_changed_are_made_again(
    catalogue: Catalogue, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = registry.scores

    def change_meanwhile(name: str, version: int) -> dict[str, Score]:
        if "prod" not in registry.aliases("support"):
            registry.move("support", "prod", 1)
            catalogue.forget()
        return scores(name, version)

    monkeypatch.setattr(registry, "scores", change_meanwhile)
    assert "support@prod" not in cards(catalogue)
    assert "support@prod" in cards(catalogue)


def test_a_version_that_is_removed_while_its_card_is_made(
    catalogue: Catalogue, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = registry.scores

    def remove_first(name: str, version: int) -> dict[str, Score]:
        if version in registry.versions(name) and version == 1:
            registry.remove(f"{name}@{version}", force=True)
        return scores(name, version)

    manifest = catalogue.find("support@1")
    monkeypatch.setattr(registry, "scores", remove_first)
    assert list(cards(catalogue)) == ["tiny", "support", "support@latest", "support@2"]
    with pytest.raises(ApiError) as caught:
        catalogue.card("support@1", manifest)
    assert caught.value.status == 404
