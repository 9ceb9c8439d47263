from __future__ import annotations

import math

import numpy as np
import pytest

from serving.evaluate import intervals
from serving.evaluate.intervals import (
    Estimate,
    mean,
    mean_difference,
    perplexity,
    perplexity_difference,
    share,
    share_difference,
)
from serving.evaluate.metrics import Floats


def pairs(both: int, second: int, first: int, neither: int) -> tuple[Floats, Floats]:
    """Zeros and ones of two models on the same rows."""
    rows = [(1, 1)] * both + [(0, 1)] * second + [(1, 0)] * first + [(0, 0)] * neither
    columns = np.array(rows, np.float64).T
    return columns[0], columns[1]


def test_a_share_has_wilsons_interval() -> None:
    found = share(np.array([1.0] * 81 + [0.0] * 182))
    # Newcombe, Statistics in Medicine 17:857 (1998), table I: 81 of 263.
    assert (found.value, found.low, found.high) == pytest.approx((81 / 263, 0.2553, 0.3662), abs=5e-5)
    none = share(np.zeros(20))
    assert none.low == pytest.approx(0, abs=1e-9)
    assert none.high == pytest.approx(0.1611, abs=5e-5)


@pytest.mark.parametrize(
    ("table", "low", "high"),
    [
        # Newcombe, Statistics in Medicine 17:2635 (1998), table II, method 10.
        ((36, 12, 2, 0), 0.0569, 0.3404),
        ((1, 98, 1, 0), None, None),
        ((0, 30, 0, 0), None, 1.0),
        ((54, 0, 0, 0), -0.0664, 0.0664),
    ],
)
def test_a_difference_of_shares_has_newcombes_interval(
    table: tuple[int, int, int, int], low: float | None, high: float | None
) -> None:
    found = share_difference(*pairs(*table))
    assert found.value == pytest.approx((table[1] - table[2]) / sum(table))
    assert found.low is not None
    assert found.high is not None
    assert -1 <= found.low <= found.value <= found.high <= 1
    assert low is None or found.low == pytest.approx(low, abs=1e-4)
    assert high is None or found.high == pytest.approx(high, abs=1e-4)
    turned = share_difference(*reversed(pairs(*table)))
    assert (turned.value, turned.low, turned.high) == pytest.approx((-found.value, -found.high, -found.low))


def test_means_hold_the_truth_in_95_of_100_samples() -> None:
    random = np.random.default_rng(1)
    held = 0
    for _ in range(100):
        found = mean(random.beta(2, 5, size=40))
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 2 / 7 <= found.high
    assert 88 <= held <= 100


def test_perplexity_weighs_tokens_not_rows() -> None:
    nats, tokens = np.array([1.0, 18.0, 2.5]), np.array([1.0, 9.0, 2.0])
    found = perplexity(nats, tokens)
    assert found.value == pytest.approx(math.exp(21.5 / 12))
    assert found.low is not None
    assert found.high is not None
    assert math.e <= found.low < found.value < found.high <= math.exp(2) + 1e-9


def test_paired_differences_see_what_unpaired_intervals_hide() -> None:
    random = np.random.default_rng(2)
    rows = random.uniform(0, 1, 60)
    better = rows + random.uniform(0.01, 0.03, 60)
    found = mean_difference(rows, better)
    assert found.value == pytest.approx(0.02, abs=0.005)
    assert found.excludes(0)
    assert not found.excludes(found.value)
    tokens = np.full(60, 5.0)
    apart = perplexity_difference((rows, tokens), (better, tokens))
    assert apart.value == pytest.approx(perplexity(better, tokens).value - perplexity(rows, tokens).value)
    assert apart.excludes(0)


def test_the_same_rows_give_the_same_interval() -> None:
    values = np.random.default_rng(3).uniform(size=30)
    assert mean(values) == mean(values)


def test_rows_without_spread_and_too_few_rows() -> None:
    assert mean(np.full(9, 0.25)) == Estimate(0.25, 0.25, 0.25, 9)
    values = np.random.default_rng(3).uniform(size=30)
    assert mean_difference(values, values) == Estimate(0.0, 0.0, 0.0, 30)
    tokens = np.arange(1, 31).astype(np.float64)
    assert perplexity_difference((values, tokens), (values, tokens)) == Estimate(0.0, 0.0, 0.0, 30)
    assert mean(np.array([0.5])) == Estimate(0.5, None, None, 1)
    assert not mean(np.array([0.5])).excludes(0)
    assert perplexity(np.array([1e9, 1.0]), np.array([1.0, 1.0])) == Estimate(math.inf, None, None, 2)


def test_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(4).uniform(size=400)
    few = mean(values)
    monkeypatch.setattr(intervals, "MANY_ROWS", 100)
    many = mean(values)
    assert (many.value, many.low, many.high) == pytest.approx((few.value, few.low, few.high), abs=0.003)
