"""Estimates against values worked out elsewhere, and intervals against what they promise."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neural_mri.diagnostics.statistics import (
    Groups,
    Tail,
    Welch,
    auroc,
    auroc_change_score,
    auroc_score,
    difference_score,
    holm,
    mcnemar,
    mean_score,
    proportion_score,
    rank_correlation,
)


def test_a_share_has_wilsons_interval() -> None:
    # Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20.
    for right, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
    ):
        interval = proportion_score(right, n).interval
        assert (interval.low, interval.high) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize("n", [3, 8, 30])
def test_an_interval_of_a_mean_holds_the_truth_as_often_as_it_says_however_few_the_values(
    n: int,
) -> None:
    draw = np.random.default_rng(0)
    missed = 0
    for _ in range(1000):
        interval = mean_score(draw.standard_normal(n) + 3.0).interval
        missed += not interval.low <= 3.0 <= interval.high
    assert 0.03 <= missed / 1000 <= 0.08


def test_an_interval_of_a_mean_is_students_and_ends_where_no_mean_can_lie() -> None:
    # Student's 4.30265 times a standard error of a third.
    values = np.array([1.0, 1.0, 0.0])
    score = mean_score(values)
    ends = (score.value - 4.30265 / 3, score.value + 4.30265 / 3)
    assert (score.interval.low, score.interval.high) == pytest.approx(ends, abs=1e-5)
    bounded = mean_score(values, least=-0.5, most=1.0).interval
    assert (bounded.low, bounded.high) == (-0.5, 1.0)


@pytest.mark.parametrize("n", [4, 12])
def test_an_interval_of_a_difference_holds_the_truth_as_often_as_it_says_however_small_the_groups(
    n: int,
) -> None:
    draw = np.random.default_rng(7)
    missed = 0
    for _ in range(1000):
        first, second = draw.standard_normal(n) + 1, 1.5 * draw.standard_normal(n)
        interval = difference_score(first, second).interval
        missed += not interval.low <= 1 <= interval.high
    assert 0.03 <= missed / 1000 <= 0.08


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.7062), (3, 3.18245), (10, 2.22814), (120, 1.97993), (5000, 1.96044)],
)
def test_an_interval_of_a_difference_is_students_and_its_test_agrees(
    freedom: float, quantile: float
) -> None:
    found = Welch(difference=quantile, error=1.0, freedom=freedom)
    assert found.interval.low == pytest.approx(0, abs=2e-5)
    assert found.p_value == pytest.approx(0.05, abs=1e-5)
    assert found._replace(difference=0.0).p_value == pytest.approx(1)
    assert found._replace(difference=1e9).p_value == pytest.approx(0, abs=1e-9)


def test_groups_that_do_not_vary_differ_by_what_they_differ() -> None:
    same = difference_score(np.full(4, 3.0), np.full(5, 1.0))
    assert (same.value, same.interval.low, same.interval.high, same.n) == (2, 2, 2, 9)
    assert Welch.of(np.full(4, 3.0), np.full(5, 1.0)).p_value == 0
    assert Welch.of(np.full(4, 3.0), np.full(5, 3.0)).p_value == 1


def test_intervals_are_seeded() -> None:
    values = np.random.default_rng(1).standard_normal(20)
    first, second = values[:10], values[10:]
    assert auroc_score(first, second, seed=4) == auroc_score(first, second, seed=4)
    assert auroc_score(first, second, seed=4) != auroc_score(first, second, seed=5)


def test_what_was_not_measured_counts_for_nothing() -> None:
    assert mean_score(np.array([1.0, np.nan, 3.0])).n == 2
    assert mean_score(np.array([np.nan])).n == proportion_score(0, 0).n == 0
    assert auroc_score(np.array([]), np.array([1.0])).n == 0


def test_groups_that_differ_are_told_apart() -> None:
    draw = np.random.default_rng(2)
    low, high = draw.standard_normal(40), draw.standard_normal(40) + 2
    assert difference_score(high, low).interval.low > 1
    assert auroc_score(low, high).interval.low > 0.8
    assert auroc(np.array([1.0, 2.0]), np.array([2.0, 3.0])) == 0.875


def test_holm_adjusts_as_in_his_paper() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_an_adjusted_p_value_is_never_smaller_and_keeps_the_order(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    assert (adjusted >= np.array(p_values) - 1e-12).all()
    order = np.argsort(p_values, kind="stable")
    assert (np.diff(adjusted[order]) >= -1e-12).all()


def test_mcnemar_is_the_binomial_test_of_what_changed_sides() -> None:
    before = np.array([True] * 10 + [False] * 10)
    after = np.array([False] * 8 + [True] * 2 + [True] * 1 + [False] * 9)
    assert mcnemar(before, after) == pytest.approx(0.0390625)  # 2 * P(X <= 1), X ~ B(9, 1/2)
    assert mcnemar(before, before) == 1.0


def test_rank_correlation_is_pearsons_of_ranks_ties_shared() -> None:
    a = np.array([[1.0, 2.0, 2.0, 9.0], [1.0, 1.0, 1.0, 1.0]])
    b = np.array([[10.0, 20.0, 30.0, 25.0], [4.0, 3.0, 2.0, 1.0]])
    ranks = np.corrcoef([1, 2.5, 2.5, 4], [1, 2, 4, 3])[0, 1]
    assert rank_correlation(a, b) == pytest.approx([ranks, 1.0])


def test_a_tail_tells_how_rare_a_value_is_beyond_all_that_were_seen() -> None:
    noise = np.random.default_rng(3).exponential(size=4000)
    tail = Tail.of(noise)
    p = tail.p_values(np.array([0.0, 3.0, 12.0, 40.0]))
    assert p[0] == 1.0
    assert p[1] == pytest.approx(np.exp(-3.0), rel=0.25)
    # An exponential ends sooner than the tail that is assumed: never too sure.
    assert np.exp(-12.0) < p[2] < 1e-3
    assert 0 < p[3] < p[2]


def test_the_tail_of_silence_calls_nothing_impossible() -> None:
    assert (Tail.of(np.zeros(100)).p_values(np.array([0.0, 1.0])) == 1.0).all()
    assert 0 < Tail.of(np.array([])).p_values(np.array([1e6]))[0] < 1e-6


def test_a_change_of_auroc_is_of_the_same_prompts_before_and_after() -> None:
    draw = np.random.default_rng(3)
    before = Groups(draw.standard_normal(30), draw.standard_normal(30))
    after = Groups(before.negative - 1.5, before.positive)
    change = auroc_change_score(before, after)
    assert change.value == pytest.approx(auroc(*after) - auroc(*before))
    assert 0 < change.interval.low < change.value < change.interval.high
    same = auroc_change_score(before, Groups(before.negative * 3, before.positive * 3))
    assert (same.value, same.interval.low, same.interval.high) == (0, 0, 0), "order is all it sees"
    gone = Groups(np.full(30, np.nan), before.positive)
    assert auroc_change_score(before, gone).n == 0
