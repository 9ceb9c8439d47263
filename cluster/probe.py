"""Asks one heavy library whether it works here: ``python -P probe.py NAME`` prints one JSON object as its last line.

Each library is asked in a process of its own, so that a broken one (a missing symbol, a crash while it is imported) is
a finding and not the end of ``loraloom doctor``. This file imports nothing of ours: it is run by its path.
"""

from __future__ import annotations

import importlib
import json
import sys
from importlib.util import find_spec
from typing import Any

COMPANIONS = ("torchvision", "torchaudio", "torchcodec")


def probe_torch() -> dict[str, Any]:
    """Which build torch is, and the GPUs that it can use."""
    import torch

    usable = torch.cuda.is_available()
    return {
        "version": str(torch.__version__),
        "cuda": torch.version.cuda,
        "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if usable else [],
        "bf16": torch.cuda.is_bf16_supported() if usable else True,
    }


def probe_bitsandbytes() -> dict[str, Any]:
    """Quantise a matrix to NF4 with double quantisation and back; a sound library errs by some 9 % of its norm."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).to(device)
    packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    restored = dequantize_4bit(packed, state)
    return {"device": device, "error": float((restored - weight).norm() / weight.norm())}


def probe_peft() -> dict[str, Any]:
    """Import what trains: transformers' Llama and peft."""
    import peft
    import transformers

    return {"peft": peft.__version__, "transformers": transformers.LlamaForCausalLM.__module__.split(".")[0]}


def probe_vllm() -> dict[str, Any]:
    """Import vLLM and its compiled part; its device is ``cuda``, ``cpu``, or empty where it could not tell."""
    import torch
    import vllm
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    kernels = hasattr(torch.ops._C, "rms_norm")  # noqa: SLF001 -- the name space in which vLLM's library registers
    return {"version": vllm.__version__, "device": current_platform.device_type, "kernels": kernels}


def probe_ray() -> dict[str, Any]:
    """Import Ray with its Tune and its Serve LLM parts."""
    import ray
    from ray import serve, tune
    from ray.serve import llm

    return {"version": ray.__version__, "parts": [tune.__name__, serve.__name__, llm.__name__]}


def probe_companions() -> dict[str, Any]:
    """torch's companion packages that are installed and cannot be imported: they break ``import transformers``."""
    broken: dict[str, str] = {}
    for name in COMPANIONS:
        if find_spec(name) is None:
            continue
        try:
            importlib.import_module(name)
        except Exception as error:  # noqa: BLE001 -- whatever it raises is the finding
            broken[name] = str(error).strip().partition("\n")[0]
    return {"broken": broken}


def probe_hub() -> dict[str, Any]:
    """Ask the Hugging Face hub for a sign of life (only ``doctor --online``)."""
    import httpx
    from huggingface_hub.constants import ENDPOINT

    return {"endpoint": ENDPOINT, "status": httpx.head(ENDPOINT, timeout=10, follow_redirects=True).status_code}


if __name__ == "__main__":
    print(json.dumps(globals()[f"probe_{sys.argv[1]}"]()))  # noqa: T201 -- the answer
