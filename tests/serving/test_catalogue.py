from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from serving.api_error import ApiError
from serving.catalogue import Catalogue
from serving.engine import RoutedId
from serving.manifest import BaseIdentity
from serving.registry import Registry
from tests.serving.adapters import identity, make_adapter


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
    return Catalogue("tiny", identity(base), str(registry.root), max_rank=16, max_model_len=128, started_at=started)


def error(catalogue: Catalogue, model: str | None) -> tuple[int, str | None]:
    with pytest.raises(ApiError) as caught:
        catalogue.route(model)
    if model:
        assert model in caught.value.message
    assert caught.value.param == "model"
    return caught.value.status, caught.value.code


def test_routes(catalogue: Catalogue, registry: Registry) -> None:
    digest = registry.resolve("support").digest
    assert catalogue.route("tiny") == "tiny"
    assert catalogue.route("support") == str(RoutedId("tiny", "support@2", digest))
    assert catalogue.route("support@latest") == catalogue.route("support")
    assert catalogue.route("support@1") == str(RoutedId("tiny", "support@1", digest))


@pytest.mark.parametrize(
    "model",
    ["nobody", "support@3", "support@prod", "../support", "..", "tiny:support@2", "support@2:x", "TINY", "a\nb", " "],
)
def test_unknown_models(catalogue: Catalogue, model: str) -> None:
    assert error(catalogue, model) == (404, "model_not_found")


@pytest.mark.parametrize("model", [None, ""])
def test_no_model(catalogue: Catalogue, model: str | None) -> None:
    assert error(catalogue, model) == (400, "model_required")


@pytest.mark.parametrize("model", ["big", "stranger", "stranger@1"])
def test_adapters_that_do_not_fit(catalogue: Catalogue, model: str) -> None:
    assert error(catalogue, model) == (400, "adapter_unfit")


def test_a_damaged_log(catalogue: Catalogue, registry: Registry) -> None:
    Path(registry.root, "_log", "000000000002.json").write_text("{")
    assert error(catalogue, "support@2") == (500, "adapter_corrupt")
    assert [card["id"] for card in catalogue.cards()] == ["tiny", "support", "support@1"]


def test_cards(catalogue: Catalogue) -> None:
    cards = {card["id"]: card for card in catalogue.cards()}
    assert list(cards) == ["tiny", "support", "support@1", "support@2"]
    assert (cards["support"]["root"], cards["support"]["parent"], cards["support"]["object"]) == (
        "support@2",
        "tiny",
        "model",
    )
    assert cards["support"]["metadata"]["metrics"] == {"eval_loss": 1.0}
    assert (cards["tiny"]["parent"], cards["tiny"]["max_model_len"]) == (None, 128)
    assert catalogue.card("support@latest")["root"] == "support@2"
    assert catalogue.card("tiny") == cards["tiny"]
    with pytest.raises(ApiError, match="does not exist"):
        catalogue.card("nobody")


def test_a_publication_is_seen_at_once(catalogue: Catalogue, registry: Registry, base: Path, tmp_path: Path) -> None:
    assert error(catalogue, "new") == (404, "model_not_found")
    registry.publish("new", tmp_path / "adapter", identity(base), metrics={}, lineage={})
    assert catalogue.route("new").startswith("tiny:new@1:")
