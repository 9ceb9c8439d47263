"""A pass of the engine without weights and without memory: the model on the meta device, its allocations counted.

What a forward pass keeps for the backward one depends on the architecture, on autograd, on this engine's packed layers
and on gradient checkpointing. Rather than know them all by formula, the pass itself is run on tensors that have a shape
but no data, and a counter watches which storages live. That is exact for any architecture whose control flow does not
look at values, costs a fraction of a second and works from `config.json` alone.

Shapes: b rows of the whole pack, t tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from serving.weights.architecture import nf4_layers
from tuning.engine.attention import RowAttention
from tuning.engine.base import select_targets
from tuning.engine.batch import RowIndex
from tuning.engine.counting import Count, again, counting
from tuning.engine.head import Head, heads_of
from tuning.engine.lora import Dropout, PackedLinear, Stack, Stretch
from tuning.engine.losses import logit_rows
from tuning.engine.norm import fuse_norms
from tuning.memory import BLOCK
from tuning.spec import TrialConfig

Pair = tuple[int, int]
FEW_LAYERS = 3
"""Layers that are run of a stack of equal ones, and one less, to see what one keeps."""


@dataclass(frozen=True, slots=True)
class Growth:
    """Bytes of a pass beside weights and slots, for any number of rows.

    Every tensor of a pass has a size that is linear in its rows, so two runs tell all others: the live bytes after each
    operation at two and at three rows. (A single row is left out: torch copies less where a dimension is 1.) Layers
    that were left out, being like the others, kept as much as one of these, and needed nothing when the pass was at its
    fullest, in the last layer.
    """

    kept: Pair
    """What the forward pass leaves for the loss and the backward pass, at two and at three rows."""
    live: tuple[np.ndarray, np.ndarray]
    """After each operation of the whole pass."""
    layer: Pair = (0, 0)
    """Part of ``kept`` of one layer."""
    left_out: int = 0
    """Layers that were not run."""

    def saved(self, rows: int) -> int:
        """Bytes that the forward pass leaves."""
        return int(_extend(*self.kept, rows) + self.left_out * _extend(*self.layer, rows))

    def peak(self, rows: int) -> int:
        """Most bytes at one time, forward and backward, without the loss."""
        return int(_extend(*self.live, rows).max() + self.left_out * _extend(*self.layer, rows))


def _extend(at_two: Any, at_three: Any, rows: int) -> Any:
    return at_two + (rows - 2) * (at_three - at_two)


@dataclass(frozen=True, slots=True)
class LossBytes:
    """Of the losses of a pass, on top of what its forward pass left."""

    peak: int
    """At most."""
    left: int
    """What is there until the backward pass ends: the gradients of the targets' features."""


class DryRun:
    """A base on the meta device with the engine's own layers in it."""

    def __init__(self, model: Any, dtype: torch.dtype, device_type: str = "cuda", *, end_to_end: bool = False) -> None:
        """``model`` is a transformers model on the meta device; it is changed.

        ``device_type`` is what it is to run on, whose kernels keep different things; ``end_to_end`` is `data.packing`.
        """
        self._dtype, self._end_to_end = dtype, end_to_end
        self._logit_rows = logit_rows(torch.device(device_type))
        self._model = model.to(dtype).eval().requires_grad_(False)
        tape = torch.zeros((), device="meta", requires_grad=True)
        self._sites: dict[str, PackedLinear] = {}
        for name, (outputs, inputs) in nf4_layers(model).items():
            parent, _, leaf = name.rpartition(".")
            has_bias = model.get_submodule(name).bias is not None
            linear = nn.Linear(inputs, outputs, has_bias, device="meta", dtype=dtype).requires_grad_(False)
            own_bias: Any = linear.bias  # None or a tensor; torch's type says always a tensor
            self._sites[name] = PackedLinear(linear, partial(_dequantise, linear.weight), own_bias, tape)
            setattr(model.get_submodule(parent), leaf, self._sites[name])
        fuse_norms(model, device_type, dry_rms_norm)
        self._stack = LayerStack.of(model)
        self._attention = self._use_row_attention(device_type)
        self._head = next((head for head in heads_of(model) if self._splits(head)), None)
        """None: logits come for all tokens at once."""
        text = model.config.get_text_config()
        self._width = int(text.hidden_size if self._head else text.vocab_size)

    def training(self, trial: TrialConfig, tokens: int, *, gradient_checkpointing: bool) -> Growth:
        """Forward and backward of rows of trials like ``trial``.

        Raises:
            ArchitectureError: this base cannot be run without values.
        """
        with _checkpointing(self._model) if gradient_checkpointing else nullcontext():
            return self._growth(trial, tokens, training=True)

    def evaluation(self, trial: TrialConfig, tokens: int) -> Growth:
        """The same without gradients.

        Raises:
            ArchitectureError: this base cannot be run without values.
        """
        return self._growth(trial, tokens, training=False)

    def losses(self, targets: int, *, training: bool) -> LossBytes:
        """Of the losses that a pass makes together: of all trials in training, of one in an evaluation.

        The steps of ``losses_and_gradients`` and ``summed_losses``, for one chunk of logits.
        """
        head = self._head or nn.Identity()
        chunk = min(targets, self._logit_rows)
        goal = torch.empty(chunk, dtype=torch.long, device="meta")
        part = torch.empty(chunk, self._width, dtype=self._dtype, device="meta", requires_grad=training)
        weight = torch.empty(chunk, device="meta")
        with torch.set_grad_enabled(training), counting() as count:
            loss = functional.cross_entropy(head(part).float(), goal, reduction="none") * weight
            if training:
                torch.autograd.grad(loss.sum(), part)
        features = targets * self._width * self._dtype.itemsize
        if not training:
            return LossBytes(features + max(count.timeline), 0)
        # The features of the targets and their gradients, which at last are put together.
        return LossBytes(max(2 * features + max(count.timeline), 3 * features), features)

    def _growth(self, trial: TrialConfig, tokens: int, *, training: bool) -> Growth:
        stack = self._stack
        targets = set(select_targets(self._sites, trial.target_modules))
        if stack is None or not stack.is_uniform(targets):
            return _growth_of(*(self._pass(trial, rows, tokens, training=training) for rows in (2, 3)))
        with stack.first(FEW_LAYERS - 1):
            fewer = [self._pass(trial, rows, tokens, training=training).kept for rows in (2, 3)]
        with stack.first(FEW_LAYERS):
            growth = _growth_of(*(self._pass(trial, rows, tokens, training=training) for rows in (2, 3)))
        layer = growth.kept[0] - fewer[0], growth.kept[1] - fewer[1]
        return replace(growth, layer=layer, left_out=len(stack.layers) - FEW_LAYERS)

    def _pass(self, trial: TrialConfig, rows: int, tokens: int, *, training: bool) -> Count:
        self._set_stacks(trial, rows, tokens, training=training)
        ids, positions = _ids(rows, tokens), None
        if self._end_to_end and self._attention:
            ids = positions = _ids(1, rows * tokens)
            self._attention.rows = RowIndex(_ids(rows, tokens), _ids(1, rows * tokens)[0], _ids(1, rows * tokens)[0])
        with torch.set_grad_enabled(training), counting() as count:
            features = self._features(ids, positions)
            count.kept = count.now
            if training:
                torch.autograd.backward(features, torch.zeros_like(features))
        if self._attention:
            self._attention.rows = None
        return count

    def _features(self, ids: Tensor, positions: Tensor | None = None) -> Tensor:
        given = {} if positions is None else {"position_ids": positions}
        if self._head:
            return self._model.base_model(input_ids=ids, **given, use_cache=False).last_hidden_state
        return self._model(input_ids=ids, **given, use_cache=False).logits

    def _set_stacks(self, trial: TrialConfig, rows: int, tokens: int, *, training: bool) -> None:
        """One slot that has all rows: it keeps what several would keep together."""
        targets = set(select_targets(self._sites, trial.target_modules))
        for name, site in self._sites.items():
            linear: Any = site.base
            a, grad_a, b, grad_b = (
                torch.empty(1, trial.rank, features, dtype=self._dtype, device="meta")
                for features in (linear.in_features, linear.in_features, linear.out_features, linear.out_features)
            )
            scaling = torch.empty(1, 1, 1, device="meta")
            stack = Stack(Stretch(0, rows * tokens), 0, a, b, scaling, grad_a, grad_b)
            if trial.dropout and training:
                stack.dropouts = [DryDropout(trial.dropout, 0, trial.batch_size, tokens)]
            site.stacks = [stack] if name in targets else ()

    def _use_row_attention(self, device_type: str) -> RowAttention | None:
        """As ``Base``, which also compares what comes out."""
        model = self._model
        if not model._can_set_attn_implementation():  # noqa: SLF001 - transformers tells it in no other way
            return None
        before = model.config._attn_implementation  # noqa: SLF001
        attention = RowAttention(device_type)
        model.set_attn_implementation(attention.name)
        few = self._stack.first(FEW_LAYERS) if self._stack else nullcontext()
        try:
            with few, torch.no_grad(), counting():
                model.base_model(input_ids=_ids(1, 8), use_cache=False)
        except ValueError:
            model.set_attn_implementation(before)
            return None
        return attention

    def _splits(self, head: Head) -> bool:
        """Whether the logits are the head's work on the decoder's output, as ``Base`` finds out from values: here the
        model does nothing else.
        """
        ids = _ids(1, 8)
        few = self._stack.first(FEW_LAYERS) if self._stack else nullcontext()
        try:
            with few, torch.no_grad(), counting() as count:
                self._model(input_ids=ids, use_cache=False)
                whole, count.operations = count.operations, []
                head(self._model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
        except Exception:  # noqa: BLE001 - as in ``Base``
            return False
        return count.operations == whole


def _growth_of(two: Count, three: Count) -> Growth:
    """Of the same pass with two and with three rows."""
    lines = two.timeline, three.timeline
    if len(two.timeline) != len(three.timeline):  # not seen yet; the two peaks then say less, but nothing wrong
        lines = [max(two.timeline)], [max(three.timeline)]
    return Growth((two.kept, three.kept), (np.array(lines[0]), np.array(lines[1])))


@dataclass(frozen=True, slots=True)
class LayerStack:
    """The decoder layers of a model, all of one form, of which a pass may run the first few."""

    parent: Any
    attribute: str
    path: str
    layers: Any

    @classmethod
    def of(cls, model: Any) -> LayerStack | None:
        """The one stack of a model; None where there is no single one, its layers differ, or it is short."""
        stacks = [
            (name, module)
            for name, module in model.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) and isinstance(module[0], GradientCheckpointingLayer)
        ]
        if len(stacks) != 1 or len(stacks[0][1]) <= FEW_LAYERS:
            return None
        path, layers = stacks[0]
        kinds = getattr(model.config.get_text_config(), "layer_types", None) or [None] * len(layers)
        forms = {
            (type(layer), kind, *((name, weight.shape) for name, weight in layer.named_parameters()))
            for layer, kind in zip(layers, kinds, strict=True)
        }
        parent, _, attribute = path.rpartition(".")
        return cls(model.get_submodule(parent), attribute, path, layers) if len(forms) == 1 else None

    def is_uniform(self, targets: Collection[str]) -> bool:
        """Whether ``targets`` are the same in every layer."""
        own = [self._inside(index, targets) for index in range(len(self.layers))]
        return all(one == own[0] for one in own)

    def _inside(self, index: int, targets: Collection[str]) -> set[str]:
        prefix = f"{self.path}.{index}."
        return {target.removeprefix(prefix) for target in targets if target.startswith(prefix)}

    @contextmanager
    def first(self, count: int) -> Generator[None]:
        """In the block, the model has its first ``count`` layers only."""
        setattr(self.parent, self.attribute, self.layers[:count])
        try:
            yield
        finally:
            setattr(self.parent, self.attribute, self.layers)


@contextmanager
def _checkpointing(model: Any) -> Generator[None]:
    """Every decoder layer keeps its input only, and is computed again in the backward pass."""
    layers: list[Any] = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    for layer in layers:
        layer.gradient_checkpointing = layer.training = True
        layer._gradient_checkpointing_func = partial(  # noqa: SLF001 - transformers' own place for it
            checkpoint, use_reentrant=False, preserve_rng_state=False, context_fn=again
        )
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = layer.training = False


class DryDropout(Dropout):
    """Masks of one slot's own rows, made one after the other; a generator has no meta device to draw them on."""

    def mask(self, x: Tensor) -> Tensor:
        """Allocates as the real one does; a single row of it, to go with any number of rows."""
        shape = self.rows * self.longest, x.shape[1]
        drawn = torch.empty(shape, device="meta").to(x.dtype)
        placed = torch.zeros_like(drawn)
        return placed.copy_(drawn.clone())[:1]


def dry_rms_norm(x: Tensor, shape: list[int], weight: Tensor, epsilon: float) -> Tensor:  # noqa: ARG001
    """Allocates as torch's fused kernel for CUDA does; on the meta device torch would take the steps of a CPU."""
    return _DryNorm.apply(x)


class _DryNorm(torch.autograd.Function):
    """Keeps its input and a float32 a row; what does not lie in order is copied first, the gradient too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(x, torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device))
        return torch.empty_like(x.contiguous())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, _ = ctx.saved_tensors
        _in_order = x.contiguous(), grad.contiguous()
        return torch.empty_like(_in_order[0])


def _ids(rows: int, tokens: int) -> Tensor:
    return torch.empty(rows, tokens, dtype=torch.long, device="meta")


def _dequantise(weight: Tensor) -> Tensor:
    """Allocates as bitsandbytes does: the constants in float32, then the weights in the compute dtype."""
    _constants = torch.empty(weight.numel() // BLOCK, dtype=torch.float32, device="meta")
    return torch.empty_like(weight)
