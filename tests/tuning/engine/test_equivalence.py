"""A trial trained in a pack, against the same trial trained alone by peft and bitsandbytes (peft_loop.py).

The bounds are those of alike.py. Measured: losses agree to 1e-6, weights to 5e-6 (32-bit) and 5e-4 (8-bit); the mildest
mistake below moves the weights by 4e-2.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.tuning.engine.alike import LOSS_TOLERANCE, Alone, Trained, distance, weight_tolerance
from tests.tuning.engine.peft_loop import Mistakes
from tuning.engine.trainer import Trainer
from tuning.spec import TrialConfig

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",  # peft asks transformers by the old name
    "ignore:Paged optimizers are not supported on CPU:UserWarning",  # peft_loop's own optimizers
)

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


def train_packed(trainer: Trainer, names: list[str]) -> dict[str, Trained]:
    """Train the trials side by side to their ends."""
    ids = {name: trainer.attach(TRIALS[name]) for name in names}
    losses: dict[int, list[float]] = {slot: [] for slot in ids.values()}
    while any(not slot.finished for slot in trainer.slots.values()):
        for report in trainer.step():
            losses[report.slot].append(report.loss)
    return {name: Trained(losses[slot], trainer.slots[slot].weights()) for name, slot in ids.items()}


@pytest.mark.parametrize("names", PACKS, ids=" + ".join)
def test_a_trial_in_a_pack_ends_where_it_ends_alone(
    names: list[str], make_trainer: Callable[[], Trainer], alone: Alone
) -> None:
    packed = train_packed(make_trainer(), names)
    for name in names:
        config = TRIALS[name]
        found = distance(packed[name], alone.train(config), alone.first(config))
        assert found.loss < LOSS_TOLERANCE, name
        assert found.weights < weight_tolerance(config), name


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
def test_the_tolerance_has_teeth(mistake: str, make_trainer: Callable[[], Trainer], alone: Alone) -> None:
    name, wrong = MISTAKES[mistake]
    config = TRIALS[name]
    found = distance(train_packed(make_trainer(), [name])[name], alone.train(config, wrong), alone.first(config))
    assert found.weights > 5 * weight_tolerance(config)
    assert found.loss > 2 * LOSS_TOLERANCE
