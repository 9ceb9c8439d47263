"""Where a registry's objects lie: one small interface over a local folder and over an object store.

**Contract.** A key is a relative path such as ``support/0f…/adapter_config.json``. ``create`` is the one operation that
must be atomic against every other writer: the object is there whole, or not at all, and only one of several creators
of a key succeeds. It and ``upload`` return once the object is kept for good. ``upload`` replaces whole objects, so a
reader of the same key sees the old content or the new.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Generator, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, Protocol
from urllib.parse import unquote, urlsplit

from cluster.errors import MachineError
from cluster.storage import disk_trouble, local_folder
from serving.registry.errors import RegistryUnreachableError
from serving.scratch import Scratch

_WHERE = "the registry"
_SCRATCH = ".publish-"
_CHUNK = 1 << 20
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


class Stored(NamedTuple):
    """One object of a store."""

    key: str
    changed_at: datetime
    """When it was last written, by the store's clock."""
    size: int = 0
    """Bytes."""
    tag: str = ""
    """What the store says of its content (HTTP's ETag), if it says so."""


class Store(Protocol):
    """See the head of this file. A store that does not answer raises RegistryUnreachableError, within seconds."""

    @property
    def where(self) -> str:
        """The store as people are told of it: no secrets."""
        ...

    def exists(self) -> bool:
        """True if the folder is there; a bucket's prefix always is.

        Raises:
            InputError: there is no such bucket.
        """
        ...

    def read(self, key: str) -> bytes | None:
        """The content of a small object; None if there is none."""
        ...

    def read_many(self, keys: list[str]) -> list[bytes | None]:
        """The contents of many small objects, in the order of ``keys``."""
        ...

    def chunks(self, key: str) -> Iterator[bytes]:
        """The content of an object, piece by piece.

        Raises:
            FileNotFoundError: there is none.
        """
        ...

    def create(self, key: str, content: bytes) -> bool:
        """Write an object that is not there; False, and nothing is changed, if it is."""
        ...

    def upload(self, source: Path, key: str) -> None:
        """Write an object from a file."""
        ...

    def keys(self, prefix: str) -> list[Stored]:
        """All objects below the folder ``prefix`` (all that there are, if it is empty), by key."""
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects; those that are gone already do not matter."""
        ...

    def scratch(self) -> contextlib.AbstractContextManager[Path]:
        """An empty folder of this machine for files that will be uploaded; removed afterwards."""
        ...


def open_store(reference: str | Path, where: str = "registry") -> Store:
    """The store that a folder or a URI names. Nothing is asked of it yet.

    Raises:
        InputError: ``reference`` cannot name a store; ``where`` is the field that holds it.
        MachineError: the system does not let us look.
    """
    reference = str(reference)
    if reference.startswith("file://"):
        reference = unquote(urlsplit(reference).path)
    if _URI.match(reference):
        from serving.registry.object_store import ObjectStore

        return ObjectStore(reference, where)
    return LocalStore(local_folder(reference, where))


class LocalStore:
    """A folder, of this machine or shared; its file system must have hard links, which ``create`` is made of."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def where(self) -> str:
        """The folder."""
        return str(self.folder)

    def exists(self) -> bool:
        """True if the folder is there."""
        return self.folder.is_dir()

    def read(self, key: str) -> bytes | None:
        """As ``Store.read``."""
        with self._reading():
            try:
                return (self.folder / key).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def read_many(self, keys: list[str]) -> list[bytes | None]:
        """As ``Store.read_many``."""
        return [self.read(key) for key in keys]

    def chunks(self, key: str) -> Iterator[bytes]:
        """As ``Store.chunks``."""
        with self._reading(), (self.folder / key).open("rb") as file:
            while chunk := file.read(_CHUNK):
                yield chunk

    def create(self, key: str, content: bytes) -> bool:
        """As ``Store.create``: a hard link to a file that is whole fails where the name is taken."""
        with self.scratch() as folder, disk_trouble(_WHERE, self.folder):
            draft, target = folder / "draft", self.folder / key
            with draft.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            self._make_folder(target.parent)
            try:
                os.link(draft, target)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno in (errno.EPERM, errno.ENOTSUP, errno.EMLINK):
                    reason = "its file system has no hard links, by which an entry of the log is made at one stroke"
                    raise MachineError(f"{_WHERE}: {self.folder} cannot be written ({reason})") from error
                raise
            _sync_folder(target.parent)
            return True

    def upload(self, source: Path, key: str) -> None:
        """As ``Store.upload``; ``source`` lies in a folder of ``scratch`` and is moved."""
        with disk_trouble(_WHERE, self.folder):
            target = self.folder / key
            self._make_folder(target.parent)
            source.replace(target)
            os.utime(target)  # a sweeper judges by it
            _sync_folder(target.parent)

    def keys(self, prefix: str) -> list[Stored]:
        """As ``Store.keys``."""
        with self._reading():
            return sorted(self._walk(self.folder / prefix))

    def delete(self, keys: Iterable[str]) -> None:
        """As ``Store.delete``; a folder that is left empty goes too."""
        with disk_trouble(_WHERE, self.folder):
            for key in keys:
                path = self.folder / key
                path.unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    path.parent.rmdir()

    @contextlib.contextmanager
    def scratch(self) -> Generator[Path]:
        """As ``Store.scratch``: hidden, and on the same file system, so that its files can be moved."""
        with disk_trouble(_WHERE, self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            scratch = Scratch(self.folder, _SCRATCH)
        try:
            yield scratch.path
        finally:
            scratch.close()

    def _walk(self, folder: Path) -> Iterator[Stored]:
        try:
            with os.scandir(folder) as entries:
                found = list(entries)
        except (FileNotFoundError, NotADirectoryError):
            return
        for entry in found:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from self._walk(Path(entry.path))
                continue
            with contextlib.suppress(FileNotFoundError):
                stat = entry.stat()
                changed_at = datetime.fromtimestamp(stat.st_mtime, UTC)
                yield Stored(Path(entry.path).relative_to(self.folder).as_posix(), changed_at, stat.st_size)

    def _make_folder(self, folder: Path) -> None:
        """Make a folder below the root, and have the names of it and of its parents survive a power cut."""
        if folder.is_dir():
            return
        folder.mkdir(parents=True, exist_ok=True)
        while folder != self.folder:
            folder = folder.parent
            _sync_folder(folder)

    @contextlib.contextmanager
    def _reading(self) -> Generator[None]:
        try:
            yield
        except (FileNotFoundError, NotADirectoryError):
            raise
        except OSError as error:
            reason = error.strerror or str(error)
            raise RegistryUnreachableError(
                f"{_WHERE} cannot be read: {error.filename or self.folder} ({reason})"
            ) from None


def _sync_folder(path: Path) -> None:
    """Make the names in a folder survive a power cut; a file's own fsync does not."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
