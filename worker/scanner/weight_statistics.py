"""The statistics of one stored tensor, exact, in one pass over the file and bounded memory.

Sums are in float64. The tensor is taken block of rows by block of rows, each small enough to stay in a
core's cache while everything is computed from it, and in memory that is used over and over: touching
fresh memory costs more than the arithmetic.
"""

from collections.abc import Callable, Iterator, Sequence
from math import isfinite, nan, sqrt
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from worker.scanner.order_statistics import (
    OrderStatistics,
    Quantiles,
    add_counts,
    look_up,
    no_counts,
    sort,
)
from worker.scanner.weight_files import FloatArray, StoredTensor
from worker.scanner.weight_kernels import add_columns, add_rows

__all__ = (
    "QUANTILES",
    "LineSums",
    "Outlier",
    "Questions",
    "TensorStatistics",
    "Workspace",
    "blocks",
    "measure",
    "not_measured",
)

QUANTILES = (0.001, 0.01, 0.25, 0.5, 0.75, 0.99, 0.999)
N_OUTLIERS = 8
_BLOCK = 1 << 16
"""Values worked on together: with their float64 squares they fit a second-level cache."""
_KEPT = 1 << 25
"""Values that were decoded are kept between the two looks that quantiles take; more are decoded twice."""
_FEW = 1 << 12
"""Values that are sorted at once: to look through all bins would take longer."""
_SIGN = np.uint32(1 << 31)
_SMALLEST_NAN = 0xFFFF_FFFF
"""As bits, above every number's."""
_FAR_FROM_ZERO = 10.0
"""Means of more standard deviations than this cost raw moments their digits."""

Sums = npt.NDArray[np.float64]
Checkpoint = Callable[[], None]


class Questions(NamedTuple):
    """What is asked about a tensor."""

    histogram_bins: int
    outlier_sigma: float
    columns: bool
    """Whether to keep sums of each column as well as of each row."""
    head_axis: int | None
    """Along which axis lie the lines whose outliers are counted one by one; None to count none so."""


class LineSums(NamedTuple):
    """Of every row, or of every column."""

    sums: Sums
    squares: Sums
    peaks: Sums
    """Largest absolute value."""


class Outlier(NamedTuple):
    """One far value."""

    row: int
    column: int
    value: float
    z: float
    """Standard deviations from the tensor's mean."""


class TensorStatistics(NamedTuple):
    """What is known of one tensor. NaN where it was not measured."""

    nonfinite: int
    """Infinite or undefined values. Where there are any, nothing else is measured."""
    mean: float = nan
    std: float = nan
    minimum: float = nan
    maximum: float = nan
    rms: float = nan
    frobenius: float = nan
    kurtosis: float = nan
    """Excess: 0 for a Gaussian."""
    quantiles: tuple[float, ...] = (nan,) * len(QUANTILES)
    outlier_share: float = nan
    line_outliers: npt.NDArray[np.int64] | None = None
    """Of the lines along the axis asked about, how many outliers each has."""
    counts: npt.NDArray[np.uint32] | None = None
    """Of the histogram: the last bin holds its upper edge too."""
    outliers: tuple[Outlier, ...] = ()
    """The farthest from the mean, farthest first, whether or not they are outliers."""
    rows: LineSums | None = None
    columns: LineSums | None = None

    @property
    def max_abs(self) -> float:
        """The largest absolute value."""
        return max(-self.minimum, self.maximum)

    def lines(self, axis: int) -> LineSums | None:
        """Of the rows (0) or the columns (1)."""
        return self.columns if axis else self.rows


not_measured = TensorStatistics(nonfinite=0)


class Workspace:
    """One thread's memory."""

    def __init__(self) -> None:
        self._single: dict[str, FloatArray] = {}
        self._double: dict[str, Sums] = {}

    def single(self, name: str, size: int) -> FloatArray:
        """`size` float32 values that nobody else of this name is using."""
        array = self._single.get(name)
        if array is None or len(array) < size:
            self._single[name] = array = np.empty(max(size, _BLOCK), np.float32)
        return array[:size]

    def double(self, name: str, size: int) -> Sums:
        """`size` float64 values that nobody else of this name is using."""
        array = self._double.get(name)
        if array is None or len(array) < size:
            self._double[name] = array = np.empty(max(size, _BLOCK))
        return array[:size]


def blocks(tensor: StoredTensor) -> Iterator[slice]:
    """The tensor's rows, as many at a time as are worked on together."""
    step = max(1, _BLOCK // tensor.n_columns)
    for start in range(0, tensor.n_rows, step):
        yield slice(start, min(start + step, tensor.n_rows))


def measure(
    tensor: StoredTensor, asked: Questions, workspace: Workspace, checkpoint: Checkpoint
) -> TensorStatistics:
    """Everything about one tensor. `checkpoint` is called between blocks, and may raise."""
    if not tensor.numel:
        return not_measured
    with np.errstate(invalid="ignore", over="ignore"):
        first = _FirstLook(tensor, asked.columns, workspace)
        for block in blocks(tensor):
            checkpoint()
            first.take(block)
    total, squares = float(first.row_sums.sum()), float(first.row_squares.sum())
    if not isfinite(total) or not isfinite(squares):
        return TensorStatistics(nonfinite=_nonfinite(tensor, workspace))
    low, high = first.low, first.high
    mean, variance, kurtosis = _moments(tensor, first, workspace, checkpoint)
    std = sqrt(variance)
    far = asked.outlier_sigma * std
    sought = Quantiles.of(tensor.numel, QUANTILES)
    edges = np.linspace(low, high, asked.histogram_bins + 1)[1:-1]
    found = first.look_up(
        checkpoint,
        ranks=sought.ranks,
        limits=np.concatenate([edges, [mean - far, np.nextafter(mean + far, np.inf)]]),
    )
    below_far, not_above_far = found.below[-2:].tolist()
    return TensorStatistics(
        nonfinite=0,
        mean=mean,
        std=std,
        minimum=low,
        maximum=high,
        rms=sqrt(squares / tensor.numel),
        frobenius=sqrt(squares),
        kurtosis=kurtosis,
        quantiles=tuple(sought.between(found.at_ranks).tolist()),
        outlier_share=(below_far + tensor.numel - not_above_far) / tensor.numel,
        line_outliers=None
        if asked.head_axis is None
        else _beyond(tensor, first, mean, far, checkpoint, axis=asked.head_axis),
        counts=np.diff(found.below[:-2], prepend=0, append=tensor.numel).astype(np.uint32),
        outliers=_farthest(tensor, first, mean, std, checkpoint),
        rows=LineSums(first.row_sums, first.row_squares, first.row_peaks),
        columns=LineSums(first.column_sums, first.column_squares, first.column_peaks)
        if asked.columns
        else None,
    )


class _FirstLook:
    """Sums over a tensor's lines, and in which bins its values lie."""

    def __init__(self, tensor: StoredTensor, columns: bool, workspace: Workspace) -> None:  # noqa: FBT001
        self._tensor = tensor
        self._columns = columns
        self._workspace = workspace
        self._kept = tensor.numel <= _KEPT and tensor.dtype != "F32"
        self.row_sums = np.empty(tensor.n_rows)
        self.row_squares = np.empty(tensor.n_rows)
        self._row_peaks = np.empty(tensor.n_rows, np.uint32)
        width = tensor.n_columns if columns else 0
        self.column_sums = np.zeros(width)
        self.column_squares = np.zeros(width)
        self._column_peaks = np.zeros(width, np.uint32)
        self._higher = np.zeros(2)
        self._extremes = np.array([0, 0, _SMALLEST_NAN], np.uint32)
        self._few = tensor.numel <= _FEW
        self._bins = None if self._few else no_counts()

    def take(self, block: slice) -> None:
        """Add a block of rows."""
        values = self._tensor.read(block, self._room(block))
        bits = values.view(np.uint32)
        add_rows(
            values,
            bits,
            self.row_sums[block],
            self.row_squares[block],
            self._row_peaks[block],
            self._higher,
            self._extremes,
        )
        if self._columns:
            add_columns(values, bits, self.column_sums, self.column_squares, self._column_peaks)
        if self._bins is not None:
            add_counts(values.reshape(-1), self._bins)

    @property
    def low(self) -> float:
        """The least value."""
        _, largest, smallest = self._extremes
        return float((largest if largest & _SIGN else smallest).view(np.float32))

    @property
    def high(self) -> float:
        """The greatest value."""
        positive, _, smallest = self._extremes
        return float((smallest if smallest & _SIGN else positive).view(np.float32))

    def look_up(
        self, checkpoint: Checkpoint, *, ranks: Sequence[tuple[int, int]], limits: Sums
    ) -> OrderStatistics:
        """The values of some ranks, and how many values lie below some limits."""

        def again() -> Iterator[FloatArray]:
            return self.blocks(checkpoint)

        if self._bins is None:
            return sort(np.concatenate(list(again())), ranks=ranks, limits=limits)
        return look_up(again, self._bins, ranks=ranks, limits=limits)

    @property
    def cubes(self) -> float:
        """Sum of the third powers."""
        return float(self._higher[0])

    @property
    def fourths(self) -> float:
        """Sum of the fourth powers."""
        return float(self._higher[1])

    @property
    def row_peaks(self) -> Sums:
        """Largest absolute value of each row."""
        return self._row_peaks.view(np.float32).astype(np.float64)

    @property
    def column_peaks(self) -> Sums:
        """Largest absolute value of each column."""
        return self._column_peaks.view(np.float32).astype(np.float64)

    def blocks(self, checkpoint: Checkpoint) -> Iterator[FloatArray]:
        """The values again."""
        for block in blocks(self._tensor):
            checkpoint()
            if self._kept:
                n_values = (block.stop - block.start) * self._tensor.n_columns
                yield self._room(block)[:n_values]
            else:
                yield self._tensor.read(block, self._room(block)).reshape(-1)

    def _room(self, block: slice) -> FloatArray:
        if self._kept:
            start = block.start * self._tensor.n_columns
            return self._workspace.single("values", self._tensor.numel)[start:]
        return self._workspace.single("values", _BLOCK + self._tensor.n_columns)


def _nonfinite(tensor: StoredTensor, workspace: Workspace) -> int:
    room = workspace.single("values", _BLOCK + tensor.n_columns)
    return sum(int((~np.isfinite(tensor.read(block, room))).sum()) for block in blocks(tensor))


def _moments(
    tensor: StoredTensor, first: _FirstLook, workspace: Workspace, checkpoint: Checkpoint
) -> tuple[float, float, float]:
    """Mean, variance and excess kurtosis (NaN where nothing varies)."""
    if first.low == first.high:
        return first.low, 0.0, nan
    n_values = tensor.numel
    mean = float(first.row_sums.sum()) / n_values
    second = float(first.row_squares.sum()) / n_values
    variance = max(second - mean**2, 0.0)
    fourth = (
        first.fourths / n_values
        - 4 * mean * first.cubes / n_values
        + 6 * mean**2 * second
        - 3 * mean**4
    )
    if mean**2 > _FAR_FROM_ZERO**2 * variance:
        room = workspace.single("block", _BLOCK + tensor.n_columns)
        variance = fourth = 0.0
        for block in blocks(tensor):
            checkpoint()
            squares = np.square(np.subtract(tensor.read(block, room), mean, dtype=np.float64))
            variance += float(squares.sum()) / n_values
            fourth += float(np.square(squares).sum()) / n_values
    return mean, variance, fourth / variance**2 - 3 if variance else nan


def _beyond(
    tensor: StoredTensor,
    first: _FirstLook,
    mean: float,
    far: float,
    checkpoint: Checkpoint,
    *,
    axis: int,
) -> npt.NDArray[np.int64]:
    """How many values of each row (`axis` 0) or column lie farther than `far` from the mean.

    Only rows are read again that reach far enough from zero to hold one.
    """
    reach = far - abs(mean)
    counts = np.zeros((tensor.n_rows, tensor.n_columns)[axis], np.int64)
    for numbers, values in _again(tensor, first.row_peaks >= reach, checkpoint):
        # Few lie so far from zero: only those are looked at in float64.
        row, column = np.nonzero(np.abs(values) >= np.float32(reach * 0.999))
        found = np.abs(values[row, column].astype(np.float64) - mean) > far
        np.add.at(counts, column[found] if axis else numbers[row[found]], 1)
    return counts


def _farthest(
    tensor: StoredTensor, first: _FirstLook, mean: float, std: float, checkpoint: Checkpoint
) -> tuple[Outlier, ...]:
    """The values farthest from the mean, ties in the tensor's order.

    As many rows as values are wanted reach to some distance from zero; a row that stays nearer to it by
    more than the mean can account for holds none of them.
    """
    n_rows = min(N_OUTLIERS, tensor.n_rows)
    reach = np.partition(first.row_peaks, -n_rows)[-n_rows]
    found: list[Outlier] = []
    for numbers, values in _again(tensor, first.row_peaks >= reach - 2 * abs(mean), checkpoint):
        distances = np.abs(values.astype(np.float64) - mean).reshape(-1)
        n_values = min(N_OUTLIERS, len(distances))
        least = np.partition(distances, -n_values)[-n_values]
        farther = np.flatnonzero(distances > least)
        as_far = np.flatnonzero(distances == least)[: n_values - len(farther)]
        for index in (*farther, *as_far):
            row, column = divmod(int(index), tensor.n_columns)
            value = float(values[row, column])
            z = (value - mean) / std if std else 0.0
            found.append(Outlier(int(numbers[row]), column, value, z))
    found.sort(key=lambda outlier: (-abs(outlier.z), outlier.row, outlier.column))
    return tuple(found[:N_OUTLIERS])


def _again(
    tensor: StoredTensor, wanted: npt.NDArray[np.bool_], checkpoint: Checkpoint
) -> Iterator[tuple[npt.NDArray[np.intp], FloatArray]]:
    """The rows wanted, some at a time: their numbers, and their values."""
    numbers = np.flatnonzero(wanted)
    step = max(1, _BLOCK // tensor.n_columns)
    room = np.empty(min(step, len(numbers)) * tensor.n_columns, np.float32)
    for start in range(0, len(numbers), step):
        checkpoint()
        some = numbers[start : start + step]
        yield some, tensor.read(some, room)
