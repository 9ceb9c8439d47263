"""`loraloom estimate`, as a user types it, and what it prints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import loraloom
from cluster.machine import find_gpus
from tests.tuning.make import sweep_document, write_rows
from tests.tuning.test_estimate import llama
from tuning.forecast import COMMON_GIB, PARTS

LARGE: dict[str, Any] = {"space": {}, "search": {"trials": 1}, "train": {"steps": 4, "batch_size": 4, "rank": 16}}


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """In this process, which has the heavy libraries loaded."""
    words = ["estimate", *map(str, arguments)]
    done = CliRunner().invoke(loraloom.app, words)
    assert done.exception is None or isinstance(done.exception, SystemExit)
    return subprocess.CompletedProcess(words, done.exit_code, done.stdout, done.stderr)


def write(path: Path, document: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A sweep on a base of 1.9 billion parameters of which there is a config.json and nothing else."""
    model = llama(tmp_path / "2B", 2048, 8192, 24, vocab_size=64000)
    document = sweep_document(model, tmp_path / "missing.jsonl", **LARGE)
    document["data"] = {"train": "someone/rows", "max_length": 500, "max_eval_rows": 10}
    return write(tmp_path / "large.yaml", document)


def test_a_hub_dataset_and_a_base_without_weights_and_tokenizer(large: Path) -> None:
    words = ["estimate", str(large), "--json", "--set", "train.rank=64", "--gpu-memory-gib", "24"]
    done = subprocess.run(
        [sys.executable, "-m", "loraloom", *words], capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["trial"]["rank"] == 64
    assert found["rows"] == {
        "train_tokens": 504,
        "train_targets": 499,
        "eval_tokens": 504,
        "eval_targets": 499,
        "source": "data.max_length",
    }
    layers = 24 * (4 * 2048**2 + 3 * 2048 * 8192)
    assert found["one_slot"]["weights"] == layers // 2
    assert found["parameters"] == layers + 2 * 64000 * 2048 + (2 * 24 + 1) * 2048
    (device,) = found["devices"]
    assert device["slots"] >= 1
    assert device["host"]["total"] <= device["usable_bytes"]
    assert any("base.gradient_checkpointing=true" in change["settings"] for change in device["changes"])


@pytest.mark.skipif(bool(find_gpus()), reason="this machine's GPU is what is told then")
def test_without_a_gpu_common_sizes_are_a_table(large: Path) -> None:
    done = run(large)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert "rank 16 on all-linear, 4 rows of 504 tokens (by data.max_length)" in lines[1]
    for words in PARTS.values():
        assert any(line.strip().startswith(words) for line in lines)
    rows = [line.split() for line in lines if line.split() and line.split()[0] in {f"{size:g}" for size in COMMON_GIB}]
    slots = [int(row[1]) for row in rows]
    assert len(slots) == len(COMMON_GIB)
    assert slots == sorted(slots)
    assert slots[-1] > slots[0]
    assert "with base.gradient_checkpointing=true" in done.stdout
    quiet = run(large, "--quiet")
    assert [int(line) for line in quiet.stdout.splitlines()] == slots


def test_what_does_not_fit_has_an_exit_code_and_advice(large: Path) -> None:
    done = run(large, "--gpu-memory-gib", "9")
    assert done.returncode == 5
    assert "at most" in done.stdout
    error = f"error: {large}: must fit a GPU of 9.0 GiB, of which 7.9 can be used, but its largest trial alone needs "
    assert done.stderr.startswith(error)
    assert "it fits with base.gradient_checkpointing=true" in done.stderr
    helped = run(large, "--gpu-memory-gib", "9", "--set", "base.gradient_checkpointing=true", "--quiet")
    assert (helped.returncode, helped.stderr) == (0, "")
    assert int(helped.stdout) >= 1


def test_a_gpu_that_its_driver_fills_has_room_for_nothing(large: Path) -> None:
    done = run(large, "--gpu-memory-gib", "0.5", "--json")
    rule = "must fit a GPU of 0.5 GiB, but nothing does: the driver and the kernels of any process take all of it"
    assert (done.returncode, done.stderr) == (5, f"error: {large}: {rule}\n")
    (device,) = json.loads(done.stdout)["devices"]
    assert (device["usable_bytes"], device["slots"], device["changes"]) == (0, 0, [])


def test_rows_that_are_here_count_as_long_as_they_are(tiny_base: Path, tmp_path: Path) -> None:
    config = write(tmp_path / "s.yaml", sweep_document(tiny_base, write_rows(tmp_path / "rows.jsonl")))
    done = run(config, "--json", "--quiet", "--gpu-memory-gib", "16")
    found = json.loads(done.stdout)
    assert found["rows"]["source"] == "the rows"
    assert found["rows"]["train_tokens"] < 64
    assert found["rows"]["train_targets"] < found["rows"]["train_tokens"]
    table = run(config, "--gpu-memory-gib", "16")
    assert "MiB" in table.stdout


def test_faults_come_together_and_start_nothing(tiny_base: Path, tmp_path: Path) -> None:
    document = sweep_document(tiny_base, write_rows(tmp_path / "rows.jsonl"), space={"rank": {"choice": [2, 500]}})
    with (tmp_path / "rows.jsonl").open("a") as rows:
        rows.write('{"messages": []}\n')
    done = run(write(tmp_path / "s.yaml", document))
    assert done.returncode == 2
    assert "space.rank: must be at most 32" in done.stderr
    assert "rows.jsonl: line 49" in done.stderr
    assert run(tmp_path / "nothing.yaml").returncode == 3
    nowhere = run(tmp_path / "s.yaml", "--set", "base.model=/nonexist")
    told = f"error: {tmp_path}/s.yaml: base.model: must be a model's folder, with a config.json, or a hub id, got '/non"
    assert (nowhere.returncode, nowhere.stderr[: len(told)]) == (2, told)


@pytest.mark.parametrize("size", ["inf", "nan", "-8", "0", "1e300"])
def test_a_size_that_no_gpu_has(size: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(loraloom.app, ["estimate", str(tmp_path / "s.yaml"), f"--gpu-memory-gib={size}"])
    told = f"error: --gpu-memory-gib: must be from 0.1 to 100000, got {float(size)!r}\n"
    assert (done.exit_code, done.stderr) == (2, told)


def test_a_base_whose_passes_look_at_values_is_refused(tmp_path: Path) -> None:
    model = llama(tmp_path / "looking", 256, 256, 2, model_type="jetmoe", architectures=[])
    train = {**LARGE["train"], "target_modules": ["kv_proj"]}
    document = sweep_document(model, tmp_path / "rows.jsonl", **{**LARGE, "train": train})
    document["data"] = {"train": "someone/rows", "max_length": 64}
    done = run(write(tmp_path / "s.yaml", document))
    assert done.returncode == 2
    rule = "must be a base whose memory can be counted without its weights (JetMoeTopKGating does other work for other"
    assert f"base.model: {rule} values), got '{model}'" in done.stderr
    assert "Traceback" not in done.stderr


MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 1024, "head_dim": 64},
    "gpt_oss": {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 64},
}


@pytest.mark.parametrize("kind", MIXTURES)
def test_a_mixture_s_experts_count_as_what_they_are(kind: str, tmp_path: Path) -> None:
    """bitsandbytes leaves them in 16 bits."""
    model = llama(tmp_path / kind, 1024, 1024, 6, model_type=kind, architectures=[], **MIXTURES[kind])
    document = sweep_document(model, tmp_path / "rows.jsonl", **LARGE)
    document["base"] = {"model": str(model)}
    document["data"] = {"train": "someone/rows", "max_length": 64}
    config = write(tmp_path / "s.yaml", document)
    done = run(config, "--json", "--quiet", "--gpu-memory-gib", "24")
    assert done.returncode == 0  # transformers may give advice on standard error
    found = json.loads(done.stdout)
    experts = 6 * 8 * 3 * 1024 * 1024
    assert found["one_slot"]["unquantised"] >= 2 * experts
    assert found["devices"][0]["slots"] > 1
    head = run(config, "--gpu-memory-gib", "24").stdout.splitlines()[0]
    assert f"{2 * found['one_slot']['weights']:,} of them in NF4, {kind}" in head
