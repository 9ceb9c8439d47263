"""A node's quantised bases on disk: a base is read in 16 bits and quantised once a node, not once a host.

    XDG_CACHE_HOME/loraloom/bases/KEY/    as transformers saves a model in 4 bits (see cluster/folder_cache.py)

Where XDG_CACHE_HOME is not set it is ~/.cache. KEY says what the weights depend on: the model's files or its commit on
the hub, the compute dtype, the kind of device, the versions that quantise. The first host of a node holds the lock
while it loads and quantises, the others wait for its result. The bases that were used last are kept. Whatever is wrong
with the cache (no room on the disk, no locks on its file system, a damaged file, a folder that was removed while it was
read) is told, and the base is loaded as without one. Memory that is short says nothing about the cache, and ends the
load as everywhere.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cluster.folder_cache import cache_root, locked, mark_used, remove, remove_oldest, write_whole
from serving.weights.architecture import weights_identity
from tuning.engine.dtype import compute_dtype
from tuning.spec import BaseSpec

KEPT = 4
"""Bases in the cache."""
LOCK_S = 600.0
"""A host waits so long for another to quantise: some minutes are honest work on a large base and a slow disk. After
that the other one hangs, and to wait for it would hang this one too."""
_log = logging.getLogger(__name__)
Tell = Callable[[str], None]
"""Hears what is wrong with the cache."""


def cache_folder() -> Path:
    """Where this node's quantised bases are."""
    return cache_root("bases")


def cache_key(spec: BaseSpec, device: str) -> str | None:
    """What a quantised base depends on, as a name; None for one that is not cached.

    Args:
        spec: the base.
        device: the kind that quantises, "cpu" or "cuda". bitsandbytes has a kernel for each, and does not promise that
            they round a weight between two codes alike.
    """
    if spec.trust_remote_code:  # its code may do anything with the weights
        return None
    source = weights_identity(spec)
    if not source:
        return None
    versions = [f"{name} {version(name)}" for name in ("bitsandbytes", "transformers", "torch")]
    parts = json.dumps([spec.model, source, str(compute_dtype(spec, device)), device, *versions])
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
        with _locked(folder, tell) as is_held:
            if not folder.is_dir():
                model = load()
                if is_held:
                    _store(model, folder, tell)
                return model
            seen = _inode(folder)
        mark_used(folder)
        try:
            return load_folder(folder)
        except _broken() as error:
            if isinstance(error, OSError) and error.errno == errno.ENOMEM:
                raise
            tell(f"{folder}: the quantised base cannot be read, and is made anew: {error}")
            with _locked(folder, tell) as is_held:
                if is_held and _inode(folder) == seen:  # else another host has made it anew already
                    remove(folder)
    return load()


def _broken() -> tuple[type[Exception], ...]:
    """What says that files are damaged, or gone."""
    from safetensors import SafetensorError

    return OSError, SafetensorError, ValueError


def _store(model: Any, folder: Path, tell: Tell) -> None:
    """Put ``model`` in ``folder``, whole or not at all; a disk that is full is told and forgotten."""
    try:
        write_whole(folder, model.save_pretrained)
        remove_oldest(folder.parent, KEPT)
    except Exception as error:  # noqa: BLE001 - whatever hinders it, training goes on without
        tell(f"{folder}: the quantised base is not kept: {error}")


def _inode(folder: Path) -> int | None:
    try:
        return folder.stat().st_ino
    except OSError:
        return None


@contextmanager
def _locked(folder: Path, tell: Tell) -> Generator[bool]:
    """Hold the lock of a base; False where there is no place for one, or another host has held it for too long."""
    with ExitStack() as stack:
        try:
            is_held = stack.enter_context(locked(folder, LOCK_S))
            if not is_held:
                tell(f"{folder}: another host has held it for {LOCK_S:.0f} s; going on without the cache")
        except OSError as error:
            if not folder.is_dir():  # one that is there can be read without
                tell(f"{folder.parent}: no cache of quantised bases here: {error}")
            is_held = False
        yield is_held
