"""The gradients of a pack of unequal trials after one micro-batch, each against peft's own for that trial alone.

The bound is on every A's and B's gradient, relative to its norm. B starts at random here, not at 0, where the gradient
of A would be 0 and prove nothing. Measured: they agree to 2e-6; the mildest mistake below is 9e-2 off.
"""

from __future__ import annotations

import pytest
import torch

from tests.tiny import make_base
from tests.tuning.engine.alike import Alone, apart, copied, gradients
from tests.tuning.engine.conftest import Data
from tests.tuning.engine.peft_loop import Mistakes, Weights
from tuning.engine.base import Base
from tuning.engine.slot import Slot
from tuning.engine.trainer import SlotId, Trainer
from tuning.spec import BaseSpec, TrialConfig

TOLERANCE = 2e-5

# Two micro-batches in a step everywhere, so that the gradient is there to be seen after the first.
PACK = {
    "rank 64": TrialConfig(rank=64, alpha=16.0, target_modules="attention", batch_size=1, accumulation=2, seed=1),
    "dropout": TrialConfig(rank=8, alpha=16.0, dropout=0.3, batch_size=3, accumulation=2, seed=2),
    "rank 1": TrialConfig(rank=1, alpha=1.0, batch_size=5, accumulation=3, seed=3),
    "rsLoRA": TrialConfig(
        rank=32, alpha=8.0, rslora=True, dropout=0.3, target_modules="mlp", batch_size=2, accumulation=2, seed=4
    ),
    "one layer": TrialConfig(
        rank=3, alpha=96.0, target_modules=["layers.1.self_attn.v_proj"], batch_size=4, accumulation=2, seed=5
    ),
    # Equal in shape to others, and in nothing else.
    "like rank 1": TrialConfig(rank=1, alpha=32.0, rslora=True, batch_size=5, accumulation=2, seed=6),
    "like dropout": TrialConfig(
        rank=8, alpha=4.0, dropout=0.6, optimizer="paged_adamw_8bit", batch_size=3, accumulation=4, seed=7
    ),
}


@pytest.fixture(scope="module")
def wide_spec(tmp_path_factory: pytest.TempPathFactory) -> BaseSpec:
    """A base whose narrowest layers have 64 outputs, as many as the largest rank."""
    folder = make_base(tmp_path_factory.mktemp("bases") / "wide", hidden=128)
    return BaseSpec(model=str(folder), compute_dtype="float32")


@pytest.fixture(scope="module")
def wide(wide_spec: BaseSpec) -> Base:
    return Base(wide_spec)


@pytest.fixture(scope="module")
def wide_alone(wide_spec: BaseSpec, wide: Base, data: Data) -> Alone:
    return Alone(wide_spec, wide, data)


def with_some_b(slot: Slot) -> Weights:
    """Give the slot a B other than 0; returns its weights."""
    generator = torch.Generator().manual_seed(slot.config.seed)
    for _, b in slot.weights().values():
        b.copy_(torch.empty(b.shape).normal_(0, 0.05, generator=generator))
    return copied(slot.weights())


def nothing(weights: Weights) -> Weights:
    return {site: (torch.zeros_like(a), torch.zeros_like(b)) for site, (a, b) in weights.items()}


def attach_all(trainer: Trainer, pack: dict[str, TrialConfig]) -> tuple[dict[str, SlotId], dict[str, Weights]]:
    ids = {name: trainer.attach(config) for name, config in pack.items()}
    return ids, {name: with_some_b(trainer.slots[slot]) for name, slot in ids.items()}


@pytest.mark.parametrize("reverse", [False, True], ids=["in order", "reversed"])
def test_gradients_of_unequal_trials_are_peft_s(wide: Base, wide_alone: Alone, data: Data, reverse: bool) -> None:
    trainer = Trainer(wide, *data)
    ids, first = attach_all(trainer, dict(reversed(PACK.items())) if reverse else PACK)
    assert trainer.step() == []  # every step has a micro-batch to come
    for name, slot in ids.items():
        theirs = wide_alone.loop(PACK[name], first=first[name]).gradients()
        ours = gradients(trainer.slots[slot])
        assert ours.keys() == theirs.keys()
        assert apart(ours, theirs, nothing(theirs)) < TOLERANCE, name


def test_gradients_of_later_micro_batches_add_up(wide: Base, wide_alone: Alone, data: Data) -> None:
    pack = {name: config.model_copy(update={"accumulation": 3}) for name, config in PACK.items()}
    trainer = Trainer(wide, *data)
    ids, first = attach_all(trainer, pack)
    trainer.step()
    trainer.step()
    for name in ("dropout", "rsLoRA", "like rank 1"):
        theirs = wide_alone.loop(pack[name], first=first[name]).gradients(2)
        assert apart(gradients(trainer.slots[ids[name]]), theirs, nothing(theirs)) < TOLERANCE, name


def test_an_idle_slot_gets_no_gradient_and_changes_none(wide: Base, data: Data) -> None:
    trainer = Trainer(wide, *data)
    ids, first = attach_all(trainer, PACK)
    idle = ids["dropout"]
    trainer.step([slot for slot in ids.values() if slot != idle])
    assert not trainer.slots[idle].grad.any()
    assert all(
        torch.equal(now, then)
        for site, pair in trainer.slots[idle].weights().items()
        for now, then in zip(pair, first["dropout"][site], strict=True)
    )
    other = Trainer(wide, *data)
    others, _ = attach_all(other, {name: config for name, config in PACK.items() if name != "dropout"})
    other.step()
    for name, slot in others.items():
        assert torch.equal(trainer.slots[ids[name]].grad, other.slots[slot].grad)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("rank 64", Mistakes(scaling=1.1)),
        ("dropout", Mistakes(mask_step=1)),
        ("rsLoRA", Mistakes(scaling=32**-0.5)),
        ("rank 1", Mistakes(label_shift=1)),
        ("like rank 1", Mistakes(mean_of_means=True)),
        ("one layer", Mistakes(row_shift=1)),
    ],
)
def test_the_tolerance_has_teeth(wide: Base, wide_alone: Alone, data: Data, name: str, wrong: Mistakes) -> None:
    trainer = Trainer(wide, *data)
    ids, first = attach_all(trainer, {name: PACK[name]})
    trainer.step()
    theirs = wide_alone.loop(PACK[name], wrong, first[name]).gradients()
    assert apart(gradients(trainer.slots[ids[name]]), theirs, nothing(theirs)) > 1000 * TOLERANCE
