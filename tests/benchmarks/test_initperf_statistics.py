"""The statistics against examples that are worked out by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from benchmarks.initperf.statistics import (
    bootstrap,
    holm,
    isotonic,
    performance_profile,
    pretraining_equivalent,
    steps_to,
)


def test_the_bootstrap_is_that_over_all_draws_of_architectures_and_data_sets():
    # One seed each, so that only architectures (a, b) and data sets (x, y) are drawn: 4 x 4 draws of the same chance.
    gains = {('a', 'x'): [1.0], ('a', 'y'): [3.0], ('b', 'x'): [5.0], ('b', 'y'): [-7.0]}
    means = [
        np.mean([gains[network, data][0] for network in networks for data in names])
        for networks in itertools.product('ab', repeat=2)
        for names in itertools.product('xy', repeat=2)
    ]
    found = bootstrap(gains)
    assert found.mean == pytest.approx(0.5)
    assert (found.low, found.high) == (min(means), max(means)) == (-7, 5)
    below = sum(mean <= 0 for mean in means) / 16
    assert found.p == pytest.approx(2 * min(below, 1 - below), abs=0.03)


def test_the_bootstrap_draws_seeds_and_passes_over_cells_that_are_missing():
    found = bootstrap({('a', 'x'): [0.0, 2.0], ('b', 'y'): [10.0, 10.0]})
    assert (found.mean, found.low, found.high) == (5.5, 0, 10)
    assert bootstrap({('a', 'x'): [1.0, 1.0]}).p == pytest.approx(1e-4), 'no draw is below: the least there is'


def test_holm_multiplies_the_smallest_by_all_and_never_descends():
    # 0.01 * 4; 0.02 * 3; 0.03 * 2 = 0.06; 0.9 * 1
    assert holm({'b': 0.02, 'a': 0.01, 'd': 0.9, 'c': 0.03}) == pytest.approx(
        {'a': 0.04, 'b': 0.06, 'c': 0.06, 'd': 0.9}
    )


def test_a_profile_counts_the_cells_within_a_ratio_of_the_best():
    accuracies = {'one': {'x': 40.0, 'y': 10.0, 'z': 1.0}, 'two': {'x': 20.0, 'y': 30.0}}
    # Best: x 40, y 30. one: 1 and 3 times; two: 2 and 1 times. z counts for nobody.
    assert performance_profile(accuracies, [1, 2, 3]) == {'one': [0.5, 0.5, 1.0], 'two': [0.5, 1.0, 1.0]}


def test_steps_to_an_accuracy_are_read_off_between_the_points():
    curve = [(15, 10.0), (30, 20.0), (60, 15.0)]
    assert steps_to(curve, 12.0) == pytest.approx(18)
    assert steps_to(curve, 5.0) == 15
    assert math.isinf(steps_to(curve, 21.0))


def test_a_curve_of_noise_is_pooled():
    assert isotonic([1, 4, 2, 3, 5]) == [1, 3, 3, 3, 5]


MINUTES = [0.5, 1, 2, 4, 8]


def test_the_equivalent_is_linear_in_the_logarithm_of_the_minutes():
    accuracies = [10.0, 16.0, 20.0, 22.0, 23.0]
    assert pretraining_equivalent(MINUTES, accuracies, 16.0) == pytest.approx(1)
    assert pretraining_equivalent(MINUTES, accuracies, 21.0) == pytest.approx(2 * 2**0.5)
    assert pretraining_equivalent(MINUTES, accuracies, 23.0) == 8
    assert pretraining_equivalent(MINUTES, accuracies, 9.0) == 0, 'less than the shortest'
    assert math.isinf(pretraining_equivalent(MINUTES, accuracies, 24.0)), 'more than the longest'


@pytest.mark.parametrize('minutes', [0.7, 1, 3, 6])
def test_a_pretrained_network_shows_its_own_minutes_within_a_factor_of_1_5(minutes):
    """On simulated curves that saturate, with the noise of the mean of five seeds of 1,000 images."""

    def accuracy(spent: float) -> float:
        return 30 * spent / (spent + 1.5)

    rng = np.random.default_rng(0)
    found = [
        pretraining_equivalent(
            MINUTES, [accuracy(each) + rng.normal(0, 0.4) for each in MINUTES], accuracy(minutes) + rng.normal(0, 0.4)
        )
        for _ in range(200)
    ]
    assert np.median(found) == pytest.approx(minutes, rel=0.1)
    assert np.mean([minutes / 1.5 <= each <= minutes * 1.5 for each in found]) > 0.95
