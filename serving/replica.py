"""The replica: Ray Serve LLM's server, with a loader that takes adapters from the registry.

Upstream's path of a request is: make room (evict the least recently used adapter), load from disk, hand to vLLM.
Three things are changed. An adapter is fetched and verified *before* room is made for it, so that a corrupt one evicts
nothing. vLLM reads it from a private copy of the verified files: it re-reads them whenever it needs an adapter again
that it dropped from host memory, and a file that is missing then kills the engine (vllm/lora/worker_manager.py,
add_adapter). And whatever goes wrong becomes an answer that names the adapter.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
from collections import defaultdict
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from ray import serve
from ray.llm._internal.common.callbacks.base import CallbackBase
from ray.llm._internal.serve.core.configs.llm_config import DiskMultiplexConfig
from ray.llm._internal.serve.core.configs.openai_api_models import ErrorInfo, ErrorResponse
from ray.serve.llm import LLMConfig
from ray.serve.llm.deployment import LLMServer

from cluster.errors import LoraloomError, NotFoundError
from serving.api_error import ADAPTER_CHANGED, ADAPTER_CORRUPT, ADAPTER_REFUSED, ApiError, model_not_found
from serving.engine import RoutedId, adapter_of
from serving.registry import Registry, RegistryUnreachableError
from serving.scratch import Scratch

_CACHE = "loraloom-adapters-"


class NoDownload(CallbackBase):
    """Leaves the base to vLLM, and so saves each start a worker process that imports everything (7 s on two cores)."""

    async def on_before_node_init(self) -> None:
        """Called by the engine before it starts."""
        self.ctx.run_init_node = False


class RegistryLoader:
    """Fetches adapters from the registry into a folder of this process. All methods run on one event loop.

    The folder is removed by ``close``; what a killed process leaves is removed when the next loader starts on the
    machine.
    """

    def __init__(self, registry: str, cache: Path | None = None) -> None:
        self._registry = Registry(registry)
        self._scratch = Scratch(cache or Path(tempfile.gettempdir()), _CACHE)
        self._fetches: dict[RoutedId, asyncio.Task[Path]] = {}
        self._digests: dict[str, str] = {}

    def close(self) -> None:
        """Remove the private copies. The engine must not be asked for adapters any more."""
        self._scratch.close()

    async def fetch(self, routed: RoutedId) -> Path:
        """The folder with a verified copy of an adapter; requests that come together share one fetch.

        Raises:
            ApiError: the adapter vanished, is corrupt, or is not what it was when it was first loaded; it is named.
        """
        held = self._digests.get(routed.adapter, routed.digest)
        if held != routed.digest:
            # The engine holds the old content under this id, and its prefix cache too: neither may mix with the new.
            reason = "it was replaced on disk after it was loaded; publish it as a new version, or restart the server"
            raise ApiError(409, f"The adapter `{routed.adapter}` never changes, but {reason}", ADAPTER_CHANGED, "model")
        task = self._fetches.get(routed)
        if task is None:
            task = asyncio.create_task(asyncio.to_thread(self._fetch, routed))
            self._fetches[routed] = task
        try:
            folder = await asyncio.shield(task)
        except Exception:
            self._fetches.pop(routed, None)  # the next request tries again: it may have been mended
            raise
        self._digests[routed.adapter] = routed.digest
        return folder

    async def load_model_from_config(self, lora_model_id: str, llm_config: LLMConfig) -> DiskMultiplexConfig:
        """Called by Ray Serve LLM for an adapter that it does not hold; the engine will know it by its immutable id."""
        routed = RoutedId.parse(lora_model_id)
        folder = await self.fetch(routed)
        return DiskMultiplexConfig(
            model_id=routed.adapter,
            max_total_tokens=None,
            local_path=str(folder),
            lora_assigned_int_id=0,  # vLLM counts its own
        )

    def _fetch(self, routed: RoutedId) -> Path:
        folder = Path(tempfile.mkdtemp(dir=self._scratch.path))
        try:
            with contextlib.suppress(RegistryUnreachableError):  # it may be known all the same
                self._registry.refresh()
            manifest = self._registry.resolve(routed.adapter)
            self._registry.fetch(manifest, folder)
            if manifest.digest == routed.digest:
                return folder
            reason = f"The adapter `{routed.adapter}` was replaced on disk while it was loaded"
            fault = ApiError(409, reason, ADAPTER_CHANGED, "model")
        except NotFoundError:
            fault = model_not_found(routed.adapter)
        except RegistryUnreachableError as error:
            fault = ApiError(503, f"The adapter `{routed.adapter}` cannot be fetched: {error}", None, "model")
        except LoraloomError as error:
            reason = f"The adapter `{routed.adapter}` cannot be loaded: {error}"
            fault = ApiError(500, reason, ADAPTER_CORRUPT, "model")
        shutil.rmtree(folder, ignore_errors=True)
        raise fault


class AdapterServer(LLMServer):
    """One engine with one base, and the adapters that requests ask for."""

    def _init_multiplex_loader(self, model_downloader_cls: Any = None) -> None:
        self._adapters: RegistryLoader = model_downloader_cls()
        self._loading: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        super()._init_multiplex_loader(lambda **_: self._adapters)  # pyright: ignore[reportArgumentType]

    async def _maybe_resolve_lora_from_multiplex(self) -> None:
        routed_id = serve.get_multiplexed_model_id()
        if not routed_id:
            return
        routed = RoutedId.parse(routed_id)
        await self._adapters.fetch(routed)
        try:
            # Upstream asks the engine whether it has the adapter, then loads it: requests that come together would all
            # load it, and vLLM refuses all but the first.
            async with self._loading[routed.adapter]:
                await super()._maybe_resolve_lora_from_multiplex()
        except ValueError as error:
            message = f"The engine cannot serve the adapter `{routed.adapter}`: {error}"
            raise ApiError(500, message, ADAPTER_REFUSED, "model") from None

    async def _run_request(self, request: Any, **options: Any) -> AsyncGenerator[Any, None]:
        adapter = adapter_of(request.model)
        if adapter is not None:
            request.model = adapter
        try:
            return await super()._run_request(request, **options)
        except ApiError as error:
            return _answer(error)

    async def __del__(self) -> None:
        await super().__del__()
        adapters = getattr(self, "_adapters", None)
        if adapters is not None:
            adapters.close()


async def _answer(error: ApiError) -> AsyncGenerator[ErrorResponse, None]:
    """The error as the engine would have answered it: exceptions lose their shape on the way to the gateway."""
    yield ErrorResponse(
        error=ErrorInfo(message=error.message, type=error.code or "", param=error.param, code=error.status)
    )
