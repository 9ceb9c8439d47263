"""What this machine has, what is missing, and how to mend it.

``examine`` finds and asks, ``checks.py`` judges. Heavy libraries are asked in processes of their own (``probe.py``), so
that a broken one cannot take the doctor with it.
"""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from cluster.checks import (
    DASHBOARD_PORT,
    PROJECT,
    SERVE_PORT,
    Check,
    check_address,
    check_auth,
    check_bitsandbytes,
    check_companions,
    check_cores,
    check_disk,
    check_files,
    check_gpus,
    check_hub,
    check_import,
    check_memory,
    check_packages,
    check_ports,
    check_python,
    check_shm,
    check_torch,
    check_vllm,
)
from cluster.machine import look, port_is_free
from cluster.storage import free_gib

PROBE_TIMEOUT_S = 300.0
PROBES = ("torch", "bitsandbytes", "peft", "vllm", "ray", "companions")


def examine(*, online: bool = False) -> list[Check]:
    """Look at this machine and its Python environment; ``online`` also asks the Hugging Face hub. Takes some 20 s."""
    names = (*PROBES, "hub") if online else PROBES
    with ThreadPoolExecutor(max_workers=2) as pool:  # two: each of them fills a core and a gigabyte
        answers = dict(zip(names, pool.map(ask, names), strict=True))
    machine = look()
    checks = [
        check_python(sys.version_info[:3], _project_metadata("Requires-Python")),
        check_packages(_requirements("gpu" if machine.gpus else "cpu")),
        check_torch(answers["torch"], machine),
        check_bitsandbytes(answers["bitsandbytes"]),
        check_import("peft", answers["peft"]),
        check_vllm(answers["vllm"], machine),
        check_import("ray", answers["ray"]),
        check_companions(answers["companions"]),
        check_cores(machine),
        check_memory(machine),
        check_disk("disk here", free_gib(Path.cwd())),
        check_disk("disk for temporary files", free_gib(Path(tempfile.gettempdir()))),
        check_shm(machine),
        check_gpus(machine),
        check_files(resource.getrlimit(resource.RLIMIT_NOFILE)[1]),
        check_ports({port: port_is_free(port) for port in (DASHBOARD_PORT, SERVE_PORT)}),
        check_auth(os.environ, _token_mode()),
        check_address(os.environ),
    ]
    return [*checks, check_hub(answers["hub"])] if online else checks


def ask(name: str) -> dict[str, Any]:
    """One probe's answer; ``{"trouble": ...}`` where it fails, crashes or hangs."""
    command = [sys.executable, "-P", str(Path(__file__).with_name("probe.py")), name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return {"trouble": f"no answer within {PROBE_TIMEOUT_S:.0f} s"}
    if done.returncode < 0:
        return {"trouble": f"crashed with signal {-done.returncode}"}
    if done.returncode > 0:
        return {"trouble": (done.stderr.strip().splitlines() or ["failed without a word"])[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def _project_metadata(field: str) -> str | None:
    try:
        return metadata.metadata(PROJECT)[field]
    except metadata.PackageNotFoundError:
        return None


def _requirements(extra: str) -> list[tuple[Requirement, str | None]]:
    """What the project requires with ``extra``, each with the installed version."""
    try:
        declared = metadata.requires(PROJECT) or []
    except metadata.PackageNotFoundError:
        return []
    parsed = [Requirement(re.sub(r"\s+", " ", line)) for line in declared]
    return [(item, _version(item.name)) for item in parsed if not item.marker or item.marker.evaluate({"extra": extra})]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _token_mode() -> int | None:
    try:
        return (Path.home() / ".ray" / "auth_token").stat().st_mode
    except OSError:
        return None
