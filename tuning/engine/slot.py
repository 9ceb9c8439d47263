"""One trial on a host: its parameters, optimizer, learning rate, data order. Nothing here knows of its neighbours.

All A and B of a slot are views of one flat float32 tensor, their gradients views of another, so the optimizer step,
clipping and a checkpoint are one operation a slot, and bitsandbytes' 8-bit state, which leaves tensors under 4,096
elements in 32 bits, sees one large tensor.

The flat tensor is r rows of width w, one for each rank: row j holds A[j] and B[:, j] of every layer in turn. Slots of
different ranks are then of equal width, and a stack of them (``pack.py``) is filled by one copy a slot.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tuning.engine.data import RowStream, Tokens
from tuning.spec import TrialConfig


class Slot:
    """A trial's whole state; ``state`` and ``restore`` carry it over a restart."""

    def __init__(
        self,
        config: TrialConfig,
        shapes: Mapping[str, tuple[int, int]],
        data: Tokens,
        device: torch.device,
    ) -> None:
        """``shapes`` are the trial's target layers: path -> (output features, input features)."""
        self.config = config
        self.shapes = dict(shapes)
        self.stream = RowStream(data, config.seed)
        self.step = 0
        self.diverged = False
        self.micro_steps = 0
        rank = config.rank
        size = rank * sum(outputs + inputs for outputs, inputs in shapes.values())
        self.flat = nn.Parameter(torch.zeros(size, device=device))
        self.grad = torch.zeros(size, device=device)
        self._views = dict(self._cut(self.flat.data))
        self._grad_views = dict(self._cut(self.grad))
        self._initialise()
        self.optimizer = make_optimizer(config, self.flat)

    @property
    def num_parameters(self) -> int:
        """Elements of all A and B."""
        return self.flat.numel()

    def cut(self, flat: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Views of a tensor that is laid out as ``flat``: site -> (A (r i), B (o r))."""
        return dict(self._cut(flat))

    @property
    def finished(self) -> bool:
        """True if the trial has no step left to take."""
        return self.diverged or self.step >= self.config.steps

    def weights(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Site -> (A (r i), B (o r)), float32 views of the live parameters."""
        return self._views

    def gradients(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Site -> gradients of A and B, float32 views of the flat gradient."""
        return self._grad_views

    def optimizer_step(self, norm: float | None = None) -> float:
        """Clip, step and clear the gradient; returns the gradient's norm before clipping.

        ``norm`` is that norm where it is known already (``gradient_norms``). One that is not finite marks the slot
        diverged and leaves its weights as they are.
        """
        if norm is None:
            norm = float(self.grad.norm())
        if not math.isfinite(norm):
            self.diverged = True
            return norm
        limit = self.config.max_grad_norm
        if limit is not None:
            self.grad.mul_(min(1.0, limit / (norm + 1e-6)))  # as torch.nn.utils.clip_grad_norm_
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        self.flat.grad = self.grad
        if self.flat.is_cuda or self.config.optimizer != "paged_adamw_32bit" or not self.optimizer.state[self.flat]:
            self.optimizer.step()
        else:
            self._step_on_cpu()
        self.grad.zero_()
        self.step += 1
        return norm

    def _step_on_cpu(self) -> None:
        """bitsandbytes' 32-bit AdamW on its own state, by torch's fused kernel for CPUs.

        bitsandbytes has no kernel of its own there and goes through memory a dozen times; the arithmetic is the same
        (tests/tuning/engine/test_slot.py compares them).
        """
        state, group = self.optimizer.state[self.flat], self.optimizer.param_groups[0]
        state["step"] += 1
        fused: Any = torch._fused_adamw_  # pyright: ignore[reportPrivateImportUsage] - torch.optim.AdamW(fused=True)'s
        fused(
            [self.flat],
            [self.grad],
            [state["state1"]],
            [state["state2"]],
            [],
            [torch.tensor(float(state["step"]))],
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )

    def release(self) -> None:
        """Give back what the memory's own collection does not free; the slot is not to be used again."""
        self.optimizer.release()

    def rewind(self) -> None:
        """Give up the optimizer step that has been begun: its gradient, and its rows, which come again."""
        self.grad.zero_()
        self.micro_steps = self.step * self.config.accumulation
        self.stream.position = self.micro_steps * self.config.batch_size

    def state(self) -> dict[str, Any]:
        """Everything that training goes on from, as tensors and plain values; copies, not views.

        In the middle of an accumulated step, it is the state before that step, whose gradient so far is given up.
        """
        micro_steps = self.step * self.config.accumulation
        optimizer = {
            key: _copy(value) if isinstance(value, Tensor) else value
            for key, value in self.optimizer.state.get(self.flat, {}).items()
            if not key.startswith("qmap")  # constant tables, made anew
        }
        return {
            "flat": _copy(self.flat.data),
            "optimizer": optimizer,
            "step": self.step,
            "micro_steps": micro_steps,
            "position": micro_steps * self.config.batch_size,
            "diverged": self.diverged,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``, which must come from a slot of the same configuration."""
        self.flat.data.copy_(state["flat"])
        self.grad.zero_()
        # The optimizer makes its own (paged) buffers; only then are the saved values copied into them. Its
        # load_state_dict would replace paged memory by plain tensors.
        if state["optimizer"]:
            self.optimizer.check_overrides()
            self.flat.grad = self.grad
            self.optimizer.init_state(self.optimizer.param_groups[0], self.flat, 0, 0)
            live = self.optimizer.state[self.flat]
            for key, value in state["optimizer"].items():
                if isinstance(value, Tensor):
                    live[key].copy_(value)
                else:
                    live[key] = value
        self.step, self.micro_steps = int(state["step"]), int(state["micro_steps"])
        self.diverged = bool(state["diverged"])
        self.stream.position = int(state["position"])

    def by_rank(self, flat: Tensor) -> Tensor:
        """The flat weights or gradient as (r w)."""
        return flat.view(self.config.rank, -1)

    def _cut(self, flat: Tensor) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
        """Views of ``flat`` as each site's A and B."""
        rows = self.by_rank(flat)
        for name, columns in columns_of(self.shapes).items():
            yield name, (rows[:, columns.a], rows[:, columns.b].t())

    def _initialise(self) -> None:
        """A uniform in +-1/sqrt(i), B zero, as peft: kaiming_uniform(a=sqrt(5)) of an r x i matrix.

        Drawn on the CPU with a generator of its own for each site, so the start depends on the seed and the site alone.
        """
        for name, (a, _) in self._views.items():
            generator = torch.Generator().manual_seed(stable_seed("init", self.config.seed, name))
            bound = 1.0 / math.sqrt(a.shape[1])
            a.copy_(torch.empty(a.shape).uniform_(-bound, bound, generator=generator))


class Columns(NamedTuple):
    """Where a layer's A and B stand in the rows of a flat tensor."""

    a: slice
    b: slice


def columns_of(shapes: Mapping[str, tuple[int, int]]) -> dict[str, Columns]:
    """The columns of each layer, in the order of ``shapes``."""
    columns: dict[str, Columns] = {}
    offset = 0
    for name, (outputs, inputs) in shapes.items():
        middle, end = offset + inputs, offset + inputs + outputs
        columns[name] = Columns(slice(offset, middle), slice(middle, end))
        offset = end
    return columns


def make_optimizer(config: TrialConfig, flat: nn.Parameter) -> Any:
    """bitsandbytes' paged AdamW for ``flat``."""
    from tuning.engine.paged import PagedAdamW8, PagedAdamW32

    kind = PagedAdamW32 if config.optimizer == "paged_adamw_32bit" else PagedAdamW8
    return kind([flat], lr=config.learning_rate, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay)


def gradient_norms(slots: Sequence[Slot]) -> list[float]:
    """The Euclidean norm of each slot's gradient; a GPU is waited for once."""
    return torch.stack([slot.grad.norm() for slot in slots]).tolist() if slots else []


def _copy(tensor: Tensor) -> Tensor:
    """A copy in the machine's memory."""
    return tensor.cpu() if tensor.is_cuda else tensor.clone()


def learning_rate(config: TrialConfig, step: int) -> float:
    """The learning rate of optimizer step ``step`` (from 0), by the formulas of transformers'
    get_*_schedule_with_warmup.
    """
    peak = config.learning_rate
    if step < config.warmup_steps:
        return peak * step / config.warmup_steps
    progress = (step - config.warmup_steps) / (config.steps - config.warmup_steps)
    if config.schedule == "cosine":
        return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak * (1.0 - progress) if config.schedule == "linear" else peak


def stable_seed(*parts: object) -> int:
    """A 63-bit seed from ``parts``, the same on every machine and in every process."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
