"""Where the compared sweeps lie: folders of this machine, or an object store, of which the small files are copied.

What a person names is a sweep's folder or a folder of such folders; in the latter, sweeps that begin later are found
too.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Protocol

from cluster.errors import NotFoundError
from cluster.storage import disk_trouble, local_folder
from serving.registry.object_store import ObjectStore
from serving.registry.store import Stored
from serving.scratch import Scratch, socket_folder
from tuning.results import SPEC_FILE, SWEEP_FILE

LIST_EVERY_S = 5.0
"""An object store is asked no more often: each time costs requests."""
_COPIES = "loraloom-copies-"
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_SMALL = re.compile(
    rf"({re.escape(SPEC_FILE)}|{re.escape(SWEEP_FILE)}"
    r"|t[0-9]+/(params\.json|result\.json|end\.json|error\.txt|checkpoint_[0-9]+/metrics\.json))"
)
"""Files that are read; of all others in a checkpoint only the sizes count (tuning/keep.py)."""
_IN_CHECKPOINT = re.compile(r"t[0-9]+/checkpoint_[0-9]+/([\w.-]+/)*[\w.-]+")


class Source(Protocol):
    """One sweep's folder."""

    @property
    def place(self) -> str:
        """As a person names it; holds no secret."""
        ...

    @property
    def is_local(self) -> bool:
        """True if other commands can work on ``place``."""
        ...

    @property
    def folder(self) -> Path:
        """The folder on this machine, or what has been copied of it."""
        ...

    def news_at(self) -> datetime | None:
        """When its small files were last written, by the clock of what holds them; None where none is left."""
        ...


class Shelf(Protocol):
    """What a person has named."""

    def sources(self) -> list[Source]:
        """The sweeps there, by name; copies are up to date then.

        Raises:
            LoraloomError: none is there, or it cannot be read.
        """
        ...

    def left_out(self) -> list[str]:
        """What ``sources`` did not give the last time although it belongs there, for a person."""
        ...

    def close(self) -> None:
        """Remove what was copied."""


class LocalSource:
    """A folder of this machine."""

    is_local = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def place(self) -> str:
        """The folder."""
        return str(self.folder)

    def news_at(self) -> datetime | None:
        """As ``Source.news_at``."""
        times: list[float] = []
        for path in [self.folder / SWEEP_FILE, *self.folder.glob("t*/*.json")]:
            with contextlib.suppress(OSError):
                times.append(path.stat().st_mtime)
        return datetime.fromtimestamp(max(times), UTC) if times else None


class LocalShelf:
    """A sweep's folder of this machine, or a folder of them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def place(self) -> str:
        """The folder."""
        return str(self._folder)

    def sources(self) -> list[Source]:
        """As ``Shelf.sources``."""
        if (self._folder / SPEC_FILE).is_file():
            return [LocalSource(self._folder)]
        found = sorted(path.parent for path in self._folder.glob(f"*/{SWEEP_FILE}"))
        if not found:
            raise NotFoundError(f"{self._folder}: no sweep's folder, and none in it (none has a {SWEEP_FILE})")
        return [LocalSource(folder) for folder in found]

    def left_out(self) -> list[str]:
        """Nothing."""
        return []

    def close(self) -> None:
        """Nothing was copied."""


class RemoteSource:
    """The copy of one sweep's small files."""

    is_local = False

    def __init__(self, place: str, folder: Path, news_at: Callable[[], datetime | None]) -> None:
        self._place, self.folder, self._news_at = place, folder, news_at

    @property
    def place(self) -> str:
        """The URI without credentials and options."""
        return self._place

    def news_at(self) -> datetime | None:
        """As ``Source.news_at``."""
        return self._news_at()


class RemoteShelf:
    """A sweep's folder in an object store, or a folder of them, as a copy on this machine."""

    def __init__(self, uri: str) -> None:
        self._store = ObjectStore(uri, "DIR", "the sweep's folder")
        self._scratch = Scratch(socket_folder(), _COPIES)
        self._copied: dict[str, Stored] = {}
        self._listed_at: float | None = None

    @property
    def place(self) -> str:
        """The URI without credentials and options."""
        return self._store.where

    def sources(self) -> list[Source]:
        """As ``Shelf.sources``."""
        if self._listed_at is None or time.monotonic() - self._listed_at >= LIST_EVERY_S:
            try:
                with disk_trouble("the copy of the sweep's small files", self._scratch.path):
                    self._copy(self._store.keys(""))
            finally:
                self._listed_at = time.monotonic()  # also where the store does not answer: it is given time
        root = self._scratch.path
        if (root / SPEC_FILE).is_file():
            return [RemoteSource(self._store.where, root, partial(self._news_at, ""))]
        found = sorted(path.parent for path in root.glob(f"*/{SWEEP_FILE}"))
        if not found:
            raise NotFoundError(f"{self._store.where}: no sweep's folder, and none in it (none has a {SWEEP_FILE})")
        return [
            RemoteSource(f"{self._store.where}/{folder.name}", folder, partial(self._news_at, f"{folder.name}/"))
            for folder in found
        ]

    def left_out(self) -> list[str]:
        """Nothing."""
        return []

    def close(self) -> None:
        """As ``Shelf.close``."""
        self._scratch.close()

    def _news_at(self, prefix: str) -> datetime | None:
        small = (stored for key, stored in self._copied.items() if key.startswith(prefix) and _is_small(key))
        return max((stored.changed_at for stored in small), default=None)

    def _copy(self, there: Iterable[Stored]) -> None:
        """Bring the copy up to date: fetch the small files, and give the others their sizes (they take no room)."""
        root = self._scratch.path
        wanted = {stored.key: stored for stored in there if _part_of_sweep(stored.key)}
        for key in self._copied.keys() - wanted.keys():
            path = root / key
            path.unlink(missing_ok=True)
            del self._copied[key]
            with contextlib.suppress(OSError):  # a store has no empty folders
                while path.parent != root:
                    path = path.parent
                    path.rmdir()
        changed = [stored for key, stored in wanted.items() if self._copied.get(key) != stored]
        small = [stored.key for stored in changed if _is_small(stored.key)]
        contents = dict(zip(small, self._store.read_many(small), strict=True))
        for stored in changed:
            content = contents.get(stored.key, b"")
            if content is None:
                continue  # it has gone since
            path = root / stored.key
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                file.write(content)
                if stored.key not in contents:
                    file.truncate(stored.size)
        self._copied.update((stored.key, stored) for stored in changed)


def _tail(key: str) -> str:
    """A key as it is below a sweep's folder, where the shelf may be that folder or the one above."""
    head, _, rest = key.partition("/")
    return key if _SMALL.fullmatch(key) or _IN_CHECKPOINT.fullmatch(key) or head in (".", "..", "") else rest


def _is_small(key: str) -> bool:
    return _SMALL.fullmatch(_tail(key)) is not None


def _part_of_sweep(key: str) -> bool:
    """True for what the page needs; a key that would lead out of the copy is none."""
    if ".." in key.split("/") or "\0" in key:
        return False
    return _is_small(key) or _IN_CHECKPOINT.fullmatch(_tail(key)) is not None


def open_shelf(reference: str) -> LocalShelf | RemoteShelf:
    """What a folder or a URI names. Of an object store nothing is asked yet.

    Raises:
        InputError: it is neither.
        NotFoundError: there is no such folder.
    """
    if _URI.match(reference):
        return RemoteShelf(reference)
    folder = local_folder(reference, "DIR")
    if not folder.is_dir():
        raise NotFoundError(f"{folder}: no such folder")
    return LocalShelf(folder)
