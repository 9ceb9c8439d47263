"""Counts what torch operations on the meta device would allocate."""

from __future__ import annotations

import traceback
import weakref
from collections.abc import Generator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

VIEWS = {"slice", "select", "view", "alias", "detach", "expand", "unsqueeze", "_unsafe_view", "t", "transpose"}
"""Operations that make no new values; two computations are the same without them."""


class ArchitectureError(Exception):
    """The computation looks at values, which the meta device does not have, or fails."""


class Count(TorchDispatchMode):
    """Bytes of the storages that operations made and that still live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.kept = 0
        self.timeline: list[int] = []
        """``now`` after each operation."""
        self.operations: list[str] = []
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:  # noqa: SLF001
            # transformers asks whether the positions are those of a single document in each row. They are.
            return True
        name = func.overloadpacket.__name__
        if name not in VIEWS:
            self.operations.append(name)
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):  # unknown so far: it was there before, as weights and adapters are
                self._watch(tensor.untyped_storage(), is_new=False)
        if func is torch.ops.aten._grouped_mm.default and (args[0].dim(), args[1].dim()) == (2, 3):  # noqa: SLF001
            # Experts give as many rows wherever the router sends them. torch's own for the meta device takes BF16 only.
            made = args[0].new_empty(args[0].shape[0], args[1].shape[2])
        else:
            made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._watch(tensor.untyped_storage(), is_new=True)
        self.timeline.append(self.now)
        return made

    def _watch(self, storage: torch.UntypedStorage, *, is_new: bool) -> None:
        key, size = storage._cdata, storage.nbytes() if is_new else 0  # noqa: SLF001 - the storage's identity in C++
        if key in self._known:
            return

        def gone(_: object) -> None:
            del self._known[key]
            self.now -= size

        self._known[key] = weakref.ref(storage, gone)
        self.now += size


class FlashAttention(TorchFunctionMode):
    """Attention keeps its inputs, its output and a number a row and head, as the kernels for CPUs and GPUs do; on the
    meta device torch would take the plain formula, which keeps the t x t scores.
    """

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        kwargs.pop("enable_gqa", None)
        q, k, v, mask, dropout, causal = _attention_arguments(*args, **kwargs)
        kernel: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001
        return kernel(q, k, v, dropout, causal, attn_mask=mask)[0]


def again() -> tuple[Any, Any]:
    """What surrounds a checkpointed layer, and its second computation: that runs inside ``backward``, where torch has
    left the modes behind.
    """
    return nullcontext(), FlashAttention()


def _attention_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,  # noqa: ARG001 - changes no shape
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, float, bool]:
    return q, k, v, attn_mask, dropout_p, is_causal


@contextmanager
def counting() -> Generator[Count]:
    """Count what the block allocates.

    Raises:
        ArchitectureError: the block looked at a value, or torch refused what it did.
    """
    count = Count()
    try:
        with count, FlashAttention():
            yield count
    except RuntimeError as error:
        told = str(error).strip().partition("\n")[0] or type(error).__name__
        what = "does other work for other values" if wants_values(error) else f"fails: {told}"
        raise ArchitectureError(f"{_innermost_module(error)} {what}") from error


def wants_values(error: BaseException) -> bool:
    """Whether torch raised it because the meta device has no values."""
    return isinstance(error, NotImplementedError) or "meta tensor" in str(error).lower()


def _innermost_module(error: BaseException) -> str:
    """The class of the module in whose forward pass it happened."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    modules = [frame.f_locals.get("self") for frame in frames]
    return next((type(one).__name__ for one in reversed(modules) if isinstance(one, nn.Module)), "its forward pass")
