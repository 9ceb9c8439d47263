"""Causal attention within each row of a pack, whether the rows are padded to one length or laid end to end.

Shapes: b rows, t tokens of the longest row, n tokens of the pack, h query heads, g query heads of one key head, c key
heads, d features of a head.

It stands in for transformers' own attention functions (https://huggingface.co/docs/transformers/attention_interface).
Rows laid end to end are gathered into b x t for the attention alone: everything else of the model, which is nearly all
of its work, sees no padding. A cell that pads a row repeats the row's own first token, so that no slot's numbers ever
stand in another slot's row.

Short rows on a CPU are two batched products and a softmax: torch's fused kernel takes five times as long there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tuning.engine.batch import RowIndex

CPU_SHORT = 256
"""Longest row, in tokens, whose scores are written out on a CPU."""
NOT_UNDERSTOOD = ("position_bias", "s_aux", "softcap", "indices", "block_indices")
"""What some architectures also hand to attention, which would be ignored here."""


class OtherAttentionError(ValueError):
    """An architecture wants something of attention that ``RowAttention`` does not do."""


class RowAttention:
    """The attention function of one base; ``rows`` is set for a pass over rows laid end to end, else None."""

    def __init__(self, device_type: str | None = None) -> None:
        """``device_type`` decides on the kernel; None: that of the tensors."""
        self.rows: RowIndex | None = None
        self._device_type = device_type
        self.name = f"loraloom_rows_{id(self):x}"
        AttentionInterface.register(self.name, self)

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """Query (1 h n d) or (b h t d), key and value with c heads -> (1 n h d) or (b t h d).

        Raises:
            OtherAttentionError: the architecture wants something of attention that this does not do.
        """
        wanted = [name for name in NOT_UNDERSTOOD if others.get(name) is not None]
        if attention_mask is not None or wanted or others.get("is_causal") is False:
            raise OtherAttentionError(
                f"attention with {', '.join(wanted) or 'a mask of its own'} is not that of a causal row"
            )
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        rows = self.rows
        if rows is None:
            return self._attend(module, query, key, value, scale, sliding_window).transpose(1, 2), None
        q, k, v = (_Gather.apply(states[0].transpose(0, 1), rows) for states in (query, key, value))
        out = self._attend(module, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale, sliding_window)
        return _Scatter.apply(out.transpose(1, 2), rows, query.shape[2])[None], None

    def _attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """Causal attention of each row, (b h t d) -> (b h t d); a window counts the token itself."""
        tokens = query.shape[2]
        windowed = window is not None and window < tokens
        device_type = self._device_type or query.device.type
        if device_type == "cpu" and tokens <= CPU_SHORT and query.shape[-1] == value.shape[-1]:
            return _write_out(query, key, value, scale, window if windowed else None)
        mask = None if not windowed else ~_hidden(tokens, window, query.device)[None, None]
        out, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=scale, is_causal=mask is None)
        return out.transpose(1, 2)


class _Gather(torch.autograd.Function):
    """(n h d) -> (b t h d), each cell its token. What is padded gets no gradient and gives none.

    As plain indexing the backward pass would add up cell by cell, which costs more than the attention itself.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: RowIndex) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.rows, ctx.tokens = rows, len(x)
        return x.index_select(0, rows.cells.flatten()).view(*rows.cells.shape, *x.shape[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _to_tokens(grad, ctx.rows, ctx.tokens), None


class _Scatter(torch.autograd.Function):
    """(b t h d) -> (n h d), the way back; tokens of no row get zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: RowIndex, tokens: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.rows = rows
        return _to_tokens(x, rows, tokens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows: RowIndex = ctx.rows
        cells = grad.new_zeros(rows.cells.numel(), *grad.shape[1:])
        cells.index_copy_(0, rows.places, grad.index_select(0, rows.tokens))
        return cells.view(*rows.cells.shape, *grad.shape[1:]), None, None


def _to_tokens(x: Tensor, rows: RowIndex, tokens: int) -> Tensor:
    """The real cells of x (b t h d) as (n h d)."""
    spread = x.new_zeros(tokens, *x.shape[2:])
    return spread.index_copy_(0, rows.tokens, x.flatten(0, 1).index_select(0, rows.places))


def _write_out(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
    """softmax(scale Q K^T + mask) V; the query heads of a key head share one product."""
    b, h, t, d = query.shape
    c = key.shape[1]
    k, v = key.reshape(b * c, t, d), value.reshape(b * c, t, d)
    mask = query.new_zeros(t, t).masked_fill_(_hidden(t, window, query.device), float("-inf")).repeat(h // c, 1)
    scores = torch.baddbmm(mask, query.reshape(b * c, h // c * t, d), k.transpose(1, 2), alpha=scale)
    return torch.bmm(scores.softmax(-1), v).view(b, h, t, d)


def _hidden(tokens: int, window: int | None, device: torch.device) -> Tensor:
    """(t t) True where a token must not look: ahead of itself, or further back than the window."""
    hidden = torch.ones(tokens, tokens, dtype=torch.bool, device=device).triu_(1)
    if window is not None:
        hidden |= torch.ones_like(hidden).tril_(-window)
    return hidden
