"""Registries from before there was a log: ``name/version/{manifest.json, adapter_config.json, …}``, and no aliases.

They are read as they are. The first write makes their versions the first event of a log (``log.py``), and from
then on the log alone says what is there; the files stay where they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from serving.manifest import Manifest, is_safe_name
from serving.registry.events import Adopted, State, fold

MANIFEST_FILE = "manifest.json"


def read(root: Path) -> State:
    """The state of a registry without a log; empty if nothing of the kind is there."""
    manifests: list[Manifest] = []
    damage: list[str] = []
    for name, version in _versions(root):
        where = f"{name}/{version}/{MANIFEST_FILE}"
        try:
            manifest = Manifest.model_validate_json((root / where).read_bytes())
        except (ValidationError, OSError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error.strerror
            damage.append(f"{where} cannot be read ({reason})")
            continue
        if (manifest.name, manifest.version) == (name, version):
            manifests.append(manifest)
        else:
            damage.append(f"{where} describes {manifest.id}")
    if not manifests and not damage:
        return State()
    stamp = {"seq": 1, "id": "legacy", "at": datetime.now(UTC), "by": "a registry without a log"}
    return fold(State(), [Adopted.model_validate({**stamp, "manifests": tuple(manifests)})], 0, damage)


def _versions(root: Path) -> Iterator[tuple[str, int]]:
    for name in _subfolders(root):
        numbers = [number for number in _subfolders(root / name) if number.isascii() and number.isdigit()]
        if is_safe_name(name):
            # A folder named by content may be all digits too, but it holds no manifest of its own.
            yield from sorted(
                (name, int(number)) for number in numbers if not number.startswith("0") and len(number) < 10
            )


def _subfolders(path: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in path.iterdir() if entry.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return []
