"""The Serve application: what is checked before anything starts, how it starts, and how nothing of it is left.

``prepare`` needs no Ray and finds every fault that can be known beforehand; ``serving`` runs inside
``cluster.connect``.
"""

from __future__ import annotations

import contextlib
import io
import socket
import sys
import time
from collections.abc import Generator
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import ABSENT, ConflictError, Fault, InputError, MachineError, NotFoundError
from serving.architecture import build_on_meta
from serving.catalogue import Catalogue
from serving.dequantize import engine_spec
from serving.engine import llm_config_arguments, placement_bundles
from serving.manifest import base_identity
from serving.quiet import quiet
from serving.registry import CorruptAdapterError, Registry
from serving.spec import ServeSpec
from serving.watch import APPLICATION, GATEWAY, Progress, wait_until_running

if TYPE_CHECKING:
    from ray.serve import Application


@dataclass(frozen=True)
class Shelf:
    """What a server finds in the registry when it starts."""

    catalogue: Catalogue
    adapters: list[str]
    """Ids of the adapters that it can serve."""
    unfit: dict[str, str]
    """Ids of those that it cannot, and why: another base, too high a rank, a corrupt manifest."""


@dataclass(frozen=True)
class Server:
    """A server that answers."""

    url: str
    """Base URL for OpenAI clients, such as ``http://127.0.0.1:8000/v1``."""
    start_s: float
    """Seconds from the start of Ray Serve to the first answer."""


def prepare(spec: ServeSpec) -> Shelf:
    """Check everything that can be known before Ray starts.

    Raises:
        InputError: the base's configuration, vLLM's further arguments, or a name in the registry are at fault.
        NotFoundError: there is no registry.
        ConflictError: the port is taken.
        MachineError: vLLM is not installed.
    """
    faults = _engine_faults(spec)
    try:
        base = base_identity(spec.base.model, spec.base.revision, trust_remote_code=spec.base.trust_remote_code)
    except InputError as error:
        raise InputError(faults + error.faults) from None
    if spec.serve_base == "dequantized":
        faults += _quantisation_faults(spec)
    if not Path(spec.registry).is_dir():
        if faults:
            raise InputError([*faults, Fault("registry", "must be a folder that is there", spec.registry)])
        raise NotFoundError(f"{spec.registry}: there is no registry here; `loraloom publish` makes one")
    registry = Registry(spec.registry)
    if spec.base.served_name in registry.names():
        faults.append(Fault("base.name", "must not be the name of an adapter in the registry", spec.base.served_name))
    if faults:
        raise InputError(faults)
    if spec.http.port:
        _require_free_port(spec.http.host, spec.http.port)
    catalogue = Catalogue(
        base_name=spec.base.served_name,
        base=base,
        registry=spec.registry,
        max_rank=spec.engine.max_lora_rank,
        max_model_len=spec.engine.max_model_len,
        started_at=datetime.now(UTC),
    )
    return _survey(registry, catalogue)


@contextlib.contextmanager
def serving(spec: ServeSpec, shelf: Shelf, progress: Progress = lambda _: None) -> Generator[Server]:
    """Serve ``spec`` while the block runs; Ray must be connected. On the way out the application and its HTTP proxy
    end.

    Args:
        spec: What to serve.
        shelf: What ``prepare`` returned for it.
        progress: Called with a line for people whenever the state changes.

    Raises:
        InputError: the base's weights cannot be read, where they are to be dequantised.
        ConflictError: the cluster runs Ray Serve already.
        MachineError: the cluster has not the resources that the replicas need, or the disk no room for the dequantised
            base.
        ServeFailedError: the engine or the gateway did not start, or not within ``START_LIMIT_S``.
    """
    import ray
    from ray import serve

    _require_resources(spec, dict(ray.cluster_resources()))
    if serve.status().proxies:
        raise ConflictError("Ray Serve is running on this cluster already; a second server needs a cluster of its own")
    spec = engine_spec(spec, progress)
    port = spec.http.port or _free_port(spec.http.host)
    started = time.monotonic()
    progress("starting Ray Serve")
    try:
        with quiet():
            serve.start(proxy_location="HeadOnly", http_options={"host": spec.http.host, "port": port})
            target = serve.RunTarget(build_application(spec, shelf.catalogue), name=APPLICATION, route_prefix="/")
            serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
        wait_until_running(progress, started)
        host = f"[{spec.http.host}]" if ":" in spec.http.host else spec.http.host
        yield Server(url=f"http://{host}:{port}/v1", start_s=time.monotonic() - started)
    finally:
        progress("stopping the server")
        _shut_down()


def build_application(spec: ServeSpec, catalogue: Catalogue) -> Application:
    """The Serve application: gateway -> replicas of the engine."""
    from ray import serve
    from ray.llm._internal.serve.core.configs.openai_api_models import to_model_metadata
    from ray.serve.llm import LLMConfig, build_llm_deployment

    from serving.gateway import build_ingress
    from serving.replica import AdapterServer, RegistryLoader

    config = LLMConfig(**llm_config_arguments(spec))
    name = spec.base.served_name
    engine = build_llm_deployment(
        config,
        deployment_cls=AdapterServer,
        bind_kwargs={"model_downloader": partial(RegistryLoader, catalogue.registry)},
    )
    gateway: Any = serve.deployment(
        build_ingress(),
        name=GATEWAY,
        num_replicas=1,
        max_ongoing_requests=10_000,
        # The gateway waits for engines nearly all the time: a core of its own would be a core less for them.
        ray_actor_options={"num_cpus": 0},
    )
    return gateway.bind(
        llm_deployments={name: engine}, model_cards={name: to_model_metadata(name, config)}, catalogue=catalogue
    )


def _shut_down() -> None:
    from ray import serve

    # Ray prints, and on stdout where results belong, that the controller has ended, as it was told to.
    with contextlib.redirect_stdout(io.StringIO()) as printed, quiet():
        serve.shutdown()
    rest = [line for line in printed.getvalue().splitlines() if "ServeController.graceful_shutdown" not in line]
    sys.stderr.writelines(f"{line}\n" for line in rest)


def _survey(registry: Registry, catalogue: Catalogue) -> Shelf:
    """Sort what is in the registry into what can be served and what cannot."""
    adapters: list[str] = []
    unfit: dict[str, str] = {}
    for name in registry.names():
        for version in registry.versions(name):
            try:
                manifest = registry.manifest(name, version)
                reason = catalogue.unfit(manifest)
            except CorruptAdapterError as error:
                reason = str(error)
            if reason:
                unfit[f"{name}@{version}"] = reason
            else:
                adapters.append(f"{name}@{version}")
    return Shelf(catalogue, adapters, unfit)


def _engine_faults(spec: ServeSpec) -> list[Fault]:
    """Further engine arguments that this vLLM does not know."""
    try:
        with quiet():
            from vllm.engine.arg_utils import AsyncEngineArgs
    except ImportError as error:
        extra = "gpu" if spec.resources.gpus else "cpu"
        raise MachineError(
            f"vLLM cannot be imported ({error}): install it with pip install 'loraloom[{extra}]'"
        ) from None
    known = {field.name for field in fields(AsyncEngineArgs)}
    return [
        Fault(f"engine.extra.{name}", "must be an argument of vLLM's engine", ABSENT)
        for name in spec.engine.extra
        if name not in known
    ]


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
