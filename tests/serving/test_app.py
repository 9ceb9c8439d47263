from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ConflictError, InputError, MachineError, NotFoundError
from cluster.schema import parse_spec
from serving import app
from serving.app import Server, prepare
from serving.registry import Registry
from serving.spec import ServeSpec
from serving.weights.dequantize import engine_spec
from tests.serving.make import identity, make_adapter
from tests.tiny import make_base

pytest.importorskip("vllm")


@pytest.fixture
def registry(tmp_path: Path, base: Path) -> Registry:
    registry = Registry(tmp_path / "registry")
    for name, rank in (("support", 4), ("support", 4), ("big", 32)):
        adapter = make_adapter(tmp_path / f"{name}-{len(registry.versions(name))}", base, rank=rank)
        registry.publish(name, adapter, identity(base), metrics={}, lineage={})
    return registry


def spec(base: Path, registry: Registry, **fields: Any) -> ServeSpec:
    served = {"model": str(base), "name": fields.pop("name", "tiny")}
    document = {"base": served, "registry": str(registry.root), "engine": {"max_lora_rank": 16}, "http": {"port": 0}}
    return parse_spec(document | fields, ServeSpec, "serve.yaml")


def test_the_shelf(base: Path, registry: Registry) -> None:
    Path(registry.root, "_log", "000000000001.json").write_text("{")
    shelf = prepare(spec(base, registry))
    assert shelf.adapters == ["support@2"]
    assert "rank 32" in shelf.unfit["big@1"]
    assert "_log/000000000001.json cannot be read" in shelf.unfit["the log"]
    assert shelf.base.name == "tiny"
    assert shelf.base.identity == identity(base)


def test_a_base_that_cannot_be_dequantised_is_told_before_anything_starts(tmp_path: Path, registry: Registry) -> None:
    base = make_base(tmp_path / "gptq", hidden=256)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    assert prepare(spec(base, registry)).adapters
    with pytest.raises(InputError, match=r"base\.model: must have 16- or 32-bit weights, or bitsandbytes' NF4"):
        prepare(spec(base, registry, serve_base="dequantized"))


def test_the_engine_gets_the_dequantised_folder_under_the_base_s_name(
    base: Path, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    plain = spec(base, registry)
    assert engine_spec(plain) == plain
    started = engine_spec(spec(base, registry, serve_base="dequantized"))
    assert Path(started.base.model).parent == tmp_path / "cache" / "loraloom" / "dequantized"
    assert started.base.served_name == "tiny"
    assert prepare(spec(base, registry, serve_base="dequantized")).base.identity == identity(base)


def test_a_dequantised_base_counts_as_used_as_long_as_it_is_served(tmp_path: Path) -> None:
    os.utime(tmp_path, (0, 0))
    Server("http://127.0.0.1:1/v1", 1.0, "secret").keep()
    assert tmp_path.stat().st_mtime == 0
    Server("http://127.0.0.1:1/v1", 1.0, "secret", dequantized=tmp_path).keep()
    assert tmp_path.stat().st_mtime > 0


def test_an_empty_registry_can_be_served(base: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert prepare(spec(base, Registry(tmp_path / "empty"))).adapters == []


def test_no_registry(base: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no registry here"):
        prepare(spec(base, Registry(tmp_path / "none")))


def test_all_faults_come_at_once(tmp_path: Path) -> None:
    engine = {"extra": {"no_such_argument": 1, "seed": 1}, "tool_call_parser": "no_such_parser"}
    with pytest.raises(InputError) as caught:
        prepare(spec(tmp_path / "no-base", Registry(tmp_path / "none"), engine=engine))
    assert [fault.where for fault in caught.value.faults] == [
        "engine.extra.no_such_argument",
        "engine.tool_call_parser",
        "base.model",
    ]


def test_the_base_may_not_be_called_like_an_adapter(base: Path, registry: Registry) -> None:
    with pytest.raises(InputError, match=r"base\.name: must not be the name of an adapter"):
        prepare(spec(base, registry, name="support"))


def test_a_taken_port(base: Path, registry: Registry) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ConflictError, match=f"127.0.0.1:{port} cannot be listened on"):
            prepare(spec(base, registry, http={"port": port}))
    prepare(spec(base, registry, http={"port": port}))


def test_resources_that_the_cluster_does_not_have(base: Path, registry: Registry) -> None:
    require = app._require_resources
    require(spec(base, registry, resources={"cpus": 2}), {"CPU": 2.0})
    with pytest.raises(MachineError, match=r"4 CPU \(there are 2\)"):
        require(spec(base, registry, resources={"cpus": 2}, replicas=2), {"CPU": 2.0})
    with pytest.raises(MachineError, match=r"1 GPU \(there are 0\)"):
        require(spec(base, registry, resources={"gpus": 1}), {"CPU": 2.0})


def test_free_ports() -> None:
    port = app._free_port("127.0.0.1")
    app._require_free_port("127.0.0.1", port)
    with pytest.raises(ConflictError, match="choose another"):
        app._require_free_port("192.0.2.1", port)  # an address that is not ours
