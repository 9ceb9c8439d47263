"""A node's quantised bases on disk: a base is read in 16 bits and quantised once a node, not once a host.

    XDG_CACHE_HOME/loraloom/bases/KEY/            as transformers saves a model in 4 bits
    XDG_CACHE_HOME/loraloom/bases/KEY.writing/    one that is being written, or removed
    XDG_CACHE_HOME/loraloom/bases/KEY.lock

Where XDG_CACHE_HOME is not set it is ~/.cache. KEY says what the weights depend on: the model's files or its commit on
the hub, the compute dtype, the kind of device, the versions that quantise. The first host of a node holds the lock
while it loads and quantises, the others wait for its result. A folder is written and synced under another name and then
renamed, and renamed again before it is removed, so one with its name is whole; what a crash leaves under the other name
is removed by the next writer. The bases that were used last are kept. Whatever is wrong with the cache (no room on the
disk, no locks on its file system, a damaged file, a folder that was removed while it was read) is told, and the base is
loaded as without one. Memory that is short says nothing about the cache, and ends the load as everywhere.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cluster.schema import is_local
from tuning.keep import sync
from tuning.spec import BaseSpec

KEPT = 4
"""Bases in the cache."""
LOCK_S = 600.0
"""A host waits so long for another to quantise: some minutes are honest work on a large base and a slow disk. After
that the other one hangs, and to wait for it would hang this one too."""
_POLL_S = 0.2
_WRITING = ".writing"
_log = logging.getLogger(__name__)
Tell = Callable[[str], None]
"""Hears what is wrong with the cache."""


def cache_folder() -> Path:
    """Where this node's quantised bases are."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "loraloom" / "bases"


def cache_key(spec: BaseSpec, device: str) -> str | None:
    """What a quantised base depends on, as a name; None for one that is not cached.

    Args:
        spec: the base.
        device: the kind that quantises, "cpu" or "cuda". bitsandbytes has a kernel for each, and does not promise that
            they round a weight between two codes alike.
    """
    if spec.trust_remote_code:  # its code may do anything with the weights
        return None
    source = _local_files(Path(spec.model)) if is_local(spec.model) else _commit(spec)
    if not source:
        return None
    versions = [f"{name} {version(name)}" for name in ("bitsandbytes", "transformers", "torch")]
    parts = json.dumps([spec.model, source, spec.compute_dtype, device, *versions])
    return hashlib.blake2b(parts.encode(), digest_size=12).hexdigest()


def load_cached(
    spec: BaseSpec,
    load: Callable[[], Any],
    load_folder: Callable[[Path], Any],
    device: str = "cpu",
    tell: Tell = _log.warning,
) -> Any:
    """The base of ``spec``: from the cache by ``load_folder``, else by ``load``, and then it is in the cache.

    ``device`` is the kind that it is loaded to, as in ``cache_key``.
    """
    key = cache_key(spec, device) if spec.cache else None
    if key is None:
        return load()
    folder = cache_folder() / key
    for _ in range(2):  # again where it was damaged: whoever finds the place free makes it anew, the others wait
        with _locked(folder, tell) as locked:
            if not folder.is_dir():
                model = load()
                if locked:
                    _store(model, folder, tell)
                return model
            seen = _inode(folder)
        with suppress(OSError):  # a cache that may only be read is as good
            os.utime(folder)  # used last
        try:
            return load_folder(folder)
        except _broken() as error:
            if isinstance(error, OSError) and error.errno == errno.ENOMEM:
                raise
            tell(f"{folder}: the quantised base cannot be read, and is made anew: {error}")
            with _locked(folder, tell) as locked:
                if locked and _inode(folder) == seen:  # else another host has made it anew already
                    _remove(folder)
    return load()


def _broken() -> tuple[type[Exception], ...]:
    """What says that files are damaged, or gone."""
    from safetensors import SafetensorError

    return OSError, SafetensorError, ValueError


def _store(model: Any, folder: Path, tell: Tell) -> None:
    """Put ``model`` in ``folder``, whole or not at all; a disk that is full is told and forgotten."""
    writing = folder.with_name(f"{folder.name}{_WRITING}")
    try:
        shutil.rmtree(writing, ignore_errors=True)
        model.save_pretrained(writing)
        for path in (*writing.rglob("*"), writing):
            sync(path)
        writing.rename(folder)
        sync(folder.parent)
        _remove_oldest(folder.parent, tell)
    except Exception as error:  # noqa: BLE001 - whatever hinders it, training goes on without
        tell(f"{folder}: the quantised base is not kept: {error}")
        shutil.rmtree(writing, ignore_errors=True)


def _remove_oldest(root: Path, tell: Tell) -> None:
    """Keep the bases that were used last, and nothing half written; what another host is at work on is left alone."""
    folders = [path for path in root.iterdir() if path.is_dir()]
    bases = sorted((path for path in folders if path.suffix != _WRITING), key=_used)
    for folder in (*bases[:-KEPT], *(path for path in folders if path.suffix == _WRITING)):
        with _locked(folder.with_suffix(""), tell, wait_s=0.0) as locked:
            if locked:
                _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a base, or what is left of one; its lock is held."""
    scrap = folder.with_suffix(_WRITING)
    with suppress(OSError):  # it is gone, or this disk can only be read
        folder.rename(scrap)  # at once: half a base under its name would pass for a whole one
    shutil.rmtree(scrap, ignore_errors=True)


def _used(folder: Path) -> float:
    """When a base was used last; 0 for one that has just gone."""
    try:
        return folder.stat().st_mtime
    except OSError:
        return 0.0


def _inode(folder: Path) -> int | None:
    try:
        return folder.stat().st_ino
    except OSError:
        return None


@contextmanager
def _locked(folder: Path, tell: Tell, wait_s: float | None = None) -> Generator[bool]:
    """Hold the lock of a base; False where there is no place for one, or another host has held it for too long.

    It is the kernel's, so that a host that dies holds none. ``wait_s`` is LOCK_S if None; at 0 nothing is told.
    """
    wait_s = LOCK_S if wait_s is None else wait_s
    descriptor = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o644)
        locked = _wait_for(descriptor, wait_s)
        if not locked and wait_s:
            tell(f"{folder}: another host has held it for {wait_s:.0f} s; going on without the cache")
    except OSError as error:
        if not folder.is_dir():  # one that is there can be read without
            tell(f"{folder.parent}: no cache of quantised bases here: {error}")
        locked = False
    try:
        yield locked
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _wait_for(descriptor: int, wait_s: float) -> bool:
    """Take the lock of an open file within a time; False if another process keeps it.

    Raises:
        OSError: the file system has no locks.
    """
    until = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                return False
            time.sleep(min(_POLL_S, wait_s))
        else:
            return True


def _local_files(folder: Path) -> list[list[str | int]]:
    """Names, sizes and times of the files that a model is loaded from."""
    kinds = (".json", ".safetensors", ".bin")
    return [
        [path.name, path.stat().st_size, path.stat().st_mtime_ns]
        for path in sorted(folder.iterdir())
        if path.suffix in kinds
    ]


def _commit(spec: BaseSpec) -> str | None:
    """The commit that a hub id stands for."""
    from transformers import AutoConfig

    return getattr(AutoConfig.from_pretrained(spec.model, revision=spec.revision), "_commit_hash", None)
