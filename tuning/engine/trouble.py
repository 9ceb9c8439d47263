"""What an error of the device means: memory that ran out, or a device that nothing more can be done with."""

from __future__ import annotations

import gc

import torch

SIGNS = (
    "CUDA error: out of memory",  # of a kernel's launch, or of memory that CUDA manages
    "CUDA driver error: out of memory",  # of expandable segments
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
)
"""In errors that torch does not raise as ``OutOfMemoryError``."""


LASTING = (
    "illegal memory access",
    "device-side assert",
    "uncorrectable",
    "unspecified launch failure",
    "illegal instruction",
    "misaligned address",
    "the launch timed out",
    "hardware stack error",
    "GPU has fallen off the bus",
    "device is lost",
)
"""In errors of CUDA that stay with the process: every later call fails too."""


def is_out_of_memory(error: BaseException) -> bool:
    """True if torch could not get memory, of a GPU or of the machine."""
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in SIGNS)


def has_lost_device(error: BaseException) -> bool:
    """True after an error of CUDA after which only a new process can use the device, such as an illegal access or an
    uncorrectable memory error.

    Others, such as arguments that a library refuses, belong to the call alone. (CUDA's guide calls the first kind
    sticky: https://docs.nvidia.com/cuda/cuda-c-programming-guide/#error-checking)
    """
    text = str(error)
    is_of_device = isinstance(error, torch.AcceleratorError) or "CUDA error:" in text or "CUDA driver error:" in text
    return is_of_device and any(sign in text for sign in LASTING)


def free_memory() -> None:
    """Give back what torch holds in reserve."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
