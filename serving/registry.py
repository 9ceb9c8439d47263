"""The registry: a folder of published adapters, ``name/version/``.

    registry/
      support/
        1/                        never changes once it is there
          adapter_config.json  adapter_model.safetensors  manifest.json
        2/
      .publish-x7ab/              a publication under way, or what a crash left of one; no name starts with a dot

**Contract.** ``publish`` is atomic: it prepares a hidden folder on the same file system, writes everything through to
the disk, and renames it to ``name/version``. That rename is the one moment at which the version and the alias
``latest``, which is always the highest version, come to be; before it nothing is visible, after it everything is. A
crash before it leaves a hidden folder, which a later publication removes. Publishers need not know of each other:
rename fails where a version is already there, and the loser takes the next number. Readers take no lock and see only
whole versions. Any process on any machine that shares the folder may do either.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from cluster.errors import Fault, InputError, LoraloomError, NotFoundError
from cluster.schema import parse_spec
from cluster.storage import disk_trouble
from serving.checks import CONFIG_FILE, WEIGHTS_FILE, CheckedAdapter, Sites, check_adapter
from serving.manifest import LATEST, NAME_RULE, BaseIdentity, Manifest, is_safe_name, parse_reference
from serving.scratch import Scratch

MANIFEST_FILE = "manifest.json"
_PUBLISHED_FILES = (CONFIG_FILE, WEIGHTS_FILE)
_HIDDEN = ".publish-"
_CHUNK = 1 << 20


class CorruptAdapterError(LoraloomError):
    """A published version is not what was published: files are missing, changed or unreadable."""


class Registry:
    """Published adapters under ``root``; see the head of this file for what is atomic."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def publish(
        self,
        name: str,
        adapter_dir: Path,
        base: BaseIdentity,
        *,
        metrics: Mapping[str, float],
        lineage: Mapping[str, str | int | float | None],
        max_rank: int | None = None,
        sites: Sites | None = None,
    ) -> Manifest:
        """Check ``adapter_dir`` and publish a copy of it as the next version of ``name``.

        Args:
            name: A safe name; see ``serving.manifest.NAME_RULE``.
            adapter_dir: A LoRA in PEFT's format. Only its configuration and weights are copied.
            base: The base that it was trained on.
            metrics: What was measured on it; finite numbers.
            lineage: Where it comes from.
            max_rank: Largest rank to accept; none if left out.
            sites: The base's linear layers, module path -> (out, in); with them each site's place and shape is checked.

        Raises:
            InputError: every rule that is broken by name, adapter, metrics or lineage. Nothing has been published.
            MachineError: the registry's folder cannot be made or written.
        """
        faults = [] if is_safe_name(name) else [Fault("name", NAME_RULE, name)]
        checked = None
        try:
            checked = check_adapter(adapter_dir, base, max_rank=max_rank, sites=sites)
        except InputError as error:
            faults += error.faults
        facts = {"metrics": dict(metrics), "lineage": dict(lineage), "created_at": datetime.now(UTC)}
        draft = _draft(name, base, checked, facts, faults)
        with disk_trouble("the registry", self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            scratch = Scratch(self.root, _HIDDEN)
            try:
                files = {file: copy_hashed(adapter_dir / file, scratch.path / file) for file in _PUBLISHED_FILES}
                return self._commit(draft.model_copy(update={"files": files}), scratch)
            finally:
                scratch.close()

    def resolve(self, reference: str) -> Manifest:
        """The manifest that ``name``, ``name@version`` or ``name@alias`` leads to now.

        Raises:
            InputError: it is not a reference.
            NotFoundError: there is no such name, version or alias; the message says what there is.
            CorruptAdapterError: the version is there, but its manifest cannot be read.
        """
        parsed = parse_reference(reference)
        if parsed.version is not None:
            return self.manifest(parsed.name, parsed.version)
        aliases = self.aliases(parsed.name)
        if not aliases:
            raise NotFoundError(self._unknown(parsed.name))
        if parsed.alias not in aliases:
            raise NotFoundError(
                f"{reference}: {parsed.name} has no alias {parsed.alias} (it has: {', '.join(sorted(aliases))})"
            )
        return self.manifest(parsed.name, aliases[parsed.alias])

    def manifest(self, name: str, version: int) -> Manifest:
        """The manifest of one version.

        Raises:
            NotFoundError: there is no such version.
            CorruptAdapterError: it cannot be read, or speaks of another version.
        """
        folder = self._folder(name, version)
        path = folder / MANIFEST_FILE
        try:
            manifest = Manifest.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            if folder.is_dir():
                raise CorruptAdapterError(f"{name}@{version} is corrupt: {MANIFEST_FILE} is missing") from None
            raise NotFoundError(self._unknown(name, version)) from None
        except (ValidationError, OSError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error.strerror
            raise CorruptAdapterError(
                f"{name}@{version} is corrupt: {MANIFEST_FILE} cannot be read ({reason})"
            ) from None
        if (manifest.name, manifest.version) != (name, version):
            raise CorruptAdapterError(f"{name}@{version} is corrupt: {MANIFEST_FILE} describes {manifest.id}")
        return manifest

    def path(self, manifest: Manifest) -> Path:
        """The folder of a version."""
        return self._folder(manifest.name, manifest.version)

    def names(self) -> list[str]:
        """All names that have a version, sorted; none if the registry is not there."""
        return sorted(name for name in _subfolders(self.root) if is_safe_name(name) and self.versions(name))

    def versions(self, name: str) -> list[int]:
        """The versions of ``name``, ascending; none if there is no such name."""
        if not is_safe_name(name):
            return []
        numbers = (folder for folder in _subfolders(self.root / name) if folder.isascii() and folder.isdigit())
        return sorted(int(number) for number in numbers if not number.startswith("0"))

    def aliases(self, name: str) -> dict[str, int]:
        """The aliases of ``name`` and the versions that they name now; none if there is no such name."""
        versions = self.versions(name)
        return {LATEST: versions[-1]} if versions else {}

    def verify(self, manifest: Manifest) -> None:
        """Read every file of a version and compare it with the SHA-256 in its manifest.

        Raises:
            CorruptAdapterError: all files that are missing or differ.
        """
        self._compare(manifest, {name: _hash_or_none(self.path(manifest) / name) for name in manifest.files})

    def fetch(self, manifest: Manifest, folder: Path) -> None:
        """Copy the files of a version into ``folder``, which must be empty, and verify what was copied.

        Raises:
            CorruptAdapterError: all files that are missing or differ.
        """
        found: dict[str, str | None] = {}
        for name in manifest.files:
            try:
                found[name] = copy_hashed(self.path(manifest) / name, folder / name)
            except OSError:
                found[name] = None
        self._compare(manifest, found)

    def _compare(self, manifest: Manifest, found: Mapping[str, str | None]) -> None:
        broken = [
            f"{name} {'cannot be read' if found[name] is None else 'has changed since it was published'}"
            for name, sha256 in sorted(manifest.files.items())
            if found[name] != sha256
        ]
        if broken:
            raise CorruptAdapterError(f"{manifest.id} is corrupt: {', '.join(broken)}")

    def _commit(self, draft: Manifest, scratch: Scratch) -> Manifest:
        """Rename the finished folder to the first free version; the rename is what publishes it."""
        home = self.root / draft.name
        home.mkdir(exist_ok=True)
        version = max(self.versions(draft.name), default=0) + 1
        while True:
            manifest = draft.model_copy(update={"version": version})
            _write_through(scratch.path / MANIFEST_FILE, manifest.model_dump_json(indent=2).encode() + b"\n")
            _sync_folder(scratch.path)
            try:
                scratch.path.rename(home / str(version))
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                version += 1  # another publisher took it between our look and our rename
                continue
            scratch.keep()
            _sync_folder(home)
            _sync_folder(self.root)
            return manifest

    def _folder(self, name: str, version: int) -> Path:
        if not is_safe_name(name) or version < 1:
            raise NotFoundError(self._unknown(name, version))
        return self.root / name / str(version)

    def _unknown(self, name: str, version: int | None = None) -> str:
        versions = self.versions(name)
        if version is not None and versions:
            return f"{name}@{version}: there is no such version (there are: {', '.join(map(str, versions))})"
        names = self.names()
        shelf = f"there are: {', '.join(names)}" if names else "it is empty"
        return f"{name}: there is no such adapter in {self.root} ({shelf})"


def _draft(
    name: str, base: BaseIdentity, checked: CheckedAdapter | None, facts: Mapping[str, object], faults: list[Fault]
) -> Manifest:
    """The manifest as far as it is known before the files are copied; raises ``faults`` and its own as one
    InputError.
    """
    # Where the adapter itself is at fault, a stand-in lets the other fields still be looked at.
    adapter = asdict(checked or CheckedAdapter(rank=1, alpha=1.0, rslora=False, target_modules=(), parameters=0))
    document = {"name": name, "version": 1, "base": base, "files": {}, **adapter, **facts}
    return parse_spec(document, Manifest, "publish", faults=faults)


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


def _hash_or_none(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def _write_through(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """Make the names in a folder survive a power cut; a file's own fsync does not."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _subfolders(path: Path) -> Iterator[str]:
    try:
        with os.scandir(path) as entries:
            yield from [entry.name for entry in entries if entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return
