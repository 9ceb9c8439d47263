"""What the benchmark of serving concludes from what its clients saw; the servers themselves are in tests/serving."""

from __future__ import annotations

import json

import pytest

from tests.benchmarks.load import read_stream
from tests.benchmarks.serving import allowed

MOVES = [(0.0, 1), (10.0, 2), (20.0, 1)]


@pytest.mark.parametrize(
    ("started", "total_s", "versions"),
    [
        (5.0, 0.5, {1}),
        (9.9, 0.5, {1, 2}),  # moved while it was under way
        (10.5, 0.5, {1, 2}),  # moved less than a second before
        (11.5, 0.5, {2}),
        (11.5, 9.0, {1, 2}),
        (30.0, 1.0, {1}),
    ],
)
def test_who_may_answer(started: float, total_s: float, versions: set[int]) -> None:
    assert allowed(MOVES, started, total_s) == {f"swap@{version}" for version in versions}


def test_a_stream_that_is_cut_off_is_no_answer() -> None:
    piece = f"data: {json.dumps({'model': 'a', 'choices': [{'text': 'b'}]})}\n\n"
    assert read_stream((piece * 2 + "data: [DONE]\n\n").encode()) == ("a", "bb")
    assert read_stream((piece * 2).encode()) == ("", "")
    assert read_stream(b"") == ("", "")
