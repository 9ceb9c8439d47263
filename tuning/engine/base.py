"""The frozen base: loaded in NF4 with double quantisation, its linear layers turned into packed LoRA sites.

NF4, double quantisation and 16-bit compute: Dettmers et al. 2023, sections 3 (https://arxiv.org/abs/2305.14314).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cluster.errors import Fault, InputError
from tuning.engine.batch import RowIndex
from tuning.engine.dtype import compute_dtype
from tuning.engine.head import Head, heads_of
from tuning.engine.lora import PackedLinear, Stack
from tuning.engine.norm import fuse_norms
from tuning.spec import BaseSpec

if TYPE_CHECKING:
    from tuning.engine.attention import RowAttention

PROBE_TOKENS = 24
"""Of each of two rows that try out the attention."""
NO_CHECKPOINTS = "is not supported by this architecture: it has no layers that transformers can checkpoint"
_log = logging.getLogger(__name__)
GROUP_WORDS = {"attention": ("attn", "attention"), "mlp": ("mlp", "feed_forward", "ffn")}


@dataclass(frozen=True, slots=True)
class BaseReport:
    """What a loaded base measures."""

    parameters: int
    """All parameters, as if unquantised."""
    quantised_parameters: int
    """Those held in NF4."""
    bits_per_parameter: float
    """Bits of an NF4 parameter with its quantisation constants; 4.127 in the paper (section 3), without the lookup
    tables."""
    memory_mib: float
    """All weights and constants."""


class Base:
    """A frozen causal language model whose linear layers carry the updates of many slots.

    Use: ``set_stacks`` for a pass, ``features`` on the token ids, ``head`` on the features of the positions that count.
    """

    def __init__(self, spec: BaseSpec, device: torch.device | str = "cpu", model: Any = None) -> None:
        """Load and quantise the base of ``spec``, or take ``model``, which is quantised already.

        Raises:
            OSError, ValueError: transformers cannot load it (checked before by ``tuning.inspect``).
        """
        self.device = torch.device(device)
        self.dtype = compute_dtype(spec, self.device)
        self.notes: list[str] = []
        """What the user should hear of how it was loaded."""
        self.model = load_quantised(spec, self.device, self.notes) if model is None else model
        self._tape = torch.zeros((), device=self.device, requires_grad=True)
        self.sites = self._make_sites()
        fuse_norms(self.model, self.device.type)
        self.report = self._measure()
        self.backbone, self.head = self._split()
        self.attention, self.can_lie_end_to_end = self._use_row_attention()
        if spec.gradient_checkpointing:
            _checkpoint_layers(self.model)

    def set_stacks(self, stacks: Mapping[str, list[Stack]]) -> None:
        """For the next passes, give each named site its stacks, and none to the others."""
        for name, site in self.sites.items():
            site.stacks = stacks.get(name, ())

    @contextmanager
    def laid_end_to_end(self, rows: RowIndex | None) -> Generator[None]:
        """In the block, passes forward and backward, attention stays within ``rows`` (None: the batch's own)."""
        if self.attention is None:
            yield
            return
        self.attention.rows = rows
        try:
            yield
        finally:
            self.attention.rows = None

    def features(self, ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """Token ids (b t) -> what ``head`` turns into logits, (b t d).

        Rows are padded on the right and attention is causal, so no real token sees the padding and no mask is needed.
        Rows laid end to end in one sequence also give their ``positions``, inside ``laid_end_to_end``.
        """
        return self.backbone(ids, positions)

    def _make_sites(self) -> dict[str, PackedLinear]:
        from bitsandbytes.functional import dequantize_4bit
        from bitsandbytes.nn.modules import Linear4bit

        sites: dict[str, PackedLinear] = {}
        for name, module in list(self.model.named_modules()):
            if not isinstance(module, Linear4bit):
                continue
            weight: Any = module.weight

            def dequantise(weight: Any = weight) -> Tensor:
                return dequantize_4bit(weight.data, weight.quant_state).to(self.dtype)

            own_bias: Any = module.bias  # None or a tensor; torch's type says always a tensor
            bias = None if own_bias is None else own_bias.detach().to(self.dtype)
            site = PackedLinear(module, dequantise, bias, self._tape)
            parent, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(parent), leaf, site)
            sites[name] = site
        return sites

    def _measure(self) -> BaseReport:
        quantised = quantised_bytes = 0
        for site in self.sites.values():
            weight: Any = site.base.weight
            state = weight.quant_state
            quantised += state.shape.numel()
            tensors = [weight.data, state.absmax]
            tensors += [state.state2.absmax] if state.nested else []
            quantised_bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        held = {id(site.base.weight) for site in self.sites.values()}
        plain = [parameter for parameter in self.model.parameters() if id(parameter) not in held]
        plain_bytes = sum(parameter.numel() * parameter.element_size() for parameter in plain)
        return BaseReport(
            parameters=quantised + sum(parameter.numel() for parameter in plain),
            quantised_parameters=quantised,
            bits_per_parameter=8 * quantised_bytes / quantised,
            memory_mib=(quantised_bytes + plain_bytes) / 2**20,
        )

    @torch.no_grad()
    def _split(self) -> tuple[Backbone, Head]:
        """The model as features and head, so that logits are made for the positions that count.

        Rather than know all architectures, compare on a few tokens; where no head gives the model's own output, the
        whole model is the features and the head does nothing.
        """

        def whole(ids: Tensor, positions: Tensor | None = None) -> Tensor:
            return self.model(input_ids=ids, **_given(positions), use_cache=False).logits

        def decoder(ids: Tensor, positions: Tensor | None = None) -> Tensor:
            return self.model.base_model(input_ids=ids, **_given(positions), use_cache=False).last_hidden_state

        ids = self._some_ids(8)[None]
        expected, features = whole(ids)[0], decoder(ids)[0]
        for head in heads_of(self.model):
            try:
                if torch.equal(head(features), expected):
                    return decoder, head
            except Exception:  # noqa: BLE001, S112 - whatever it misses: it is not this model's head
                continue
        self.notes.append("this base gives its logits only for all tokens at once, which takes much memory")
        return whole, nn.Identity()

    def _some_ids(self, count: int) -> Tensor:
        return torch.arange(count, device=self.device).remainder(self.model.config.get_text_config().vocab_size)

    @torch.no_grad()
    def _use_row_attention(self) -> tuple[RowAttention | None, bool]:
        """Put ``RowAttention`` in the place of the model's own, if the model is the same with it.

        Returns it, and whether rows laid end to end give what they give apart: an architecture with a state or a
        convolution along the sequence would carry one row into the next.
        """
        from tuning.engine.attention import RowAttention

        if not may_use_row_attention(self.model):
            return None, False
        before = self.model.config._attn_implementation  # noqa: SLF001
        apart = self._some_ids(2 * PROBE_TOKENS).view(2, PROBE_TOKENS)
        theirs = self.backbone(apart, None)
        attention = RowAttention()
        self.model.set_attn_implementation(attention.name)
        try:
            same = _is_close(self.backbone(apart, None), theirs)
        except ValueError:
            same = False
        if not same:
            self.model.set_attn_implementation(before)
            return None, False
        return attention, self._keeps_rows_apart(attention, apart)

    def _keeps_rows_apart(self, attention: RowAttention, apart: Tensor) -> bool:
        """True if two rows laid end to end give what they give apart, and the second not a bit of the first.

        Where it differs by bits beside another row in a padded batch too, as in a mixture of experts, whose products
        take the tokens of all rows together, only what is more than rounding counts.
        """
        expected = self.backbone(apart, None)
        other_first = torch.stack([apart[0].flip(0), apart[1]])
        is_exact = torch.equal(self.backbone(other_first, None)[1], expected[1])
        cells = torch.arange(apart.numel(), device=self.device)
        positions = cells.remainder(PROBE_TOKENS)[None]
        attention.rows = RowIndex(cells.view_as(apart), cells, cells)
        try:
            together = self.backbone(apart.view(1, -1), positions).view_as(expected)
            beside_another = self.backbone(other_first.view(1, -1), positions).view_as(expected)
        except (TypeError, ValueError):  # no position_ids, or something that is not understood
            return False
        finally:
            attention.rows = None
        is_same = torch.equal if is_exact else _is_close
        return _is_close(together, expected) and is_same(together[1], beside_another[1])


def may_use_row_attention(model: Any) -> bool:
    """False if the model computes its attention itself, or in chunks, which its mask alone would tell of."""
    config = model.config.get_text_config()
    chunked = getattr(config, "attention_chunk_size", None) or "chunked_attention" in (
        getattr(config, "layer_types", None) or ()
    )
    return not chunked and model._can_set_attn_implementation()  # noqa: SLF001 - transformers tells it in no other way


Backbone = Callable[[Tensor, Tensor | None], Tensor]


def _given(positions: Tensor | None) -> dict[str, Tensor]:
    """Positions only where there are some: not every architecture takes them."""
    return {} if positions is None else {"position_ids": positions}


def _is_close(ours: Tensor, theirs: Tensor) -> bool:
    """Equal but for rounding, by the Frobenius norm of the difference."""
    error = float((ours.float() - theirs.float()).norm() / theirs.float().norm())
    return error < (1e-4 if theirs.dtype == torch.float32 else 3e-2)


def _checkpoint_layers(model: Any) -> None:
    """Have each decoder layer keep only its input, and do its forward pass again in the backward pass.

    transformers does that for layers in training mode. So the layers say that they are, but not while they compute:
    some call their own dropout by that flag, and the base's dropout is off.

    Raises:
        InputError: the architecture has no such layers.
    """
    from torch.utils.checkpoint import checkpoint
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers: list[Any] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise InputError([Fault("base.gradient_checkpointing", NO_CHECKPOINTS, True)])
    for layer in layers:
        layer.gradient_checkpointing = layer.training = True
        layer._gradient_checkpointing_func = partial(  # noqa: SLF001 - transformers' own place for it
            _without_training, layer, partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        )


def _without_training(layer: Any, checkpoint: Callable[..., Any], forward: Callable[..., Any], *inputs: Any) -> Any:
    """``checkpoint(forward, *inputs)`` with the layer in evaluation mode, now and when it is computed again."""

    def quiet(*again: Any) -> Any:
        layer.training = False
        try:
            return forward(*again)
        finally:
            layer.training = True

    return checkpoint(quiet, *inputs)


def load_quantised(spec: BaseSpec, device: torch.device, notes: list[str] | None = None) -> Any:
    """The transformers model of ``spec`` with NF4 weights, every parameter frozen, in evaluation mode; from this node's
    cache (``base_cache``) if it is there. What is wrong with the cache is logged, and added to ``notes``.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from tuning.engine.base_cache import load_cached

    dtype = compute_dtype(spec, device)
    options: dict[str, Any] = {"dtype": dtype, "device_map": {"": str(device)}}

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(
            spec.model,
            revision=spec.revision,
            trust_remote_code=spec.trust_remote_code,
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
            ),
            **options,
        )

    def load_folder(folder: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, **options)

    def tell(text: str) -> None:
        _log.warning(text)
        if notes is not None and text not in notes:
            notes.append(text)

    model = load_cached(spec, load, load_folder, device.type, tell)
    return model.eval().requires_grad_(False)


def select_targets(sites: Iterable[str], targets: str | list[str]) -> list[str]:
    """The sites that ``targets`` means, in the order of ``sites``.

    A group (`attention`, `mlp`, `all-linear`) is matched by the path of the layer, a name as peft matches it: the
    whole path or its end after a dot.

    Raises:
        ValueError: a target matches nothing; the message names it and what there is.
    """
    names = list(sites)
    if targets == "all-linear":
        return names
    chosen: set[str] = set()
    for target in [targets] if isinstance(targets, str) else targets:
        words = GROUP_WORDS.get(target) if isinstance(targets, str) else None
        if words:
            matched = {name for name in names if any(word in name.rpartition(".")[0] for word in words)}
        else:
            matched = {name for name in names if name == target or name.endswith(f".{target}")}
        if not matched:
            known = sorted({name.rpartition(".")[2] for name in names})
            raise ValueError(f"{target!r} matches no linear layer of the base; it has {', '.join(known)}")
        chosen |= matched
    return [name for name in names if name in chosen]
