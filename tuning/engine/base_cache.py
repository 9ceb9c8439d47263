"""A node's quantised bases on disk: a base is read in 16 bits and quantised once a node, not once a host.

    XDG_CACHE_HOME/loraloom/bases/KEY/    as transformers saves a model in 4 bits
    XDG_CACHE_HOME/loraloom/bases/KEY.lock

Where XDG_CACHE_HOME is not set it is ~/.cache. KEY says what the weights depend on: the model's files or its commit on
the hub, the compute dtype, the versions that quantise. The first host of a node holds the lock while it loads and
quantises, the others wait for its result. A folder is written under another name and renamed, so one with its name is
whole; a crash leaves at most a folder that the next writer removes. The bases that were used last are kept. Whatever is
wrong with the cache (no room on the disk, a damaged file, a folder that was removed while it was read) is logged, and
the base is loaded as without one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock

from cluster.schema import is_local
from tuning.spec import BaseSpec

KEPT = 4
"""Bases in the cache."""
_log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where this node's quantised bases are."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "loraloom" / "bases"


def cache_key(spec: BaseSpec) -> str | None:
    """What a quantised base depends on, as a name; None for one that is not cached."""
    if spec.trust_remote_code:  # its code may do anything with the weights
        return None
    source = _local_files(Path(spec.model)) if is_local(spec.model) else _commit(spec)
    if not source:
        return None
    versions = [f"{name} {version(name)}" for name in ("bitsandbytes", "transformers", "torch")]
    parts = json.dumps([spec.model, source, spec.compute_dtype, *versions])
    return hashlib.blake2b(parts.encode(), digest_size=12).hexdigest()


def load_cached(spec: BaseSpec, load: Callable[[], Any], load_folder: Callable[[Path], Any]) -> Any:
    """The base of ``spec``: from the cache by ``load_folder``, else by ``load``, and then it is in the cache."""
    key = cache_key(spec) if spec.cache else None
    if key is None:
        return load()
    folder = cache_folder() / key
    with _locked(folder.with_name(f"{key}.lock")) as locked:
        if not folder.is_dir():
            model = load()
            if locked:
                _store(model, folder)
            return model
    try:
        os.utime(folder)  # used last
        return load_folder(folder)
    except Exception as error:  # noqa: BLE001 - whatever is wrong with it, the model itself is elsewhere
        _log.warning("%s: the quantised base cannot be read, and is made anew: %s", folder, error)
        shutil.rmtree(folder, ignore_errors=True)
        return load()


def _store(model: Any, folder: Path) -> None:
    """Put ``model`` in ``folder``, whole or not at all; a disk that is full is told and forgotten."""
    writing = folder.with_name(f"{folder.name}.writing")
    try:
        shutil.rmtree(writing, ignore_errors=True)
        model.save_pretrained(writing)
        writing.rename(folder)
        _remove_oldest(folder.parent)
    except Exception as error:  # noqa: BLE001 - whatever hinders it, training goes on without
        _log.warning("%s: the quantised base is not kept: %s", folder, error)
        shutil.rmtree(writing, ignore_errors=True)


def _remove_oldest(root: Path) -> None:
    """Keep the bases that were used last."""
    bases = sorted((path for path in root.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
    for folder in bases[:-KEPT]:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(path: Path) -> Generator[bool]:
    """Hold the lock; False where there is no place for one."""
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        _log.warning("%s: no cache of quantised bases here: %s", path.parent, error)
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


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
