"""Promises about statistics: values worked out by hand, and properties that hold for every sample."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolchain.measuring.statistics import (
    median_with_interval,
    percentile,
    ratio_of_percentiles,
    ratio_of_rates,
    summarize,
)

positive = st.lists(st.floats(0.001, 1000), min_size=1, max_size=40)


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [
        ([10, 20, 30, 40], 50, 25),  # r = 1.5, between 20 and 30
        ([40, 10, 30, 20], 90, 37),  # r = 2.7, from 30 to 40
        ([1, 2, 3], 99, 2.98),
        ([7], 99, 7),
        ([5, 1], 0, 1),
        ([5, 1], 100, 5),
    ],
)
def test_percentiles_by_hand(values: list[float], percent: float, expected: float) -> None:
    assert percentile(values, percent) == pytest.approx(expected)


def test_a_summary_by_hand() -> None:
    found = summarize([4, 1, 3, 2])
    assert found is not None
    assert (found.count, found.mean, found.min, found.p50, found.max) == (4, 2.5, 1, 2.5, 4)
    assert found.p90 == pytest.approx(3.7)


def test_nothing_measured_has_no_summary_and_no_percentile() -> None:
    assert summarize([]) is None
    with pytest.raises(ValueError, match="nothing was measured"):
        percentile([], 50)


@given(positive)
def test_percentiles_are_in_order_and_within_the_sample(values: list[float]) -> None:
    found = summarize(values)
    assert found is not None
    assert min(values) == found.min <= found.p50 <= found.p90 <= found.p99 <= found.max == max(values)


def test_a_sample_of_one_value_has_an_interval_without_width() -> None:
    found = ratio_of_percentiles([2.0] * 9, [3.0] * 5)
    assert (found.value, found.low, found.high) == (1.5, 1.5, 1.5)
    assert found.differs


@given(positive, st.floats(0.1, 10))
def test_the_interval_scales_with_the_sample(values: list[float], factor: float) -> None:
    plain = ratio_of_percentiles([1.0, 2.0, 3.0], values)
    scaled = ratio_of_percentiles([1.0, 2.0, 3.0], [factor * value for value in values])
    assert (scaled.value, scaled.low, scaled.high) == pytest.approx(
        (factor * plain.value, factor * plain.low, factor * plain.high), rel=1e-6
    )


def test_equal_samples_do_not_differ() -> None:
    values = [float(1 + one % 7) for one in range(50)]
    found = ratio_of_percentiles(values, values)
    assert found.low < 1 < found.high or found.low == found.high == 1
    assert not found.differs


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    import numpy as np

    generator, covered = np.random.default_rng(7), 0
    for index in range(100):
        a, b = generator.lognormal(0, 0.3, 40), 1.5 * generator.lognormal(0, 0.3, 40)
        found = ratio_of_percentiles(a.tolist(), b.tolist(), seed=index)
        covered += found.low <= 1.5 <= found.high
    assert 86 <= covered <= 100


def test_a_ratio_of_rates_by_hand() -> None:
    found = ratio_of_rates([(10, 1.0), (10, 3.0)], [(20, 1.0), (20, 1.0)])  # 5 and 20 a second
    assert found.value == pytest.approx(4)
    assert found.low <= 4 <= found.high


@pytest.mark.parametrize("bad", [[], [1.0, 0.0]])
def test_a_ratio_of_nothing_is_refused(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="not empty and above 0"):
        ratio_of_percentiles(bad, [1.0])


def test_the_median_of_differences_has_an_interval_that_may_hold_zero() -> None:
    assert median_with_interval([3.0] * 5) == (3.0, 3.0, 3.0)
    middle, low, high = median_with_interval([-2.0, -1.0, 0.5, 1.0, 2.0] * 8)
    assert middle == 0.5
    assert -1.0 <= low <= 0.5 <= high <= 1.0
    with pytest.raises(ValueError, match="nothing was measured"):
        median_with_interval([])


def test_the_interval_of_a_median_covers_the_truth_about_as_often_as_it_says() -> None:
    import numpy as np

    generator = np.random.default_rng(11)
    found = [median_with_interval(generator.normal(4, 1, 40).tolist(), seed=index) for index in range(100)]
    assert 86 <= sum(low <= 4 <= high for _, low, high in found) <= 100
