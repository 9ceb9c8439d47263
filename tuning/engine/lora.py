"""One frozen linear layer, many low-rank updates: the packed LoRA layer and its slow twin.

Shapes: n tokens of the whole pack, m tokens of one slot's stretch, k slots of a stack, i input features, o output
features, r rank (the largest of a stack; smaller ones are padded with zeros).

For the tokens of slot k, with its own A_k (r x i), B_k (o x r), scaling s_k and dropout mask M_k (Hu et al. 2021,
section 4.1, https://arxiv.org/abs/2106.09685; dropout on the adapter's input as in peft):

    y[k] = x[k] W^T + bias + s_k (x[k] * M_k) A_k^T B_k^T

W is dequantised once for all tokens, forward and again backward (keeping it would hold the whole base in 16 bits).
The small products of neighbouring slots are one batched product: each slot is an item of its own, so a slot whose
numbers overflow cannot reach its neighbours. (With all ranks concatenated and masked, 0 * inf would.) A zero that pads
a rank meets only numbers of its own slot, adds nothing and gets a zero gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(slots=True)
class Stretch:
    """Where the slots of one group stand in the flattened tokens of a pass: ``tokens`` each, from ``start`` on."""

    start: int = 0
    tokens: int = 0
    """Of one slot, padding included."""


@dataclass(frozen=True, slots=True)
class Dropout:
    """The dropout of one slot at one layer in one pass.

    The mask is drawn for the trial's own micro-batch as if it were alone: its rows x its longest row. ``own`` says
    which of these cells each real token has, ``places`` where the token stands in the slot's stretch (None: in order).
    """

    probability: float
    seed: int
    rows: int
    longest: int
    own: Tensor | None = None
    places: Tensor | None = None

    def mask(self, x: Tensor) -> Tensor:
        """The mask for x (m i); 0 on padding that only the pack has."""
        drawn = dropout_mask(x.new_empty(()).expand(self.rows * self.longest, x.shape[1]), self.probability, self.seed)
        if self.own is None or self.places is None:
            return drawn
        return torch.zeros_like(x).index_copy_(0, self.places, drawn[self.own])


@dataclass(slots=True)
class Stack:
    """What k neighbouring slots bring to one linear layer, in the compute dtype.

    Before a pass, whoever set the stack fills ``a`` and ``b``; ``backward`` writes the gradients into ``grad_a`` and
    ``grad_b``, adding where a layer is used more than once in a pass.
    """

    stretch: Stretch
    first: int
    """Place in the group of the first of these slots."""
    a: Tensor
    """(k r i)"""
    b: Tensor
    """(k r o), each slot's B transposed."""
    scaling: Tensor
    """(k 1 1), float32."""
    grad_a: Tensor
    """(k r i)"""
    grad_b: Tensor
    """(k r o)"""
    dropouts: list[Dropout | None] = field(default_factory=list["Dropout | None"])
    """One for each slot, or empty: none has dropout."""
    has_gradient: bool = False

    def of(self, x: Tensor) -> Tensor:
        """The stack's part of x (n f), as a view (k m f)."""
        k, m = self.a.shape[0], self.stretch.tokens
        start = self.stretch.start + self.first * m
        return x[start : start + k * m].view(k, m, x.shape[1])

    def drop(self, x: Tensor) -> Tensor:
        """x (k m f) times the slots' dropout masks; x itself where none has dropout."""
        if not any(self.dropouts):
            return x
        parts = (part if drop is None else part * drop.mask(part) for part, drop in zip(x, self.dropouts, strict=True))
        return torch.stack(list(parts))

    def project(self, x: Tensor) -> Tensor:
        """s_k x[k] A_k^T for x (k m i) -> (k m r)."""
        return torch.bmm(x, self.a.transpose(1, 2)).mul_(self.scaling)

    def add_gradients(self, grad_a: Tensor, grad_b: Tensor) -> None:
        """Add to what the pass has found so far."""
        for total, part in ((self.grad_a, grad_a), (self.grad_b, grad_b)):
            if self.has_gradient:
                total.add_(part)
            else:
                total.copy_(part)
        self.has_gradient = True


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


class _PackedLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        x: Tensor,
        _tape: Tensor,
        dequantise: Callable[[], Tensor],
        bias: Tensor | None,
        stacks: Sequence[Stack],
    ) -> Tensor:
        """x (n i) -> (n o). ``_tape`` is any tensor that requires grad: it makes autograd call ``backward`` where x
        itself needs no gradient.
        """
        y = functional.linear(x, dequantise(), bias)
        projected: list[Tensor] = []
        for stack in stacks:
            u = stack.project(stack.drop(stack.of(x)))
            stack.of(y).baddbmm_(u, stack.b)
            projected.append(u)
        if stacks:  # else only the weights are needed for the gradient of x
            ctx.save_for_backward(x, *projected)
        ctx.dequantise, ctx.stacks = dequantise, stacks
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, None, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Leaves each stack's gradients with the stack; returns the gradient of x.

        With g the gradient of y, u = s (x * M) A^T and h = s g B: dB = g^T u, dA = h^T (x * M), dx = g W + (h A) * M.
        """
        x, *projected = ctx.saved_tensors or (grad_y,)
        grad_y = grad_y.contiguous()
        grad_x = grad_y @ ctx.dequantise() if ctx.needs_input_grad[0] else None
        for stack, u in zip(ctx.stacks, projected, strict=True):
            g = stack.of(grad_y)
            h = torch.bmm(g, stack.b.transpose(1, 2)).mul_(stack.scaling)
            stack.add_gradients(torch.bmm(h.transpose(1, 2), stack.drop(stack.of(x))), torch.bmm(u.transpose(1, 2), g))
            if grad_x is None:
                continue
            if any(stack.dropouts):
                stack.of(grad_x).add_(stack.drop(torch.bmm(h, stack.a)))
            else:
                stack.of(grad_x).baddbmm_(h, stack.a)
        return grad_x, None, None, None, None


class PackedLinear(nn.Module):
    """A frozen linear layer of the base that carries the updates of the slots in ``stacks`` (set for every pass)."""

    def __init__(self, base: nn.Module, dequantise: Callable[[], Tensor], bias: Tensor | None, tape: Tensor) -> None:
        super().__init__()
        self.base = base
        self.stacks: Sequence[Stack] = ()
        self._dequantise, self._bias, self._tape = dequantise, bias, tape

    def forward(self, x: Tensor) -> Tensor:
        """x (b t i) -> (b t o), both in the compute dtype; its rows are the pack's, in order."""
        if self.stacks and x.dim() != 3:
            raise ValueError(
                f"a packed layer needs rows x tokens x features, got {tuple(x.shape)}: this base mixes its rows"
            )
        tokens = x.reshape(-1, x.shape[-1])
        if torch.is_grad_enabled():
            # Without stacks and without a gradient to pass on there is nothing to record.
            tape = self._tape if self.stacks else self._tape.detach()
            y = _PackedLinearFunction.apply(tokens, tape, self._dequantise, self._bias, self.stacks)
        else:
            y = self._without_gradient(tokens)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _without_gradient(self, x: Tensor) -> Tensor:
        """Evaluation: no dropout, nothing kept."""
        y = functional.linear(x, self._dequantise(), self._bias)
        for stack in self.stacks:
            stack.of(y).baddbmm_(stack.project(stack.of(x)), stack.b)
        return y


def packed_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None, stacks: Sequence[Stack]) -> Tensor:
    """The slow twin: the head's equation slot by slot in plain autograd, x (n i) -> (n o). For tests."""
    pieces = list(functional.linear(x, weight, bias).split(1))
    for stack in stacks:
        for index, (a, b) in enumerate(zip(stack.a, stack.b, strict=True)):
            first = stack.stretch.start + (stack.first + index) * stack.stretch.tokens
            tokens = x[first : first + stack.stretch.tokens]
            drop = stack.dropouts[index] if stack.dropouts else None
            dropped = tokens if drop is None else tokens * drop.mask(tokens)
            update = functional.linear(dropped, a) @ b * float(stack.scaling[index])
            for offset in range(stack.stretch.tokens):
                pieces[first + offset] = pieces[first + offset] + update[offset]
    return torch.cat(pieces)
