"""The files of a version in a registry's store: copied, hashed, compared, and swept away when nobody needs them."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from serving.manifest import Manifest
from serving.registry.errors import CorruptAdapterError
from serving.registry.events import State
from serving.registry.lookup import shelf_of
from serving.registry.store import Store

SWEEP_AFTER = timedelta(days=1)
"""Longer than any publication takes from its first file to its event."""

_CHUNK = 1 << 20
_BY_CONTENT = re.compile(r"[0-9a-f]{16}")


def copy_hashed(source: Path, target: Path) -> str:
    """Copy one file, write it through to the disk, and return the SHA-256 of what was copied."""
    sha256 = hashlib.sha256()
    with source.open("rb") as reader, target.open("xb") as writer:
        while chunk := reader.read(_CHUNK):
            sha256.update(chunk)
            writer.write(chunk)
        writer.flush()
        os.fsync(writer.fileno())
    return sha256.hexdigest()


def hash_file(path: Path) -> str | None:
    """The SHA-256 of a file; None if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def hash_object(store: Store, key: str, target: Path | None = None) -> str | None:
    """The SHA-256 of an object, copied to ``target`` on the way if that is given; None if there is no such object.

    Raises:
        RegistryUnreachableError: the store does not answer.
        OSError: ``target`` cannot be written.
    """
    sha256 = hashlib.sha256()
    chunks = store.chunks(key)
    try:
        first = next(chunks, b"")
    except FileNotFoundError:
        return None
    if target is None:
        sha256.update(first)
        for chunk in chunks:
            sha256.update(chunk)
        return sha256.hexdigest()
    with target.open("xb") as writer:
        writer.write(first)
        sha256.update(first)
        for chunk in chunks:
            writer.write(chunk)
            sha256.update(chunk)
    return sha256.hexdigest()


def compare(manifest: Manifest, found: dict[str, str | None]) -> None:
    """Compare hashes, by file name, with those of the manifest.

    Raises:
        CorruptAdapterError: all files that are missing (None) or differ.
    """
    broken = [
        f"{name} {'cannot be read' if found.get(name) is None else 'has changed since it was published'}"
        for name, sha256 in sorted(manifest.files.items())
        if found.get(name) != sha256
    ]
    if broken:
        raise CorruptAdapterError(f"{manifest.id} is corrupt: {', '.join(broken)}")


def sweep(store: Store, state: State, names: Iterable[str] | None = None) -> list[str]:
    """Remove folders whose files no version needs, where all of that is older than ``SWEEP_AFTER``.

    Age is what makes this safe without locks: a publication writes its files anew, even those that are there, and needs
    less than that to its event.

    Args:
        store: Where the files are.
        state: The newest state.
        names: Whose folders to look at; all if left out.

    Returns:
        The folders that were removed.
    """
    before = datetime.now(UTC) - SWEEP_AFTER
    folders: dict[str, list[tuple[str, datetime]]] = {}
    for prefix in [""] if names is None else names:
        for stored in store.keys(prefix):
            folders.setdefault(stored.key.rpartition("/")[0], []).append((stored.key, stored.changed_at))
    swept = [
        folder
        for folder, found in folders.items()
        if _is_unneeded(state, folder, before) and all(changed_at < before for _, changed_at in found)
    ]
    for folder in swept:
        store.delete(key for key, _ in folders[folder])
    return sorted(swept)


def _is_unneeded(state: State, folder: str, before: datetime) -> bool:
    """True for a folder of a removed version, and for one that has a content's name and no version."""
    name, _, content = folder.partition("/")
    known = shelf_of(state, name).folders
    if folder in known:
        since = known[folder]
        return since is not None and since < before
    return _BY_CONTENT.fullmatch(content) is not None
