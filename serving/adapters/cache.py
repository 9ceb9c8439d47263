"""Copies of adapters on this machine, shared by all processes of a user: the engine loads from them.

    ~/.cache/loraloom/adapters/
      0f…/             the files of one content, named by its digest: adapter_config.json, adapter_model.safetensors
      0f….lock         held (flock, shared) by each process that uses the copy, (exclusive) by one that removes it
      .fetch-x7ab/     a copy on its way here, or what a killed process left of one

**Contract.** ``hold`` gives the folder of a copy whose hashes are right *now*; as long as somebody holds it, no process
removes it. What a process held is free once it ends, however it ends: the locks are the kernel's. Copies are made in a
folder of their own and moved here file by file, each at one stroke; a crash in between leaves a copy that the next
``hold`` finds wanting and completes. The bound is kept by removing what was used least recently; what is held may
exceed it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import threading
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path

from cluster.storage import disk_trouble
from serving.manifest import Manifest
from serving.registry import Registry
from serving.registry.errors import CorruptAdapterError
from serving.registry.files import compare, hash_file
from serving.scratch import Scratch

DEFAULT_GIB = 20.0
_FETCH = ".fetch-"
_GONE = ".gone-"
_WHERE = "the adapter cache"


def default_folder() -> Path:
    """``$XDG_CACHE_HOME/loraloom/adapters``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loraloom" / "adapters"


@dataclass
class _Held:
    """A copy that this process uses, or is about to."""

    using: int = 0
    lock: int | None = None
    turn: threading.Lock = field(default_factory=threading.Lock)


class AdapterCache:
    """See the head of this file. Threads may share one; processes share the folder.

    Args:
        registry: Where copies come from.
        folder: Where they are kept; ``default_folder()`` if left out.
        limit_gib: Size that is kept, in GiB, unless more than that is in use.
    """

    def __init__(self, registry: Registry, folder: Path | None = None, *, limit_gib: float = DEFAULT_GIB) -> None:
        self.folder = (folder or default_folder()).absolute()
        self._registry = registry
        self._limit = int(limit_gib * 2**30)
        self._held: dict[str, _Held] = {}
        self._guard = threading.Lock()

    def hold(self, manifest: Manifest) -> Path:
        """The folder with verified copies of a version's files; ``release`` its digest as often as it was held.

        The hashes are compared whenever this process begins to hold a copy; a copy that is wrong is fetched anew.

        Raises:
            CorruptAdapterError: the registry's files are missing or changed.
            RegistryUnreachableError: there is no right copy here, and the registry's store does not answer.
            MachineError: the cache cannot be written.
        """
        digest = manifest.digest
        with self._guard:
            held = self._held.setdefault(digest, _Held())
            held.using += 1
        try:
            with held.turn:
                if held.lock is None:
                    held.lock = self._take(manifest)
        except BaseException:
            self.release(digest)
            raise
        return self.folder / digest

    def release(self, digest: str) -> None:
        """Give up one ``hold``; the copy stays until its room is needed. Releasing what is not held does nothing."""
        with self._guard:
            held = self._held.get(digest)
            if held is None:
                return
            held.using -= 1
            if held.using > 0:
                return
            del self._held[digest]
            if held.lock is not None:
                with contextlib.suppress(OSError):
                    os.utime(self.folder / digest)  # used until now
                os.close(held.lock)

    def close(self) -> None:
        """Give up everything that this process holds."""
        with self._guard:
            locks = [held.lock for held in self._held.values() if held.lock is not None]
            self._held.clear()
        for lock in locks:
            os.close(lock)

    def size(self) -> int:
        """Bytes of all copies."""
        return sum(_size(folder) for folder in self._copies())

    def _take(self, manifest: Manifest) -> int:
        """A shared lock on a right copy."""
        with disk_trouble(_WHERE, self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = self._share(manifest.digest)
        try:
            with disk_trouble(_WHERE, self.folder):
                copy = self.folder / manifest.digest
                if not _is_right(copy, manifest):
                    with self._fetching(manifest.digest):
                        if not _is_right(copy, manifest):  # nobody else has fetched it meanwhile
                            self._fetch(manifest)
                    self._make_room()
                os.utime(copy)
        except BaseException:
            os.close(lock)
            raise
        return lock

    def _share(self, digest: str) -> int:
        """Lock a copy against removal. Its lock's file is removed with it, so the one that was locked may be gone."""
        path = self.folder / f"{digest}.lock"
        while True:
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(lock, fcntl.LOCK_SH)
            if _is_same(lock, path):
                return lock
            os.close(lock)

    @contextlib.contextmanager
    def _fetching(self, digest: str) -> Generator[None]:
        """One process at a time fetches a content; the others wait, and find it. Two at once would do no harm."""
        path = self.folder / f".{digest}.fetching"
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            path.unlink(missing_ok=True)
            os.close(lock)

    def _fetch(self, manifest: Manifest) -> None:
        scratch = Scratch(self.folder, _FETCH)
        try:
            self._registry.fetch(manifest, scratch.path)
            target = self.folder / manifest.digest
            target.mkdir(exist_ok=True)
            for file in manifest.files:
                if (target / file).is_dir():
                    shutil.rmtree(target / file)
                (scratch.path / file).replace(target / file)
        finally:
            scratch.close()

    def _make_room(self) -> None:
        """Remove copies that nobody holds, the least recently used first, until the rest is within the bound."""
        copies = [(folder, _size(folder), _used_at(folder)) for folder in self._copies()]
        excess = sum(size for _, size, _ in copies) - self._limit
        for folder, size, _ in sorted(copies, key=lambda copy: copy[2]):
            if excess <= 0:
                return
            if self._remove(folder):
                excess -= size

    def _remove(self, folder: Path) -> bool:
        """Remove a copy unless a living process holds it."""
        path = folder.with_name(f"{folder.name}.lock")
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_same(lock, path):
                return False
            # Out of sight at one stroke: a crash in the middle of the removal leaves no half of a copy.
            gone = Scratch(self.folder, _GONE)
            try:
                folder.rename(gone.path / folder.name)
                path.unlink()
            finally:
                gone.close()
        except (BlockingIOError, FileNotFoundError):
            return False
        else:
            return True
        finally:
            os.close(lock)

    def _copies(self) -> list[Path]:
        with contextlib.suppress(FileNotFoundError):
            return [path for path in self.folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
        return []


def _is_right(folder: Path, manifest: Manifest) -> bool:
    try:
        compare(manifest, {name: hash_file(folder / name) for name in manifest.files})
    except CorruptAdapterError:
        return False
    return True


def _is_same(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _size(folder: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return sum(file.stat().st_size for file in folder.iterdir())
    return 0


def _used_at(folder: Path) -> float:
    with contextlib.suppress(FileNotFoundError):
        return folder.stat().st_mtime
    return 0.0
