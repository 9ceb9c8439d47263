"""Which type a base computes in, where its spec leaves that open."""

from __future__ import annotations

import torch

from cluster.bfloat16 import cpu_multiplies_bfloat16
from tuning.spec import BaseSpec


def compute_dtype(spec: BaseSpec, device: torch.device | str) -> torch.dtype:
    """The type of activations and of dequantised weights on ``device``.

    ``auto`` is bfloat16, and float32 on a CPU without instructions for bfloat16.
    """
    if spec.compute_dtype != "auto":
        return getattr(torch, spec.compute_dtype)
    is_slow = torch.device(device).type == "cpu" and not cpu_multiplies_bfloat16()
    return torch.float32 if is_slow else torch.bfloat16
