"""Order statistics of runs against sorting everything."""

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from worker.scanner import order_statistics
from worker.scanner.order_statistics import (
    Float32s,
    Float64s,
    Quantiles,
    add_counts,
    look_up,
    no_counts,
)

SHARES = (0.0, 0.001, 0.25, 0.5, 0.99, 1.0)

# A few values over and over, or anything: ties and their absence.
numbers = st.sampled_from([-1.5, -0.0, 0.0, 1e-45, 1.0, 3.4e38]) | st.floats(-1e6, 1e6, width=32)
runs_of_numbers = st.lists(
    arrays.arrays(np.float32, st.integers(1, 200), elements=numbers), min_size=1, max_size=6
)


class Found(NamedTuple):
    quantiles: Float64s
    below: list[int]


def looked_up(runs: list[Float32s], limits: list[float]) -> Found:
    sought = Quantiles.of(sum(map(len, runs)), SHARES)
    counts = no_counts()
    for run in runs:
        add_counts(run, counts)
    found = look_up(
        lambda: runs,
        counts,
        ranks=sought.ranks,
        limits=np.array(limits),
    )
    return Found(sought.between(found.at_ranks), found.below.tolist())


@given(runs_of_numbers, st.lists(st.floats(-1e6, 1e6), max_size=5))
def test_quantiles_and_counts_are_those_of_all_values_sorted(
    runs: list[Float32s], limits: list[float]
) -> None:
    found = looked_up(runs, limits)
    everything = np.concatenate(runs).astype(np.float64)
    expected = np.quantile(everything, SHARES)
    np.testing.assert_allclose(found.quantiles, expected, rtol=1e-12, atol=1e-300)
    assert found.below == [int((everything < limit).sum()) for limit in limits]


@pytest.mark.parametrize("n_values", [1, 2, 5000])
def test_equal_values_are_found_however_many_there_are(n_values: int) -> None:
    found = looked_up([np.full(n_values, 0.25, np.float32)] * 3, [0.25, 0.26])
    assert found.quantiles.tolist() == [0.25] * len(SHARES)
    assert found.below == [0, 3 * n_values]


@given(runs_of_numbers)
def test_a_bin_of_too_many_values_to_sort_is_counted_instead(runs: list[Float32s]) -> None:
    expected = looked_up(runs, [])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order_statistics, "_MOST_SORTED", 0)
        counted = looked_up(runs, [])
    np.testing.assert_array_equal(counted.quantiles, expected.quantiles)


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_many_limits_in_one_bin_are_each_counted(seed: int, other: int) -> None:
    values = np.random.default_rng(seed).uniform(1.0, 1.01, 300).astype(np.float32)
    limits = np.random.default_rng(other).uniform(0.999, 1.011, 9).tolist()
    found = looked_up([values], limits)
    assert found.below == [int((values.astype(np.float64) < limit).sum()) for limit in limits]
