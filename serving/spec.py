"""ServeSpec: which base is served, where its adapters come from, and how much of the machine the engine may take."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt

from cluster.errors import InputError
from cluster.rules import Broken, SecretValueError, StrictModel, rule
from cluster.schema import Reference, is_local
from cluster.spec import ClusterSpec
from serving.manifest import parse_reference

LoraRank = Literal[1, 8, 16, 32, 64, 128, 256, 320, 512]
"""The ranks that vLLM compiles its LoRA kernels for (vllm/config/lora.py, MaxLoRARanks); adapters of lower rank are
padded."""

MAX_LORA_RANKS: tuple[int, ...] = get_args(LoraRank)

ENGINE_OWNED = {
    "model": "base.model",
    "revision": "base.revision",
    "tokenizer": "base.model",
    "tokenizer_revision": "base.revision",
    "trust_remote_code": "base.trust_remote_code",
    "served_model_name": "base.name",
    "enable_lora": "nothing: it is always on",
    "max_loras": "engine.max_loras",
    "max_cpu_loras": "engine.max_cpu_loras",
    "max_lora_rank": "engine.max_lora_rank",
    "max_model_len": "engine.max_model_len",
    "dtype": "engine.dtype",
    "gpu_memory_utilization": "engine.gpu_memory_utilization",
    "kv_cache_memory_bytes": "engine.kv_cache_gib on CPUs, engine.gpu_memory_utilization on GPUs",
    "lora_modules": "registry",
    "worker_extension_cls": "nothing: on CPUs serving/weights/cpu_lora.py needs it",
    "distributed_executor_backend": "nothing: Ray Serve chooses it",
}
"""vLLM arguments that another field sets, and which one: given in ``engine.extra`` they would win or lose silently."""

REGISTRY_SCHEMES = ("s3", "gs", "abfs", "abfss", "file")
"""What a registry's URI may start with: those of pyarrow's file systems whose stores can create an object only where
there is none."""

DEFAULT_CPU_LORAS = 16
DEFAULT_CPU_KV_CACHE_GIB = 1

_SERVED_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")


def _check_served_name(name: str) -> str:
    # ':' parts base from adapter in Ray Serve's model ids, '@' parts name from version in ours.
    if not _SERVED_NAME.fullmatch(name):
        raise ValueError("must start with a letter or digit and hold only letters, digits, '.', '_', '-' and '/'")
    return name


def _check_engine_arguments(extra: dict[str, Any]) -> dict[str, Any]:
    owned = [f"{name} (set {ENGINE_OWNED[name]} instead)" for name in extra if name in ENGINE_OWNED]
    if owned:
        raise ValueError("must not hold what another field sets: " + ", ".join(owned))
    sizes = [name for name in ("tensor_parallel_size", "pipeline_parallel_size") if not _is_size(extra.get(name, 1))]
    if sizes:
        raise ValueError(f"{' and '.join(sizes)} must be an integer of at least 1")
    return extra


def _check_adapter(reference: str) -> str:
    try:
        parse_reference(reference)
    except InputError as error:
        raise ValueError("; ".join(fault.rule for fault in error.faults)) from None
    return reference


def _check_folder(reference: str) -> str:
    if "://" in reference:
        raise ValueError("must be a folder on this machine")
    return reference


def _check_registry(reference: str) -> str:
    scheme, separator, _ = reference.partition("://")
    if separator and scheme not in REGISTRY_SCHEMES:
        kinds = ", ".join(f"{known}://" for known in REGISTRY_SCHEMES)
        raise SecretValueError(f"must be a folder, or a URI that starts with one of {kinds}, got '{scheme}://…'")
    return reference


def _check_key_file(reference: str) -> str:
    if not is_local(reference):
        raise ValueError("must be a file on this machine: ./x, ../x, /x or ~/x")
    return reference


def is_loopback(host: str) -> bool:
    """True if only this machine reaches ``host``: an address, or a name all of whose addresses are loopback ones.

    A name that cannot be looked up may lead anywhere later.
    """
    try:
        return _is_loopback_address(host)
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM) if host else []
    except (OSError, UnicodeError):
        return False
    return bool(found) and all(_is_loopback_address(str(address[0])) for *_, address in found)


def _is_loopback_address(text: str) -> bool:
    address = ipaddress.ip_address(text.partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


ServedName = Annotated[str, AfterValidator(_check_served_name)]
EngineArguments = Annotated[dict[str, Any], AfterValidator(_check_engine_arguments)]
Folder = Annotated[Reference, AfterValidator(_check_folder)]
AdapterRef = Annotated[str, AfterValidator(_check_adapter)]
KeyFile = Annotated[Reference, AfterValidator(_check_key_file)]
RegistryPlace = Annotated[Reference, AfterValidator(_check_registry)]


class ServedBase(StrictModel):
    """The base model."""

    model: Reference
    """Hugging Face folder or hub id of the base that the adapters were trained on; see also ``serve_base``."""
    revision: str | None = None
    """Hub revision (branch, tag or commit); null means the default branch. Not for folders."""
    name: ServedName | None = None
    """What clients write in ``model`` to reach the plain base; null means the last part of ``model``."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models whose code you have read."""

    @property
    def served_name(self) -> str:
        """The name under which clients reach the plain base."""
        return (
            self.name
            or re.sub(r"[^A-Za-z0-9._-]", "-", self.model.rstrip("/").rsplit("/", 1)[-1]).lstrip(".-_")
            or "base"
        )


class EngineSpec(StrictModel):
    """vLLM's settings. At the start, memory for ``max_loras`` adapters of rank ``max_lora_rank`` is reserved."""

    max_loras: PositiveInt = 4
    """Different adapters in one batch, resident on the accelerator. Requests for more of them at once take turns."""
    max_cpu_loras: PositiveInt | None = None
    """Adapters kept in host memory, ready to move to the accelerator; null means the larger of 16 and ``max_loras``."""
    max_lora_rank: LoraRank = 64
    """Largest rank that can be served; adapters above it are refused. One of vLLM's 1, 8, 16, 32, 64, 128, 256, 320,
    512."""
    max_model_len: PositiveInt | None = None
    """Longest prompt and answer together, in tokens; null means what the base's configuration says."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Data type of weights and activations; ``auto`` is the one that the base was saved in (float32 is served as
    bfloat16), and float32 on CPUs that have no instructions for bfloat16."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of each GPU's memory that the engine takes; null means vLLM's own default. GPUs only."""
    kv_cache_gib: PositiveInt | None = None
    """Size of the KV cache in GiB; null means 1. CPUs only."""
    tool_call_parser: str | None = None
    """How the base writes calls of tools, such as ``hermes`` or ``llama3_json``: one of vLLM's tool call parsers; null
    means that requests with tools are refused."""
    extra: EngineArguments = Field(default_factory=dict[str, Any])
    """Further vLLM engine arguments by their Python names, such as ``enforce_eager: true`` or ``tensor_parallel_size:
    2``."""

    @rule
    def _host_holds_the_accelerators(self) -> Iterator[Broken]:
        if self.max_cpu_loras is not None and self.max_cpu_loras < self.max_loras:
            yield "max_cpu_loras", f"must be at least engine.max_loras ({self.max_loras}), got {self.max_cpu_loras}"

    @property
    def host_loras(self) -> int:
        """Adapters that the engine keeps in host memory."""
        return self.max_cpu_loras or max(DEFAULT_CPU_LORAS, self.max_loras)

    @property
    def accelerators(self) -> int:
        """Accelerators that one engine spans: tensor parallel times pipeline parallel size."""
        return int(self.extra.get("tensor_parallel_size", 1)) * int(self.extra.get("pipeline_parallel_size", 1))


class HttpSpec(StrictModel):
    """Where the server listens."""

    host: str = "127.0.0.1"
    """Address to listen on. Any that other machines reach needs ``http.api_keys``."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """TCP port; 0 means any free one, which is printed."""
    api_keys: KeyFile | None = None
    """File of hashed API keys (``loraloom keys add FILE``), read again when it changes; null means that whoever reaches
    the server may use it."""
    allow_no_keys: bool = False
    """Listen on an address that other machines reach although there are no keys: something else keeps strangers out."""

    max_body_mib: PositiveInt = 4
    """Largest request, in MiB; larger ones are answered 413."""
    body_timeout_s: PositiveFloat = 30.0
    """Longest time that a request may take to arrive, in seconds; slower ones are answered 408."""
    adapter_roots: list[Folder] = Field(default_factory=list[str])
    """Folders below which ``POST /v1/load_lora_adapter`` takes adapters from; none closes that route."""

    @rule
    def _strangers_need_keys(self) -> Iterator[Broken]:
        if self.api_keys is not None:
            if self.allow_no_keys:
                yield "allow_no_keys", "has no effect where http.api_keys is set"
        elif is_loopback(self.host):
            if self.allow_no_keys:
                yield "allow_no_keys", f"has no effect on {self.host}, which only this machine reaches"
        elif not self.allow_no_keys:
            reached = f"{self.host!r} is not a loopback address, so that other machines may reach it"
            yield "api_keys", f"is required ({reached}): set it, or set http.allow_no_keys"


class QueueSpec(StrictModel):
    """How many requests a replica works on at once, and how many wait; see ``serving/access/fairness.py``."""

    running: PositiveInt | None = None
    """Requests in the engine at once; null means as many as one batch of it holds (vLLM's ``max_num_seqs``)."""
    waiting: PositiveInt = 512
    """Requests that wait at most. Beyond it, whoever holds most places gets 429 with Retry-After."""
    timeout_s: PositiveFloat = 60.0
    """Longest wait for a place in the engine, in seconds; then the request gets 503."""


class CacheSpec(StrictModel):
    """Where replicas keep what they fetch from the registry."""

    folder: Folder | None = None
    """A folder of each machine, which its replicas share; null means ~/.cache/loraloom/adapters."""
    gib: PositiveFloat = 20.0
    """Most that is kept there, in GiB. Adapters that an engine holds stay, even beyond it."""


class ReplicaResources(StrictModel):
    """What Ray reserves for one replica."""

    gpus: Annotated[float, Field(ge=0)] = 0
    """GPUs a replica; 0 serves on CPUs. A fraction shares one GPU: lower ``engine.gpu_memory_utilization``
    accordingly."""
    cpus: PositiveFloat = 1
    """CPUs a replica. On a CPU machine this is bookkeeping for Ray's scheduler; vLLM takes the cores that it may run
    on."""


class ServeSpec(StrictModel):
    """One base, all adapters of a registry, over HTTP."""

    base: ServedBase
    """What is served, with and without adapters."""
    serve_base: Literal["plain", "dequantized"] = "plain"
    """``plain``: the base's own weights. ``dequantized``: its linear layers quantised to NF4 and dequantised once, as
    they were when the adapters were trained; kept on this node's disk (XDG_CACHE_HOME/loraloom/dequantized, the two
    used last), in bfloat16, or in float32 where the engine computes in that (engine.dtype). Other nodes must see the
    same folder."""
    registry: RegistryPlace
    """Folder or URI (``s3://bucket/prefix?region=…``, ``gs://…``, ``abfs://…``) of published adapters; read while the
    server runs, so that a new adapter answers at once."""
    engine: EngineSpec = EngineSpec()
    """vLLM's settings."""
    http: HttpSpec = HttpSpec()
    """Where it listens."""
    queue: QueueSpec = QueueSpec()
    """How requests wait."""
    preload: list[AdapterRef] = Field(default_factory=list[str])
    """Adapters that are loaded before the server answers, such as ``support`` or ``sales@prod``."""
    pin: list[AdapterRef] = Field(default_factory=list[str])
    """Adapters that are loaded before the server answers and stay so. An alias stays pinned wherever it moves."""
    cache: CacheSpec = CacheSpec()
    """Where adapters are fetched to."""
    replicas: PositiveInt = 1
    """Copies of the base, each with an engine of its own."""
    adapters_per_replica: PositiveInt | None = None
    """Adapters that a replica keeps loaded before it drops the least recently used one; null means as many as the
    engine holds in host memory."""
    drain_s: PositiveFloat = 30.0
    """Longest that a replica which is to end waits for the answers under way, in seconds."""
    resources: ReplicaResources = ReplicaResources()
    """What Ray reserves for each replica."""
    cluster: ClusterSpec = ClusterSpec()
    """Where it runs; left out, a Ray is started on this machine and ended with the server."""

    @rule
    def _engine_holds_them(self) -> Iterator[Broken]:
        adapters, engine = self.adapters_per_replica, self.engine
        if adapters is None:
            return
        if adapters > engine.host_loras:
            most = f"what the engine keeps in host memory (engine.max_cpu_loras: {engine.host_loras})"
            yield "adapters_per_replica", f"must be at most {most}, got {adapters}"
        if adapters < engine.max_loras:
            least = f"engine.max_loras ({engine.max_loras}), whose slots would else stay empty"
            yield "adapters_per_replica", f"must be at least {least}; got {adapters}"

    @rule
    def _pins_leave_room(self) -> Iterator[Broken]:
        if len(self.pin) >= self.resident_adapters:
            room = f"the adapters that a replica keeps ({self.resident_adapters}), so that others find a place"
            yield "pin", f"must hold fewer adapters than {room}; got {len(self.pin)}"

    @rule
    def _memory_is_the_accelerators(self) -> Iterator[Broken]:
        gpus, engine = self.resources.gpus, self.engine
        if gpus == 0 and engine.gpu_memory_utilization is not None:
            yield "engine.gpu_memory_utilization", "has no effect without GPUs: set resources.gpus, or leave it out"
        if gpus > 0 and engine.kv_cache_gib is not None:
            yield "engine.kv_cache_gib", "has no effect on GPUs: set engine.gpu_memory_utilization instead"

    @rule
    def _resources_fit_the_engine(self) -> Iterator[Broken]:
        gpus, span = self.resources.gpus, self.engine.accelerators
        if gpus >= 1 and gpus != span:
            yield "resources.gpus", f"must equal tensor_parallel_size x pipeline_parallel_size ({span}), got {gpus}"
        if 0 < gpus < 1 and span != 1:
            yield "resources.gpus", f"is a fraction, which cannot hold an engine that spans {span} accelerators"

    @rule
    def _dequantized_weights_are_read(self) -> Iterator[Broken]:
        if self.serve_base == "dequantized" and "quantization" in self.engine.extra:
            yield "serve_base", "dequantized serves 16- or 32-bit weights: leave engine.extra.quantization out"
        if self.serve_base == "dequantized" and self.engine.extra.get("load_format") == "dummy":
            yield "serve_base", "has no effect with engine.extra.load_format: dummy, which reads no weights"

    @property
    def resident_adapters(self) -> int:
        """Adapters that a replica keeps loaded."""
        return self.adapters_per_replica or self.engine.host_loras
