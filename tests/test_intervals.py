"""Intervals against textbook values and against what they promise."""

import math
import random
import statistics

import pytest

from eval_tasks.intervals import jackknife_variance, mean_interval, wilson


def test_wilson_equals_published_values() -> None:
    # Newcombe 1998, table I, method 3.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


def test_a_t_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = random.Random(0)
    covered = 0
    for _ in range(2000):
        _, low, high = mean_interval([rng.gauss(3.0, 2.0) for _ in range(3)])
        covered += low <= 3.0 <= high
    assert wilson(covered, 2000)[0] <= 0.95 <= wilson(covered, 2000)[1]


def test_a_lone_value_says_nothing() -> None:
    assert mean_interval([2.0]) == (2.0, -math.inf, math.inf)
    with pytest.raises(ValueError, match="at least one"):
        wilson(0, 0)


def test_the_jackknife_of_a_mean_is_its_variance() -> None:
    values = [float(n * n % 7) for n in range(18)]
    exact = statistics.variance(values) / len(values)
    assert jackknife_variance(values, statistics.fmean) == pytest.approx(exact)
    with pytest.raises(ValueError, match="at least two"):
        jackknife_variance([1.0], statistics.fmean)


def test_the_jackknife_in_groups_is_right_on_average() -> None:
    rng = random.Random(0)
    found = [
        jackknife_variance([rng.gauss(0, 3) for _ in range(100)], statistics.fmean)
        for _ in range(400)
    ]
    assert statistics.fmean(found) == pytest.approx(9 / 100, rel=0.06)
