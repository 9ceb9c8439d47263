"""What an error of the device means: memory that ran out, or a device that nothing more can be done with."""

from __future__ import annotations

import gc

import torch

SIGNS = (
    "CUDA error: out of memory",  # of a kernel's launch, or of memory that CUDA manages
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
)
"""In errors that torch does not raise as ``OutOfMemoryError``."""


def is_out_of_memory(error: BaseException) -> bool:
    """True if torch could not get memory, of a GPU or of the machine."""
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in SIGNS)


def has_lost_device(error: BaseException) -> bool:
    """True after an error of CUDA itself, such as an illegal access or an uncorrectable memory error.

    Most of them stay with the process: every later call fails too, so only a new process can go on. (CUDA's guide,
    "Error checking": https://docs.nvidia.com/cuda/cuda-c-programming-guide/#error-checking)
    """
    is_of_device = isinstance(error, torch.AcceleratorError) or "CUDA error:" in str(error)
    return is_of_device and not is_out_of_memory(error)


def free_memory() -> None:
    """Give back what torch holds in reserve."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
