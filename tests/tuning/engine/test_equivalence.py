"""A trial trained in a pack, against the same trial trained alone by peft and bitsandbytes (peft_loop.py).

float32 compute on both sides, on the same NF4 weights. Tolerances: every step's loss to LOSS_TOLERANCE relative, and
every A and B to ``weight_tolerance`` of how far training moved it (Frobenius norms). Adam divides each element by its
own size, so elements whose gradient is rounding noise may move by a whole step in either direction: a bound on single
elements would say less than this one. With 8-bit state a last bit of rounding can tip an element into the next of its
256 codes, which is why that bound is wider.

Measured: losses agree to 1e-6, weights to 5e-6 (32-bit) and 5e-4 (8-bit); the mildest mistake below moves the weights
by 4e-2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from tests.tuning.engine.conftest import Data
from tests.tuning.engine.peft_loop import Mistakes, PeftLoop, Weights
from tuning.engine.base import Base
from tuning.engine.trainer import Trainer
from tuning.spec import BaseSpec, TrialConfig

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",  # peft asks transformers by the old name
    "ignore:Paged optimizers are not supported on CPU:UserWarning",  # peft_loop's own optimizers
)

LOSS_TOLERANCE = 1e-4
WEIGHT_TOLERANCE = 1e-4
WEIGHT_TOLERANCE_8BIT = 5e-3

# Unequal in everything that may differ between two trials.
TRIALS = {
    "plain": TrialConfig(rank=8, alpha=16.0, learning_rate=5e-3, batch_size=2, steps=8, seed=1),
    "dropout": TrialConfig(
        rank=3,
        alpha=7.0,
        rslora=True,
        target_modules="attention",
        dropout=0.3,
        learning_rate=1e-2,
        batch_size=2,
        accumulation=3,
        schedule="cosine",
        warmup_steps=2,
        max_grad_norm=None,
        weight_decay=2.0,
        steps=5,
        seed=2,
    ),
    "8-bit": TrialConfig(
        rank=16,
        alpha=8.0,
        target_modules=["q_proj", "v_proj", "down_proj"],
        optimizer="paged_adamw_8bit",
        learning_rate=2e-3,
        beta1=0.8,
        beta2=0.95,
        batch_size=4,
        schedule="linear",
        warmup_steps=3,
        max_grad_norm=1.0,
        steps=10,
        seed=3,
    ),
    "rank 1": TrialConfig(
        rank=1,
        alpha=2.0,
        target_modules="mlp",
        dropout=0.1,
        learning_rate=2e-2,
        batch_size=1,
        accumulation=2,
        schedule="linear",
        steps=6,
        seed=4,
    ),
}
PACKS = [["plain"], ["dropout"], ["8-bit"], ["rank 1"], ["plain", "dropout"], ["8-bit", "rank 1"], list(TRIALS)]


def weight_tolerance(name: str) -> float:
    return WEIGHT_TOLERANCE_8BIT if TRIALS[name].optimizer == "paged_adamw_8bit" else WEIGHT_TOLERANCE


class Trained(NamedTuple):
    losses: list[float]
    weights: Weights


class Distance(NamedTuple):
    loss: float
    """Largest relative difference of a step's loss."""
    weights: float
    """Largest distance of a matrix, relative to how far training moved it."""


@pytest.fixture(scope="module")
def first(base: Base, data: Data) -> dict[str, dict[str, torch.Tensor]]:
    """Each trial's first A, as a slot draws it."""
    trainer = Trainer(base, *data)
    ids = {name: trainer.attach(config) for name, config in TRIALS.items()}
    return {
        name: {site: a.clone() for site, (a, _) in trainer.slots[slot].weights().items()} for name, slot in ids.items()
    }


@pytest.fixture(scope="module")
def alone(base_spec: BaseSpec, data: Data, first: Any) -> Callable[..., Trained]:
    """Trains one of TRIALS with peft; without mistakes only once."""
    done: dict[str, Trained] = {}

    def train(name: str, wrong: Mistakes | None = None) -> Trained:
        if wrong is None and name in done:
            return done[name]
        trained = Trained(*PeftLoop(base_spec.model, TRIALS[name], data[0], first[name], wrong).train())
        if wrong is None:
            done[name] = trained
        return trained

    return train


def train_packed(trainer: Trainer, names: list[str]) -> dict[str, Trained]:
    """Train the trials side by side to their ends."""
    ids = {name: trainer.attach(TRIALS[name]) for name in names}
    losses: dict[int, list[float]] = {slot: [] for slot in ids.values()}
    while any(not slot.finished for slot in trainer.slots.values()):
        for report in trainer.step():
            losses[report.slot].append(report.loss)
    return {name: Trained(losses[slot], trainer.slots[slot].weights()) for name, slot in ids.items()}


def distance(ours: Trained, theirs: Trained, first: dict[str, torch.Tensor]) -> Distance:
    assert ours.weights.keys() == theirs.weights.keys()
    losses = max(abs(a - b) / abs(b) for a, b in zip(ours.losses, theirs.losses, strict=True))
    apart = 0.0
    for site, pair in theirs.weights.items():
        starts = first[site], torch.zeros_like(pair[1])
        for mine, yours, start in zip(ours.weights[site], pair, starts, strict=True):
            apart = max(apart, float((mine - yours).norm() / (yours - start).norm()))
    return Distance(losses, apart)


@pytest.mark.parametrize("names", PACKS, ids=" + ".join)
def test_a_trial_in_a_pack_ends_where_it_ends_alone(
    names: list[str], make_trainer: Callable[[], Trainer], alone: Callable[..., Trained], first: Any
) -> None:
    packed = train_packed(make_trainer(), names)
    for name in names:
        apart = distance(packed[name], alone(name), first[name])
        assert apart.loss < LOSS_TOLERANCE, name
        assert apart.weights < weight_tolerance(name), name


MISTAKES = {
    "scaling 10 % too large": ("plain", Mistakes(scaling=1.1)),
    "alpha over rank in place of rsLoRA": ("dropout", Mistakes(scaling=3**-0.5)),
    "no bias correction": ("plain", Mistakes(bias_correction=False)),
    "beta2 of another trial": ("8-bit", Mistakes(beta2=0.999)),
    "labels one token late": ("plain", Mistakes(label_shift=1)),
    "labels one token early": ("rank 1", Mistakes(label_shift=-1)),
    "mean of the micro-batches' means": ("dropout", Mistakes(mean_of_means=True)),
    "no clipping": ("plain", Mistakes(clip=False)),
    "schedule one step late": ("rank 1", Mistakes(late_schedule=1)),
    "no weight decay": ("dropout", Mistakes(weight_decay=False)),
    "masks of the next micro-step": ("dropout", Mistakes(mask_step=1)),
    "rows of the next place": ("plain", Mistakes(row_shift=1)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_tolerance_has_teeth(
    mistake: str, make_trainer: Callable[[], Trainer], alone: Callable[..., Trained], first: Any
) -> None:
    name, wrong = MISTAKES[mistake]
    apart = distance(train_packed(make_trainer(), [name])[name], alone(name, wrong), first[name])
    assert apart.weights > 5 * weight_tolerance(name)
    assert apart.loss > 2 * LOSS_TOLERANCE
