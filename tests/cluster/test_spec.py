from __future__ import annotations

from pathlib import Path

import pytest

from cluster.errors import InputError
from cluster.schema import load_spec, parse_spec, parse_yaml, to_yaml
from cluster.spec import MAX_TEMP_DIR_BYTES, ClusterSpec

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "cluster").rglob("*.yaml"))


def faults_of(**fields: object) -> list[str]:
    with pytest.raises(InputError) as caught:
        parse_spec(fields, ClusterSpec, "f")
    return [str(fault) for fault in caught.value.faults]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configs_load_and_say_their_command(path: Path) -> None:
    load_spec(path, ClusterSpec)
    assert f"configs/cluster/{path.name}" in path.read_text(encoding="utf-8").splitlines()[1]


@pytest.mark.parametrize("address", ["auto", "10.0.0.1:6379", "ray://head:10001", "[::1]:6379", "ray://a-b.c:1"])
def test_addresses(address: str) -> None:
    assert ClusterSpec(address=address).address == address


@pytest.mark.parametrize("address", ["", "head", "http://head:1", "ray://head", "local", "head:123456", "a b:1"])
def test_other_addresses_are_refused(address: str) -> None:
    assert faults_of(address=address) == [f"f: address: must be auto, HOST:PORT or ray://HOST:PORT, got {address!r}"]


@pytest.mark.parametrize("address", ["1.2.3.4:99999", "head:0", "ray://head:65536", "[::1]:70000"])
def test_ports_that_there_are_not(address: str) -> None:
    assert faults_of(address=address) == [f"f: address: must have a port from 1 to 65535, got {address!r}"]


def test_faults_of_fields_come_at_once() -> None:
    faults = faults_of(num_cpus=0, num_gpus=-1, object_store_memory_mib=10, dashboard_port=80, env={"1A": "x"}, cpus=3)
    assert [fault.split(":")[1].strip() for fault in faults] == [
        "num_cpus",
        "num_gpus",
        "object_store_memory_mib",
        "dashboard_port",
        "env.1A",
        "cpus",
    ]


def test_settings_without_effect_are_refused() -> None:
    no_effect = "has no effect on a Ray that is running already (address is set)"
    assert faults_of(address="auto", num_cpus=2, dashboard=False, temp_dir="/tmp") == [
        f"f: num_cpus: {no_effect}",
        f"f: dashboard: {no_effect}",
        f"f: temp_dir: {no_effect}",
    ]
    assert faults_of(ship_code=False) == ["f: ship_code: has no effect without address"]
    assert faults_of(dashboard=False, dashboard_port=8300) == ["f: dashboard_port: has no effect without dashboard"]
    joined = faults_of(address="auto", keep_logs=True, dashboard=False, dashboard_port=9000)
    assert [fault.partition(" has")[0] for fault in joined] == ["f: dashboard:", "f: dashboard_port:", "f: keep_logs:"]
    assert faults_of(keep_logs=True) == ["f: keep_logs: needs temp_dir, or nobody would find them"]


def test_defaults_written_out_are_no_fault() -> None:
    for spec in (ClusterSpec(), ClusterSpec(address="auto")):
        assert parse_spec(parse_yaml(to_yaml(spec), "f"), ClusterSpec, "f") == spec


def test_the_temporary_folder_must_be_local_and_short() -> None:
    assert "must be a folder of this machine" in faults_of(temp_dir="scratch")[0]
    assert "must be a folder of this machine" in faults_of(temp_dir="s3://bucket/x")[0]
    assert f"at most {MAX_TEMP_DIR_BYTES} bytes" in faults_of(temp_dir="/" + "x" * MAX_TEMP_DIR_BYTES)[0]


def test_the_longest_temporary_folder_leaves_room_for_rays_sockets() -> None:
    longest = "/" + "x" * (MAX_TEMP_DIR_BYTES - 1)
    socket = f"{longest}/loom-00000000/r/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
    assert parse_spec({"temp_dir": longest}, ClusterSpec, "f").temp_dir == longest
    assert len(socket) <= 107
