"""Estimates, intervals and tests, each with its reference. Seeded: equal numbers give equal intervals."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from neural_mri.contract.findings import Interval, Score

__all__ = (
    "Groups",
    "Tail",
    "Welch",
    "auroc",
    "auroc_change_score",
    "auroc_score",
    "difference_score",
    "holm",
    "mcnemar",
    "mean_score",
    "median_score",
    "proportion_score",
    "rank_correlation",
    "rms_score",
)

Floats = npt.NDArray[np.floating[Any]]

CONFIDENCE = 0.95
_Z = 1.959963984540054
"""Standard normal quantile of 0.975."""
RESAMPLES = 2000
FEWEST = 3
"""Of fewer values no interval can be drawn: resampling one or two of them says nothing."""
UNKNOWN = Interval(-1e30, 1e30)
"""Beyond all numbers that are measured: JSON has no word for infinity."""


NOTHING = Score(value=0.0, interval=Interval(0.0, 0.0), n=0, method="none")
"""The score of no prompts: JSON has no word for what is no number."""


def proportion_score(right: int, n: int) -> Score:
    """A share, with Wilson's interval (1927): it keeps its promise for small n and shares near 0 and 1."""
    if n == 0:
        return NOTHING
    share, z2 = right / n, _Z**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return Score(
        value=share,
        interval=Interval(max(0.0, middle - half), min(1.0, middle + half)),
        n=n,
        method="wilson",
    )


def mean_score(values: Floats, *, least: float = UNKNOWN.low, most: float = UNKNOWN.high) -> Score:
    """A mean, with Student's interval over prompts (1908), as much of it as lies from `least` to `most`.

    Resampling a few values draws their spread too small: of 8 that are normal the bootstrap's 95 % hold the truth
    in 89 % of experiments, and Student's in 95 %. Of values as skewed as the exponential it is 84 % and 89 %.
    """

    def ends(known: Floats, mean: float) -> Interval:
        n = len(known)
        found = _students(mean, float(known.std(ddof=1)) / math.sqrt(n), n - 1)
        return Interval(max(found.low, least), min(found.high, most))

    return _over_known(values, np.mean, "student", ends)


def median_score(values: Floats, *, seed: int = 0) -> Score:
    """A median, with its percentile bootstrap interval over prompts (Efron 1979)."""

    def ends(known: Floats, _median: float) -> Interval:
        n = len(known)
        draws = np.random.default_rng(seed).integers(0, n, (RESAMPLES, n))
        return Interval(*_ends(np.median(known[draws], axis=1)))

    return _over_known(values, np.median, "bootstrap", ends)


def _over_known(
    values: Floats,
    statistic: Callable[[Floats], Any],
    method: str,
    ends: Callable[[Floats, float], Interval],
) -> Score:
    """A statistic of the values that were measured, with the interval that `ends` gives for them and for it."""
    known = values[np.isfinite(values)].astype(np.float64)
    n = len(known)
    if n == 0:
        return NOTHING
    value = float(statistic(known))
    if n < FEWEST:
        return Score(value=value, interval=UNKNOWN, n=n, method="none")
    return Score(value=value, interval=ends(known, value), n=n, method=method)


def rms_score(values: Floats) -> Score:
    """A root mean square, with the roots of where the mean square lies: of 8 normal values it holds the truth in 85 %."""
    squares = mean_score(values.astype(np.float64) ** 2)
    if not squares.n:
        return NOTHING
    low, high = squares.interval.low, squares.interval.high
    return Score(
        value=math.sqrt(squares.value),
        interval=Interval(math.sqrt(max(low, 0.0)), math.sqrt(high) if high < 1e30 else high),
        n=squares.n,
        method=squares.method,
    )


def difference_score(first: Floats, second: Floats) -> Score:
    """Mean of the one group minus mean of the other, with Welch's interval."""
    first, second = (each[np.isfinite(each)].astype(np.float64) for each in (first, second))
    n = len(first) + len(second)
    if not len(first) or not len(second):
        return NOTHING
    if min(len(first), len(second)) < FEWEST:
        value = float(first.mean() - second.mean())
        return Score(value=value, interval=UNKNOWN, n=n, method="none")
    found = Welch.of(first, second)
    return Score(value=found.difference, interval=found.interval, n=n, method="welch")


class Welch(NamedTuple):
    """The difference of two groups' means, whose spreads need not be alike (Welch 1947).

    Resampling a group of a few draws its spread too small: by the bootstrap an interval of 95 % holds the
    truth in 84 % of experiments with two groups of 4, and in 92 % with two of 12.
    """

    difference: float
    error: float
    """Its standard error; 0 where neither group varies."""
    freedom: float
    """Degrees of freedom (Satterthwaite 1946)."""

    @classmethod
    def of(cls, first: Floats, second: Floats) -> "Welch":
        """Of two or more finite values each."""
        squares = [float(each.var(ddof=1)) / len(each) for each in (first, second)]
        error = sum(squares)
        spread = sum(
            square**2 / (len(each) - 1)
            for square, each in zip(squares, (first, second), strict=True)
        )
        freedom = error**2 / spread if spread > 0 else float(len(first) + len(second) - 2)
        return cls(float(first.mean() - second.mean()), math.sqrt(error), freedom)

    @property
    def interval(self) -> Interval:
        """Where the difference lies, at the level `CONFIDENCE`."""
        return _students(self.difference, self.error, self.freedom)

    @property
    def p_value(self) -> float:
        """The chance of a difference as large between groups of one mean; two-sided."""
        if self.error == 0:
            return float(self.difference == 0)
        t = abs(self.difference) / self.error
        return max(0.0, 1 - _within(math.atan(t / math.sqrt(self.freedom)), self.freedom))


def _students(value: float, error: float, freedom: float) -> Interval:
    """Where what was estimated lies, at the level `CONFIDENCE`, from its standard error."""
    low, high = 0.0, math.pi / 2
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < CONFIDENCE else (low, middle)
    half = math.sqrt(freedom) * math.tan((low + high) / 2) * error
    return Interval(value - half, value + half)


def _within(angle: float, freedom: float) -> float:
    """Student's P(|t| < sqrt(freedom) tan(angle)): with that angle in the place of t a smooth integral.

    Cut off where nothing is left to add up, so that the nodes of many degrees stand where the density does.
    """
    angle = min(angle, 12 / math.sqrt(freedom), math.pi / 2)
    at = angle / 2 * (_NODES + 1)
    sum_of = float((_NODE_WEIGHTS * np.cos(at) ** (freedom - 1)).sum()) * angle / 2
    scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
    return min(1.0, 2 * math.exp(scale) / math.sqrt(math.pi) * sum_of)


_NODES, _NODE_WEIGHTS = np.polynomial.legendre.leggauss(64)


def auroc(negative: Floats, positive: Floats) -> float:
    """Chance that a positive one is larger than a negative one, ties counted half (Mann-Whitney)."""
    if not len(negative) or not len(positive):
        return math.nan
    above = positive[:, None] > negative[None, :]
    equal = positive[:, None] == negative[None, :]
    return float((above + 0.5 * equal).mean())


def auroc_score(negative: Floats, positive: Floats, *, seed: int = 0) -> Score:
    """AUROC, both groups resampled."""
    negative, positive = (each[np.isfinite(each)] for each in (negative, positive))
    rng = np.random.default_rng(seed)
    n = len(negative) + len(positive)
    if not len(negative) or not len(positive):
        return NOTHING
    value = auroc(negative, positive)
    if min(len(negative), len(positive)) < FEWEST:
        return Score(value=value, interval=Interval(0.0, 1.0), n=n, method="none")
    drawn = [
        auroc(
            negative[rng.integers(0, len(negative), len(negative))],
            positive[rng.integers(0, len(positive), len(positive))],
        )
        for _ in range(RESAMPLES // 4)
    ]
    low, high = _ends(np.array(drawn))
    return Score(value=value, interval=Interval(low, high), n=n, method="bootstrap")


class Groups(NamedTuple):
    """Values of two groups of prompts."""

    negative: Floats
    positive: Floats

    def auroc(self, negative: npt.NDArray[np.intp], positive: npt.NDArray[np.intp]) -> float:
        """Of those prompts alone, some of them more than once."""
        return auroc(self.negative[negative], self.positive[positive])


def auroc_change_score(before: Groups, after: Groups, *, seed: int = 0) -> Score:
    """AUROC after less AUROC before, of the same prompts in one order: prompts are resampled, not readings."""
    kept = [np.isfinite(a) & np.isfinite(b) for a, b in zip(before, after, strict=True)]
    before, after = (
        Groups(*(group[known] for group, known in zip(groups, kept, strict=True)))
        for groups in (before, after)
    )
    sizes = [len(group) for group in after]
    if not min(sizes):
        return NOTHING
    everybody = [np.arange(size) for size in sizes]
    value = after.auroc(*everybody) - before.auroc(*everybody)
    if min(sizes) < FEWEST:
        return Score(value=value, interval=Interval(-1.0, 1.0), n=sum(sizes), method="none")
    rng = np.random.default_rng(seed)
    drawn = [[rng.integers(0, size, size) for size in sizes] for _ in range(RESAMPLES // 4)]
    low, high = _ends(np.array([after.auroc(*each) - before.auroc(*each) for each in drawn]))
    return Score(value=value, interval=Interval(low, high), n=sum(sizes), method="bootstrap")


def _ends(drawn: Floats) -> tuple[float, float]:
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(drawn, (tail, 100 - tail))
    return float(low), float(high)


def ranks(values: Floats) -> npt.NDArray[np.float64]:
    """Ranks from 1 along the last axis, ties sharing their mean."""
    flat = values.reshape(-1, values.shape[-1])
    found = np.empty(flat.shape)
    for row, line in enumerate(flat):
        _, inverse, counts = np.unique(line, return_inverse=True, return_counts=True)
        last = np.cumsum(counts)
        found[row] = ((last - counts + 1 + last) / 2)[inverse]
    return found.reshape(values.shape)


def rank_correlation(first: Floats, second: Floats) -> npt.NDArray[np.float64]:
    """Spearman's correlation along the last axis; 1 where neither side varies."""
    a, b = ranks(first), ranks(second)
    a = a - a.mean(-1, keepdims=True)
    b = b - b.mean(-1, keepdims=True)
    scale = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    safe = np.where(scale > 0, scale, 1.0)
    found: npt.NDArray[np.float64] = np.where(scale > 0, (a * b).sum(-1) / safe, 1.0)
    return found


def mcnemar(before: npt.NDArray[np.bool_], after: npt.NDArray[np.bool_]) -> float:
    """Exact two-sided test that as many prompts were gained as lost (McNemar 1947)."""
    lost, gained = int((before & ~after).sum()), int((~before & after).sum())
    n, k = lost + gained, min(lost, gained)
    if n == 0:
        return 1.0
    return min(1.0, sum(math.comb(n, i) for i in range(k + 1)) / float(2 ** (n - 1)))


def holm(p_values: Sequence[float] | Floats) -> npt.NDArray[np.float64]:
    """p-values adjusted so that the chance of any false one among all stays below the level (Holm 1979)."""
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p, kind="stable")
    steps = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(steps, 1.0)
    return adjusted


class Tail(NamedTuple):
    """The upper tail of noise: how likely is a value as large, also beyond the largest that was seen.

    A generalised Pareto distribution above a high quantile (Pickands 1975), fitted by probability-weighted
    moments (Hosking and Wallis 1987). Its shape is never taken below `LEAST_SHAPE`: a tail that ended would
    call anything beyond the largest seen impossible.
    """

    threshold: float
    share: float
    """Of the values, those above the threshold."""
    scale: float
    shape: float

    @classmethod
    def of(cls, noise: Floats) -> "Tail":
        """The tail of noise values, in any unit. Of none, or nothing but zeros, one of unit scale."""
        values = np.sort(np.asarray(noise, np.float64)[np.isfinite(noise)])
        if not len(values) or values[-1] <= 0:
            return cls(1.0, 1.0, 1.0, LEAST_SHAPE)
        threshold = float(np.quantile(values, _TAIL_FROM))
        excess = values[values > threshold] - threshold
        if len(excess) < _FEWEST_EXCESSES:
            return cls(float(values[-1]), 1.0, float(values[-1]), LEAST_SHAPE)
        n = len(excess)
        mean = excess.mean()
        weighted = float((excess * (n - np.arange(1, n + 1) + 0.35) / n).mean())
        shape = max(LEAST_SHAPE, min(0.9, 2 - mean / max(mean - 2 * weighted, 1e-300)))
        return cls(threshold, len(excess) / len(values), float(mean * (1 - shape)), shape)

    def p_values(self, values: Floats) -> npt.NDArray[np.float64]:
        """The chance of noise at least as large as each value; 1 below the threshold, at most its share above."""
        above = np.maximum(np.asarray(values, np.float64) - self.threshold, 0.0)
        survival = (1 + self.shape * above / self.scale) ** (-1 / self.shape)
        found: npt.NDArray[np.float64] = np.where(above > 0, self.share * survival, 1.0)
        return found


LEAST_SHAPE = 0.1
_TAIL_FROM = 0.9
_FEWEST_EXCESSES = 12
