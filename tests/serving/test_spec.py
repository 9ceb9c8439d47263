from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.errors import InputError
from cluster.schema import load_spec, parse_spec, to_yaml
from serving.spec import ENGINE_OWNED, MAX_LORA_RANKS, ServeSpec, is_loopback

MINIMAL: dict[str, Any] = {"base": {"model": "/models/tiny"}, "registry": "/registry"}


def parse(**fields: Any) -> ServeSpec:
    return parse_spec(MINIMAL | fields, ServeSpec, "serve.yaml")


def faults(**fields: Any) -> dict[str, str]:
    with pytest.raises(InputError) as caught:
        parse(**fields)
    return {fault.where.removeprefix("serve.yaml: "): fault.rule for fault in caught.value.faults}


def test_a_base_and_a_registry_are_all_that_is_needed() -> None:
    spec = parse()
    assert (spec.base.served_name, spec.http.host, spec.replicas, spec.resources.gpus) == ("tiny", "127.0.0.1", 1, 0)
    assert (spec.engine.host_loras, spec.resident_adapters, spec.engine.accelerators) == (16, 16, 1)


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "serve.yaml").write_text("base:\n  model: ./base\nregistry: ../registry\n")
    spec = load_spec(tmp_path / "serve.yaml", ServeSpec)
    assert spec.base.model == str(tmp_path / "base")
    assert spec.registry == str(tmp_path.parent / "registry")


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("/models/tiny/", "tiny"),
        ("meta-llama/Llama-3.2-1B", "Llama-3.2-1B"),
        ("/a/we:rd n@me", "we-rd-n-me"),
        ("/", "base"),
    ],
)
def test_the_name_comes_from_the_model(model: str, name: str) -> None:
    assert parse(base={"model": model}).base.served_name == name


def test_a_spec_survives_yaml(tmp_path: Path) -> None:
    spec = parse(engine={"max_loras": 2, "extra": {"enforce_eager": False}}, adapters_per_replica=3)
    (tmp_path / "again.yaml").write_text(to_yaml(spec))
    assert load_spec(tmp_path / "again.yaml", ServeSpec) == spec


@pytest.mark.parametrize("name", ["a:b", "a@b", "", "/a", ".a", "a b", "ä", "a" * 129])
def test_a_name_that_cannot_be_routed_is_refused(name: str) -> None:
    assert "base.name" in faults(base={"model": "x", "name": name})


@pytest.mark.parametrize("rank", [0, 2, 4, 63, 1024, "16", None])
def test_only_the_ranks_of_vllm(rank: object) -> None:
    assert "engine.max_lora_rank" in faults(engine={"max_lora_rank": rank})


def test_vllm_has_the_same_ranks() -> None:
    lora = pytest.importorskip("vllm.config.lora")
    assert lora.MaxLoRARanks.__args__ == MAX_LORA_RANKS


def test_all_faults_come_at_once() -> None:
    found = faults(
        base={"model": "x", "name": "a:b", "color": "red"},
        engine={"max_loras": 4, "max_cpu_loras": 2, "max_lora_rank": 7, "gpu_memory_utilization": 1.5},
        http={"port": 70000},
        replicas=0,
        registry="ftp://bucket/adapters",
        resources={"cpus": 0},
    )
    assert set(found) == {
        "base.name", "base.color", "engine.max_cpu_loras", "engine.max_lora_rank",
        "engine.gpu_memory_utilization", "http.port", "replicas", "registry", "resources.cpus",
    }  # fmt: skip


def test_a_registry_may_hold_a_secret_and_is_not_shown() -> None:
    with pytest.raises(InputError, match=r"registry: must be a folder, or a URI .*, got 's3a://…'") as caught:
        parse(registry="s3a://key:hush@bucket/x")
    assert "hush" not in str(caught.value)


def test_combinations_are_told_with_single_faults() -> None:
    found = faults(
        engine={"max_loras": 4, "max_cpu_loras": 8, "max_lora_rank": 7, "kv_cache_gib": 2},
        adapters_per_replica=9,
        replicas=0,
        resources={"gpus": 2, "cpus": 0},
        cluster={"num_cpus": "many", "dashboard": "no", "keep_logs": True},
    )
    assert set(found) == {
        "engine.max_lora_rank", "engine.kv_cache_gib", "adapters_per_replica", "replicas", "resources.gpus",
        "resources.cpus", "cluster.num_cpus", "cluster.dashboard", "cluster.keep_logs",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "where", "rule"),
    [
        ({"engine": {"max_loras": 20}, "adapters_per_replica": 21}, "adapters_per_replica", "at most"),
        (
            {"engine": {"max_cpu_loras": 8}, "adapters_per_replica": 9},
            "adapters_per_replica",
            "engine.max_cpu_loras: 8",
        ),
        ({"engine": {"max_loras": 4}, "adapters_per_replica": 3}, "adapters_per_replica", "at least engine.max_loras"),
        ({"engine": {"gpu_memory_utilization": 0.5}}, "engine.gpu_memory_utilization", "no effect without GPUs"),
        ({"engine": {"kv_cache_gib": 2}, "resources": {"gpus": 1}}, "engine.kv_cache_gib", "no effect on GPUs"),
        ({"engine": {"extra": {"tensor_parallel_size": 2}}, "resources": {"gpus": 1}}, "resources.gpus", "must equal"),
        ({"resources": {"gpus": 2}}, "resources.gpus", "must equal"),
        (
            {"engine": {"extra": {"pipeline_parallel_size": 2}}, "resources": {"gpus": 0.5}},
            "resources.gpus",
            "fraction",
        ),
        ({"serve_base": "nf4"}, "serve_base", "plain"),
        ({"serve_base": "dequantized", "engine": {"extra": {"quantization": "fp8"}}}, "serve_base", "leave"),
        ({"serve_base": "dequantized", "engine": {"extra": {"load_format": "dummy"}}}, "serve_base", "no effect"),
        ({"engine": {"extra": {"tensor_parallel_size": 0}}}, "engine.extra", "integer of at least 1"),
        ({"engine": {"extra": {"tensor_parallel_size": "2"}}}, "engine.extra", "integer of at least 1"),
    ],
)
def test_impossible_combinations(fields: dict[str, Any], where: str, rule: str) -> None:
    found = faults(**fields)
    assert set(found) == {where}
    assert rule in found[where]


@pytest.mark.parametrize("argument", sorted(ENGINE_OWNED))
def test_extra_may_not_hold_what_has_a_field(argument: str) -> None:
    assert argument in faults(engine={"extra": {argument: 1}})["engine.extra"]


@pytest.mark.parametrize(
    "fields",
    [
        {"resources": {"gpus": 1}, "engine": {"gpu_memory_utilization": 0.9}},
        {"resources": {"gpus": 0.5}, "engine": {"gpu_memory_utilization": 0.4}},
        {"resources": {"gpus": 4}, "engine": {"extra": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}}},
        {"engine": {"max_loras": 32}},
        {"engine": {"max_loras": 2, "max_cpu_loras": 2}, "adapters_per_replica": 2},
    ],
)
def test_possible_combinations(fields: dict[str, Any]) -> None:
    assert parse(**fields).resident_adapters >= parse(**fields).engine.max_loras


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost", "::ffff:127.0.0.1"])
def test_loopback_needs_no_keys(host: str) -> None:
    assert is_loopback(host)
    assert parse(http={"host": host}).http.api_keys is None
    assert "no effect" in faults(http={"host": host, "allow_no_keys": True})["http.allow_no_keys"]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "2001:db8::1", "", "no-such-host.invalid", "a" * 300])
def test_an_address_that_others_reach_needs_keys_or_a_word(host: str) -> None:
    assert "is required" in faults(http={"host": host})["http.api_keys"]
    assert parse(http={"host": host, "allow_no_keys": True}).http.host == host
    assert parse(http={"host": host, "api_keys": "/keys.yaml"}).http.api_keys == "/keys.yaml"


def test_a_key_file_is_a_file_here_and_relative_to_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "serve.yaml").write_text("base: {model: ./base}\nregistry: ./r\nhttp: {api_keys: ./keys.yaml}\n")
    assert load_spec(tmp_path / "serve.yaml", ServeSpec).http.api_keys == str(tmp_path / "keys.yaml")
    assert "a file on this machine" in faults(http={"api_keys": "s3://bucket/keys"})["http.api_keys"]
    assert "no effect" in faults(http={"api_keys": "/k", "allow_no_keys": True})["http.allow_no_keys"]


def test_missing_keys_are_told_with_other_faults() -> None:
    found = faults(http={"host": "0.0.0.0", "port": 70000}, queue={"running": 0, "waiting": 0, "timeout_s": 0})
    assert set(found) == {"http.api_keys", "http.port", "queue.running", "queue.waiting", "queue.timeout_s"}


def test_every_field_is_documented() -> None:
    schema = ServeSpec.model_json_schema()
    for model in (schema, *schema["$defs"].values()):
        undocumented = [name for name, field in model["properties"].items() if "description" not in field]
        assert not undocumented, (model["title"], undocumented)
