"""Exact quantiles and histograms of more numbers than one wants to sort at once.

The numbers come in runs, each sorted by itself. Of every run each `SAMPLE`-th value is kept. The
samples of all runs together then bracket any order statistic: at most `SAMPLE` values a run can hide
between two of them. A second look at the runs counts what lies below each bracket and sorts the little
that lies inside. Nothing is estimated.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ("SAMPLE", "OrderStatistics", "Quantiles", "look_up", "sample")

SAMPLE = 64
"""Of each sorted run, every this many-th value is kept."""

Float32s = npt.NDArray[np.float32]
Float64s = npt.NDArray[np.float64]


class OrderStatistics(NamedTuple):
    """What was looked up."""

    at_ranks: Float64s
    """The values of the pairs of ranks asked for, `[pair, 2]`."""
    below: npt.NDArray[np.int64]
    """How many values lie below each limit asked for."""


def sample(run: Float32s) -> Float32s:
    """What to keep of a sorted run."""
    return run[SAMPLE - 1 :: SAMPLE].copy()


def look_up(
    runs: Callable[[], Iterable[Float32s]],
    samples: Sequence[Float32s],
    *,
    ranks: Sequence[tuple[int, int]],
    limits: Float64s,
) -> OrderStatistics:
    """The values of some ranks, and how many values lie below some limits.

    Args:
        runs: Gives the sorted runs; called once.
        samples: `sample` of each run.
        ranks: Pairs of neighbouring ranks, from 0 and less than the number of values.
        limits: Any finite numbers.
    """
    floors, ceilings = _brackets(np.sort(np.concatenate(samples)), len(samples), ranks)
    # Strictly above a floor is at or above the next float: every question is "how many are below".
    cuts = np.concatenate(
        [_first_float32_at_least(limits), np.nextafter(floors, np.float32(np.inf)), ceilings]
    )
    below = np.zeros(len(cuts), np.int64)
    inside: list[list[Float32s]] = [[] for _ in ranks]
    starts, stops = slice(len(limits), -len(ranks)), slice(-len(ranks), None)
    for run in runs():
        found = run.searchsorted(cuts)
        below += found
        for kept, start, stop in zip(
            inside, found[starts].tolist(), found[stops].tolist(), strict=True
        ):
            if start < stop:
                kept.append(run[start:stop].copy())
    at_ranks = np.empty((len(ranks), 2))
    for position, kept in enumerate(inside):
        between = np.sort(np.concatenate(kept)) if kept else np.empty(0, np.float32)
        for neighbour, rank in enumerate(ranks[position]):
            index = rank - below[starts][position]
            if index < 0:
                at_ranks[position, neighbour] = floors[position]
            elif index < len(between):
                at_ranks[position, neighbour] = between[index]
            else:
                at_ranks[position, neighbour] = ceilings[position]
    return OrderStatistics(at_ranks, below[: len(limits)])


def _brackets(
    merged: Float32s, n_runs: int, ranks: Sequence[tuple[int, int]]
) -> tuple[Float32s, Float32s]:
    """Values between which the values of each pair of ranks lie, themselves included.

    The k-th sample (from 0) has at least (k + 1) * SAMPLE values at or below it, its own and those that
    the samples before it stand for; and at most k * SAMPLE + n_runs * (SAMPLE - 1) below it.
    """
    guarded = np.concatenate([[-np.inf], merged, [np.inf]]).astype(np.float32)
    lower, upper = np.array(ranks).T
    first = (lower - n_runs * (SAMPLE - 1)) // SAMPLE
    last = upper // SAMPLE
    return guarded[np.maximum(first + 1, 0)], guarded[np.minimum(last + 1, len(merged) + 1)]


def _first_float32_at_least(numbers: Float64s) -> Float32s:
    """The smallest float32 values that are not below the numbers: float32 x < these iff x < those."""
    rounded = numbers.astype(np.float32)
    return np.where(rounded < numbers, np.nextafter(rounded, np.float32(np.inf)), rounded)


class Quantiles(NamedTuple):
    """Where quantiles lie: between which ranks, and how far from the first to the second."""

    ranks: list[tuple[int, int]]
    weights: Float64s

    @classmethod
    def of(cls, n_values: int, shares: Sequence[float]) -> "Quantiles":
        """Of some number of values; linear between neighbours, as numpy's default."""
        positions = np.asarray(shares) * (n_values - 1)
        lower = np.floor(positions).astype(np.int64)
        upper = np.minimum(lower + 1, n_values - 1)
        return cls(list(zip(lower.tolist(), upper.tolist(), strict=True)), positions - lower)

    def between(self, at_ranks: Float64s) -> Float64s:
        """The quantiles, from the values of the ranks."""
        return at_ranks[:, 0] + (at_ranks[:, 1] - at_ranks[:, 0]) * self.weights
