"""The replica: one vLLM engine under Ray Serve LLM's care, with an HTTP server of its own.

Ray Serve starts it, places it, checks its health, replaces it when it dies, and ends it. Requests do not come through
Ray Serve: HAProxy sends them straight to the HTTP server in this process (see ``serving/http/haproxy.py`` for why), and
``serving/http/door.py`` says what they pass here.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import uvicorn
from ray import serve
from ray.exceptions import RayError
from ray.llm._internal.common.callbacks.base import CallbackBase
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.llm import LLMConfig
from ray.serve.llm.deployment import LLMServer
from ray.util import get_node_ip_address

from cluster.errors import LoraloomError
from serving.access.admission import Admission
from serving.access.keys import KeyRing
from serving.access.ledger import find_ledger, share
from serving.access.limits import Limiter
from serving.adapters.cache import AdapterCache
from serving.adapters.catalogue import Catalogue, ServedBase
from serving.adapters.follower import Follower
from serving.adapters.holdings import Holdings
from serving.adapters.uploads import Uploads
from serving.http.api_error import SHUTTING_DOWN, UNAVAILABLE, ApiError, overloaded
from serving.http.door import Door
from serving.http.front import ANNOUNCE_S
from serving.http.inner import FrontOnly
from serving.http.pages import add_pages
from serving.http.usage import count_outputs
from serving.manifest import Manifest
from serving.metrics import Metrics
from serving.playground.routes import add_playground
from serving.playground.votes import Votes
from serving.registry import Registry
from serving.scratch import Scratch, socket_folder
from serving.watch import FRONT, FRONT_APPLICATION

KEYS_EVERY_S = 1.0
METRICS_EVERY_S = 1.0
LEDGER = "loraloom-ledger"
_FOLDER = "loraloom-engine-"
_KEEP_ALIVE_S = 600
"""Longer than HAProxy keeps idle connections, so that it is always HAProxy who closes one."""
_DRAIN_POLL_S = 0.05
_ON_THEIR_WAY_S = 0.2
"""Requests that HAProxy has sent and this process has not read yet."""
_FRONT_TIMEOUT_S = 5.0

_log = logging.getLogger(__name__)


class ReplicaSpec(NamedTuple):
    """What a replica needs to know, as plain data."""

    base: ServedBase
    replicas: int
    registry: str
    capacity: int
    """Adapters that the engine keeps."""
    preload: tuple[str, ...]
    pin: tuple[str, ...]
    cache_dir: str | None
    """Where adapters are fetched to; None means the user's own cache."""
    cache_gib: float
    api_keys: str | None
    trusts_everybody: bool
    """True if admin routes are open to all: there are no keys, and only this machine reaches the server."""
    adapter_roots: tuple[str, ...]
    trust_remote_code: bool
    max_body_bytes: int
    body_timeout_s: float
    running: int | None
    """Requests in the engine at once; None means as many as it takes."""
    waiting: int
    queue_timeout_s: float
    drain_s: float
    secret: str
    """What HAProxy adds to the requests that it sends."""
    is_local: bool
    """True if HAProxy runs on the same machine for sure, so that nobody else needs to reach the replica."""


class NoDownload(CallbackBase):
    """Leaves the base to vLLM, and so saves each start a worker process that imports everything (7 s on two cores)."""

    async def on_before_node_init(self) -> None:
        """Called by the engine before it starts."""
        self.ctx.run_init_node = False


class AdapterServer(LLMServer):
    """One engine with one base, and the adapters that requests ask for."""

    async def __init__(self, llm_config: LLMConfig, *, spec: ReplicaSpec) -> None:
        self._spec = spec
        self._front: DeploymentHandle[Any] = serve.get_deployment_handle(FRONT, FRONT_APPLICATION)
        self._id = serve.get_replica_context().replica_id.unique_id
        self._is_draining = False
        self._tasks: list[asyncio.Task[Any]] = []
        # Each time it runs, vLLM leaves seven sockets and a file in the folder for temporary files.
        self._scratch = Scratch(socket_folder(), _FOLDER)
        os.environ["TMPDIR"] = os.environ["VLLM_RPC_BASE_PATH"] = str(self._scratch.path)
        try:
            await super().__init__(llm_config)
        except BaseException:
            self._scratch.close()
            raise

    def _init_multiplex_loader(self, model_downloader_cls: Any = None) -> None:
        """Nothing: adapters are loaded by ``Holdings``, not by Ray Serve's multiplexing."""

    async def _start_engine(self) -> None:
        """Start the engine, and not the actor that upstream starts with it to report usage: that alone takes ten
        seconds of a core.
        """
        engine: Any = self.engine
        await engine.start()

    async def start(self) -> None:
        """Start the engine, then its HTTP server, and announce it."""
        await super().start()
        engine: Any = self.engine
        client, spec = engine._engine_client, self._spec  # noqa: SLF001 - Ray Serve LLM has no public way to it
        count_outputs(client)
        registry = Registry(spec.registry, reads_first=False)  # questions are asked on the event loop
        try:
            await asyncio.to_thread(registry.refresh)
        except LoraloomError as error:
            _log.warning("nothing is known of the registry yet: %s", error)  # the base can be served all the same
        folder = Path(spec.cache_dir) if spec.cache_dir else None
        cache = AdapterCache(registry, folder, limit_gib=spec.cache_gib)
        self._catalogue = Catalogue(spec.base, registry)
        self._metrics = Metrics()
        self._holdings = Holdings(client, engine._oai_models, cache, spec.capacity, self._tell)  # noqa: SLF001
        self._follower = Follower(registry, self._catalogue, self._holdings, spec.pin)
        app = await engine.build_asgi_app()
        uploads = Uploads(
            registry,
            spec.base,
            spec.adapter_roots,
            self._follower.catch_up,
            trust_remote_code=spec.trust_remote_code,
        )
        add_pages(app, self._catalogue, self._follower.find, self._health, uploads.load, uploads.unload)
        add_playground(app, Votes(registry, spec.base.name, self._follower.catch_up).cast)
        self._keys = KeyRing(spec.api_keys) if spec.api_keys else None
        self._admission = Admission(
            running=spec.running or client.vllm_config.scheduler_config.max_num_seqs,
            waiting=spec.waiting,
            timeout_s=spec.queue_timeout_s,
        )
        self._limiter = Limiter(spec.replicas)
        self._door = Door(
            app,
            catalogue=self._catalogue,
            follower=self._follower,
            holdings=self._holdings,
            keys=self._keys,
            limiter=self._limiter,
            admission=self._admission,
            metrics=self._metrics,
            max_body_bytes=spec.max_body_bytes,
            is_open=spec.trusts_everybody,
            max_sequences=client.vllm_config.scheduler_config.max_num_seqs,
            wait_s=spec.queue_timeout_s,
            body_timeout_s=spec.body_timeout_s,
            is_engine_dead=lambda: bool(client.errored),
        )
        await self._follower.begin(spec.preload)
        await self._listen()

    async def check_health(self) -> None:
        """Called by Ray Serve, which replaces the replica if this raises."""
        await super().check_health()
        for task in self._tasks:
            if task.done():
                raise RuntimeError(f"a task of the replica has ended: {task}")

    async def _listen(self) -> None:
        host = "127.0.0.1" if self._spec.is_local else get_node_ip_address()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, 0), family=family, backlog=2048)
        self._address = (host, int(listener.getsockname()[1]))
        config = uvicorn.Config(
            FrontOnly(self._door, self._spec.secret),
            http="httptools",
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            forwarded_allow_ips="*",  # only HAProxy reaches it
            timeout_keep_alive=_KEEP_ALIVE_S,
        )
        self._server = uvicorn.Server(config)
        serving = asyncio.create_task(self._server.serve(sockets=[listener]))
        while not self._server.started and not serving.done():  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0.01)
        if serving.done():
            await serving
            raise RuntimeError("the replica's HTTP server did not start; its log says why")
        while not await self._announce():  # noqa: ASYNC110 - the front may be starting still
            await asyncio.sleep(0.1)
        self._tasks = [
            serving,
            asyncio.create_task(self._stay_announced()),
            asyncio.create_task(self._follower.run()),
            asyncio.create_task(self._flush_metrics()),
        ]
        if self._keys is not None:
            self._tasks.append(asyncio.create_task(self._follow_keys(self._keys)))
            if self._spec.replicas > 1:
                find = partial(find_ledger, LEDGER)
                self._tasks.append(asyncio.create_task(share(self._limiter, self._id, find)))

    def _tell(self, manifest: Manifest, seconds: float | None, failed: bool) -> None:
        if seconds is None:
            self._metrics.eviction(manifest.id)
        else:
            self._metrics.load(manifest.id, seconds, failed=failed)

    async def _flush_metrics(self) -> None:
        self._metrics.watch("loraloom_requests_running", lambda: self._admission.running)
        self._metrics.watch("loraloom_requests_waiting", lambda: self._admission.waiting)
        self._metrics.watch("loraloom_adapters_resident", lambda: len(self._holdings.resident))
        while True:
            await asyncio.sleep(METRICS_EVERY_S)
            self._metrics.flush()

    async def _announce(self) -> bool:
        return bool(await self._tell_front("announce", *self._address))

    async def _tell_front(self, method: str, *arguments: object) -> object:
        """What the front answers; None if it does not, for now."""
        try:
            answer = getattr(self._front, method).remote(self._id, *arguments)
            return await asyncio.wait_for(answer, _FRONT_TIMEOUT_S)
        except (RayError, RayServeException, TimeoutError) as error:
            _log.warning("the front does not answer: %s", error or type(error).__name__)
            return None

    async def _stay_announced(self) -> None:
        while True:
            await asyncio.sleep(ANNOUNCE_S)
            await self._announce()

    async def _follow_keys(self, keys: KeyRing) -> None:
        trouble = keys.trouble
        while True:
            await asyncio.sleep(KEYS_EVERY_S)
            await asyncio.to_thread(keys.refresh)  # some milliseconds a key, where the file has changed
            if keys.trouble not in (None, trouble):
                self._metrics.key_file_fault()
            trouble = keys.trouble

    async def _health(self) -> None:
        if self._is_draining:
            raise overloaded("This replica is about to end", SHUTTING_DOWN, 1)
        try:
            await super().check_health()
        except Exception as error:  # noqa: BLE001 - whatever it is, the engine does not answer
            raise ApiError(503, f"The engine does not answer: {error or type(error).__name__}", UNAVAILABLE) from None

    async def _drain(self) -> None:
        """Take no new requests, and wait for those under way."""
        self._is_draining = True
        deadline = time.monotonic() + self._spec.drain_s
        await self._tell_front("drain")
        await asyncio.sleep(_ON_THEIR_WAY_S)
        while self._door.running and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(_DRAIN_POLL_S)
        self._admission.close()  # those that still wait are told; those that are answered are cut off
        await self._tell_front("leave")

    async def __del__(self) -> None:
        if self._tasks:
            await self._drain()  # announcing itself all the while: the front forgets who is silent
            for task in self._tasks[1:]:
                task.cancel()
            self._server.should_exit = True
            await asyncio.wait([self._tasks[0]], timeout=2)
            await asyncio.to_thread(self._holdings.close)
        try:
            await super().__del__()
        finally:
            self._scratch.close()
