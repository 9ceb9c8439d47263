"""vLLM's routes for loading and unloading an adapter at run time, in terms of the registry.

vLLM keeps what is loaded so in the memory of one server process. Here it is published: every replica has it within a
second, it is checked like everything that is published, and it is there again after a restart. What was published in
another way is not unloaded so.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Awaitable, Callable
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

from cluster.errors import ABSENT, ConflictError, Fault, InputError, LoraloomError, NotFoundError
from cluster.storage import disk_trouble
from serving.adapters.catalogue import ServedBase, shortened
from serving.http.api_error import REGISTRY_UNREACHABLE, ApiError, model_not_found, overloaded
from serving.http.pages import LoadAdapter, UnloadAdapter
from serving.manifest import DEFAULT_ALIAS, Manifest
from serving.registry import Registry
from serving.weights.adapter_weights import Sites
from serving.weights.architecture import ModelSource, linear_sites
from serving.weights.checks import CONFIG_FILE, WEIGHTS_FILE

SOURCE = "load_lora_adapter"
"""What stands in the lineage of what was published so."""
_RETRY_AFTER_S = 5.0

_log = logging.getLogger(__name__)


class Uploads:
    """Publishes folders of this machine.

    Args:
        registry: Where to.
        base: What the server serves.
        roots: Folders below which adapters may be taken from; none means that the routes are closed.
        caught_up: Called when something was published or removed, so that this replica knows.
        trust_remote_code: Run Python code that comes with the base, to learn the shapes of its layers.
    """

    def __init__(
        self,
        registry: Registry,
        base: ServedBase,
        roots: tuple[str, ...],
        caught_up: Callable[[], Awaitable[None]],
        *,
        trust_remote_code: bool = False,
    ) -> None:
        self._registry = registry
        self._base = base
        self._roots = [Path(root).resolve() for root in roots]
        self._caught_up = caught_up
        self._trust_remote_code = trust_remote_code

    async def load(self, body: LoadAdapter) -> str:
        """Publish the folder ``body.lora_path`` as ``body.lora_name``.

        A new version of a name is what requests for the name get, unless it has an alias ``prod``, which goes on
        pointing to what it points to, as after every publication.

        Returns:
            vLLM's message; where the name was there already also which version it is now, and which one is asked.

        Raises:
            ApiError: 400 for a name or an adapter that is refused, or a name that is taken; 403 for a folder, or a file
                of it, elsewhere; 503 if the registry cannot be written.
        """
        folder = await asyncio.to_thread(self._allowed, body.lora_path)
        if body.lora_name == self._base.name:
            raise ApiError(400, f"`{body.lora_name}` is the base's name", "invalid_request", "lora_name")
        is_known = bool(self._registry.versions(body.lora_name))
        manifest = await asyncio.to_thread(self._publish, body.lora_name, folder, must_be_new=not body.load_inplace)
        await self._caught_up()
        message = f"Success: LoRA adapter '{body.lora_name}' added successfully."
        if not is_known:
            return message
        message += f" It is the version {manifest.id}"
        if DEFAULT_ALIAS in self._registry.aliases(manifest.name):
            return f"{message}; `{manifest.name}` goes on following its alias {DEFAULT_ALIAS}."
        return f"{message}, which `{manifest.name}` now leads to."

    async def unload(self, body: UnloadAdapter) -> str:
        """Remove all versions of ``body.lora_name``, which must have been published by ``load``.

        Raises:
            ApiError: 404 for an unknown name or one that somebody else has just removed, 400 for one that was published
                in another way, 503 if the registry cannot be written.
        """
        versions = self._registry.versions(body.lora_name)
        if not versions:
            raise model_not_found(shortened(body.lora_name))
        foreign: list[str] = []
        for version in versions:
            with contextlib.suppress(NotFoundError):  # somebody else is removing it; the end of it tells who was first
                manifest = self._registry.manifest(body.lora_name, version)
                if manifest.lineage.get("source") != SOURCE:
                    foreign.append(manifest.id)
        if foreign:
            message = f"{', '.join(foreign)} was not loaded by this route; `loraloom adapters remove` removes it"
            raise ApiError(400, message, "invalid_request", "lora_name")
        await asyncio.to_thread(self._remove, [f"{body.lora_name}@{version}" for version in versions])
        await self._caught_up()
        return f"Success: LoRA adapter '{body.lora_name}' removed successfully."

    def _allowed(self, path: str) -> Path:
        """``path``, without links; nothing is told of folders elsewhere, not even whether they are there."""
        try:
            folder = Path(path).resolve()
        except (OSError, ValueError, RuntimeError):  # a NUL, a name that is too long, a circle of links
            folder = None
        if folder is None or self._root_of(folder) is None:
            raise _elsewhere("lora_path")
        return folder

    def _root_of(self, path: Path) -> Path | None:
        return next((root for root in self._roots if path.is_relative_to(root)), None)

    def _publish(self, name: str, folder: Path, *, must_be_new: bool) -> Manifest:
        lineage = {"source": SOURCE, "folder": str(folder)}
        with tempfile.TemporaryDirectory(prefix="loraloom-upload-") as scratch:
            try:
                self._copy(folder, Path(scratch))
                return self._registry.publish(
                    name,
                    Path(scratch),
                    self._base.identity,
                    metrics={},
                    lineage=lineage,
                    max_rank=self._base.max_rank,
                    sites=self._sites,
                    must_be_new=must_be_new,
                )
            except ConflictError:
                message = f"The adapter `{name}` is there already; load_inplace publishes a new version of it"
                raise ApiError(400, message, "invalid_request", "lora_name") from None
            except InputError as error:
                if any(fault.where == "registry" for fault in error.faults):  # its bucket is gone
                    raise _cannot_write(error) from None
                told = str(error).replace(scratch, str(folder))
                raise ApiError(400, f"The adapter is refused: {told}", "invalid_request", "lora_path") from None
            except ApiError:
                raise
            except LoraloomError as error:
                raise _cannot_write(error) from None

    def _copy(self, folder: Path, scratch: Path) -> None:
        """Copy the adapter's files to where nobody can change them between their check and their publication. What is
        not there is left to the check.
        """
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            try:
                source = self._open(folder / name)
            except FileNotFoundError:
                continue
            except (OSError, RuntimeError):
                raise InputError([Fault(str(folder / name), "must be a file that can be read", ABSENT)]) from None
            with source, disk_trouble("the copy of an adapter", scratch), (scratch / name).open("xb") as target:
                shutil.copyfileobj(source, target)

    def _open(self, path: Path) -> BinaryIO:
        """Open a file below a root. A link is followed to where it leads (a hub's cache is made of links) if that is
        below a root too; from there each step is taken without links, so that one made meanwhile leads nowhere.

        Raises:
            ApiError: 403, it lies elsewhere.
            OSError: it is not there, no file, cannot be read, or was exchanged meanwhile.
        """
        real = path.resolve(strict=True)
        root = self._root_of(real)
        if root is None:
            raise _elsewhere(f"{path}, which is a link,")
        *folders, name = real.relative_to(root).parts or (".",)
        at = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for folder in folders:
                inner = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
                os.close(at)
                at = inner
            # A pipe that nobody writes to would be waited for.
            file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=at)
        finally:
            os.close(at)
        if not stat.S_ISREG(os.fstat(file).st_mode):
            os.close(file)
            raise OSError(f"{path} is not a regular file")
        return os.fdopen(file, "rb")

    @cached_property
    def _sites(self) -> Sites | None:
        """The base's linear layers, to check shapes against; None for a base that only vLLM can build."""
        identity = self._base.identity
        try:
            return linear_sites(ModelSource(identity.model, identity.revision, self._trust_remote_code))
        except InputError as error:
            _log.warning("shapes of adapters that are loaded over HTTP are not checked: %s", error)
            return None

    def _remove(self, ids: list[str]) -> None:
        for adapter_id in ids:
            try:
                self._registry.remove(adapter_id, force=True)
            except NotFoundError:
                raise model_not_found(adapter_id) from None
            except LoraloomError as error:
                raise _cannot_write(error) from None


def _elsewhere(what: str) -> ApiError:
    message = f"{what} must be below one of this server's http.adapter_roots"
    return ApiError(403, message, "insufficient_scope", "lora_path")


def _cannot_write(error: LoraloomError) -> ApiError:
    return overloaded(f"The registry cannot be written: {error}", REGISTRY_UNREACHABLE, _RETRY_AFTER_S)
