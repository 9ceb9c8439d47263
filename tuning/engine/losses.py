"""Losses of many slots from the features of one pass, without all logits in memory at once.

Shapes: l targets of all slots, d features, v words of the vocabulary. The logits of a whole pack, in float32, would be
its largest tensor: here they are made for the targets only, and a chunk of targets at a time, of whichever slots. Every
row of the logits is computed and differentiated by itself, so a slot that is not finite stays alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from tuning.engine.batch import Share
from tuning.engine.head import Head

LOGIT_ROWS = 2048
"""Targets whose logits are in memory at once on a GPU: 3 GiB at a vocabulary of 128,000, twice in float32 and twice in
bfloat16, for the logits and their gradient."""
CPU_LOGIT_ROWS = 256
"""The same on a CPU, whose caches are faster than its memory."""


def logit_rows(device: torch.device) -> int:
    """Targets whose logits are in memory at once."""
    return LOGIT_ROWS if device.type == "cuda" else CPU_LOGIT_ROWS


def losses_and_gradients(
    head: Head, features: Tensor, shares: Sequence[Share], totals: Sequence[int]
) -> tuple[list[float], Sequence[Tensor]]:
    """Each slot's summed loss over its total, and its gradient by the features of its targets (l d).

    Args:
        head: features (l d) -> logits (l v).
        features: of the whole pass, (b t d), without a gradient.
        shares: each slot's part of them.
        totals: targets of each slot's whole optimizer step.
    """
    counts = [len(share.targets) for share in shares]
    picked = features.reshape(-1, features.shape[-1])[torch.cat([share.places for share in shares])]
    targets = torch.cat([share.targets for share in shares])
    weights = torch.cat(
        [torch.full((count,), 1.0 / total, device=features.device) for count, total in zip(counts, totals, strict=True)]
    )
    rows = logit_rows(features.device)
    losses: list[Tensor] = []
    grads: list[Tensor] = []
    for part, goal, weight in zip(picked.split(rows), targets.split(rows), weights.split(rows), strict=True):
        part.requires_grad_()
        loss = functional.cross_entropy(head(part).float(), goal, reduction="none") * weight
        grads += torch.autograd.grad(loss.sum(), part)
        losses.append(loss.detach())
    sums = torch.stack([part.sum() for part in torch.cat(losses).split(counts)])
    return sums.tolist(), torch.cat(grads).split(counts)


@torch.no_grad()
def summed_losses(head: Head, features: Tensor, shares: Sequence[Share]) -> list[float]:
    """Each slot's summed loss; a GPU is waited for once."""
    features = features.reshape(-1, features.shape[-1])
    rows = logit_rows(features.device)
    sums: list[Tensor] = []
    for share in shares:
        total = features.new_zeros((), dtype=torch.float64)
        for part, goal in zip(features[share.places].split(rows), share.targets.split(rows), strict=True):
            total += functional.cross_entropy(head(part).float(), goal, reduction="sum")
        sums.append(total)
    return torch.stack(sums).tolist()
