from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import InputError, MachineError
from cluster.schema import load_spec
from serving.access.key_file import KeyEntry, KeyFile, change_keys, key_digest, new_key, parse_keys

DIGEST = "0" * 64


def faults(document: Any) -> dict[str, str]:
    with pytest.raises(InputError) as caught:
        parse_keys(json.dumps(document).encode(), "keys")
    return {fault.where.removeprefix("keys: "): fault.rule for fault in caught.value.faults}


def with_key(keys: KeyFile, name: str) -> KeyFile:
    return KeyFile(keys={**keys.keys, name: KeyEntry(sha256=key_digest(name))})


def test_keys_are_random_and_long_enough_for_a_plain_hash() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(key.startswith("ll-") and len(key) == 3 + 43 for key in keys)


def test_yaml_and_json_are_read_alike() -> None:
    text = f"keys:\n  a:\n    sha256: '{DIGEST}'\n    expires_at: 2027-01-01T00:00:00Z\n"
    document = {"keys": {"a": {"sha256": DIGEST, "expires_at": "2027-01-01T00:00:00Z"}}}
    assert parse_keys(text.encode(), "keys") == parse_keys(json.dumps(document).encode(), "keys")


def test_all_faults_come_at_once() -> None:
    found = faults(
        {
            "keys": {
                "good": {"sha256": DIGEST},
                "twin": {"sha256": DIGEST},
                "../bad": {"sha256": DIGEST[1:]},
                "idle": {"sha256": "1" * 64, "scopes": {"base": False}},
                "odd": {
                    "sha256": "2" * 64,
                    "scopes": {"adapters": ["a/b", "x@1"], "root": True},
                    "limits": {"requests_per_minute": 0, "weight": -1},
                    "expires_at": "2027-01-01",
                },
            }
        }
    )
    assert {
        "keys.twin.sha256", "keys.idle.scopes", "keys.odd.scopes.adapters.0", "keys.odd.scopes.adapters.1",
        "keys.odd.scopes.root", "keys.odd.limits.requests_per_minute", "keys.odd.limits.weight", "keys.odd.expires_at",
    } <= set(found)  # fmt: skip
    assert any("../bad" in place for place in found)
    assert "zone" in found["keys.odd.expires_at"]


@pytest.mark.parametrize("content", [b"", b"\xff", b"keys: [", b"- a\n", b"keys: {a: {sha256: 0}}"])
def test_a_file_that_is_none_is_told(content: bytes) -> None:
    with pytest.raises(InputError):
        parse_keys(content, "keys")


@pytest.mark.parametrize("name", ["keys.yaml", "keys.json"])
def test_a_change_is_read_back_and_only_its_owner_reads_it(tmp_path: Path, name: str) -> None:
    path = tmp_path / "new" / name
    change_keys(path, lambda keys: with_key(keys, "a"), create=True)
    path.chmod(0o644)
    after = change_keys(path, lambda keys: with_key(keys, "b"))
    assert load_spec(path, KeyFile) == after
    assert set(after.keys) == {"a", "b"}
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == [name]


def test_a_change_that_fails_leaves_everything_as_it_was(tmp_path: Path) -> None:
    def fail(keys: KeyFile) -> KeyFile:
        raise RuntimeError("no")

    path = tmp_path / "keys.yaml"
    with pytest.raises(RuntimeError):
        change_keys(path, fail, create=True)
    assert list(tmp_path.iterdir()) == []
    change_keys(path, lambda keys: with_key(keys, "a"), create=True)
    before = path.read_bytes()
    with pytest.raises(RuntimeError):
        change_keys(path, fail)
    with pytest.raises(InputError):  # two ids of one key
        change_keys(path, lambda keys: keys.model_copy(update={"keys": {**keys.keys, "b": keys.keys["a"]}}))
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["keys.yaml"]


def test_a_file_that_cannot_be_there_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MachineError, match="file of keys"):
        change_keys(tmp_path / "file" / "keys.yaml", lambda keys: keys, create=True)
    with pytest.raises(MachineError):
        change_keys(tmp_path / "none.yaml", lambda keys: keys)


def test_a_symbolic_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    real, link = tmp_path / "real" / "keys.yaml", tmp_path / "keys.yaml"
    change_keys(real, lambda keys: with_key(keys, "a"), create=True)
    link.symlink_to(real)
    change_keys(link, lambda keys: with_key(keys, "b"))
    assert link.is_symlink()
    assert set(load_spec(real, KeyFile).keys) == {"a", "b"}


WRITER = """
import sys
from pathlib import Path
from serving.access.key_file import KeyEntry, KeyFile, change_keys, key_digest

for number in range(15):
    name = f"{sys.argv[2]}-{number}"
    entry = KeyEntry(sha256=key_digest(name))
    change_keys(Path(sys.argv[1]), lambda keys: KeyFile(keys={**keys.keys, name: entry}), create=True)
"""


def test_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(number)]) for number in range(3)]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0, 0]
    assert set(load_spec(path, KeyFile).keys) == {f"{writer}-{number}" for writer in range(3) for number in range(15)}
