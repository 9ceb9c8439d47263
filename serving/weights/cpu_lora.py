"""Mends vLLM 0.29's LoRA on CPUs, in two places.

**The base among adapters.** A request for the base that shares a batch with adapters is answered by the base alone.
vLLM marks the rows of a batch that use no adapter with slot -1. Its GPU kernels skip them. Its CPU fallback
(vllm/lora/ops/torch_ops/lora_ops.py) takes the -1 for an index, and so applies whatever adapter lies in the last slot:
a wrong answer, without an error (https://github.com/vllm-project/vllm/pull/48421, open as of this version). Here the
narrow activations x A^T of those rows are set to zero, so that B adds nothing to them.

**Log-probabilities of the prompt.** For ``prompt_logprobs``, or ``echo`` with ``logprobs``, vLLM puts all tokens of a
prompt through the head, but looks up their adapters in a table with one entry a request
(https://github.com/vllm-project/vllm/issues/51594, open as of this version): on CPUs the shapes do not match, and the
engine dies, for all its clients. Here the tokens get the entries of their own places in the batch.

vLLM's workers are processes that vLLM starts. Its argument ``worker_extension_cls`` makes them import this module;
the import mends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.lora.ops.torch_ops import lora_ops
from vllm.lora.punica_wrapper import punica_cpu
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

if TYPE_CHECKING:
    import torch

_upstream_shrink: Any = lora_ops.bgmv_shrink
_upstream_prompt_logprobs: Any = GPUModelRunner._get_prompt_logprobs_dict  # noqa: SLF001
_upstream_sampler_indices: Any = punica_cpu.PunicaWrapperCPU.sampler_indices.fget
_upstream_add_lora_logits: Any = punica_cpu.PunicaWrapperCPU.add_lora_logits


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


class _PromptRows:
    """While log-probabilities of prompts are computed: which rows of the batch are at the head now."""

    hidden: Any = None
    """Hidden states of all tokens of the batch, (tokens, width); None at all other times."""
    rows: slice | None = None


def prompt_logprobs(self: Any, hidden_states: torch.Tensor, num_scheduled_tokens: dict[str, int]) -> Any:
    """What upstream does, with the batch's hidden states at hand for ``add_lora_logits``."""
    _PromptRows.hidden = hidden_states
    try:
        return _upstream_prompt_logprobs(self, hidden_states, num_scheduled_tokens)
    finally:
        _PromptRows.hidden = None


def add_lora_logits(self: Any, y: torch.Tensor, x: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    """``y += scale * x A^T B^T`` by each row's own adapter, in place; ``x`` is (rows, width).

    For a prompt, ``x`` is a run of rows of the batch's hidden states, found by its address.
    """
    if _PromptRows.hidden is not None:
        hidden = _PromptRows.hidden
        first = (x.data_ptr() - hidden.data_ptr()) // (hidden.stride(0) * hidden.element_size())
        _PromptRows.rows = slice(first, first + x.shape[0])
    try:
        _upstream_add_lora_logits(self, y, x, *args, **kwargs)
    finally:
        _PromptRows.rows = None


def sampler_indices(self: Any) -> torch.Tensor:
    """The adapters' slots of the rows at the head: one a request when tokens are drawn, else one a token."""
    return _upstream_sampler_indices(self) if _PromptRows.rows is None else self.token_lora_indices[_PromptRows.rows]


# `sgmv_shrink`, for prompts, calls the first by name; the second is for answers.
lora_ops.bgmv_shrink = bgmv_shrink
punica_cpu.bgmv_shrink = bgmv_shrink  # pyright: ignore[reportPrivateImportUsage]
GPUModelRunner._get_prompt_logprobs_dict = prompt_logprobs  # noqa: SLF001 - CPUModelRunner inherits it
punica_cpu.PunicaWrapperCPU.add_lora_logits = add_lora_logits
punica_cpu.PunicaWrapperCPU.sampler_indices = property(sampler_indices)  # pyright: ignore[reportAttributeAccessIssue]
