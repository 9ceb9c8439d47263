"""Stacks: who stands with whom, what they hold, and that padding never reaches a slot."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.tuning.engine.conftest import Data
from tuning.engine.batch import Cells
from tuning.engine.pack import Pack, group_slots
from tuning.engine.slot import Slot
from tuning.spec import TrialConfig

SHAPES = {"layer.q": (8, 16), "layer.k": (4, 16), "layer.up": (32, 16)}
CPU = torch.device("cpu")


def make_slot(data: Data, rank: int, sites: list[str] | None = None, **knobs: Any) -> Slot:
    shapes = {site: SHAPES[site] for site in sites or SHAPES}
    slot = Slot(TrialConfig(rank=rank, alpha=3.0 * rank, **knobs), shapes, data[0], CPU)
    slot.flat.data.normal_(generator=torch.Generator().manual_seed(rank))
    return slot


def make_pack(slots: dict[int, Slot], rows: int = 1, row_tokens: float = 10.0) -> Pack[int]:
    return Pack(slots, dict.fromkeys(slots, rows), row_tokens, torch.float32)


def test_groups_are_of_equal_rows_and_like_ranks(data: Data) -> None:
    slots = {index: make_slot(data, rank) for index, rank in enumerate((16, 2, 8, 4, 1))}
    assert group_slots(slots, dict.fromkeys(slots, 1), 64) == [[4, 1, 3, 2, 0]]
    assert group_slots(slots, {0: 1, 1: 2, 2: 1, 3: 2, 4: 1}, 64) == [[4, 2, 0], [1, 3]]
    # The more tokens, the more padding costs: 3 ranks x 500 tokens are cheap, 4 are not.
    assert group_slots(slots, dict.fromkeys(slots, 5), 100) == [[4, 1, 3], [2], [0]]


def test_neighbours_have_like_targets(data: Data) -> None:
    some = ["layer.q"]
    slots = {0: make_slot(data, 2, some), 1: make_slot(data, 2), 2: make_slot(data, 4, some), 3: make_slot(data, 4)}
    assert group_slots(slots, dict.fromkeys(slots, 1), 10) == [[0, 2, 1, 3]]


def test_a_stack_holds_the_weights_and_zeros_beyond_the_rank(data: Data) -> None:
    slots = {7: make_slot(data, 2), 8: make_slot(data, 5)}
    pack = make_pack(slots)
    assert pack.keys == [7, 8]
    for site, (stack,) in pack.prepare().items():
        for index, key in enumerate(pack.keys):
            rank = slots[key].config.rank
            a, b = slots[key].weights()[site]
            assert torch.equal(stack.a[index, :rank], a)
            assert torch.equal(stack.b[index, :rank], b.t())
            assert not stack.a[index, rank:].any()
            assert not stack.b[index, rank:].any()
            assert float(stack.scaling[index]) == 3.0


def test_a_stack_follows_the_weights_from_pass_to_pass(data: Data) -> None:
    slot = make_slot(data, 2)
    pack = make_pack({0: slot})
    before = pack.prepare()["layer.q"][0].a.clone()
    slot.flat.data.mul_(2.0)
    assert torch.equal(pack.prepare()["layer.q"][0].a, 2 * before)


def test_a_layer_has_a_stack_of_those_who_adapt_it_and_zeros_between_them(data: Data) -> None:
    q, k, up = SHAPES
    slots = {0: make_slot(data, 2, [up]), 1: make_slot(data, 2, [q, k]), 2: make_slot(data, 2, [q, up])}
    pack = make_pack(slots)
    assert pack.keys == [0, 1, 2]
    stacks = {site: stack for site, (stack,) in pack.prepare().items()}
    assert {site: (stack.first, len(stack.a)) for site, stack in stacks.items()} == {up: (0, 3), q: (1, 2), k: (1, 1)}
    assert not stacks[up].a[1].any()
    assert torch.equal(stacks[up].a[2], slots[2].weights()[up][0])


def test_gradients_come_back_without_the_padding_and_add_up(data: Data) -> None:
    q, k, up = SHAPES
    slots = {0: make_slot(data, 2, [up]), 1: make_slot(data, 3, [q, k]), 2: make_slot(data, 1, [q, up])}
    pack = make_pack(slots)
    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for site, (stack,) in pack.prepare({key: Cells(1, 1, None, None) for key in slots}).items():
        found[site] = torch.randn(stack.a.shape), torch.randn(stack.b.shape)
        stack.add_gradients(*found[site])
    pack.collect({0, 2})
    pack.collect({2})
    assert not slots[1].grad.any()
    for key, times in ((0, 1), (2, 2)):
        for site, (grad_a, grad_b) in slots[key].gradients().items():
            (stack,) = pack.stacks[site]
            index, rank = pack.keys.index(key) - stack.first, slots[key].config.rank
            torch.testing.assert_close(grad_a, times * found[site][0][index, :rank])
            torch.testing.assert_close(grad_b, times * found[site][1][index, :rank].t())


def test_a_layer_that_a_pass_went_around_adds_nothing(data: Data) -> None:
    slot = make_slot(data, 2)
    pack = make_pack({0: slot})
    for (stack,) in pack.prepare({0: Cells(1, 1, None, None)}).values():
        stack.add_gradients(torch.ones_like(stack.a), torch.ones_like(stack.b))
    pack.prepare({0: Cells(1, 1, None, None)})
    pack.collect({0})
    assert not slot.grad.any()


def test_dropout_is_each_slot_s_own_and_absent_in_evaluation(data: Data) -> None:
    slots = {
        0: make_slot(data, 2, dropout=0.5, seed=3),
        1: make_slot(data, 2),
        2: make_slot(data, 2, dropout=0.5, seed=4),
    }
    pack = make_pack(slots)
    cells = {key: Cells(2, 3, None, None) for key in slots}

    def seeds() -> list[int]:
        stacks = [stack for stacks in pack.prepare(cells).values() for stack in stacks]
        assert all(stack.dropouts[1] is None for stack in stacks)
        return [drop.seed for stack in stacks for drop in stack.dropouts if drop]

    first = seeds()
    assert len(set(first)) == 6
    assert seeds() == first
    slots[0].micro_steps += 1
    slots[2].micro_steps += 1
    assert not set(seeds()) & set(first)
    assert not any(drop for stacks in pack.prepare().values() for stack in stacks for drop in stack.dropouts)


@pytest.mark.parametrize(
    ("change", "fits"),
    [("rows of all", True), ("rows of one", False), ("a slot gone", False), ("another in its place", False)],
)
def test_a_pack_serves_its_own_slots_only(data: Data, change: str, fits: bool) -> None:
    slots = {0: make_slot(data, 2), 1: make_slot(data, 2)}
    pack = make_pack(slots)
    rows = {"rows of all": {0: 5, 1: 5}, "rows of one": {0: 1, 1: 5}}.get(change, {0: 1, 1: 1})
    others = {"a slot gone": {0: slots[0]}, "another in its place": {0: slots[0], 1: make_slot(data, 2)}}
    assert pack.fits(others.get(change, slots), rows) is fits
