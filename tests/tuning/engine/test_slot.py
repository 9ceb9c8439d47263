"""One trial's state: first weights, optimizer, clipping, schedule, and all of it over a restart."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from tests.tuning.engine.conftest import Data
from tuning.engine.slot import Slot, learning_rate, stable_seed
from tuning.spec import TrialConfig

SHAPES = {"layer.q": (32, 64), "layer.up": (128, 64)}
CPU = torch.device("cpu")


def config(**knobs: Any) -> TrialConfig:
    fields: dict[str, Any] = {"rank": 16, "alpha": 8.0, "steps": 10, "learning_rate": 1e-2, **knobs}
    return TrialConfig(**fields)


def make_slot(data: Data, **knobs: Any) -> Slot:
    return Slot(config(**knobs), SHAPES, data[0], CPU)


def fill_gradient(slot: Slot, seed: int) -> None:
    slot.grad.copy_(torch.randn(slot.grad.shape, generator=torch.Generator().manual_seed(seed)))


# Parameters


def test_all_a_and_b_are_views_of_one_flat_leaf(data: Data) -> None:
    slot = make_slot(data)
    assert slot.num_parameters == slot.flat.numel() == 16 * (32 + 64 + 128 + 64)
    weights = slot.weights()
    assert {site: (a.shape, b.shape) for site, (a, b) in weights.items()} == {
        "layer.q": ((16, 64), (32, 16)),
        "layer.up": ((16, 64), (128, 16)),
    }
    slot.flat.data.fill_(7.0)
    assert all(bool((matrix == 7.0).all()) for pair in weights.values() for matrix in pair)


def test_the_first_weights_are_peft_s_distribution(data: Data) -> None:
    weights = Slot(config(rank=256), {"x": (8, 100)}, data[0], CPU).weights()
    peft_model: Any = get_peft_model(nn.Sequential(nn.Linear(100, 8)), LoraConfig(r=256, target_modules=["0"]))
    theirs = peft_model.base_model.model[0].lora_A["default"].weight
    a, b = weights["x"]
    assert not b.any()
    assert a.abs().max().item() == pytest.approx(theirs.abs().max().item(), rel=0.01) == pytest.approx(0.1, rel=0.01)
    assert a.std().item() == pytest.approx(theirs.std().item(), rel=0.03) == pytest.approx(0.1 / 3**0.5, rel=0.03)


def test_the_first_weights_depend_on_the_seed_and_the_site_alone(data: Data) -> None:
    first = make_slot(data).weights()
    torch.manual_seed(99)
    reordered = Slot(config(), dict(reversed(SHAPES.items())), data[0], CPU).weights()
    assert all(torch.equal(first[site][0], reordered[site][0]) for site in SHAPES)
    assert not torch.equal(first["layer.q"][0], first["layer.up"][0])
    assert not torch.equal(first["layer.q"][0], make_slot(data, seed=1).weights()["layer.q"][0])


def test_the_gradients_are_views_laid_out_as_the_weights(data: Data) -> None:
    slot = make_slot(data)
    for (a, b), (grad_a, grad_b) in zip(slot.weights().values(), slot.gradients().values(), strict=True):
        for weights, gradient in ((a, grad_a), (b, grad_b)):
            assert (weights.shape, weights.stride(), weights.storage_offset()) == (
                gradient.shape,
                gradient.stride(),
                gradient.storage_offset(),
            )
    slot.grad.fill_(1.0)
    assert all(bool((matrix == 1.0).all()) for pair in slot.gradients().values() for matrix in pair)


def test_a_row_of_the_flat_tensor_holds_one_rank_of_every_layer(data: Data) -> None:
    slot = make_slot(data, rank=2)
    (q_a, q_b), (up_a, up_b) = slot.weights().values()
    slot.flat.data.copy_(torch.arange(slot.num_parameters))
    for rank, row in enumerate(slot.by_rank(slot.flat.data)):
        assert torch.equal(row, torch.cat([q_a[rank], q_b[:, rank], up_a[rank], up_b[:, rank]]))


def test_stable_seeds_are_the_same_in_every_process() -> None:
    assert stable_seed("dropout", 3, 7, "model.layers.0") == 6450759526510802608
    assert min(stable_seed("x", n) for n in range(100)) >= 0
    assert max(stable_seed("x", n) for n in range(100)) < 2**63
    assert stable_seed("a", "b") != stable_seed("ab")


# Steps


@pytest.mark.parametrize("limit", [0.3, 1e6, None])
def test_clipping_is_torch_s(data: Data, limit: float | None) -> None:
    slot = make_slot(data, max_grad_norm=limit, beta1=0.0, beta2=0.0)
    fill_gradient(slot, 1)
    leaf = nn.Parameter(torch.zeros_like(slot.flat))
    leaf.grad = slot.grad.clone()
    expected = float(leaf.grad.norm())
    if limit is not None:
        torch.nn.utils.clip_grad_norm_([leaf], limit)
    assert slot.optimizer_step() == pytest.approx(expected)
    # Without momentum the first moment is the clipped gradient itself.
    torch.testing.assert_close(slot.optimizer.state[slot.flat]["state1"], leaf.grad)
    assert not slot.grad.any()


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_the_step_on_a_cpu_is_bitsandbytes_own(data: Data, decay: float) -> None:
    slot, twin = (make_slot(data, max_grad_norm=None, weight_decay=decay, beta1=0.8, beta2=0.95) for _ in range(2))
    twin._step_on_cpu = twin.optimizer.step
    for seed in range(5):
        for one in (slot, twin):
            fill_gradient(one, seed)
            one.optimizer_step()
    ours, theirs = slot.optimizer.state[slot.flat], twin.optimizer.state[twin.flat]
    assert ours.keys() == theirs.keys()
    assert ours["step"] == theirs["step"] == 5
    torch.testing.assert_close(slot.flat.data, twin.flat.data, rtol=1e-5, atol=1e-7)
    for name in ("state1", "state2"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_the_optimizer_is_adamw(data: Data, decay: float) -> None:
    slot = make_slot(data, max_grad_norm=None, weight_decay=decay, beta1=0.8, beta2=0.95)
    leaf = nn.Parameter(slot.flat.data.clone())
    plain = torch.optim.AdamW([leaf], lr=1e-2, betas=(0.8, 0.95), weight_decay=decay, eps=1e-8)
    for seed in range(5):
        fill_gradient(slot, seed)
        leaf.grad = slot.grad.clone()
        slot.optimizer_step()
        plain.step()
    torch.testing.assert_close(slot.flat.data, leaf.data, rtol=1e-5, atol=1e-6)


def test_eight_bit_state_is_eight_bits_and_close_to_thirty_two(data: Data) -> None:
    slots = [make_slot(data, optimizer=name) for name in ("paged_adamw_8bit", "paged_adamw_32bit")]
    start = slots[0].flat.data.clone()
    for seed in range(5):
        for slot in slots:
            fill_gradient(slot, seed)
            slot.optimizer_step()
    assert [slot.optimizer.state[slot.flat]["state1"].dtype for slot in slots] == [torch.uint8, torch.float32]
    moved = [slot.flat.data - start for slot in slots]
    assert float((moved[0] - moved[1]).norm() / moved[1].norm()) < 0.1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_a_gradient_that_is_not_finite_marks_the_slot_and_spares_its_weights(data: Data, bad: float) -> None:
    slot = make_slot(data)
    before = slot.flat.data.clone()
    slot.grad[5] = bad
    assert not math.isfinite(slot.optimizer_step())
    assert slot.diverged
    assert slot.finished
    assert slot.step == 0
    assert torch.equal(slot.flat.data, before)


@pytest.mark.parametrize("warmup", [0, 1, 4])
@pytest.mark.parametrize(
    ("schedule", "theirs"),
    [
        ("constant", get_constant_schedule_with_warmup),
        ("cosine", lambda optimizer, warmup: get_cosine_schedule_with_warmup(optimizer, warmup, 10)),
        ("linear", lambda optimizer, warmup: get_linear_schedule_with_warmup(optimizer, warmup, 10)),
    ],
)
def test_schedules_are_transformers(schedule: str, theirs: Any, warmup: int) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3e-3)
    scheduler = theirs(optimizer, warmup)
    trial = config(schedule=schedule, warmup_steps=warmup, learning_rate=3e-3)
    for step in range(10):
        assert learning_rate(trial, step) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12), step
        optimizer.step()
        scheduler.step()


# Restart


@pytest.mark.parametrize("optimizer", ["paged_adamw_32bit", "paged_adamw_8bit"])
def test_a_restored_slot_goes_on_bit_for_bit(data: Data, optimizer: str) -> None:
    knobs: dict[str, Any] = {"optimizer": optimizer, "schedule": "cosine", "batch_size": 3, "accumulation": 2}

    def advance(slot: Slot, steps: range) -> list[list[int]]:
        taken: list[list[int]] = []
        for seed in steps:
            taken += [slot.stream.take(3) for _ in range(2)]
            slot.micro_steps += 2
            fill_gradient(slot, seed)
            slot.optimizer_step()
        return taken

    whole, first, second = (make_slot(data, **knobs) for _ in range(3))
    taken = advance(whole, range(8))
    advance(first, range(5))
    state = first.state()
    before = {key: state[key].clone() for key in ("flat",)}
    advance(first, range(5, 6))
    assert torch.equal(state["flat"], before["flat"])  # a copy, not a view
    second.restore(state)
    assert (second.step, second.micro_steps, second.stream.position) == (5, 10, 30)
    assert advance(second, range(5, 8)) == taken[10:]
    assert torch.equal(second.flat.data, whole.flat.data)
    ours, theirs = (slot.optimizer.state[slot.flat] for slot in (second, whole))
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert torch.equal(ours[key], value) if isinstance(value, torch.Tensor) else ours[key] == value, key


def test_a_slot_that_took_no_step_can_be_restored(data: Data) -> None:
    first, second = make_slot(data), make_slot(data, seed=1)
    second.restore(first.state())
    assert torch.equal(first.flat.data, second.flat.data)
    for slot in (first, second):
        fill_gradient(slot, 0)
        slot.optimizer_step()
    assert torch.equal(first.flat.data, second.flat.data)


def test_divergence_survives_a_restart(data: Data) -> None:
    slot = make_slot(data)
    slot.grad.fill_(math.nan)
    slot.optimizer_step()
    again = make_slot(data)
    again.restore(slot.state())
    assert again.diverged
    assert again.finished
    assert not again.grad.any()
