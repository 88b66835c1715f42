"""Exact quantiles and histograms of more numbers than one wants to sort.

A float32's leading sixteen bits, sign, exponent and seven binary digits, put all numbers into 65,536 bins in
order of size. A first look counts them. Counts say in which bin each order statistic lies, and how many
numbers lie below every bin; a second look takes out the few numbers of the bins in question, and sorting
those settles the rest. Nothing is estimated.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from worker.scanner import weight_kernels

__all__ = ("OrderStatistics", "Quantiles", "add_counts", "look_up", "no_counts", "sort")

N_BINS = 1 << 16
_MOST_SORTED = 1 << 18
"""Numbers of one bin that are kept to be sorted; more are counted by their trailing sixteen bits."""
_SIGN = 1 << 31

Float32s = npt.NDArray[np.float32]
Float64s = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]
Bits = npt.NDArray[np.uint32]
Keys = npt.NDArray[np.uint32]
Places = npt.NDArray[np.intp]

# As integers, negative numbers stand after the positive ones, and the wrong way round.
_ASCENDING = np.concatenate([np.arange(N_BINS - 1, N_BINS // 2 - 1, -1), np.arange(N_BINS // 2)])


class OrderStatistics(NamedTuple):
    """What was looked up."""

    at_ranks: Float64s
    """The values of the pairs of ranks asked for, `[pair, 2]`."""
    below: Counts
    """How many values lie below each limit asked for."""


def no_counts() -> Counts:
    """No number in any bin."""
    return np.zeros(N_BINS, np.int64)


def add_counts(values: Float32s, counts: Counts) -> None:
    """Add how many of the values, in one stretch of memory, lie in each bin."""
    weight_kernels.count(values.view(np.uint32), counts)


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
        counts: How many of them lie in each bin.
        ranks: Pairs of ranks, from 0 and less than the number of values.
        limits: Any finite numbers.
    """
    ordered = counts[_ASCENDING]
    through = ordered.cumsum()
    before = through - ordered
    cuts = _keys(_first_float32_at_least(limits).view(np.uint32))
    sought = np.array(ranks).reshape(-1)
    bins = np.searchsorted(through, sought, side="right")
    found = _Found.among(blocks, ordered, np.unique(np.concatenate([cuts >> 16, bins])))
    at_ranks = found.at(bins, sought - before[bins])
    return OrderStatistics(at_ranks.reshape(-1, 2), before[cuts >> 16] + found.below(cuts))


def sort(
    values: Float32s, *, ranks: Sequence[tuple[int, int]], limits: Float64s
) -> OrderStatistics:
    """The same of few values."""
    ascending = np.sort(values).astype(np.float64)
    return OrderStatistics(ascending[np.array(ranks)], np.searchsorted(ascending, limits))


class _Found(NamedTuple):
    """All values of some bins."""

    keys: Keys
    """Of the values of most bins, ascending."""
    crowded: dict[int, Counts]
    """Of a bin of very many: how many have each trailing half of a key."""

    @classmethod
    def among(
        cls, blocks: Callable[[], Iterable[Float32s]], ordered: Counts, places: Places
    ) -> "_Found":
        """Take the values of the bins at some places, in ascending order, out of all values."""
        crowds = {int(place): no_counts() for place in places[ordered[places] > _MOST_SORTED]}
        wanted = np.zeros(N_BINS, np.bool_)
        wanted[_ASCENDING[places]] = True
        parts = []
        for block in blocks():
            bits = block.view(np.uint32)
            room = np.empty_like(bits)
            keys = _keys(room[: weight_kernels.pick(bits, wanted, room)])
            for place, crowd in crowds.items():
                theirs = keys >> 16 == place
                trailing = np.bincount(keys[theirs] & 0xFFFF, minlength=N_BINS)
                np.add(crowd, trailing, out=crowd)
                keys = keys[~theirs]
            parts.append(keys)
        return cls(np.sort(np.concatenate(parts)), crowds)

    def at(self, places: Places, ranks: Counts) -> Float64s:
        """The values of some ranks, each within its bin, from 0."""
        keys = np.empty(len(places), np.uint32)
        sorted_away = ~np.isin(places, list(self.crowded))
        first = np.searchsorted(self.keys, (places[sorted_away] << 16).astype(np.uint32))
        keys[sorted_away] = self.keys[first + ranks[sorted_away]]
        for place, crowd in self.crowded.items():
            here = places == place
            trailing = np.searchsorted(crowd.cumsum(), ranks[here], side="right")
            keys[here] = place << 16 | trailing
        bits = keys ^ np.where(keys & _SIGN, np.uint32(_SIGN), np.uint32(0xFFFF_FFFF))
        return bits.view(np.float32).astype(np.float64)

    def below(self, cuts: Keys) -> Counts:
        """How many values of each cut's own bin lie below it."""
        places = cuts >> 16
        counts = np.searchsorted(self.keys, cuts) - np.searchsorted(self.keys, places << 16)
        for place, crowd in self.crowded.items():
            here = places == place
            counts[here] = (crowd.cumsum() - crowd)[cuts[here] & 0xFFFF]
        return counts


def _keys(bits: Bits) -> Keys:
    """Integers in the order of the values, -0 before 0. Their leading halves are the bins' places."""
    return bits ^ np.where(bits & _SIGN, np.uint32(0xFFFF_FFFF), np.uint32(_SIGN))


def _first_float32_at_least(numbers: Float64s) -> Float32s:
    """The smallest float32 values that are not below the numbers: float32 x < these iff x < those."""
    with np.errstate(over="ignore"):
        rounded = numbers.astype(np.float32)
    least = np.where(rounded < numbers, np.nextafter(rounded, np.float32(np.inf)), rounded)
    # Nothing lies between the two zeros, and -0 stands first.
    return np.where(least == 0, np.float32(-0.0), least)


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
