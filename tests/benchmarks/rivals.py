"""What the benchmarks compare with: trials trained one after another by transformers, peft and bitsandbytes.

And what both sides start from: a base of random weights, built straight in NF4.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from tuning.engine.paged import PagedAdamW32
from tuning.spec import TrialConfig


@torch.no_grad()
def random_nf4(config: PretrainedConfig, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Any:
    """A causal language model of normally distributed weights whose linear layers, but the head, are in NF4 with double
    quantisation. One layer at a time is ever in 16 or 32 bits.
    """
    config = deepcopy(config)  # a model writes its attention's name into it
    generator = torch.Generator(device).manual_seed(seed)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not head:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, _random_linear(module, device, dtype, generator))
    for module in list(model.modules()):
        if "inv_freq" in dict(module.named_buffers(recurse=False)):  # a rotary embedding: computed, not drawn
            for name, values in type(module)(config).named_buffers():
                module.register_buffer(name, values.to(device), persistent=False)
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.device.type == "meta":
                values = torch.empty(parameter.shape, dtype=dtype, device=device)
                filled = values.fill_(1.0) if values.dim() == 1 else values.normal_(0.0, 0.02, generator=generator)
                setattr(module, name, nn.Parameter(filled, requires_grad=False))
    model.tie_weights()
    model.is_loaded_in_4bit = True
    return model.eval().requires_grad_(False)


def _random_linear(
    layer: nn.Linear, device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> Linear4bit:
    has_bias: bool = layer.bias is not None  # pyright: ignore[reportUnnecessaryComparison] - torch's type hides None
    quantised = Linear4bit(
        layer.in_features, layer.out_features, has_bias, compute_dtype=dtype, quant_type="nf4", device="meta"
    )
    values = torch.empty(layer.out_features, layer.in_features, dtype=dtype, device=device)
    values.normal_(0.0, 0.02, generator=generator)
    make_weight: Any = Params4bit  # its signature is hidden from type checkers
    quantised.weight = make_weight(values, requires_grad=False, quant_type="nf4", module=quantised).to(device)
    if has_bias:
        quantised.bias = nn.Parameter(torch.zeros(layer.out_features, dtype=dtype, device=device), requires_grad=False)
    return quantised


@dataclass(frozen=True, slots=True)
class Manner:
    """How peft is used; both are common."""

    attention: str
    autocast: bool


class OneByOne:
    """K trials on one base, one after another, in the manner that is fastest here."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model, self.device = model, device
        self._tuned: Any = None
        self._rank = 0

    def choose_manner(self, sample: Tensor) -> Manner:
        """Try all manners on ``sample`` (b t), and keep to the fastest."""
        trial = TrialConfig(rank=16, alpha=16.0)
        manners = [Manner(*pair) for pair in product(("sdpa", "eager"), (False, True))]
        if self.model.dtype == torch.float32:
            manners = [manner for manner in manners if not manner.autocast]
        times: dict[Manner, float] = {}
        for manner in manners:
            self.manner = manner
            self.run([trial], [sample] * 2)
            times[manner] = min(self.run([trial], [sample]) for _ in range(4))
        self.manner = min(times, key=lambda manner: times[manner])
        return self.manner

    def run(self, trials: Sequence[TrialConfig], batches: Sequence[Tensor]) -> float:
        """Seconds to train each trial on all batches; making the adapters and optimizers is not counted."""
        self.model.set_attn_implementation(self.manner.attention)
        seconds = 0.0
        for trial in trials:
            tuned = self._adapted(trial)
            parameters = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
            # bitsandbytes' own, but for its memory, which bitsandbytes would never give back.
            optimizer: Any = PagedAdamW32(parameters, lr=trial.learning_rate, weight_decay=trial.weight_decay)
            self._step(tuned, parameters, optimizer, batches[0])  # the optimizer's state is made here
            synchronise(self.device)
            began = time.perf_counter()
            for ids in batches:
                self._step(tuned, parameters, optimizer, ids)
            synchronise(self.device)
            seconds += time.perf_counter() - began
            optimizer.release()
        return seconds

    def _adapted(self, trial: TrialConfig) -> Any:
        """The base with an adapter of the trial's rank. The last trial's serves again where its rank is the same: to
        make one takes longer than some steps, and what its weights are makes no difference to the time.
        """
        if self._rank != trial.rank:
            if self._tuned is not None:
                self.model = self._tuned.unload()
            lora = LoraConfig(
                task_type="CAUSAL_LM",
                r=trial.rank,
                lora_alpha=trial.alpha,  # pyright: ignore[reportArgumentType] - peft divides it; a float is as good
                target_modules="all-linear",
            )
            self._tuned, self._rank = get_peft_model(self.model, lora), trial.rank
            self._tuned.train()
        return self._tuned

    def _step(self, tuned: Any, parameters: list[nn.Parameter], optimizer: Any, ids: Tensor) -> None:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.manner.autocast):
            loss = tuned(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.3)
        optimizer.step()
        tuned.zero_grad()
        float(loss.detach())  # whoever trains, logs it


def synchronise(device: torch.device) -> None:
    """Wait for a GPU's queue; nothing to wait for elsewhere."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
