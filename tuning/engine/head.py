"""From features to logits, for the positions that count: the end of a causal language model by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

Head = Callable[[Tensor], Tensor]
"""Features (l d) -> logits (l v)."""


def heads_of(model: Any) -> list[Head]:
    """What the model's head may be, the quickest first; whether one is, only trying tells.

    In most architectures it is a linear layer. Some do more to the logits (scaling, soft caps).
    """
    linear = model.get_output_embeddings()
    return [*([] if linear is None else [linear]), OwnHead(model)]


class OwnHead:
    """The model's own forward pass with its decoder left out: whatever else it does is done.

    Not thread-safe: meanwhile the model has no decoder.
    """

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, features: Tensor) -> Tensor:
        """Features (l d) -> logits (l v).

        Raises:
            AttributeError, TypeError, ValueError: this architecture's forward pass wants more of its decoder.
        """
        model, name = self._model, self._model.base_model_prefix
        decoder = getattr(model, name)
        setattr(model, name, _Given(features[None]))
        try:
            return model(inputs_embeds=features[None], use_cache=False).logits[0]
        finally:
            setattr(model, name, decoder)


class _Given(nn.Module):
    """Stands where the decoder stood."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self._features = features

    def forward(self, *_inputs: Any, **_others: Any) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=self._features)  # pyright: ignore[reportArgumentType]
