from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.schema import parse_spec
from serving.engine import engine_arguments, environment, llm_config_arguments, placement_bundles
from serving.spec import ServeSpec


def spec(**fields: Any) -> ServeSpec:
    return parse_spec({"base": {"model": "/models/tiny"}, "registry": "/r"} | fields, ServeSpec, "serve.yaml")


@pytest.fixture(autouse=True)
def multiplies_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever machine this is."""
    monkeypatch.setattr("serving.engine.cpu_multiplies_bfloat16", lambda: True)


@pytest.mark.parametrize(
    ("wanted", "gpus", "has_instructions", "expected"),
    [
        ("auto", 0, True, "auto"),
        ("auto", 0, False, "float32"),
        ("auto", 1, False, "auto"),
        ("bfloat16", 0, False, "bfloat16"),
        ("float16", 0, False, "float16"),
    ],
)
def test_what_the_engine_computes_in(
    wanted: str, gpus: int, has_instructions: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.engine.cpu_multiplies_bfloat16", lambda: has_instructions)
    served = spec(engine={"dtype": wanted}, resources={"gpus": gpus, "cpus": 1})
    assert engine_arguments(served)["dtype"] == expected


def test_on_cpus() -> None:
    arguments = llm_config_arguments(spec(engine={"max_loras": 2, "max_lora_rank": 16, "max_model_len": 128}))
    assert arguments["model_loading_config"] == {"model_id": "tiny", "model_source": "/models/tiny"}
    assert arguments["placement_group_config"] == {"bundles": [{"CPU": 1}]}
    assert arguments["engine_kwargs"] == {
        "enable_lora": True,
        "max_loras": 2,
        "max_cpu_loras": 17,
        "max_lora_rank": 16,
        "max_model_len": 128,
        "dtype": "auto",
        "enforce_eager": True,
        "worker_extension_cls": "serving.weights.cpu_lora.PlainBaseRows",
        "enable_offline_docs": True,
        "allowed_origins": [],
    }
    assert arguments["runtime_env"]["env_vars"]["VLLM_TARGET_DEVICE"] == "cpu"
    assert arguments["runtime_env"]["env_vars"]["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert arguments["deployment_config"]["num_replicas"] == 1


def test_on_gpus() -> None:
    served = spec(
        base={"model": "org/model", "revision": "abc", "name": "m"},
        engine={"gpu_memory_utilization": 0.8, "extra": {"tensor_parallel_size": 2}},
        resources={"gpus": 2, "cpus": 4},
        replicas=3,
    )
    assert placement_bundles(served) == [{"GPU": 1, "CPU": 2}] * 2
    arguments = engine_arguments(served)
    assert arguments["gpu_memory_utilization"] == 0.8
    assert arguments["tensor_parallel_size"] == 2
    assert (arguments["revision"], arguments["tokenizer_revision"]) == ("abc", "abc")
    assert not {"enforce_eager", "worker_extension_cls"} & set(arguments)
    assert set(environment(served)) == {"VLLM_NO_USAGE_STATS"}
    assert llm_config_arguments(served)["deployment_config"]["num_replicas"] == 3


def test_code_of_the_base_runs_only_where_that_is_asked_for() -> None:
    assert "trust_remote_code" not in engine_arguments(spec())
    assert engine_arguments(spec(base={"model": "m", "trust_remote_code": True}))["trust_remote_code"] is True


def test_a_fraction_of_a_gpu() -> None:
    assert placement_bundles(spec(resources={"gpus": 0.25, "cpus": 0.5})) == [{"GPU": 0.25, "CPU": 0.5}]


def test_extra_arguments_win_over_our_defaults() -> None:
    served = spec(engine={"kv_cache_gib": 3, "extra": {"enforce_eager": False, "seed": 1}})
    assert engine_arguments(served)["enforce_eager"] is False
    assert engine_arguments(served)["seed"] == 1
    assert environment(served)["VLLM_CPU_KVCACHE_SPACE"] == "3"
    assert "TORCH_COMPILE_DISABLE" not in environment(served)


def test_vllm_takes_every_argument(base: Path) -> None:
    arg_utils = pytest.importorskip("vllm.engine.arg_utils")
    taken = arg_utils.AsyncEngineArgs(model=str(base), **engine_arguments(spec(engine={"max_model_len": 64})))
    assert taken.max_model_len == 64
