"""Exact quantiles and histograms of more numbers than one wants to sort.

A float32's leading sixteen bits, sign, exponent and seven binary digits, put all numbers into 65,536 bins in
order of size. A first look counts them. Counts say in which bin each order statistic lies, and how many
numbers lie below every bin; a second look takes out the few numbers of the bins in question, and settles the
rest among those. Nothing is estimated.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ("N_BINS", "OrderStatistics", "Quantiles", "bin_counts", "look_up")

N_BINS = 1 << 16
_LEADING = 1 if sys.byteorder == "little" else 0
_MOST_SORTED = 1 << 20
"""Numbers of one bin that are kept to be sorted; more are counted by their trailing sixteen bits."""

Float32s = npt.NDArray[np.float32]
Float64s = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]
Halves = npt.NDArray[np.uint16]

# As integers, negative numbers stand after the positive ones, and the wrong way round.
_ASCENDING = np.concatenate([np.arange(N_BINS - 1, N_BINS // 2 - 1, -1), np.arange(N_BINS // 2)])
_PLACE = np.argsort(_ASCENDING)
_NEGATIVE = N_BINS // 2


class OrderStatistics(NamedTuple):
    """What was looked up."""

    at_ranks: Float64s
    """The values of the pairs of ranks asked for, `[pair, 2]`."""
    below: Counts
    """How many values lie below each limit asked for."""


def bin_counts(values: Float32s) -> Counts:
    """How many of the values, in one stretch of memory, lie in each bin."""
    return np.bincount(_leading(values), minlength=N_BINS)


def _leading(values: Float32s) -> Halves:
    return values.view(np.uint16)[_LEADING::2]


def _trailing(values: Float32s) -> Halves:
    return values.view(np.uint16)[1 - _LEADING :: 2]


def look_up(
    blocks: Callable[[], Iterable[Float32s]],
    counts: Counts,
    *,
    ranks: Sequence[tuple[int, int]],
    limits: Float64s,
) -> OrderStatistics:
    """The values of some ranks, and how many values lie below some limits.

    Args:
        blocks: Gives all values, in any order; called once.
        counts: Their `bin_counts`.
        ranks: Pairs of ranks, from 0 and less than the number of values.
        limits: Any finite numbers.
    """
    ordered = counts[_ASCENDING]
    through = ordered.cumsum()
    before = through - ordered
    cuts = _Cuts(_first_float32_at_least(limits), before)
    wanted_ranks = np.array(ranks).reshape(-1)
    places = np.searchsorted(through, wanted_ranks, side="right")
    bins = {int(place): _Bin(int(_ASCENDING[place]), int(ordered[place])) for place in places}
    ranked = np.zeros(N_BINS, np.bool_)
    ranked[[found.half for found in bins.values()]] = True
    wanted = ranked | cuts.wanted
    for block in blocks():
        values = block.compress(wanted.take(_leading(block)))
        if not len(values):
            continue
        halves = _leading(values)
        cuts.count(values, halves)
        among = ranked.take(halves)
        of_ranks, halves = values.compress(among), halves.compress(among)
        for found in bins.values():
            found.take(of_ranks, halves)
    at_ranks = [
        bins[int(place)].at(int(rank - before[place]))
        for rank, place in zip(wanted_ranks, places, strict=True)
    ]
    return OrderStatistics(np.array(at_ranks, np.float64).reshape(-1, 2), cuts.below)


class _Cuts:
    """Numbers, and how many values lie below each."""

    def __init__(self, cuts: Float32s, before: Counts) -> None:
        # Nothing lies between the two zeros, and -0 stands first.
        cuts = np.where(cuts == 0, np.float32(-0.0), cuts)
        halves = _leading(cuts)
        self.below: Counts = before[_PLACE[halves]]
        self.wanted = np.zeros(N_BINS, np.bool_)
        self.wanted[halves] = True
        self._rounds: list[tuple[npt.NDArray[np.intp], Float32s]] = []
        """Cuts of different bins, by bin: -1 and NaN, below which nothing lies, where there is none."""
        left = np.arange(len(cuts))
        while len(left):
            which, limits = np.full(N_BINS, -1), np.full(N_BINS, np.nan, np.float32)
            which[halves[left]] = left
            limits[halves[left]] = cuts[left]
            self._rounds.append((which, limits))
            left = np.setdiff1d(left, which[halves[left]])

    def count(self, values: Float32s, halves: Halves) -> None:
        """Add values of the bins wanted."""
        for which, limits in self._rounds:
            found = which.take(halves.compress(values < limits.take(halves)))
            self.below += np.bincount(found, minlength=len(self.below))


class _Bin:
    """The values of one bin that an order statistic lies in."""

    def __init__(self, half: int, n_values: int) -> None:
        self.half = half
        self._parts: list[Float32s] = []
        self._counts: Counts | None = None
        if n_values > _MOST_SORTED:
            self._counts = np.zeros(N_BINS, np.int64)

    def take(self, values: Float32s, halves: Halves) -> None:
        """Take those that are of this bin."""
        mine = values[halves == self.half]
        if self._counts is not None:
            self._counts += np.bincount(_trailing(mine), minlength=N_BINS)
        elif len(mine):
            self._parts.append(mine)

    def at(self, rank: int) -> float:
        """The value of that rank within the bin, from 0."""
        if self._counts is None:
            if len(self._parts) > 1 or not self._is_sorted():
                self._parts = [np.sort(np.concatenate(self._parts))]
            return float(self._parts[0][rank])
        counts, is_negative = self._counts, self.half >= _NEGATIVE
        through = (counts[::-1] if is_negative else counts).cumsum()
        place = int(np.searchsorted(through, rank, side="right"))
        trailing = N_BINS - 1 - place if is_negative else place
        bits = np.array([self.half << 16 | trailing], np.uint32)
        return float(bits.view(np.float32)[0])

    def _is_sorted(self) -> bool:
        [only] = self._parts
        return bool((only[:-1] <= only[1:]).all())


def _first_float32_at_least(numbers: Float64s) -> Float32s:
    """The smallest float32 values that are not below the numbers: float32 x < these iff x < those."""
    with np.errstate(over="ignore"):
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
