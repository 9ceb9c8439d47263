"""What rows say of a model: a value with its 95 % confidence interval, and the difference between two models on the
same rows with its own.

The rows are taken for a sample of those that the model will meet. Shares get Wilson's interval, differences of shares
Newcombe's for paired proportions (method 10 of Statistics in Medicine 17:2635, 1998): both are honest near 0 and 1,
where resampling sees no spread. All else is resampled by rows (bootstrap, BCa: Efron, JASA 82:171, 1987).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from serving.evaluate.metrics import Floats

CONFIDENCE = 0.95
RESAMPLES = 9_999
MANY_ROWS = 5_000
"""Above it BCa, whose jackknife is quadratic in the rows, gives way to fewer resamples and their percentiles; there the
two agree."""
RESAMPLES_OF_MANY = 1_999
_BATCH_VALUES = 2_000_000
_SEED = 0
"""The same rows give the same interval."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and the interval that holds the true one in 95 of 100 samples."""

    value: float
    low: float | None
    """None where the rows are too few to tell (one row, and not a share)."""
    high: float | None
    count: int
    """Rows."""

    def excludes(self, number: float) -> bool:
        """True if the interval lies wholly above or below ``number``."""
        return self.low is not None and self.high is not None and not self.low <= number <= self.high


def share(hits: Floats) -> Estimate:
    """The mean of zeros and ones; float64[n], n >= 1."""
    low, high = _wilson(int(hits.sum()), len(hits))
    return Estimate(float(hits.mean()), low, high, len(hits))


def mean(values: Floats) -> Estimate:
    """The mean of ``values``; float64[n], n >= 1."""
    return _resampled((values,), lambda sample: sample.mean(axis=-1))


def perplexity(nats: Floats, tokens: Floats) -> Estimate:
    """``exp(sum nats / sum tokens)``: every token weighs the same, whichever row it stands in.

    Args:
        nats: Negative log-likelihood of each row; float64[n].
        tokens: Tokens of each row; float64[n], their sum at least 1.
    """
    return _resampled((nats, tokens), _perplexity)


def share_difference(first: Floats, second: Floats) -> Estimate:
    """``mean(second) - mean(first)`` of zeros and ones over the same rows; float64[n] each."""
    count = len(first)
    both, only_second = int((first * second).sum()), int(((1 - first) * second).sum())
    only_first = int((first * (1 - second)).sum())
    neither = count - both - only_second - only_first
    p2, p1 = (both + only_second) / count, (both + only_first) / count
    (low2, high2), (low1, high1) = _wilson(both + only_second, count), _wilson(both + only_first, count)
    phi = _correlation(both, only_second, only_first, neither)
    below = _root((p2 - low2) ** 2 - 2 * phi * (p2 - low2) * (high1 - p1) + (high1 - p1) ** 2)
    above = _root((high2 - p2) ** 2 - 2 * phi * (high2 - p2) * (p1 - low1) + (p1 - low1) ** 2)
    return Estimate(p2 - p1, p2 - p1 - below, p2 - p1 + above, count)


def mean_difference(first: Floats, second: Floats) -> Estimate:
    """``mean(second) - mean(first)`` over the same rows; float64[n] each."""
    return mean(second - first)


def perplexity_difference(first: tuple[Floats, Floats], second: tuple[Floats, Floats]) -> Estimate:
    """``perplexity(*second) - perplexity(*first)`` over the same rows."""

    def statistic(nats1: Floats, tokens1: Floats, nats2: Floats, tokens2: Floats) -> Floats:
        return _perplexity(nats2, tokens2) - _perplexity(nats1, tokens1)

    return _resampled((*first, *second), statistic)


def _perplexity(nats: Floats, tokens: Floats) -> Floats:
    # A base may be so sure of the opposite that exp() overflows; infinity is then the honest value.
    with np.errstate(over="ignore"):
        return np.exp(nats.sum(axis=-1) / tokens.sum(axis=-1))


def _wilson(hits: int, count: int) -> tuple[float, float]:
    from scipy.stats import binomtest

    interval = binomtest(hits, count).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def _correlation(both: int, only_second: int, only_first: int, neither: int) -> float:
    """Newcombe's phi: how far the two models' rows go together, corrected towards 0 where they do."""
    margins = (both + only_second) * (only_first + neither) * (both + only_first) * (only_second + neither)
    if margins == 0:
        return 0.0
    excess = both * neither - only_second * only_first
    half = (both + only_second + only_first + neither) / 2
    return (max(excess - half, 0.0) if excess > 0 else excess) / math.sqrt(margins)


def _root(square: float) -> float:
    return math.sqrt(max(square, 0.0))  # rounding may leave it a hair below 0


def _resampled(data: tuple[Floats, ...], statistic: Callable[..., Floats]) -> Estimate:
    """``statistic`` of whole rows drawn with replacement; ``data`` are columns of the same rows."""
    from scipy.stats import DegenerateDataWarning, bootstrap

    count = len(data[0])
    value = float(statistic(*data))
    if count == 1:
        return Estimate(value, None, None, count)
    if all(np.all(column == column[0]) for column in data):
        return Estimate(value, value, value, count)  # every resample is the sample itself, and BCa divides by 0
    if not math.isfinite(value):
        return Estimate(value, None, None, count)
    many = count > MANY_ROWS
    with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
        # Where every resample gives the same value, scipy warns and answers nan; told apart below.
        warnings.simplefilter("ignore", DegenerateDataWarning)
        result = bootstrap(
            data,
            lambda *columns, axis: statistic(*columns),  # noqa: ARG005, PLW0108 - the last axis, as everywhere here
            n_resamples=RESAMPLES_OF_MANY if many else RESAMPLES,
            batch=max(1, _BATCH_VALUES // count),
            vectorized=True,
            paired=True,
            confidence_level=CONFIDENCE,
            method="percentile" if many else "BCa",
            rng=np.random.default_rng(_SEED),
        )
    low, high = (float(end) for end in result.confidence_interval)
    if math.isfinite(low) and math.isfinite(high):
        return Estimate(value, low, high, count)
    if np.all(result.bootstrap_distribution == value):
        return Estimate(value, value, value, count)
    return Estimate(value, None, None, count)
