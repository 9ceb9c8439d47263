"""The packed layer against its slow twin, outputs and gradients, in float64 where nothing hides in rounding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tuning.engine.lora import Lane, PackedLinear, dropout_mask, packed_linear_reference

INPUTS, OUTPUTS, TOKENS = 6, 5, 7


def make_lane(start: int, stop: int, rank: int, *, dropout: float = 0.0, tokens: int | None = None) -> Lane:
    generator = torch.Generator().manual_seed(rank)
    a = torch.randn(rank, INPUTS, generator=generator).double()
    b = torch.randn(OUTPUTS, rank, generator=generator).double()
    scaling = 0.5 + rank / 3
    return Lane(start, stop, a, b, scaling, torch.zeros_like(a), torch.zeros_like(b), dropout, start + 11, tokens)


LAYOUTS = {
    "one slot": [make_lane(0, 4, 2)],
    "unequal ranks": [make_lane(0, 1, 1), make_lane(1, 4, 8), make_lane(4, 6, 3)],
    "idle rows around and between": [make_lane(1, 2, 3), make_lane(4, 5, 1)],
    "no slot": [],
    "dropout in some": [make_lane(0, 2, 4, dropout=0.3), make_lane(2, 3, 2), make_lane(4, 6, 1, dropout=0.8, tokens=3)],
}


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


def pack(lanes: Sequence[Lane], weight: Tensor, bias: Tensor | None) -> PackedLinear:
    tape = torch.zeros((), requires_grad=True)
    layer = PackedLinear(torch.nn.Identity(), lambda: weight, bias, tape)
    layer.lanes = lanes
    return layer


def leaves_of(lanes: Sequence[Lane]) -> list[Lane]:
    """The same lanes with A and B as autograd leaves."""
    return [replace(lane, a=lane.a.clone().requires_grad_(), b=lane.b.clone().requires_grad_()) for lane in lanes]


def cleared(lanes: Sequence[Lane]) -> list[Lane]:
    return [replace(lane, grad_a=torch.zeros_like(lane.a), grad_b=torch.zeros_like(lane.b)) for lane in lanes]


def close(ours: Tensor | None, theirs: Tensor | None) -> None:
    assert ours is not None
    assert theirs is not None
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs_and_gradients_are_the_slow_twin_s(layout: str, with_bias: bool) -> None:
    x = torch.randn(6, TOKENS, INPUTS).double().requires_grad_()
    weight = torch.randn(OUTPUTS, INPUTS).double()
    bias = torch.randn(OUTPUTS).double() if with_bias else None
    upstream = torch.randn(6, TOKENS, OUTPUTS).double()
    slow_lanes, lanes = leaves_of(LAYOUTS[layout]), cleared(LAYOUTS[layout])

    slow = packed_linear_reference(x, weight, bias, slow_lanes)
    slow.backward(upstream)
    slow_x, x.grad = x.grad, None
    fast = pack(lanes, weight, bias)(x)
    fast.backward(upstream)

    close(fast, slow)
    close(x.grad, slow_x)
    for ours, theirs in zip(lanes, slow_lanes, strict=True):
        close(ours.grad_a, theirs.a.grad)
        close(ours.grad_b, theirs.b.grad)


@pytest.mark.parametrize("layout", ["unequal ranks", "dropout in some"])
def test_the_gradient_of_x_is_that_of_finite_differences(layout: str) -> None:
    x = torch.randn(6, TOKENS, INPUTS).double().requires_grad_()
    layer = pack(cleared(LAYOUTS[layout]), torch.randn(OUTPUTS, INPUTS).double(), None)
    assert torch.autograd.gradcheck(layer, (x,))


def test_the_gradients_of_a_and_b_are_those_of_finite_differences() -> None:
    x, weight = torch.randn(4, TOKENS, INPUTS).double(), torch.randn(OUTPUTS, INPUTS).double()
    lane = make_lane(1, 3, 2, dropout=0.4, tokens=5)

    def loss() -> Tensor:
        return pack([lane], weight, None)(x).square().sum()

    loss().backward()
    for values, gradient in ((lane.a, lane.grad_a), (lane.b, lane.grad_b)):
        assert gradient is not None
        for index in range(values.numel()):
            flat, step = values.view(-1), 1e-6
            flat[index] += step
            above = loss().item()
            flat[index] -= 2 * step
            below = loss().item()
            flat[index] += step
            assert (above - below) / (2 * step) == pytest.approx(gradient.view(-1)[index].item(), rel=1e-6, abs=1e-6)


def test_gradients_add_up_over_micro_batches() -> None:
    x, weight = torch.randn(2, TOKENS, INPUTS).double(), torch.randn(OUTPUTS, INPUTS).double()
    lane = make_lane(0, 2, 3)
    layer = pack([lane], weight, None)
    layer(x).sum().backward()
    assert lane.grad_a is not None
    assert lane.grad_b is not None
    once = lane.grad_a.clone(), lane.grad_b.clone()
    layer(x).sum().backward()
    close(lane.grad_a, 2 * once[0])
    close(lane.grad_b, 2 * once[1])


def test_inputs_that_are_not_contiguous_or_need_no_gradient() -> None:
    x = torch.randn(TOKENS, 4, INPUTS).double().transpose(0, 1)
    weight = torch.randn(OUTPUTS, INPUTS).double()
    lanes = [make_lane(0, 3, 2)]
    y = pack(lanes, weight, None)(x)
    close(y, packed_linear_reference(x, weight, None, lanes))
    y.transpose(1, 2).contiguous().transpose(1, 2).sum().backward()
    assert lanes[0].grad_b is not None
    assert lanes[0].grad_b.abs().sum() > 0


def test_without_gradient_the_same_output_and_nothing_recorded() -> None:
    x, weight = torch.randn(6, TOKENS, INPUTS).double(), torch.randn(OUTPUTS, INPUTS).double()
    lanes = LAYOUTS["unequal ranks"]
    layer = pack(lanes, weight, None)
    with torch.no_grad():
        quiet = layer(x)
    assert not quiet.requires_grad
    close(quiet, layer(x))


def test_without_lanes_and_gradient_nothing_is_recorded() -> None:
    layer = pack([], torch.randn(OUTPUTS, INPUTS).double(), None)
    assert not layer(torch.randn(2, TOKENS, INPUTS).double()).requires_grad


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e308])
def test_broken_weights_stay_in_their_own_rows(bad: float) -> None:
    weight = torch.randn(OUTPUTS, INPUTS).double()
    sound, broken = make_lane(0, 2, 3), make_lane(2, 4, 4)
    broken.b.fill_(bad)

    def run(lanes: list[Lane]) -> tuple[Tensor, Tensor]:
        x = torch.ones(4, TOKENS, INPUTS).double().requires_grad_()
        y = pack(lanes, weight, None)(x)
        y.backward(torch.ones_like(y))
        assert x.grad is not None
        return y[:2].detach(), x.grad[:2]

    alone = cleared([sound])
    together = cleared([sound, broken])
    for ours, theirs in zip(run(together), run(alone), strict=True):
        assert torch.equal(ours, theirs)
    assert together[0].grad_a is not None
    assert alone[0].grad_a is not None
    assert torch.equal(together[0].grad_a, alone[0].grad_a)


def test_rows_that_an_architecture_merges_are_refused() -> None:
    layer = pack([make_lane(0, 1, 1)], torch.randn(OUTPUTS, INPUTS).double(), None)
    with pytest.raises(ValueError, match=r"rows x tokens x features, got \(14, 6\)"):
        layer(torch.randn(14, INPUTS).double())


def test_a_dropout_mask_is_a_function_of_its_arguments() -> None:
    x = torch.empty(8, 50, 40)
    mask = dropout_mask(x, 0.3, 5)
    torch.manual_seed(1)
    assert torch.equal(mask, dropout_mask(torch.ones_like(x), 0.3, 5))
    assert not torch.equal(mask, dropout_mask(x, 0.3, 6))
    assert set(mask.unique().tolist()) == {0.0, torch.tensor(1.0).div(1.0 - 0.3).item()}
    # 16,000 draws: three standard deviations of the share are 0.011, those of the mean are 0.016.
    assert (mask == 0).float().mean().item() == pytest.approx(0.3, abs=0.011)
    assert mask.mean().item() == pytest.approx(1.0, abs=0.016)
    assert dropout_mask(x.bfloat16(), 0.3, 5).dtype == torch.bfloat16


def test_a_longer_neighbour_does_not_change_a_slot_s_mask() -> None:
    weight = torch.randn(OUTPUTS, INPUTS).double()
    lane = make_lane(0, 3, 2, dropout=0.5, tokens=4)
    short = torch.randn(3, 4, INPUTS).double()
    long = torch.nn.functional.pad(short, (0, 0, 0, 5), value=1.0)
    close(pack([lane], weight, None)(long)[:, :4], pack([lane], weight, None)(short))
    close(packed_linear_reference(long, weight, None, [lane])[:, :4], pack([lane], weight, None)(short))
