"""The registry over a folder and over S3: one suite, because both must behave alike."""

from __future__ import annotations

import hashlib
import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import binomtest

from cluster.errors import ConflictError, InputError, NotFoundError
from serving.registry import CorruptAdapterError, CorruptRegistryError, Registry, Score
from serving.registry.events import Moved
from serving.registry.store import Store
from serving.registry.votes import Tally, Votes
from tests.serving.conftest import Publish
from tests.serving.make import edit_config, identity


def store_of(registry: Registry) -> Store:
    return registry._store


def damage(registry: Registry, key: str, content: bytes | None, tmp_path: Path) -> None:
    """Replace or remove an object behind the registry's back."""
    if content is None:
        store_of(registry).delete([key])
        return
    (tmp_path / "damage").write_bytes(content)
    store_of(registry).upload(tmp_path / "damage", key)


def weights_key(registry: Registry, name: str = "support") -> str:
    manifest = registry.resolve(name)
    return f"{manifest.name}/{manifest.digest[:16]}/adapter_model.safetensors"


def test_what_is_published_is_there(
    registry: Registry, publish: Publish, adapter: Path, base: Path, tmp_path: Path
) -> None:
    manifest = publish(metrics={"eval_loss": 1.25}, lineage={"sweep": "s", "trial": 3, "lr": 1e-4, "note": None})
    reader = Registry(registry.root)
    for one in (registry, reader):
        for reference in ("support", "support@1", "support@latest"):
            assert one.resolve(reference) == manifest
    assert (manifest.id, manifest.rank, manifest.alpha, manifest.rslora) == ("support@1", 4, 8.0, False)
    assert (manifest.metrics, manifest.base) == ({"eval_loss": 1.25}, identity(base))
    assert manifest.lineage == {"sweep": "s", "trial": 3, "lr": 1e-4, "note": None}
    assert abs((datetime.now(UTC) - manifest.created_at).total_seconds()) < 60
    (tmp_path / "copy").mkdir()
    reader.fetch(manifest, tmp_path / "copy")
    assert {file.name for file in (tmp_path / "copy").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    for name, sha256 in manifest.files.items():
        content = (adapter / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == sha256
        assert (tmp_path / "copy" / name).read_bytes() == content
    reader.verify(manifest)
    assert registry.location(manifest).startswith(registry.where)


def test_versions_count_up_and_latest_follows(registry: Registry, publish: Publish) -> None:
    assert [publish().version for _ in range(11)] == list(range(1, 12))
    publish("other")
    assert registry.names() == ["other", "support"]
    assert registry.versions("support") == list(range(1, 12))
    assert registry.aliases("support") == {"latest": 11}
    assert registry.resolve("support").version == 11
    assert registry.resolve("support@2").version == 2


def test_only_the_adapter_is_copied(registry: Registry, publish: Publish, adapter: Path) -> None:
    (adapter / "README.md").write_text("model card")
    (adapter / "checkpoint").mkdir()
    publish()
    files = {stored.key.rpartition("/")[2] for stored in store_of(registry).keys("support")}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}


def test_a_registry_that_is_not_there_is_empty(registry: Registry) -> None:
    assert (registry.names(), registry.versions("support"), registry.aliases("support")) == ([], [], {})
    assert registry.history("support") == []
    assert not registry.refresh()
    with pytest.raises(NotFoundError, match=r"support: there is no such adapter in the registry \(it is empty\)"):
        registry.resolve("support")
    assert store_of(registry).keys("") == []


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("none", "there are: support"),
        ("support@3", "there are: 1, 2"),
        ("support@prod", "it has: latest"),
        ("none@1", "no such adapter"),
    ],
)
def test_what_is_not_there_is_said_with_what_is(
    registry: Registry, publish: Publish, reference: str, message: str
) -> None:
    publish()
    publish()
    with pytest.raises(NotFoundError, match=message):
        registry.resolve(reference)


@pytest.mark.parametrize(
    "reference",
    ["../adapter", "..", ".", "", "support@../1", "/etc", "support/1", "support@1/..", "a\0b", "%2e%2e", "a" * 10_000],
)
def test_names_never_climb(registry: Registry, publish: Publish, reference: str) -> None:
    publish()
    for call in (registry.resolve, registry.resolve_one, registry.remove):
        with pytest.raises(InputError):
            call(reference)
    for call in (lambda: publish(reference), lambda: registry.move(reference, "prod", 1)):
        with pytest.raises(InputError, match="name: must start with"):
            call()
    with pytest.raises(NotFoundError):
        registry.manifest(reference, 1)
    assert registry.versions(reference) == []
    assert [event.seq for event in registry.history("support")] == [1]


def test_all_faults_come_at_once_and_nothing_is_written(registry: Registry, publish: Publish, adapter: Path) -> None:
    edit_config(adapter, r=100, use_dora=True)
    with pytest.raises(InputError) as caught:
        publish("../evil", max_rank=64, metrics={"loss": float("nan")}, lineage={"x": object()}, by=" ", note="a\nb")
    text = str(caught.value)
    for part in ("name:", "adapter_config.json: r", "use_dora", "metrics.loss", "lineage.x", "by:", "note:"):
        assert part in text
    assert store_of(registry).keys("") == []


# aliases


def test_a_bare_name_follows_prod_and_without_it_the_latest(registry: Registry, publish: Publish) -> None:
    publish()
    publish()
    assert registry.resolve("support").version == 2
    registry.move("support", "prod", 1)
    assert registry.resolve("support").version == 1
    assert registry.resolve("support@latest").version == 2
    assert registry.aliases("support") == {"latest": 2, "prod": 1}
    publish()
    assert registry.resolve("support").version == 1


def test_who_moved_what_when(registry: Registry, publish: Publish) -> None:
    publish(by="ann")
    publish(note="lower loss")
    first = registry.move("support", "prod", 1, by="ann", note="first")
    second = registry.move("support", "prod", 2, by="bob")
    assert isinstance(first, Moved)
    assert isinstance(second, Moved)
    assert (first.before, first.target, first.by, first.note) == (None, 1, "ann", "first")
    assert (second.before, second.target, second.by, second.note) == (1, 2, "bob", None)
    assert abs((datetime.now(UTC) - second.at).total_seconds()) < 60
    history = Registry(registry.root).history("support")
    assert [(event.kind, event.by) for event in history][2:] == [("moved", "ann"), ("moved", "bob")]
    assert (registry.entry("support", 1).by, registry.entry("support", 2).note) == ("ann", "lower loss")
    assert "@" in registry.entry("support", 2).by


def test_a_move_to_where_it_points_already_is_none(registry: Registry, publish: Publish) -> None:
    publish()
    first = registry.move("support", "prod", 1)
    assert registry.move("support", "prod", {1: 5.0}) == first
    assert len(registry.history("support")) == 2


def test_aliases_that_cannot_be_moved(registry: Registry, publish: Publish) -> None:
    publish()
    for alias in ("latest", "Prod", "7", "", "a/b", "../x"):
        with pytest.raises(InputError, match="alias:"):
            registry.move("support", alias, 1)
    for target in ({}, {1: 0.0}, {1: -1.0, 2: 1.0}, {1: float("nan")}, {1: float("inf")}, {1: True}):
        with pytest.raises(InputError, match="target"):
            registry.move("support", "prod", target)
    for version in (2, {1: 1.0, 2: 1.0}):
        with pytest.raises(NotFoundError, match="there are: 1"):
            registry.move("support", "prod", version)
    with pytest.raises(NotFoundError, match="no such adapter"):
        registry.move("nobody", "prod", 1)
    assert len(registry.history("support")) == 1


def test_a_move_that_its_author_has_not_seen_is_not_overwritten(registry: Registry, publish: Publish) -> None:
    publish()
    publish()
    other = Registry(registry.root)
    seen = other.aliases("support").get("prod")
    registry.move("support", "prod", 1, by="ann", note="hotfix")
    with pytest.raises(
        ConflictError, match=r"support@prod points to 1, not to nothing as expected: ann moved it at .*hotfix"
    ):
        other.move("support", "prod", 2, expect=seen)
    other.move("support", "prod", {1: 1.0, 2: 1.0}, expect=1)
    assert registry.refresh()
    assert registry.move("support", "prod", 2, expect={1: 0.5, 2: 0.5}).by
    with pytest.raises(ConflictError, match=r"points to 2, not to 1 \(0.5\), 2 \(0.5\)"):
        registry.move("support", "prod", 1, expect={1: 3.0, 2: 3.0})


def test_a_split_is_sticky_by_key(registry: Registry, publish: Publish) -> None:
    for _ in range(2):
        publish()
    registry.move("support", "prod", {2: 1, 1: 9})
    assert Registry(registry.root).aliases("support")["prod"] == {1: 0.9, 2: 0.1}
    chosen = {key: registry.resolve("support", key).version for key in map(str, range(300))}
    reader = Registry(registry.root)
    assert chosen == {key: reader.resolve("support@prod", key).version for key in chosen}
    assert 10 <= sum(version == 2 for version in chosen.values()) <= 60
    assert {registry.resolve("support").version for _ in range(300)} == {1, 2}


def test_rollback_walks_back(registry: Registry, publish: Publish) -> None:
    for _ in range(4):
        publish()
    for target in (1, 2, {2: 0.5, 3: 0.5}, 4):
        registry.move("support", "prod", target)
    walked = [registry.rollback("support", by="eve") for _ in range(3)]
    assert [event.target for event in walked if isinstance(event, Moved)] == [{2: 0.5, 3: 0.5}, 2, 1]
    with pytest.raises(ConflictError, match="support@prod points to 1, and there is nothing earlier to go back to"):
        registry.rollback("support")
    registry.move("support", "prod", 4)
    assert Registry(registry.root).rollback("support").model_dump()["target"] == 1
    with pytest.raises(NotFoundError, match="no alias canary"):
        registry.rollback("support", "canary")


def test_rollback_passes_over_what_was_removed(registry: Registry, publish: Publish) -> None:
    for _ in range(3):
        publish()
    for target in (1, 2, 3):
        registry.move("support", "prod", target)
    registry.remove("support@2")
    registry.rollback("support")
    assert registry.aliases("support")["prod"] == 1


# removal


def test_what_an_alias_points_to_is_not_removed(registry: Registry, publish: Publish) -> None:
    for _ in range(3):
        publish()
    registry.move("support", "prod", {1: 0.5, 2: 0.5})
    registry.move("support", "canary", 2)
    for reference, named in (("support@2", "canary, prod"), ("support@1", "prod"), ("support@3", "latest")):
        with pytest.raises(ConflictError, match=f"{reference} is what {named} points to"):
            registry.remove(reference)
    registry.remove("support@2", force=True, by="ann", note="leaks")
    assert registry.aliases("support") == {"latest": 3}
    assert registry.versions("support") == [1, 3]
    with pytest.raises(NotFoundError, match=r"support@2: it was removed by ann at .*leaks"):
        registry.resolve("support@2")
    registry.remove("support@3", force=True)
    assert registry.resolve("support").version == 1
    assert publish().version == 4  # a number is never given twice
    last = registry.history("support")[-3]
    assert last.model_dump()["aliases"] == ("canary", "prod")


def test_an_alias_is_taken_away_and_the_last_version_too(registry: Registry, publish: Publish) -> None:
    publish()
    registry.move("support", "canary", 1)
    registry.remove("support@canary")
    assert registry.aliases("support") == {"latest": 1}
    for reference in ("support", "support@latest"):
        with pytest.raises(InputError, match="must say what to remove"):
            registry.remove(reference)
    with pytest.raises(NotFoundError, match="no alias canary"):
        registry.remove("support@canary")
    registry.remove("support@1", force=True)
    assert (registry.names(), registry.versions("support"), registry.aliases("support")) == ([], [], {})
    assert publish().version == 2


# scores


def test_scores_are_kept_with_the_version(registry: Registry, publish: Publish) -> None:
    publish()
    publish()
    now = datetime.now(UTC)
    old = Score(value=0.5, low=0.4, high=0.6, count=100, data="eval.jsonl", data_sha256="0" * 64, at=now)
    new = Score(value=0.7, count=10, data="other.jsonl", at=now)
    registry.record_scores("support@1", {"exact_match": old, "f1": old}, by="ann")
    registry.record_scores("support@1", {"exact_match": new})
    reader = Registry(registry.root)
    assert reader.scores("support", 1) == {"exact_match": new, "f1": old}
    assert reader.scores("support", 2) == {}
    reader.move("support", "prod", {1: 1, 2: 1})
    with pytest.raises(InputError, match=r"must be one version; it splits over 1 \(0.5\), 2 \(0.5\)"):
        reader.record_scores("support@prod", {"f1": new})
    with pytest.raises(InputError, match="scores: must hold at least one metric"):
        reader.record_scores("support@1", {})
    with pytest.raises(NotFoundError):
        reader.record_scores("support@7", {"f1": new})


# votes


def test_votes_are_counted_for_every_version_that_they_name(registry: Registry, publish: Publish) -> None:
    for name in ("support", "support", "sales"):
        publish(name)
    registry.record_vote(["support@1", "base"], "support@1", by="ann")
    registry.record_vote(["base", "support@1"], None)
    registry.record_vote(["support@1", "support@2", "sales@1", "base"], "support@2", note="shorter")
    reader = Registry(registry.root)
    votes = {version: reader.entry(*version).votes for version in (("support", 1), ("support", 2), ("sales", 1))}
    assert votes["support", 1] == Votes(3, {"base": Tally(1, 0, 1), "support@2": Tally(0, 1, 0)})
    assert votes["support", 2] == Votes(1, {other: Tally(1, 0, 0) for other in ("support@1", "sales@1", "base")})
    assert votes["sales", 1] == Votes(1, {"support@2": Tally(0, 1, 0)})
    score = reader.scores("support", 1)["preferred"]
    assert (score.value, score.count, score.data) == (0.5, 3, "votes")
    assert [type(event).__name__ for event in reader.history("support")] == ["Published"] * 2 + ["Voted"] * 3
    assert reader.history("sales")[-1].note == "shorter"


@pytest.mark.parametrize(("won", "lost"), [(1, 0), (0, 1), (7, 3), (60, 40), (0, 12)])
def test_the_interval_of_votes_is_wilson_s(won: int, lost: int) -> None:
    votes = Votes()
    for better in ["a@1"] * won + ["b@1"] * lost:
        votes = votes.after("a@1", ["a@1", "b@1"], better)
    value, low, high = votes.preferred()
    interval = binomtest(won, won + lost).proportion_ci(0.95, method="wilson")
    assert (value, low, high) == pytest.approx((won / (won + lost), interval.low, interval.high), abs=1e-12)


def test_by_chance_everybody_is_preferred_in_half_of_the_pairs() -> None:
    models = ["a@1", "b@1", "c@1", "base"]
    for own in models[:3]:
        votes = Votes()
        for better in models:  # each as often as any other
            votes = votes.after(own, models, better)
        assert votes.preferred()[0] == 0.5


@pytest.mark.parametrize(
    ("models", "better", "rule"),
    [
        (["support@1"], None, "must be 2 to 6 different models"),
        (["support@1", "support@1"], None, "must be 2 to 6 different models"),
        ([f"support@{number}" for number in range(1, 8)], None, "must be 2 to 6 different models"),
        (["support@1", "support@prod"], None, "must be versions"),
        (["support@1", "support@01"], None, "must be versions"),
        (["support@1", "../x"], None, "must be versions"),
        (["support@1", "base"], "support@2", "must be one of the models"),
    ],
)
def test_what_is_no_vote(registry: Registry, publish: Publish, models: list[str], better: str, rule: str) -> None:
    publish()
    with pytest.raises(InputError, match=rule):
        registry.record_vote(models, better)
    assert len(registry.history("support")) == 1


def test_a_vote_on_what_is_not_there(registry: Registry, publish: Publish) -> None:
    publish()
    with pytest.raises(NotFoundError):
        registry.record_vote(["support@1", "support@2"], None)
    publish()
    registry.record_vote(["support@1", "support@2"], "support@1")
    registry.remove("support@1")
    reader = Registry(registry.root)
    assert reader.scores("support", 2)["preferred"].value == 0
    assert reader.damage == ()


@pytest.mark.parametrize("models", [["support@1"], ["support@1", "support@1"], []])
def test_a_vote_that_was_altered_is_damage(
    registry: Registry, publish: Publish, tmp_path: Path, models: list[str]
) -> None:
    publish()
    publish()
    event = registry.record_vote(["support@1", "support@2"], None)
    altered = event.model_dump(mode="json") | {"models": models}
    damage(registry, f"_log/{event.seq:012}.json", json.dumps(altered).encode(), tmp_path)
    reader = Registry(registry.root)
    assert reader.versions("support") == [1, 2]
    (told,) = reader.damage
    assert "must be 2 to 6 different models" in told


def test_preferred_is_counted_and_not_recorded(registry: Registry, publish: Publish) -> None:
    publish()
    score = Score(value=1, count=1, data="mine", at=datetime.now(UTC))
    with pytest.raises(InputError, match="must not hold preferred"):
        registry.record_scores("support@1", {"preferred": score})


def test_votes_at_once_are_all_counted(registry: Registry, publish: Publish) -> None:
    publish()
    publish()
    voters = [Registry(registry.root) for _ in range(6)]
    with ThreadPoolExecutor(6) as threads:
        list(threads.map(lambda voter: voter.record_vote(["support@1", "support@2"], "support@2"), voters))
    registry.refresh()
    assert registry.entry("support", 2).votes == Votes(6, {"support@1": Tally(6, 0, 0)})


# damage


@pytest.mark.parametrize("kind", ["missing", "byte", "cut", "longer", "empty"])
def test_a_changed_file_is_found(
    registry: Registry, publish: Publish, adapter: Path, tmp_path: Path, kind: str
) -> None:
    manifest = publish()
    content = (adapter / "adapter_model.safetensors").read_bytes()
    damaged = {
        "missing": None, "byte": content[:-1] + b"\x01", "cut": content[:-1], "longer": content + b"\0", "empty": b"",
    }  # fmt: skip
    damage(registry, weights_key(registry), damaged[kind], tmp_path)
    (tmp_path / "copy").mkdir()
    for check in (lambda: registry.verify(manifest), lambda: registry.fetch(manifest, tmp_path / "copy")):
        with pytest.raises(CorruptAdapterError, match=r"support@1 is corrupt: adapter_model\.safetensors"):
            check()
    assert publish().version == 2
    registry.verify(manifest)  # the same content, published again, mends it


@pytest.mark.parametrize("content", [None, b"", b"{", b"{}", b'{"kind": "moved"}', b"swap"])
def test_a_damaged_log_is_read_as_far_as_it_goes_and_not_written(
    registry: Registry, publish: Publish, tmp_path: Path, content: bytes | None
) -> None:
    publish()
    publish()
    publish("other")
    log = [stored.key for stored in store_of(registry).keys("_log")]
    other = store_of(registry).read(log[0])
    damage(registry, log[1], other if content == b"swap" else content, tmp_path)
    reader = Registry(registry.root)
    assert (reader.names(), reader.versions("support")) == (["other", "support"], [1])
    assert len(reader.damage) == 1
    assert log[1] in reader.damage[0]
    with pytest.raises(CorruptAdapterError, match=r"support@2 is not found, and may be lost: _log/000000000002\.json"):
        reader.resolve("support@2")
    with pytest.raises(CorruptRegistryError, match=r"is not written to while its log is damaged: _log/000000000002"):
        reader.move("support", "prod", 1)
    assert registry.resolve("support@2").version == 2  # who has read it goes on


@pytest.mark.parametrize("content", [b"", b"{"])
def test_damage_that_comes_while_a_registry_is_open(
    registry: Registry, publish: Publish, tmp_path: Path, content: bytes
) -> None:
    publish()
    damage(registry, "_log/000000000002.json", content, tmp_path)
    with pytest.raises(CorruptRegistryError, match=r"_log/000000000002\.json cannot be read"):
        publish()
    assert registry.resolve("support").version == 1
    assert not registry.refresh()


def test_a_registry_travels_between_processes(registry: Registry, publish: Publish) -> None:
    manifest = publish()
    copy: Any = pickle.loads(pickle.dumps(registry))
    assert copy.resolve("support") == manifest
