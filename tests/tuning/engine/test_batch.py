"""Rows of several trials in one batch: who has which rows, and which position predicts which token."""

from __future__ import annotations

import pytest
import torch

from tests.tuning.engine.conftest import Data
from tuning.engine.batch import TOKEN_MULTIPLE, Micro, PackedBatch, Share, count_targets, pack_rows
from tuning.engine.data import IGNORED, Tokens

CPU = torch.device("cpu")
GROUPS = [[Micro("one", [50])], [Micro("two", [3, 8]), Micro("three", [0, 8])]]
MICROS = [micro for group in GROUPS for micro in group]
both = pytest.mark.parametrize("end_to_end", [False, True], ids=["padded", "end to end"])


def spans(batch: PackedBatch[str], data: Tokens) -> dict[tuple[str, int], list[int]]:
    """The tokens of each row, counted through the pack, as the layout has them."""
    found: dict[tuple[str, int], list[int]] = {}
    begin, width = 0, batch.ids.shape[1]
    for group, stretch in zip(GROUPS, batch.stretches, strict=True):
        for micro in group:
            offset = 0
            for line, row in enumerate(micro.rows):
                found[micro.key, line] = [begin + offset + place for place in range(data.length(row))]
                offset += width if batch.rows is None else data.length(row)
            begin += stretch
    assert begin == batch.ids.numel()
    return found


@both
def test_rows_stand_whole_in_the_order_of_the_trials(data: Data, end_to_end: bool) -> None:
    batch = pack_rows(data[0], GROUPS, CPU, end_to_end=end_to_end)
    ids, places = batch.ids.flatten(), spans(batch, data[0])
    assert batch.ids.dtype == torch.int64
    for micro in MICROS:
        for line, row in enumerate(micro.rows):
            assert ids[places[micro.key, line]].tolist() == data[0].row(row)[0].tolist()
    elsewhere = set(range(len(ids))) - {place for span in places.values() for place in span}
    assert elsewhere
    assert not ids[list(elsewhere)].any()


def test_padded_the_length_is_the_longest_row_s_rounded_up(data: Data) -> None:
    batch = pack_rows(data[0], GROUPS, CPU)
    longest = max(data[0].length(row) for micro in MICROS for row in micro.rows)
    rows, length = batch.ids.shape
    assert rows == 5
    assert length % TOKEN_MULTIPLE == 0
    assert 0 <= length - longest < TOKEN_MULTIPLE
    assert batch.stretches == [length, 2 * length]
    assert batch.positions is None


def test_end_to_end_a_stretch_is_the_largest_micro_batch_of_its_group_rounded_up(data: Data) -> None:
    batch = pack_rows(data[0], GROUPS, CPU, end_to_end=True)
    for group, stretch in zip(GROUPS, batch.stretches, strict=True):
        most = max(sum(map(data[0].length, micro.rows)) for micro in group)
        assert stretch % TOKEN_MULTIPLE == 0
        assert 0 <= stretch - most < max(TOKEN_MULTIPLE, most / 8)
    assert batch.ids.shape == (1, batch.stretches[0] + 2 * batch.stretches[1])


def test_end_to_end_there_are_few_lengths_of_stretches(data: Data) -> None:
    def stretch(count: int) -> int:
        return pack_rows(data[0], [[Micro("x", list(range(count)))]], CPU, end_to_end=True).stretches[0]

    lengths = [stretch(count) for count in range(1, 90)]
    assert lengths == sorted(lengths)
    assert lengths[-1] > 2000
    assert len({length for length in lengths if length > 256}) <= 8 * 4


def test_end_to_end_positions_begin_anew_with_each_row_and_cells_stay_within_it(data: Data) -> None:
    batch = pack_rows(data[0], GROUPS, CPU, end_to_end=True)
    assert batch.positions is not None
    assert batch.rows is not None
    places = spans(batch, data[0])
    assert len(batch.rows.cells) == len(places)
    for span, cells in zip(places.values(), batch.rows.cells.tolist(), strict=True):
        assert batch.positions[0, span].tolist() == list(range(len(span)))
        assert cells[: len(span)] == span
        assert set(cells[len(span) :]) <= {span[0]}  # never a token of another row
    assert batch.rows.tokens.tolist() == [place for span in places.values() for place in span]
    assert batch.rows.cells.flatten()[batch.rows.places].tolist() == batch.rows.tokens.tolist()


@both
def test_each_target_is_predicted_from_the_position_before_it(data: Data, end_to_end: bool) -> None:
    batch = pack_rows(data[0], GROUPS, CPU, end_to_end=end_to_end)
    places, ids = spans(batch, data[0]), batch.ids.flatten()
    for micro in MICROS:
        share = batch.shares[micro.key]
        expected = [
            (places[micro.key, line][position - 1], label)
            for line, row in enumerate(micro.rows)
            for position, label in enumerate(data[0].row(row)[1].tolist())
            if position > 0 and label != IGNORED
        ]
        assert list(zip(share.places.tolist(), share.targets.tolist(), strict=True)) == expected
        assert count_targets(data[0], micro.rows) == len(expected)
        assert ids[share.places + 1].tolist() == share.targets.tolist()


def cell_of_tokens(share: Share) -> dict[int, int]:
    """Place in the stretch -> cell of the trial's own micro-batch."""
    assert share.cells.own is not None
    assert share.cells.places is not None
    return dict(zip(share.cells.places.tolist(), share.cells.own.tolist(), strict=True))


@both
def test_each_token_knows_its_cell_of_the_trial_s_own_micro_batch(data: Data, end_to_end: bool) -> None:
    batch = pack_rows(data[0], GROUPS, CPU, end_to_end=end_to_end)
    places, begin = spans(batch, data[0]), 0
    for group, stretch in zip(GROUPS, batch.stretches, strict=True):
        for micro in group:
            cells = batch.shares[micro.key].cells
            longest = max(map(data[0].length, micro.rows))
            assert (cells.rows, cells.longest) == (len(micro.rows), longest)
            expected = {
                place - begin: line * longest + position
                for line in range(len(micro.rows))
                for position, place in enumerate(places[micro.key, line])
            }
            assert cell_of_tokens(batch.shares[micro.key]) == expected
            begin += stretch


def test_the_halves_of_a_micro_batch_keep_their_cells(data: Data) -> None:
    whole = Micro("x", [3, 8, 50])
    first, second = whole.split()
    assert (first.rows, second.rows, second.first) == ([3], [8, 50], 1)
    third = second.split()[1]
    assert (third.rows, third.first, third.whole) == ([50], 2, [3, 8, 50])
    longest = max(map(data[0].length, whole.rows))
    share = pack_rows(data[0], [[third]], CPU).shares["x"]
    assert (share.cells.rows, share.cells.longest) == (3, longest)
    assert list(cell_of_tokens(share).values()) == [2 * longest + place for place in range(data[0].length(50))]


def test_a_micro_batch_that_fills_its_stretch_needs_no_cells(data: Data) -> None:
    row = next(row for row in range(len(data[0])) if data[0].length(row) % TOKEN_MULTIPLE == 0)
    share = pack_rows(data[0], [[Micro("x", [row, row])]], CPU).shares["x"]
    assert (share.cells.own, share.cells.places) == (None, None)
