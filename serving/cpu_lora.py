"""Mends vLLM 0.29's LoRA on CPUs: a request for the base that shares a batch with adapters is answered by the base
alone.

vLLM marks the rows of a batch that use no adapter with slot -1. Its GPU kernels skip them. Its CPU fallback
(vllm/lora/ops/torch_ops/lora_ops.py) takes the -1 for an index, and so applies whatever adapter lies in the last slot:
a wrong answer, without an error (https://github.com/vllm-project/vllm/pull/48421, open as of this version). Here the
narrow activations x A^T of those rows are set to zero, so that B adds nothing to them.

vLLM's workers are processes that vLLM starts. Its argument ``worker_extension_cls`` makes them import this module;
the import mends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.lora.ops.torch_ops import lora_ops
from vllm.lora.punica_wrapper import punica_cpu

if TYPE_CHECKING:
    import torch

_upstream_shrink: Any = lora_ops.bgmv_shrink


class PlainBaseRows:
    """Named by ``worker_extension_cls``; vLLM adds it to its worker's bases, where it does nothing more."""


def bgmv_shrink(
    inputs: torch.Tensor,
    lora_b_weights: torch.Tensor,
    output_tensor: torch.Tensor,
    lora_indices_tensor: torch.Tensor,
    scaling: float = 1.0,
) -> None:
    """``output[row, :rank] = scaling * inputs[row] @ weights[slot[row]].T``, and zero where the slot is -1; in place.

    Shapes: inputs (rows, in), weights (slots, 1, rank, in), output (rows, rank), slots (rows,).
    """
    _upstream_shrink(inputs, lora_b_weights, output_tensor, lora_indices_tensor, scaling)
    output_tensor[lora_indices_tensor == -1] = 0


# `sgmv_shrink`, for prompts, calls the first by name; the second is for answers.
lora_ops.bgmv_shrink = bgmv_shrink
punica_cpu.bgmv_shrink = bgmv_shrink  # pyright: ignore[reportPrivateImportUsage]
