from __future__ import annotations

import logging
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import InputError, NotFoundError
from cluster.schema import to_yaml
from serving.access.key_file import KeyFile, key_digest
from serving.access.keys import ANONYMOUS, Key, KeyRing
from serving.http.api_error import ApiError

ALICE, BOB, EVE = "ll-alice", "ll-bob", "ll-eve"
NOON = datetime(2027, 1, 1, 12, tzinfo=UTC).timestamp()


def write(path: Path, **keys: dict[str, Any]) -> None:
    path.write_text(to_yaml(KeyFile.model_validate({"keys": keys})))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.yaml"
    write(
        path,
        alice={"sha256": key_digest(ALICE), "scopes": {"adapters": ["support", "sales-*"], "base": False}},
        bob={
            "sha256": key_digest(BOB),
            "scopes": {"admin": True},
            "expires_at": "2027-01-01T12:00:00Z",
            "limits": {"weight": 2},
        },
        eve={"sha256": key_digest(EVE), "revoked_at": "2026-01-01T00:00:00Z"},
    )
    return path


@pytest.fixture
def ring(file: Path) -> KeyRing:
    return KeyRing(file, clock=lambda: NOON - 1)


def refused(work: Callable[[], object]) -> ApiError:
    with pytest.raises(ApiError) as caught:
        work()
    return caught.value


@pytest.mark.parametrize("header", [f"Bearer {BOB}", f"bearer {BOB}", f"BEARER   {BOB} "])
def test_a_known_key_passes(ring: KeyRing, header: str) -> None:
    key = ring.authenticate(header)
    assert (key.id, key.admin, key.limits.weight) == ("bob", True, 2)


@pytest.mark.parametrize(
    ("header", "error"),
    [
        (None, ""),
        ("", ""),
        ("Basic abc", ""),
        (f"Basic {ALICE}", ""),
        (ALICE, ""),
        ("Bearer", ""),
        ("Bearer ", "invalid_token"),
        ("Bearer a b", "invalid_token"),
        (f"Bearer {ALICE}x", "invalid_token"),
        (f"Bearer {key_digest(ALICE)}", "invalid_token"),  # the file's content opens nothing
        ("Bearer \u00e4", "invalid_token"),
        ("Bearer " + "a" * 10_000, "invalid_token"),
        (f"Bearer {EVE}", "invalid_token"),
    ],
)
def test_anything_else_is_401(ring: KeyRing, header: str | None, error: str) -> None:
    found = refused(lambda: ring.authenticate(header))
    assert (found.status, found.code) == (401, "invalid_api_key")
    challenge = found.headers["WWW-Authenticate"]
    assert challenge.startswith("Bearer ")
    assert f'error="{error}"' in challenge if error else "error" not in challenge


def test_no_answer_repeats_the_key(ring: KeyRing) -> None:
    assert "unknown-secret" not in refused(lambda: ring.authenticate("Bearer unknown-secret")).message


def test_a_key_stops_at_the_second_of_its_expiry(file: Path) -> None:
    now = [NOON - 0.001]
    ring = KeyRing(file, clock=lambda: now[0])
    assert ring.authenticate(f"Bearer {BOB}").id == "bob"
    now[0] = NOON
    assert "expired at 2027-01-01T12:00:00Z" in refused(lambda: ring.authenticate(f"Bearer {BOB}")).message


@pytest.mark.parametrize(
    ("model", "allowed"),
    [
        ("support", True),
        ("support@7", True),
        ("support@prod", True),
        ("sales-", True),
        ("sales-emea@2", True),
        ("supports", False),
        ("my-support", False),
        ("Support", False),
        ("sales", False),
        ("sales-a\nx", False),
        ("@support", False),
        ("", False),
        ("base", False),
    ],
)
def test_scopes_go_by_the_name_alone(ring: KeyRing, model: str, allowed: bool) -> None:
    key = ring.authenticate(f"Bearer {ALICE}")
    assert key.may_ask(model, "base") is allowed
    if not allowed:
        error = refused(lambda: key.authorise(model, "base"))
        assert (error.status, error.code) == (403, "insufficient_scope")
        return
    key.authorise(model, "base")


def test_a_long_name_is_not_repeated_whole(ring: KeyRing) -> None:
    key = ring.authenticate(f"Bearer {ALICE}")
    assert len(refused(lambda: key.authorise("x" * 10_000, "base")).message) < 300


def test_a_key_without_adapters_asks_the_base_only(ring: KeyRing) -> None:
    key = ring.authenticate(f"Bearer {BOB}")
    assert key.may_ask("base", "base")
    assert not key.may_ask("support", "base")
    key.require_admin()
    assert refused(ring.authenticate(f"Bearer {ALICE}").require_admin).status == 403


def test_without_keys_clients_are_told_apart_by_address() -> None:
    assert ANONYMOUS.may_ask("anything\n", "base")
    assert refused(ANONYMOUS.require_admin).status == 403
    assert ANONYMOUS.tenant("10.0.0.1") != ANONYMOUS.tenant("10.0.0.2")


def test_a_key_is_one_tenant_wherever_it_comes_from(ring: KeyRing) -> None:
    key: Key = ring.authenticate(f"Bearer {ALICE}")
    assert key.tenant("10.0.0.1") == key.tenant("10.0.0.2") == "alice"


def test_a_changed_file_counts_at_the_next_refresh(file: Path, ring: KeyRing) -> None:
    assert not ring.refresh()
    write(file, carol={"sha256": key_digest("ll-carol")})
    assert ring.authenticate(f"Bearer {ALICE}").id == "alice"
    assert ring.refresh()
    assert ring.authenticate("Bearer ll-carol").id == "carol"
    assert refused(lambda: ring.authenticate(f"Bearer {ALICE}")).status == 401
    assert len(ring) == 1


def test_a_file_of_the_same_size_and_time_is_noticed_by_its_inode(file: Path, ring: KeyRing) -> None:
    stat = file.stat()
    other = file.with_name("other")
    other.write_text(file.read_text().replace(key_digest(ALICE), key_digest("ll-new")))
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.replace(file)
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    assert ring.refresh()
    assert ring.authenticate("Bearer ll-new").id == "alice"


@pytest.mark.parametrize("content", [b"keys: {", b"", b"\xff", b"keys: {x: {sha256: none}}", None])
def test_a_broken_file_neither_opens_nor_closes_the_server(
    file: Path, ring: KeyRing, content: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    whole = file.read_text()
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    with caplog.at_level(logging.ERROR):
        assert not ring.refresh()
        assert not ring.refresh()
    assert len(caplog.records) == 1
    assert ring.trouble
    assert str(file) in ring.trouble
    assert ring.authenticate(f"Bearer {ALICE}").id == "alice"
    assert refused(lambda: ring.authenticate("Bearer other")).status == 401
    file.write_text(whole)
    assert ring.refresh()
    assert ring.trouble is None


def test_a_ring_needs_a_file_to_begin_with(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="keys add"):
        KeyRing(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("keys: {a: {}, b: {sha256: x}}")
    with pytest.raises(InputError) as caught:
        KeyRing(tmp_path / "bad.yaml")
    assert len(caught.value.faults) == 2
