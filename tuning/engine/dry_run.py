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

from tuning.engine.base import select_targets
from tuning.engine.counting import Count, again, counting
from tuning.engine.lora import Lane, PackedLinear
from tuning.engine.trainer import LOGIT_ROWS
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


class DryRun:
    """A base on the meta device with the engine's own layers in it."""

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        """``model`` is a transformers model on the meta device; it is changed."""
        self._dtype = dtype
        self._model = model.to(dtype).eval().requires_grad_(False)
        tape = torch.zeros((), device="meta", requires_grad=True)
        self._head = model.get_output_embeddings()
        self._sites: dict[str, PackedLinear] = {}
        for name, linear in list(model.named_modules()):
            if isinstance(linear, nn.Linear) and linear is not self._head:
                parent, _, leaf = name.rpartition(".")
                own_bias: Any = linear.bias  # None or a tensor; torch's type says always a tensor
                bias = None if own_bias is None else own_bias.detach()
                self._sites[name] = PackedLinear(linear, partial(_dequantise, linear.weight), bias, tape)
                setattr(model.get_submodule(parent), leaf, self._sites[name])
        self._stack = LayerStack.of(model)
        self._head_is_linear = self._head is not None and self._splits()
        text = model.config.get_text_config()
        self._width = int(text.hidden_size if self._head_is_linear else text.vocab_size)

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

    def loss(self, targets: int, *, training: bool) -> int:
        """Most bytes that the loss of one trial needs on top of what the forward pass left, for so many targets.

        The same steps as ``Trainer._loss_and_gradient`` and ``Trainer._evaluate_rows``.
        """
        head = self._head if self._head_is_linear else nn.Identity()
        places = torch.empty(targets, dtype=torch.long, device="meta")
        features = torch.empty(targets, self._width, dtype=self._dtype, device="meta")
        grads: list[Tensor] = []
        with torch.set_grad_enabled(training), counting() as count:
            picked = features[places]
            for part, wanted in zip(picked.split(LOGIT_ROWS), places.split(LOGIT_ROWS), strict=True):
                part.requires_grad_(training)
                loss = functional.cross_entropy(head(part).float(), wanted, reduction="sum") / targets
                grads += torch.autograd.grad(loss, part) if training else ()
        return max(count.timeline)

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
        self._set_lanes(trial, rows, tokens, training=training)
        ids = _ids(rows, tokens)
        with torch.set_grad_enabled(training), counting() as count:
            features = self._features(ids)
            grad_features = torch.zeros_like(features) if training else None
            count.kept = count.now
            if training:
                torch.autograd.backward(features, grad_features)
        return count

    def _features(self, ids: Tensor) -> Tensor:
        if self._head_is_linear:
            return self._model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return self._model(input_ids=ids, use_cache=False).logits

    def _set_lanes(self, trial: TrialConfig, rows: int, tokens: int, *, training: bool) -> None:
        """One lane for all rows: it keeps what the lanes of several trials would keep together."""
        targets = set(select_targets(self._sites, trial.target_modules))
        for name, site in self._sites.items():
            linear: Any = site.base
            a = torch.empty(trial.rank, linear.in_features, dtype=self._dtype, device="meta")
            b = torch.empty(linear.out_features, trial.rank, dtype=self._dtype, device="meta")
            grad_a, grad_b = (torch.empty_like(m, dtype=torch.float32) if training else None for m in (a, b))
            site.lanes = [Lane(0, rows, a, b, 1.0, grad_a, grad_b, tokens=tokens)] if name in targets else ()

    def _splits(self) -> bool:
        """Whether the logits are the head's product with the decoder's output, as ``Base`` finds out from values: here
        the model does nothing else.
        """
        ids = _ids(1, 8)
        few = self._stack.first(FEW_LAYERS) if self._stack else nullcontext()
        with few, torch.no_grad(), counting() as count:
            self._model(input_ids=ids, use_cache=False)
            whole, count.operations = count.operations, []
            self._head(self._model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
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


def _ids(rows: int, tokens: int) -> Tensor:
    return torch.empty(rows, tokens, dtype=torch.long, device="meta")


def _dequantise(weight: Tensor) -> Tensor:
    """Allocates as bitsandbytes does: the constants in float32, then the weights in the compute dtype."""
    _constants = torch.empty(weight.numel() // BLOCK, dtype=torch.float32, device="meta")
    return torch.empty_like(weight)
