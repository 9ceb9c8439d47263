"""The same training without the engine: one trial, by transformers, peft and bitsandbytes, as their documentation has
it.

From the engine come only what defines a trial rather than trains it: the order of rows, the first A and B (given by
the caller), and the numbers of a dropout mask. The shift of labels, the loss and its normalisation are transformers'
own, the low-rank update and its gradient peft's, clipping torch's, the schedule transformers'.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.optim.adamw import PagedAdamW8bit, PagedAdamW32bit
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from tuning.engine.data import RowStream, Tokens
from tuning.engine.lora import dropout_mask
from tuning.engine.slot import stable_seed
from tuning.spec import TrialConfig

Weights = dict[str, tuple[Tensor, Tensor]]
"""Site -> (A (r i), B (o r))."""

PEFT_TARGETS: dict[str, str | list[str]] = {
    "all-linear": "all-linear",
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "mlp": ["gate_proj", "up_proj", "down_proj"],
}


@dataclass(frozen=True, slots=True)
class Mistakes:
    """Errors that an engine could make, each off by default: proof that the comparison would find them."""

    scaling: float = 1.0
    bias_correction: bool = True
    beta2: float | None = None
    label_shift: int = 0
    mean_of_means: bool = False
    """Average the micro-batches' mean losses instead of all tokens of the step."""
    clip: bool = True
    late_schedule: int = 0
    """Read the learning rate so many steps behind."""
    weight_decay: bool = True
    mask_step: int = 0
    """Draw the dropout masks of another micro-step."""
    row_shift: int = 0


def load_nf4(folder: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Any:
    """The base as anyone would load it for QLoRA."""
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=quantisation, device_map={"": str(device)}
    )


class GivenDropout(nn.Module):
    """Stands where peft's dropout stood, and multiplies by the mask that the trial's rule gives."""

    def __init__(self, probability: float, seed: Callable[[], int]) -> None:
        super().__init__()
        self.probability, self.seed = probability, seed

    def forward(self, x: Tensor) -> Tensor:
        return x * dropout_mask(x, self.probability, self.seed())


class PeftLoop:
    """One trial alone."""

    def __init__(
        self,
        folder: str,
        config: TrialConfig,
        data: Tokens,
        first: Weights,
        wrong: Mistakes | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config, self.data, self.wrong = config, data, wrong or Mistakes()
        self.micro_steps = 0
        targets = config.target_modules
        lora = LoraConfig(
            task_type="CAUSAL_LM",
            r=config.rank,
            lora_alpha=config.alpha * self.wrong.scaling,  # pyright: ignore[reportArgumentType] - peft divides it
            use_rslora=config.rslora,
            lora_dropout=0.0,
            target_modules=targets if isinstance(targets, list) else PEFT_TARGETS[targets],
        )
        self.model: Any = get_peft_model(load_nf4(folder, dtype, device), lora)
        self.layers = {
            name.removeprefix("base_model.model."): module
            for name, module in self.model.named_modules()
            if hasattr(module, "lora_A")
        }
        assert set(self.layers) == set(first)
        for site, layer in self.layers.items():
            for weight, start in zip(_pair(layer), first[site], strict=True):
                weight.data.copy_(start)
            if config.dropout:
                layer.lora_dropout["default"] = GivenDropout(config.dropout, self._mask_seed(site))
        self.parameters = [weight for layer in self.layers.values() for weight in _pair(layer)]
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        assert {id(parameter) for parameter in trainable} == {id(parameter) for parameter in self.parameters}
        self.flat = nn.Parameter(_by_rank([parameter.data for parameter in self.parameters]).flatten())
        self.optimizer = self._make_optimizer()
        self.schedule = self._make_schedule()
        self.stream = RowStream(data, config.seed)
        self.stream.take(self.wrong.row_shift)

    def train(self, steps: int | None = None) -> tuple[list[float], Weights]:
        """All steps, or the first ``steps`` of them: the loss of each, and the weights at the end."""
        losses = [self.step() for _ in range(self.config.steps if steps is None else steps)]
        pairs = {site: _pair(layer) for site, layer in self.layers.items()}
        return losses, {site: (a.detach().clone(), b.detach().clone()) for site, (a, b) in pairs.items()}

    def step(self) -> float:
        """One optimizer step; returns the mean loss of its targets."""
        total = self._backward(self.config.accumulation)
        self._update()
        return total

    def gradients(self, micro_batches: int = 1) -> Weights:
        """Gradients of A and B after the first ``micro_batches`` of a step, before clipping."""
        self._backward(micro_batches)
        return {
            site: (a.grad.clone(), b.grad.clone())  # pyright: ignore[reportOptionalMemberAccess]
            for site, (a, b) in ((site, _pair(layer)) for site, layer in self.layers.items())
        }

    def _backward(self, micro_batches: int) -> float:
        """The gradients of a step's first micro-batches; returns their part of the step's loss."""
        config, wrong = self.config, self.wrong
        batches = [pad_rows(self.data, self.stream.take(config.batch_size)) for _ in range(config.accumulation)]
        device = self.flat.device
        batches = [[part.to(device) for part in batch] for batch in batches]
        batches = [(ids, attention, labels.roll(wrong.label_shift, dims=1)) for ids, attention, labels in batches]
        counts = [int((labels[:, 1:] != -100).sum()) for _, _, labels in batches]
        total = 0.0
        self.model.train()
        for (ids, attention, labels), count in list(zip(batches, counts, strict=True))[:micro_batches]:
            items = count * config.accumulation if wrong.mean_of_means else sum(counts)
            output = self.model(input_ids=ids, attention_mask=attention, labels=labels, num_items_in_batch=items)
            output.loss.backward()
            total += float(output.loss.detach())
            self.micro_steps += 1
        return total

    def _update(self) -> None:
        """Clip, step, clear."""
        leaves = self._leaves()
        if self.config.optimizer == "paged_adamw_8bit":
            self.flat.grad = _by_rank([_gradient(parameter) for parameter in self.parameters]).flatten()
        if self.config.max_grad_norm is not None and self.wrong.clip:
            torch.nn.utils.clip_grad_norm_(leaves, self.config.max_grad_norm)
        if not self.wrong.bias_correction:
            for leaf in leaves:
                if leaf in self.optimizer.state:
                    self.optimizer.state[leaf]["step"] = 10**7
        self.optimizer.step()
        if self.optimizer.state[leaves[0]]["step"] > self.wrong.late_schedule:
            self.schedule.step()
        self.model.zero_grad()
        if self.config.optimizer == "paged_adamw_8bit":
            rows = self.flat.data.view(self.config.rank, -1)
            widths = [parameter.numel() // self.config.rank for parameter in self.parameters]
            for index, values in enumerate(rows.split(widths, dim=1)):
                self.parameters[index].data.copy_(values.t() if index % 2 else values)

    def _leaves(self) -> list[nn.Parameter]:
        """What the optimizer works on: with 8-bit state one flat tensor, since bitsandbytes' blocks of 256 follow the
        tensor's bounds, and the engine's tensor is flat, one row a rank; in 32 bits, where bounds do not matter, peft's
        own parameters.
        """
        return [self.flat] if self.config.optimizer == "paged_adamw_8bit" else self.parameters

    def _make_optimizer(self) -> Any:
        config, wrong = self.config, self.wrong
        kind = PagedAdamW8bit if config.optimizer == "paged_adamw_8bit" else PagedAdamW32bit
        betas = (config.beta1, config.beta2 if wrong.beta2 is None else wrong.beta2)
        decay = config.weight_decay if wrong.weight_decay else 0.0
        return kind(self._leaves(), lr=config.learning_rate, betas=betas, weight_decay=decay)

    def _make_schedule(self) -> Any:
        warmup, steps = self.config.warmup_steps, self.config.steps
        if self.config.schedule == "cosine":
            return get_cosine_schedule_with_warmup(self.optimizer, warmup, steps)
        if self.config.schedule == "linear":
            return get_linear_schedule_with_warmup(self.optimizer, warmup, steps)
        return get_constant_schedule_with_warmup(self.optimizer, warmup)

    def _mask_seed(self, site: str) -> Callable[[], int]:
        return lambda: stable_seed("dropout", self.config.seed, self.micro_steps + self.wrong.mask_step, site)


def pad_rows(data: Tokens, rows: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, attention mask and labels, padded on the right to the longest of the rows."""
    pairs = [data.row(row) for row in rows]
    shape = len(rows), max(len(ids) for ids, _ in pairs)
    ids, attention = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, -100)
    for line, (row_ids, row_labels) in enumerate(pairs):
        ids[line, : len(row_ids)] = torch.tensor(row_ids)
        attention[line, : len(row_ids)] = 1
        labels[line, : len(row_ids)] = torch.tensor(row_labels)
    return ids, attention, labels


def _pair(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def _by_rank(pairs: list[Tensor]) -> Tensor:
    """A, B, A, B, ... side by side as (r w): each A as it is, each B transposed."""
    return torch.cat([matrix.t() if index % 2 else matrix for index, matrix in enumerate(pairs)], dim=1)


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
