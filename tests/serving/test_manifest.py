from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from cluster.errors import InputError
from serving.manifest import (
    AdapterReference,
    BaseIdentity,
    Manifest,
    architecture_fingerprint,
    base_identity,
    is_safe_name,
    parse_reference,
)
from tests.tiny import make_base


def manifest(**fields: Any) -> Manifest:
    document: dict[str, Any] = {
        "name": "support",
        "version": 2,
        "created_at": datetime(2026, 1, 2, tzinfo=UTC),
        "base": BaseIdentity(model="m", fingerprint="0" * 64),
        "rank": 8,
        "alpha": 16.0,
        "rslora": False,
        "target_modules": ("q_proj",),
        "parameters": 100,
        "metrics": {"eval_loss": 1.5},
        "lineage": {"sweep": "s", "trial": 3, "score": 0.5, "note": None},
        "files": {"a": "1", "b": "2"},
    }
    return Manifest(**(document | fields))


@pytest.mark.parametrize("name", ["a", "support", "support-2", "a.b_c", "0", "x" * 63])
def test_safe_names(name: str) -> None:
    assert is_safe_name(name)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/b", "a\\b", ".hidden", "-a", "A", "a@1", "a:b", "a b", "a\n", "ä", "x" * 64, "a\0"],
)
def test_unsafe_names(name: str) -> None:
    assert not is_safe_name(name)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("support", AdapterReference("support", None, None)),
        ("support@latest", AdapterReference("support", None, "latest")),
        ("support@prod", AdapterReference("support", None, "prod")),
        ("support@2", AdapterReference("support", 2, None)),
        ("7@7", AdapterReference("7", 7, None)),
    ],
)
def test_references(text: str, expected: AdapterReference) -> None:
    assert parse_reference(text) == expected
    assert parse_reference(str(expected)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "@",
        "@2",
        "support@",
        "support@0",
        "support@-1",
        "support@02",
        "support@1.5",
        "a@b@c",
        "../a",
        "a@../b",
        "a@B",
    ],
)
def test_no_references(text: str) -> None:
    with pytest.raises(InputError, match=r"name|after '@'"):
        parse_reference(text)


def test_a_manifest_survives_json() -> None:
    before = manifest()
    assert Manifest.model_validate_json(before.model_dump_json()) == before
    assert before.id == "support@2"


@pytest.mark.parametrize(
    "fields",
    [
        {"version": 0},
        {"rank": 0},
        {"metrics": {"loss": float("nan")}},
        {"created_at": "2026-01-01T00:00:00Z"},
        {"x": 1},
    ],
)
def test_manifests_are_strict(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        manifest(**fields)


def test_the_digest_is_that_of_the_contents() -> None:
    assert manifest().digest == manifest(version=3, files={"b": "2", "a": "1"}).digest
    assert manifest().digest != manifest(files={"a": "1", "b": "3"}).digest
    assert manifest().digest != manifest(files={"a": "1", "c": "2"}).digest


def test_the_fingerprint_is_that_of_the_architecture(tmp_path: Path) -> None:
    one = base_identity(str(make_base(tmp_path / "one", seed=0)))
    two = base_identity(str(make_base(tmp_path / "two", seed=1)))
    deeper = base_identity(str(make_base(tmp_path / "deeper", layers=3)))
    assert one.fits(two)
    assert not one.fits(deeper)
    assert (one.model, one.revision) == (str(tmp_path / "one"), None)


def test_the_fingerprint_ignores_other_fields() -> None:
    assert architecture_fingerprint({"vocab_size": 1, "rope_theta": 1}) == architecture_fingerprint({"vocab_size": 1})
    assert architecture_fingerprint({"vocab_size": 1}) != architecture_fingerprint({"vocab_size": 2})


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", json.dumps({"model_type": "no-such-model"})])
def test_a_base_without_a_readable_configuration(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"base\.model: must be a Hugging Face model"):
        base_identity(str(tmp_path))


def test_a_hub_id_without_a_revision_is_recorded_with_its_commit(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "hub" / "models--org--tiny"
    folder = make_base(cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    script = """
from serving.manifest import base_identity
for revision in (None, "main"):
    print(base_identity("org/tiny", revision).model_dump_json())
"""
    # A process of its own, because the cache's place is read when the library is imported.
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    lines = subprocess.run(
        [sys.executable, "-c", script], env=environment, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    unpinned, pinned = (BaseIdentity.model_validate_json(line) for line in lines)
    assert (unpinned.revision, pinned.revision) == (commit, "main")
    assert unpinned.fits(base_identity(str(folder)))
    assert base_identity(str(folder)).revision is None


def test_code_of_a_base_runs_only_where_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "custom_base"
    folder.mkdir()
    auto_map = {"AutoConfig": "configuration_ours.OursConfig"}
    (folder / "config.json").write_text(json.dumps({"model_type": "ours", "auto_map": auto_map, "vocab_size": 7}))
    (folder / "configuration_ours.py").write_text(
        "from transformers import PretrainedConfig\n\n\nclass OursConfig(PretrainedConfig):\n    model_type = 'ours'\n"
    )
    with pytest.raises(InputError, match="custom code"):
        base_identity(str(folder))
    assert base_identity(str(folder), trust_remote_code=True).model == str(folder)
