"""Which type a base computes in, where its spec leaves that open."""

from __future__ import annotations

import torch

from tuning.spec import BaseSpec


def compute_dtype(spec: BaseSpec, device: torch.device | str) -> torch.dtype:
    """The type of activations and of dequantised weights on ``device``.

    ``auto`` is bfloat16, and float32 on a CPU without instructions for bfloat16: torch then multiplies number by
    number, which took 100 times as long as float32 in the backward pass (BENCHMARKS.md).
    """
    if spec.compute_dtype != "auto":
        return getattr(torch, spec.compute_dtype)
    is_slow = torch.device(device).type == "cpu" and not _multiplies_bfloat16()
    return torch.float32 if is_slow else torch.bfloat16


def _multiplies_bfloat16() -> bool:
    """True if oneDNN, which torch multiplies with on CPUs, has instructions for it here (AVX-512 or AMX on x86)."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # noqa: SLF001 - torch has no public way to ask
