"""The frozen base: loaded in NF4 with double quantisation, its linear layers turned into packed LoRA sites.

NF4, double quantisation and 16-bit compute: Dettmers et al. 2023, sections 3 (https://arxiv.org/abs/2305.14314).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tuning.engine.lora import Lane, PackedLinear
from tuning.spec import BaseSpec

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

    Use: ``set_lanes`` for a pass, ``features`` on the token ids, ``head`` on the features of the positions that count.
    """

    def __init__(self, spec: BaseSpec, device: torch.device | str = "cpu") -> None:
        """Load and quantise the base of ``spec``.

        Raises:
            OSError, ValueError: transformers cannot load it (checked before by ``tuning.inspect``).
        """
        self.device = torch.device(device)
        self.dtype = getattr(torch, spec.compute_dtype)
        self.model = load_quantised(spec, self.device)
        self._tape = torch.zeros((), device=self.device, requires_grad=True)
        self.sites = self._make_sites()
        self.report = self._measure()
        self.backbone, self.head = self._split()

    def set_lanes(self, lanes: Mapping[str, list[Lane]]) -> None:
        """For the next passes, give each named site its lanes, and none to the others."""
        for name, site in self.sites.items():
            site.lanes = lanes.get(name, ())

    def features(self, ids: Tensor) -> Tensor:
        """Token ids (b t) -> what ``head`` turns into logits, (b t d).

        Rows are padded on the right and attention is causal, so no real token sees the padding and no mask is needed.
        """
        return self.backbone(ids)

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

    def _split(self) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """The model as features and head, so that logits are made for the positions that count, one slot at a time.

        Some architectures do more to the logits than a linear layer (scaling, soft caps). Rather than know them all,
        compare on a few tokens; where head(features) is not the model's own output, the whole model is the features
        and the head does nothing.
        """

        def whole(ids: Tensor) -> Tensor:
            return self.model(input_ids=ids, use_cache=False).logits

        def decoder(ids: Tensor) -> Tensor:
            return self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state

        output = self.model.get_output_embeddings()
        ids = torch.arange(8, device=self.device).remainder(self.model.config.get_text_config().vocab_size)[None]
        with torch.no_grad():
            if output is not None and torch.equal(output(decoder(ids)), whole(ids)):
                return decoder, output
        return whole, nn.Identity()


def load_quantised(spec: BaseSpec, device: torch.device) -> Any:
    """The transformers model of ``spec`` with NF4 weights, every parameter frozen, in evaluation mode."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = getattr(torch, spec.compute_dtype)
    model = AutoModelForCausalLM.from_pretrained(
        spec.model,
        revision=spec.revision,
        trust_remote_code=spec.trust_remote_code,
        dtype=dtype,
        device_map={"": str(device)},
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
    )
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
