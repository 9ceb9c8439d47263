"""The packed layer against its slow twin, outputs and gradients, in float64 where nothing hides in rounding."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tuning.engine.lora import Dropout, PackedLinear, Stack, Stretch, dropout_mask, packed_linear_reference

INPUTS, OUTPUTS, TOKENS, TOTAL = 6, 5, 4, 28


def make_stack(start: int, ranks: Sequence[int], *, dropouts: Sequence[Dropout | None] = (), first: int = 0) -> Stack:
    """Slots of these ranks, ``TOKENS`` each, padded with zeros to the largest."""
    generator = torch.Generator().manual_seed(start)
    shape = len(ranks), max(ranks)
    a = torch.randn(*shape, INPUTS, generator=generator).double()
    b = torch.randn(*shape, OUTPUTS, generator=generator).double()
    for index, rank in enumerate(ranks):
        a[index, rank:] = 0.0
        b[index, rank:] = 0.0
    scaling = torch.tensor([0.5 + rank / 3 for rank in ranks]).view(-1, 1, 1)
    stretch = Stretch(start - first * TOKENS, TOKENS)
    return Stack(stretch, first, a, b, scaling, torch.full_like(a, 9.0), torch.full_like(b, 9.0), list(dropouts))


def dropout(probability: float, seed: int) -> Dropout:
    """For two rows of two tokens."""
    return Dropout(probability, seed, 2, 2)


def ragged() -> Dropout:
    """A row of one token and one of two: three real tokens, the last of the stretch is padding."""
    return Dropout(0.6, 3, 2, 2, torch.tensor([0, 2, 3]), torch.tensor([0, 1, 2]))


def layouts() -> dict[str, list[Stack]]:
    return {
        "one slot": [make_stack(4, [2])],
        "unequal ranks": [make_stack(0, [1, 8, 3])],
        "two stacks": [make_stack(0, [1, 2]), make_stack(12, [8, 3])],
        "idle tokens around and between": [make_stack(4, [3], first=1), make_stack(16, [1, 1])],
        "no slot": [],
        "dropout in some": [make_stack(0, [4, 2, 1], dropouts=[dropout(0.3, 5), None, ragged()]), make_stack(20, [2])],
    }


LAYOUTS = list(layouts())


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


def pack(stacks: Sequence[Stack], weight: Tensor, bias: Tensor | None) -> PackedLinear:
    tape = torch.zeros((), requires_grad=True)
    layer = PackedLinear(torch.nn.Identity(), lambda: weight, bias, tape)
    layer.stacks = stacks
    return layer


def tokens() -> Tensor:
    return torch.randn(1, TOTAL, INPUTS).double()


def matrix() -> Tensor:
    return torch.randn(OUTPUTS, INPUTS).double()


def close(ours: Tensor | None, theirs: Tensor | None) -> None:
    assert ours is not None
    assert theirs is not None
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs_and_gradients_are_the_slow_twin_s(layout: str, with_bias: bool) -> None:
    x, weight = tokens().requires_grad_(), matrix()
    bias = torch.randn(OUTPUTS).double() if with_bias else None
    upstream = torch.randn(1, TOTAL, OUTPUTS).double()
    slow_stacks, stacks = layouts()[layout], layouts()[layout]
    for stack in slow_stacks:
        stack.a.requires_grad_()
        stack.b.requires_grad_()

    slow = packed_linear_reference(x[0], weight, bias, slow_stacks)
    slow.backward(upstream[0])
    slow_x, x.grad = x.grad, None
    fast = pack(stacks, weight, bias)(x)
    fast.backward(upstream)

    close(fast[0], slow)
    close(x.grad, slow_x)
    for ours, theirs in zip(stacks, slow_stacks, strict=True):
        close(ours.grad_a, theirs.a.grad)
        close(ours.grad_b, theirs.b.grad)


@pytest.mark.parametrize("layout", ["unequal ranks", "dropout in some"])
def test_the_gradient_of_x_is_that_of_finite_differences(layout: str) -> None:
    assert torch.autograd.gradcheck(pack(layouts()[layout], matrix(), None), (tokens().requires_grad_(),))


def test_the_gradients_of_a_and_b_are_those_of_finite_differences() -> None:
    x, weight = tokens(), matrix()
    stack = make_stack(4, [2, 3], dropouts=[dropout(0.4, 1), ragged()])

    def loss() -> Tensor:
        stack.has_gradient = False
        return pack([stack], weight, None)(x).square().sum()

    loss().backward()
    for values, gradient in ((stack.a, stack.grad_a.clone()), (stack.b, stack.grad_b.clone())):
        for index in range(values.numel()):
            flat, step = values.view(-1), 1e-6
            flat[index] += step
            above = loss().item()
            flat[index] -= 2 * step
            below = loss().item()
            flat[index] += step
            assert (above - below) / (2 * step) == pytest.approx(gradient.view(-1)[index].item(), rel=1e-6, abs=1e-6)


def test_the_zeros_that_pad_a_rank_stay_without_gradient() -> None:
    stack = make_stack(0, [1, 4])
    pack([stack], matrix(), None)(tokens()).square().sum().backward()
    assert not stack.grad_a[0, 1:].any()
    assert not stack.grad_b[0, 1:].any()
    assert stack.grad_a[1].all()


def test_gradients_add_up_where_a_layer_is_used_twice_in_a_pass() -> None:
    x, weight, stack = tokens(), matrix(), make_stack(0, [3])
    layer = pack([stack], weight, None)
    layer(x).sum().backward()
    once = stack.grad_a.clone(), stack.grad_b.clone()
    layer(x).sum().backward()
    close(stack.grad_a, 2 * once[0])
    close(stack.grad_b, 2 * once[1])


def test_inputs_that_are_not_contiguous_or_need_no_gradient() -> None:
    x = torch.randn(TOKENS, 7, INPUTS).double().transpose(0, 1)
    weight, stack = matrix(), make_stack(8, [2])
    y = pack([stack], weight, None)(x)
    close(y.flatten(0, 1), packed_linear_reference(x.flatten(0, 1), weight, None, [stack]))
    y.transpose(1, 2).contiguous().transpose(1, 2).sum().backward()
    assert stack.grad_b.abs().sum() > 0


def test_without_gradient_the_same_output_and_nothing_recorded() -> None:
    x, layer = tokens(), pack(layouts()["two stacks"], matrix(), None)
    with torch.no_grad():
        quiet = layer(x)
    assert not quiet.requires_grad
    close(quiet, layer(x))


def test_without_stacks_and_gradient_nothing_is_recorded() -> None:
    assert not pack([], matrix(), None)(tokens()).requires_grad


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e308])
def test_broken_weights_stay_with_their_own_slot(bad: float) -> None:
    """Neighbours in the same stack, bit for bit."""
    weight, x = matrix(), torch.ones(1, TOTAL, INPUTS).double()

    def run(value: float) -> list[Tensor]:
        stack = make_stack(0, [3, 4, 2])
        stack.a[1], stack.b[1] = value, value
        leaf = x.clone().requires_grad_()
        y = pack([stack], weight, None)(leaf)
        y.backward(torch.ones_like(y))
        assert leaf.grad is not None
        rows = [*range(TOKENS), *range(2 * TOKENS, TOTAL)]
        return [y.detach()[0, rows], leaf.grad[0, rows], stack.grad_a[[0, 2]], stack.grad_b[[0, 2]]]

    for ours, theirs in zip(run(bad), run(0.1), strict=True):
        assert torch.equal(ours, theirs)


def test_rows_that_an_architecture_merges_are_refused() -> None:
    layer = pack([make_stack(0, [1])], matrix(), None)
    with pytest.raises(ValueError, match=r"rows x tokens x features, got \(28, 6\)"):
        layer(torch.randn(TOTAL, INPUTS).double())


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
    """Two rows of three tokens, alone and in a stretch where each has five."""
    alone = Dropout(0.5, 7, 2, 3).mask(torch.empty(6, INPUTS))
    places = torch.tensor([0, 1, 2, 5, 6, 7])
    padded = Dropout(0.5, 7, 2, 3, torch.arange(6), places).mask(torch.empty(10, INPUTS))
    assert torch.equal(padded[places], alone)
    assert not padded[[3, 4, 8, 9]].any()


def test_a_part_of_a_micro_batch_has_its_part_of_the_mask() -> None:
    whole = Dropout(0.5, 7, 2, 3).mask(torch.empty(6, INPUTS))
    second = Dropout(0.5, 7, 2, 3, torch.tensor([3, 4, 5]), torch.arange(3)).mask(torch.empty(3, INPUTS))
    assert torch.equal(second, whole[3:])
