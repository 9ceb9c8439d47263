"""The Serve application: what is checked before anything starts, how it starts, and how nothing of it is left.

``prepare`` needs no Ray and finds every fault that can be known beforehand; ``serving`` runs inside
``cluster.connect``.
"""

from __future__ import annotations

import contextlib
import io
import secrets
import socket
import sys
import time
from collections.abc import Generator
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import ABSENT, ConflictError, Fault, InputError, LoraloomError, MachineError, NotFoundError
from cluster.folder_cache import mark_used
from cluster.storage import writable_folder
from serving.access.keys import KeyRing
from serving.adapters.catalogue import Catalogue, ServedBase
from serving.engine import HEALTH_CHECK_PERIOD_S, SHUTDOWN_S, llm_config_arguments, placement_bundles
from serving.http.api_error import ApiError
from serving.http.haproxy import FrontSpec, find_binary, most_connections
from serving.manifest import base_identity
from serving.quiet import quiet
from serving.registry import Registry
from serving.spec import ServeSpec, is_loopback
from serving.watch import (
    APPLICATION,
    FRONT,
    FRONT_APPLICATION,
    Progress,
    ServeFailedError,
    wait_until_running,
)
from serving.weights.architecture import build_on_meta
from serving.weights.dequantize import engine_spec

if TYPE_CHECKING:
    from ray.serve import Application

    from serving.replica import ReplicaSpec

_SPARE_SLOTS = 2
_FRONT_ATTEMPTS = 3
_PROXY_THREADS = 2
"""The second takes over while the first is busy."""


@dataclass(frozen=True)
class Shelf:
    """What a server finds in the registry when it starts."""

    base: ServedBase
    adapters: list[str]
    """Ids of the adapters that it can serve."""
    unfit: dict[str, str]
    """Ids of those that it cannot, and why: another base, too high a rank, a damaged log."""


RAY_VARIABLES = {"RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5"}
"""For a Ray that is started for a server. Ray Serve's controller looks at its replicas ten times a second, which takes
7 % of a slow core from the engine; replicas tell of themselves, and HAProxy looks for itself."""


@dataclass
class Server:
    """A server that answers."""

    url: str
    """Base URL for OpenAI clients, such as ``http://127.0.0.1:8000/v1``."""
    start_s: float
    """Seconds from the start of Ray Serve to the first answer."""
    secret: str
    """What HAProxy adds to requests; see ``serving.http.inner``."""
    dequantized: Path | None = None
    """The dequantised base that is served, a folder of this node's cache."""

    def keep(self) -> None:
        """Keep what a replica that has to be started anew will read; to be called now and then."""
        if self.dequantized is not None:
            mark_used(self.dequantized)


def prepare(spec: ServeSpec, *, is_running: bool = False) -> Shelf:
    """Check everything that can be known before Ray starts, or, where the server ``is_running``, before its replicas
    are replaced.

    Raises:
        InputError: the base's configuration, vLLM's further arguments, the file of keys, an adapter that is to be
            loaded ahead, or a name in the registry are at fault.
        NotFoundError: there is no registry.
        RegistryUnreachableError: its store does not answer.
        ConflictError: the port is taken.
        MachineError: vLLM or HAProxy is not installed, or the cache cannot be written.
    """
    faults = [*_engine_faults(spec), *_file_faults(spec)]
    try:
        base = base_identity(spec.base.model, spec.base.revision, trust_remote_code=spec.base.trust_remote_code)
    except InputError as error:
        raise InputError(faults + error.faults) from None
    if spec.serve_base == "dequantized":
        faults += _quantisation_faults(spec)
    try:
        registry = Registry(spec.registry)
        is_there = registry.exists()
    except InputError as error:
        raise InputError(faults + error.faults) from None
    if not is_there:
        if faults:
            raise InputError([*faults, Fault("registry", "must be a folder that is there", spec.registry)])
        raise NotFoundError(f"{spec.registry}: there is no registry here; `loraloom publish` makes one")
    served = ServedBase(
        name=spec.base.served_name,
        identity=base,
        max_rank=spec.engine.max_lora_rank,
        max_model_len=spec.engine.max_model_len,
        started_at=datetime.now(UTC),
    )
    if spec.base.served_name in registry.names():
        faults.append(Fault("base.name", "must not be the name of an adapter in the registry", spec.base.served_name))
    faults += _ahead_faults(spec, Catalogue(served, registry))
    if faults:
        raise InputError(faults)
    if spec.http.port and not is_running:
        _require_free_port(spec.http.host, spec.http.port)
    find_binary()
    if spec.cache.folder:
        writable_folder(spec.cache.folder, "cache.folder")
    return _survey(registry, served)


def _file_faults(spec: ServeSpec) -> list[Fault]:
    """What is wrong with the files and folders of ``http``."""
    faults = [
        Fault("http.adapter_roots", "must be folders that are there", root)
        for root in spec.http.adapter_roots
        if not Path(root).is_dir()
    ]
    if spec.http.api_keys is not None:
        try:
            KeyRing(spec.http.api_keys)
        except InputError as error:
            faults += error.faults
        except LoraloomError as error:
            faults.append(Fault("http.api_keys", f"must be a file of keys that can be read ({error})", ABSENT))
    return faults


def _ahead_faults(spec: ServeSpec, catalogue: Catalogue) -> list[Fault]:
    """Adapters that are to be loaded ahead, and that this server does not have or cannot serve."""
    faults: list[Fault] = []
    for field, references in (("preload", spec.preload), ("pin", spec.pin)):
        for reference in references:
            try:
                catalogue.find(reference)
            except ApiError as error:
                faults.append(Fault(field, f"must hold adapters that can be served ({error})", reference))
    return faults


@contextlib.contextmanager
def serving(spec: ServeSpec, shelf: Shelf, progress: Progress = lambda _: None) -> Generator[Server]:
    """Serve ``spec`` while the block runs; Ray must be connected. On the way out the applications and HAProxy end.

    Args:
        spec: What to serve.
        shelf: What ``prepare`` returned for it.
        progress: Called with a line for people whenever the state changes.

    Raises:
        InputError: the base's weights cannot be read, where they are to be dequantised.
        ConflictError: the cluster serves another base of ours already.
        MachineError: the cluster has not the resources that the replicas need, or the disk no room for the dequantised
            base.
        ServeFailedError: the engine or the front did not start, or not within ``START_LIMIT_S``.
    """
    import ray
    from ray import serve

    _require_resources(spec, dict(ray.cluster_resources()))
    is_shared = _serve_is_running()
    if is_shared and APPLICATION in serve.status().applications:
        raise ConflictError(f"the cluster runs the Ray Serve application {APPLICATION} already; end that one first")
    spec, dequantized = _with_engine_base(spec, progress)
    port = spec.http.port or _free_port(spec.http.host)
    secret = secrets.token_urlsafe(32)
    started = time.monotonic()
    progress("starting Ray Serve")
    try:
        with quiet():
            if not is_shared:
                serve.start(proxy_location="Disabled")
            front = build_front(spec, port, secret)
            _run({FRONT_APPLICATION: front, APPLICATION: build_engines(spec, shelf.base, secret)})
        wait_until_running(progress, started)
        host = f"[{spec.http.host}]" if ":" in spec.http.host else spec.http.host
        start_s = time.monotonic() - started
        yield Server(f"http://{host}:{port}/v1", start_s=start_s, secret=secret, dequantized=dequantized)
    finally:
        progress("stopping the server")
        _shut_down(is_shared)


def restart(spec: ServeSpec, shelf: Shelf, server: Server) -> None:
    """Replace every replica by one of ``spec``, one after another: with two or more, no request fails meanwhile.

    A replica that is to end takes no new requests, and answers those that it has (at most ``drain_s``). Where the
    server listens stays as it is.

    Raises:
        ServeFailedError: Ray Serve does not take the order.
    """
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    spec, server.dequantized = _with_engine_base(spec)
    try:
        with quiet():
            _run({APPLICATION: build_engines(spec, shelf.base, server.secret)})
    except (RayError, RayServeException) as error:
        raise ServeFailedError(f"Ray Serve does not take the order: {error}") from None


def _with_engine_base(spec: ServeSpec, progress: Progress = lambda _: None) -> tuple[ServeSpec, Path | None]:
    """``engine_spec``, and the folder where the base is a dequantised one."""
    started = engine_spec(spec, progress)
    return started, None if spec.serve_base == "plain" else Path(started.base.model)


def build_engines(spec: ServeSpec, base: ServedBase, secret: str) -> Application:
    """The application of the replicas, each with an engine."""
    from ray.serve.llm import LLMConfig, build_llm_deployment

    from serving.replica import AdapterServer

    config = LLMConfig(**llm_config_arguments(spec))
    replica = replica_spec(spec, base, secret)
    return build_llm_deployment(config, deployment_cls=AdapterServer, bind_kwargs={"spec": replica})


def build_front(spec: ServeSpec, port: int, secret: str) -> Application:
    """The application of the load balancer: one of its own, which a restart of the replicas leaves alone."""
    from ray import serve

    from serving.http.front import Front

    front: Any = serve.deployment(
        Front,
        name=FRONT,
        num_replicas=1,
        # It waits nearly all the time: a core of its own would be a core less for the engines.
        ray_actor_options={"num_cpus": 0, "resources": {_front_node(): 0.001}},
        max_constructor_retry_count=_FRONT_ATTEMPTS,
        graceful_shutdown_timeout_s=spec.drain_s + SHUTDOWN_S,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        graceful_shutdown_wait_loop_s=0.1,
    )
    return front.bind(front_spec(spec, port, secret))


def _front_node() -> str:
    """The resource of the node that clients are told of: this one, or the head where this is none of the cluster's."""
    import ray

    here = f"node:{ray.util.get_node_ip_address()}"
    return here if here in ray.cluster_resources() else "node:__internal_head__"


def _run(applications: dict[str, Application]) -> None:
    from ray import serve

    targets = [serve.RunTarget(target, name=name, route_prefix=None) for name, target in applications.items()]
    serve.run_many(targets, wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)


def front_spec(spec: ServeSpec, port: int, secret: str) -> FrontSpec:
    """What HAProxy is started with."""
    return FrontSpec(
        host=spec.http.host,
        port=port,
        slots=2 * spec.replicas + _SPARE_SLOTS,
        is_one=spec.replicas == 1,
        max_body_bytes=spec.http.max_body_mib << 20,
        body_timeout_s=spec.http.body_timeout_s,
        secret=secret,
        drain_s=spec.drain_s,
        threads=_PROXY_THREADS,
        connections=most_connections(),
    )


def replica_spec(spec: ServeSpec, base: ServedBase, secret: str) -> ReplicaSpec:
    """What each replica is started with."""
    from serving.replica import ReplicaSpec

    return ReplicaSpec(
        base=base,
        replicas=spec.replicas,
        registry=spec.registry,
        capacity=spec.resident_adapters,
        preload=tuple(spec.preload),
        pin=tuple(spec.pin),
        cache_dir=spec.cache.folder,
        cache_gib=spec.cache.gib,
        api_keys=spec.http.api_keys,
        trusts_everybody=spec.http.api_keys is None and is_loopback(spec.http.host),
        adapter_roots=tuple(spec.http.adapter_roots),
        trust_remote_code=spec.base.trust_remote_code,
        max_body_bytes=spec.http.max_body_mib << 20,
        body_timeout_s=spec.http.body_timeout_s,
        running=spec.queue.running,
        waiting=spec.queue.waiting,
        queue_timeout_s=spec.queue.timeout_s,
        drain_s=spec.drain_s,
        secret=secret,
        is_local=spec.cluster.address is None,
    )


def _serve_is_running() -> bool:
    import ray
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    try:
        ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return False
    return True


def _shut_down(is_shared: bool) -> None:
    """End the application, and Ray Serve with it unless it was there before us."""
    from ray import serve

    # Ray prints, and on stdout where results belong, that the controller has ended, as it was told to.
    with contextlib.redirect_stdout(io.StringIO()) as printed, quiet():
        if is_shared:
            for application in (APPLICATION, FRONT_APPLICATION):
                serve.delete(application)
        else:
            serve.shutdown()
    rest = [line for line in printed.getvalue().splitlines() if "ServeController.graceful_shutdown" not in line]
    sys.stderr.writelines(f"{line}\n" for line in rest)


def _survey(registry: Registry, base: ServedBase) -> Shelf:
    """Sort what is in the registry into what can be served and what cannot."""
    adapters: list[str] = []
    unfit = {"the log": f"what is lost with {'; '.join(registry.damage)}"} if registry.damage else dict[str, str]()
    for name in registry.names():
        for version in registry.versions(name):
            reason = base.unfit(registry.manifest(name, version))
            if reason:
                unfit[f"{name}@{version}"] = reason
            else:
                adapters.append(f"{name}@{version}")
    return Shelf(base, adapters, unfit)


def _engine_faults(spec: ServeSpec) -> list[Fault]:
    """Further engine arguments, and a parser of tool calls, that this vLLM does not know."""
    try:
        with quiet():
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.tool_parsers import ToolParserManager
    except ImportError as error:
        extra = "gpu" if spec.resources.gpus else "cpu"
        raise MachineError(
            f"vLLM cannot be imported ({error}): install it with pip install 'loraloom[{extra}]'"
        ) from None
    known = {field.name for field in fields(AsyncEngineArgs)}
    faults = [
        Fault(f"engine.extra.{name}", "must be an argument of vLLM's engine", ABSENT)
        for name in spec.engine.extra
        if name not in known
    ]
    parser, parsers = spec.engine.tool_call_parser, ToolParserManager.list_registered()
    if parser is not None and parser not in parsers:
        faults.append(Fault("engine.tool_call_parser", f"must be one of vLLM's: {', '.join(parsers)}", parser))
    return faults


def _quantisation_faults(spec: ServeSpec) -> list[Fault]:
    """Why the base cannot be quantised to NF4 and back."""
    try:
        build_on_meta(spec.base)
    except InputError as error:
        return error.faults
    return []


def _require_resources(spec: ServeSpec, available: dict[str, float]) -> None:
    """Fail where Ray would wait for ever for resources that the cluster does not have."""
    needed: dict[str, float] = {}
    for bundle in placement_bundles(spec):
        for resource, amount in bundle.items():
            needed[resource] = needed.get(resource, 0) + amount * spec.replicas
    lacking = [
        f"{amount:g} {resource} (there are {available.get(resource, 0):g})"
        for resource, amount in needed.items()
        if amount > available.get(resource, 0)
    ]
    if lacking:
        raise MachineError(f"the replicas need {' and '.join(lacking)}: lower replicas or resources")


def _require_free_port(host: str, port: int) -> None:
    try:
        with _listener(host, port):
            pass
    except OSError as error:
        raise ConflictError(
            f"{host}:{port} cannot be listened on ({error.strerror}); choose another http.port, or 0"
        ) from None


def _free_port(host: str) -> int:
    with _listener(host, 0) as listener:
        return int(listener.getsockname()[1])


def _listener(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener
