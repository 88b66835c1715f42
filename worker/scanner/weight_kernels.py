"""Loops over a block of weights, compiled.

numpy goes over a block once for every sum, and fills memory in between. These go over it a few times in all,
keep what they need in registers, and let other threads run meanwhile. Compiling takes some seconds, once:
what comes out is kept where `NUMBA_CACHE_DIR` says, or beside this file. Bits and values are two views of one
memory; as integers, magnitudes have the order that they have as numbers.
"""

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

__all__ = ("add_columns", "add_rows", "count", "pick")

Bits = npt.NDArray[np.uint32]
Float32s = npt.NDArray[np.float32]
Float64s = npt.NDArray[np.float64]

_MAGNITUDE = np.uint32(0x7FFF_FFFF)
_TRAILING = np.uint32(16)

# Sums may be taken in any order, lane by lane. What is not a number stays so.
_sums: Any = numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
_exact: Any = numba.njit(nogil=True, cache=True)


@_sums  # type: ignore[untyped-decorator]
def add_rows(
    values: Float32s,
    bits: Bits,
    sums: Float64s,
    squares: Float64s,
    peaks: Bits,
    higher: Float64s,
    extremes: Bits,
) -> None:
    """Set each row's sum, sum of squares and largest magnitude; add to the sums of cubes and fourth powers.

    `extremes` are moved outwards: the largest bits with no sign, the largest with one, the smallest.
    """
    cubes = fourths = 0.0
    positive, largest, smallest = np.int32(extremes[0]), extremes[1], extremes[2]
    for row in range(values.shape[0]):
        total = squared = 0.0
        peak = np.uint32(0)
        for column in range(values.shape[1]):
            value = np.float64(values[row, column])
            square = value * value
            total += value
            squared += square
            cubes += square * value
            fourths += square * square
            number = bits[row, column]
            peak = max(peak, number & _MAGNITUDE)
            positive = max(positive, np.int32(number))
            largest = max(largest, number)
            smallest = min(smallest, number)
        sums[row], squares[row], peaks[row] = total, squared, peak
    higher[0] += cubes
    higher[1] += fourths
    extremes[0], extremes[1], extremes[2] = np.uint32(positive), largest, smallest


@_exact  # type: ignore[untyped-decorator]
def add_columns(
    values: Float32s, bits: Bits, sums: Float64s, squares: Float64s, peaks: Bits
) -> None:
    """Add to each column's sum and sum of squares, and raise its largest magnitude."""
    for row in range(values.shape[0]):
        for column in range(values.shape[1]):
            value = np.float64(values[row, column])
            sums[column] += value
            squares[column] += value * value
            peaks[column] = max(peaks[column], bits[row, column] & _MAGNITUDE)


@_exact  # type: ignore[untyped-decorator]
def count(bits: Bits, bins: npt.NDArray[np.int64]) -> None:
    """Add each number to the bin of its leading half."""
    for number in bits:
        bins[number >> _TRAILING] += 1


@_exact  # type: ignore[untyped-decorator]
def pick(bits: Bits, wanted: npt.NDArray[np.bool_], into: Bits) -> int:
    """Put the numbers of the bins wanted into `into`, as long as `bits`; how many they are."""
    n_picked = 0
    for number in bits:
        # Written first and then kept or not: a branch that nobody can foretell would cost more.
        into[n_picked] = number
        n_picked += wanted[number >> _TRAILING]
    return n_picked
