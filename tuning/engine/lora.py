"""One frozen linear layer, many low-rank updates: the packed LoRA layer and its slow twin.

Shapes: b batch rows of the whole pack, t tokens, i input features, o output features, n rows x tokens of one slot, r
rank.

For the rows of slot k, with its own A_k (r x i), B_k (o x r), scaling s_k and dropout mask M_k (Hu et al. 2021,
section 4.1, https://arxiv.org/abs/2106.09685; dropout on the adapter's input as in peft):

    y[k] = x[k] W^T + bias + s_k (x[k] * M_k) A_k^T B_k^T

W is dequantised once for all rows, forward and again backward (keeping it would hold the whole base in 16 bits).
Every slot's rows are one contiguous slice and its two small products touch no other rows, so a slot whose numbers
overflow cannot reach its neighbours: with all ranks concatenated and masked, 0 * inf would.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Lane:
    """What one slot brings to one linear layer for one pass.

    ``a`` (r x i) and ``b`` (o x r) are in the compute dtype; ``grad_a`` and ``grad_b`` are float32 views into the
    slot's flat gradient, which the backward pass adds to.
    """

    start: int
    stop: int
    a: Tensor
    b: Tensor
    scaling: float
    grad_a: Tensor | None = None
    grad_b: Tensor | None = None
    dropout: float = 0.0
    mask_seed: int = 0
    tokens: int | None = None
    """Tokens of the slot's own longest row. What follows is padding that the neighbours brought: it must not change the
    mask."""


def dropout_mask(x: Tensor, probability: float, seed: int) -> Tensor:
    """Mask of x's shape and dtype: 0 with ``probability``, else 1 / (1 - probability); a function of its arguments
    alone.

    Seeded by trial, step and layer instead of drawn from a running generator, so the mask depends neither on the
    neighbours in the pack nor on what was computed before, and the backward pass can make it again instead of storing
    it.
    """
    generator = torch.Generator(x.device).manual_seed(seed)
    keep = torch.empty(x.shape, dtype=torch.float32, device=x.device).bernoulli_(1.0 - probability, generator=generator)
    return keep.div_(1.0 - probability).to(x.dtype)


def _lane_mask(x_slot: Tensor, lane: Lane) -> Tensor:
    """The dropout mask of a lane's rows, 0 on the padding that only the pack's longer rows brought."""
    mask = dropout_mask(x_slot[:, : lane.tokens], lane.dropout, lane.mask_seed)
    return functional.pad(mask, (0, 0, 0, x_slot.shape[1] - mask.shape[1]))


class _PackedLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, _tape: Tensor, dequantise: Callable[[], Tensor], bias: Tensor | None, lanes: Sequence[Lane]
    ) -> Tensor:
        """``_tape`` is any tensor that requires grad: it makes autograd call ``backward`` where x itself needs no
        gradient.
        """
        y = functional.linear(x, dequantise(), bias)
        projected: list[Tensor] = []
        for lane in lanes:
            x_slot = x[lane.start : lane.stop]
            if lane.dropout:
                x_slot = x_slot * _lane_mask(x_slot, lane)
            u = x_slot.flatten(0, 1) @ lane.a.t()
            y[lane.start : lane.stop].flatten(0, 1).addmm_(u, lane.b.t(), alpha=lane.scaling)
            projected.append(u)
        if lanes:  # else only the weights are needed for the gradient of x
            ctx.save_for_backward(x, *projected)
        ctx.dequantise, ctx.lanes = dequantise, lanes
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, None, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Adds to each lane's ``grad_a`` and ``grad_b`` in place; returns the gradient of x."""
        x, *projected = ctx.saved_tensors or (grad_y,)
        grad_y = grad_y.contiguous()
        grad_x = grad_y @ ctx.dequantise() if ctx.needs_input_grad[0] else None
        for lane, u in zip(ctx.lanes, projected, strict=True):
            grad_slot = grad_y[lane.start : lane.stop].flatten(0, 1)
            x_slot = x[lane.start : lane.stop]
            mask = _lane_mask(x_slot, lane) if lane.dropout else None
            grad_u = (grad_slot @ lane.b).mul_(lane.scaling)
            if lane.grad_a is not None and lane.grad_b is not None:
                dropped = x_slot if mask is None else x_slot * mask
                lane.grad_b.add_(grad_slot.t() @ u, alpha=lane.scaling)
                lane.grad_a.add_(grad_u.t() @ dropped.flatten(0, 1))
            if grad_x is None:
                continue
            if mask is None:
                grad_x[lane.start : lane.stop].flatten(0, 1).addmm_(grad_u, lane.a)
            else:
                grad_x[lane.start : lane.stop] += (grad_u @ lane.a).view_as(x_slot) * mask
        return grad_x, None, None, None, None


class PackedLinear(nn.Module):
    """A frozen linear layer of the base that carries the updates of the slots in ``lanes`` (set anew for every
    pass).
    """

    def __init__(self, base: nn.Module, dequantise: Callable[[], Tensor], bias: Tensor | None, tape: Tensor) -> None:
        super().__init__()
        self.base = base
        self.lanes: Sequence[Lane] = ()
        self._dequantise, self._bias, self._tape = dequantise, bias, tape

    def forward(self, x: Tensor) -> Tensor:
        """x (b t i) -> (b t o), both in the compute dtype."""
        if self.lanes and x.dim() != 3:
            raise ValueError(
                f"a packed layer needs rows x tokens x features, got {tuple(x.shape)}: this base mixes its rows"
            )
        if not torch.is_grad_enabled():
            return self._without_gradient(x)
        # Without lanes and without a gradient to pass on there is nothing to record.
        tape = self._tape if self.lanes else self._tape.detach()
        return _PackedLinearFunction.apply(x, tape, self._dequantise, self._bias, self.lanes)

    def _without_gradient(self, x: Tensor) -> Tensor:
        """Evaluation: no dropout, nothing kept."""
        y = functional.linear(x, self._dequantise(), self._bias)
        for lane in self.lanes:
            u = x[lane.start : lane.stop].flatten(0, 1) @ lane.a.t()
            y[lane.start : lane.stop].flatten(0, 1).addmm_(u, lane.b.t(), alpha=lane.scaling)
        return y


def packed_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None, lanes: Sequence[Lane]) -> Tensor:
    """The slow twin: the head's equation slot by slot in plain autograd, x (b t i) -> (b t o). For tests."""
    pieces = list[Tensor]()
    covered = 0
    for lane in sorted(lanes, key=lambda lane: lane.start):
        pieces.append(functional.linear(x[covered : lane.start], weight, bias))
        rows = x[lane.start : lane.stop]
        dropped = rows * _lane_mask(rows, lane) if lane.dropout else rows
        update = functional.linear(functional.linear(dropped, lane.a), lane.b) * lane.scaling
        pieces.append(functional.linear(rows, weight, bias) + update)
        covered = lane.stop
    pieces.append(functional.linear(x[covered:], weight, bias))
    return torch.cat(pieces)
