"""vLLM's routes for loading and unloading an adapter at run time, in terms of the registry.

vLLM keeps what is loaded so in the memory of one server process. Here it is published: every replica has it within a
second, it is checked like everything that is published, and it is there again after a restart. What was published in
another way is not unloaded so.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

from cluster.errors import InputError, LoraloomError
from serving.api_error import ApiError, model_not_found, overloaded
from serving.catalogue import ServedBase, shortened
from serving.pages import LoadAdapter, UnloadAdapter
from serving.registry import Registry

SOURCE = "load_lora_adapter"
"""What stands in the lineage of what was published so."""
_RETRY_AFTER_S = 5.0


class Uploads:
    """Publishes folders of this machine.

    Args:
        registry: Where to.
        base: What the server serves.
        roots: Folders below which adapters may be taken from; none means that the routes are closed.
        caught_up: Called when something was published or removed, so that this replica knows.
    """

    def __init__(
        self, registry: Registry, base: ServedBase, roots: tuple[str, ...], caught_up: Callable[[], Awaitable[None]]
    ) -> None:
        self._registry = registry
        self._base = base
        self._roots = [Path(root).resolve() for root in roots]
        self._caught_up = caught_up

    async def load(self, body: LoadAdapter) -> str:
        """Publish the folder ``body.lora_path`` as ``body.lora_name``.

        Raises:
            ApiError: 400 for a name or an adapter that is refused, or a name that is taken; 403 for a folder elsewhere;
                503 if the registry cannot be written.
        """
        folder = await asyncio.to_thread(self._allowed, body.lora_path)
        if body.lora_name == self._base.name:
            raise ApiError(400, f"`{body.lora_name}` is the base's name", "invalid_request", "lora_name")
        if self._registry.versions(body.lora_name) and not body.load_inplace:
            message = f"The adapter `{body.lora_name}` is there already; load_inplace publishes a new version of it"
            raise ApiError(400, message, "invalid_request", "lora_name")
        await asyncio.to_thread(self._publish, body.lora_name, folder)
        await self._caught_up()
        return f"Success: LoRA adapter '{body.lora_name}' added successfully."

    async def unload(self, body: UnloadAdapter) -> str:
        """Remove all versions of ``body.lora_name``, which must have been published by ``load``.

        Raises:
            ApiError: 404 for an unknown name, 400 for one that was published in another way, 503 if the registry cannot
                be written.
        """
        versions = self._registry.versions(body.lora_name)
        if not versions:
            raise model_not_found(shortened(body.lora_name))
        manifests = [self._registry.manifest(body.lora_name, version) for version in versions]
        foreign = [manifest.id for manifest in manifests if manifest.lineage.get("source") != SOURCE]
        if foreign:
            message = f"{', '.join(foreign)} was not loaded by this route; `loraloom adapters remove` removes it"
            raise ApiError(400, message, "invalid_request", "lora_name")
        await asyncio.to_thread(self._remove, [manifest.id for manifest in manifests])
        await self._caught_up()
        return f"Success: LoRA adapter '{body.lora_name}' removed successfully."

    def _allowed(self, path: str) -> Path:
        """``path``, without links; nothing is told of folders elsewhere, not even whether they are there."""
        try:
            folder = Path(path).resolve()
        except (OSError, ValueError, RuntimeError):  # a NUL, a name that is too long, a circle of links
            folder = None
        if folder is None or not any(folder.is_relative_to(root) for root in self._roots):
            message = "lora_path must be below one of this server's http.adapter_roots"
            raise ApiError(403, message, "insufficient_scope", "lora_path")
        return folder

    def _publish(self, name: str, folder: Path) -> None:
        lineage = {"source": SOURCE, "folder": str(folder)}
        try:
            self._registry.publish(
                name, folder, self._base.identity, metrics={}, lineage=lineage, max_rank=self._base.max_rank
            )
        except InputError as error:
            raise ApiError(400, f"The adapter is refused: {error}", "invalid_request", "lora_path") from None
        except LoraloomError as error:
            raise overloaded(
                f"The registry cannot be written: {error}", "registry_unreachable", _RETRY_AFTER_S
            ) from None

    def _remove(self, ids: list[str]) -> None:
        try:
            for adapter_id in ids:
                self._registry.remove(adapter_id, force=True)
        except LoraloomError as error:
            raise overloaded(
                f"The registry cannot be written: {error}", "registry_unreachable", _RETRY_AFTER_S
            ) from None
