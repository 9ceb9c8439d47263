"""Rows of several trials in one batch: who has which rows, and which position predicts which token."""

from __future__ import annotations

import torch

from tests.tuning.engine.conftest import Data
from tuning.engine.batch import TOKEN_MULTIPLE, count_targets, pack_rows
from tuning.engine.data import IGNORED

CPU = torch.device("cpu")
WANTED = {"one": [3, 8], "two": [50], "three": [8, 0, 8]}


def test_shares_are_contiguous_in_the_order_of_the_trials(data: Data) -> None:
    batch = pack_rows(data[0], WANTED, CPU)
    assert {key: (share.start, share.stop) for key, share in batch.shares.items()} == {
        "one": (0, 2),
        "two": (2, 3),
        "three": (3, 6),
    }
    assert batch.ids.shape[0] == 6
    assert batch.ids.dtype == torch.int64


def test_rows_stand_whole_at_the_left_and_padding_at_the_right(data: Data) -> None:
    batch = pack_rows(data[0], WANTED, CPU)
    for line, row in enumerate(row for rows in WANTED.values() for row in rows):
        ids, _ = data[0].row(row)
        assert batch.ids[line, : len(ids)].tolist() == ids.tolist()
        assert not batch.ids[line, len(ids) :].any()


def test_the_length_is_the_longest_row_s_rounded_up(data: Data) -> None:
    longest = max(data[0].length(row) for rows in WANTED.values() for row in rows)
    length = pack_rows(data[0], WANTED, CPU).ids.shape[1]
    assert length % TOKEN_MULTIPLE == 0
    assert 0 <= length - longest < TOKEN_MULTIPLE


def test_a_share_knows_its_own_longest_row(data: Data) -> None:
    for key, share in pack_rows(data[0], WANTED, CPU).shares.items():
        assert share.tokens == max(data[0].length(row) for row in WANTED[key])


def test_each_target_is_predicted_from_the_position_before_it(data: Data) -> None:
    batch = pack_rows(data[0], WANTED, CPU)
    for key, rows in WANTED.items():
        share = batch.shares[key]
        found = list(zip(share.rows.tolist(), share.positions.tolist(), share.targets.tolist(), strict=True))
        expected = [
            (share.start + offset, position - 1, label)
            for offset, row in enumerate(rows)
            for position, label in enumerate(data[0].row(row)[1].tolist())
            if position > 0 and label != IGNORED
        ]
        assert found == expected
        assert count_targets(data[0], rows) == len(expected)
        assert batch.ids[share.rows, share.positions + 1].tolist() == share.targets.tolist()
