"""How many threads a host computes with."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import torch

from tuning.engine import threads
from tuning.engine.threads import ThreadTuner, choose_threads


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("cores", "others", "expected"),
    [(2, 0.0, 2), (2, 0.3, 2), (2, 0.9, 1), (8, 0.1, 8), (8, 3.0, 7), (1, 0.0, 1), (1, 1.0, 1)],
)
def test_a_core_is_left_to_the_others_only_where_they_are_busy(cores: int, others: float, expected: int) -> None:
    assert choose_threads(cores, others) == expected


def test_a_busy_neighbour_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "LOOK_EVERY_S", 0.0)
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        try:
            tuner = ThreadTuner(cores=4)
            time.sleep(1.0)
            tuner()
            assert torch.get_num_threads() == 3
        finally:
            busy.kill()


def test_it_does_not_look_at_every_pass() -> None:
    torch.set_num_threads(1)
    ThreadTuner(cores=4)()
    assert torch.get_num_threads() == 1
