"""Whether this machine's CPU multiplies bfloat16 as fast as it should."""

from __future__ import annotations


def cpu_multiplies_bfloat16() -> bool:
    """True if oneDNN, which torch multiplies with on CPUs, has instructions for it here (AVX-512 or AMX on x86).

    Without them torch and vLLM multiply number by number, up to 100 times as slowly as in float32 (BENCHMARKS.md).
    """
    import torch

    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # noqa: SLF001 - torch has no public way to ask
