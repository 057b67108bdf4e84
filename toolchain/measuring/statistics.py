"""Percentiles, summaries and bootstrap intervals of measured values. Pure; knows neither requests nor servers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Summary:
    """Of one quantity over the requests that have it. All in the quantity's own unit."""

    count: int
    mean: float
    min: float
    p50: float
    p90: float
    p99: float
    max: float


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which ``percent`` of the sample lies, between two neighbors by a straight line.

    With x sorted and r = percent / 100 * (n - 1): x[floor r] + (r - floor r) * (x[floor r + 1] - x[floor r]).
    ValueError for an empty sample.
    """
    if not values:
        raise ValueError("no values: nothing was measured")
    return float(np.percentile(np.asarray(values, dtype=np.float64), percent))


def summarize(values: Sequence[float]) -> Summary | None:
    """None where nothing was measured."""
    if not values:
        return None
    p50, p90, p99 = (percentile(values, percent) for percent in (50, 90, 99))
    return Summary(len(values), sum(values) / len(values), min(values), p50, p90, p99, max(values))


@dataclass(frozen=True)
class Ratio:
    """B over A, with the interval that holds it at the confidence asked for."""

    value: float
    low: float
    high: float

    @property
    def differs(self) -> bool:
        """Whether 1 is outside the interval."""
        return self.low > 1 or self.high < 1


def ratio_of_percentiles(a: Sequence[float], b: Sequence[float], percent: float = 50, *, seed: int = 0) -> Ratio:
    """percentile(b) / percentile(a) and its percentile bootstrap: requests drawn with replacement in A and in B.

    Source: B. Efron, R. Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3. ValueError for samples that
    are empty or hold a value that is not positive.
    """
    left, right = (np.asarray(values, dtype=np.float64) for values in (a, b))
    _positive(left, right)
    generator = np.random.default_rng(seed)
    drawn = [np.percentile(_drawn(generator, sample), percent, axis=1) for sample in (left, right)]
    return _interval(percentile(b, percent) / percentile(a, percent), drawn[1] / drawn[0])


def ratio_of_rates(a: Sequence[tuple[float, float]], b: Sequence[tuple[float, float]], *, seed: int = 0) -> Ratio:
    """(sum of amounts / sum of seconds) of B over that of A; each pair is one request's (amount, seconds).

    With equally many requests in flight throughout, it is the ratio of the throughputs.
    """
    left, right = (np.asarray(pairs, dtype=np.float64).reshape(-1, 2) for pairs in (a, b))
    _positive(left, right)
    generator = np.random.default_rng(seed)
    sums = [_drawn(generator, sample).sum(axis=1) for sample in (left, right)]
    rates = [one[:, 0] / one[:, 1] for one in sums]
    whole = [sample.sum(axis=0) for sample in (left, right)]
    return _interval(float(whole[1][0] / whole[1][1] / (whole[0][0] / whole[0][1])), rates[1] / rates[0])


def median_with_interval(values: Sequence[float], *, seed: int = 0) -> tuple[float, float, float]:
    """(median, low, high) of a sample, such as the differences of pairs; a percentile bootstrap as above.

    ValueError for an empty sample.
    """
    sample = np.asarray(values, dtype=np.float64)
    medians = np.median(_drawn(np.random.default_rng(seed), sample), axis=1) if sample.size else sample
    found = _interval(percentile(values, 50), medians)
    return found.value, found.low, found.high


def _drawn(generator: np.random.Generator, sample: Floats) -> Floats:
    """[n, ...] -> [RESAMPLES, n, ...]."""
    drawn: Floats = sample[generator.integers(0, len(sample), (RESAMPLES, len(sample)))]
    return drawn


def _interval(value: float, ratios: Floats) -> Ratio:
    tail = (1 - CONFIDENCE) / 2 * 100
    low, high = np.percentile(ratios, [tail, 100 - tail])
    return Ratio(value, float(low), float(high))


def _positive(*samples: Floats) -> None:
    for sample in samples:
        if not sample.size or (sample <= 0).any():
            raise ValueError("a ratio takes samples that are not empty and above 0")
