"""From the sums over tensors' lines to the numbers of components."""

from collections.abc import Iterable, Mapping
from functools import reduce
from math import nan, sqrt
from typing import NamedTuple

import numpy as np

from neural_mri.contract.components import Component, Kind
from worker.scanner.weight_difference import Change, LineChanges
from worker.scanner.weight_slices import HEAD_ROLES, Indices, Lines, WeightMap
from worker.scanner.weight_statistics import TensorStatistics

__all__ = ("Changed", "Extent", "changes", "extents")


class Extent(NamedTuple):
    """Some weights, as sums that add up. NaN where a tensor was not measured."""

    n_weights: int = 0
    total: float = 0.0
    squares: float = 0.0
    outliers: float = 0.0
    peak: float = 0.0

    def __or__(self, other: "Extent") -> "Extent":
        """These and those together."""
        return Extent(
            self.n_weights + other.n_weights,
            self.total + other.total,
            self.squares + other.squares,
            self.outliers + other.outliers,
            float(np.maximum(self.peak, other.peak)),
        )

    @classmethod
    def joined(cls, parts: Iterable["Extent"]) -> "Extent":
        """All of the parts together."""
        return reduce(cls.__or__, parts, cls())

    @property
    def mean(self) -> float:
        """Of the weights."""
        return self.total / self.n_weights if self.n_weights else nan

    @property
    def rms(self) -> float:
        """Root of the mean square: a size that larger matrices do not have more of."""
        return sqrt(self.squares / self.n_weights) if self.n_weights else nan

    @property
    def std(self) -> float:
        """Of the weights, as a population."""
        return (
            sqrt(max(self.squares / self.n_weights - self.mean**2, 0.0)) if self.n_weights else nan
        )

    @property
    def frobenius(self) -> float:
        """Root of the sum of squares."""
        return sqrt(self.squares)

    @property
    def outlier_share(self) -> float:
        """Share of the weights that are outliers of the tensor that they stand in."""
        return self.outliers / self.n_weights if self.n_weights else nan


class Changed(NamedTuple):
    """Some weights beside the baseline's, as sums that add up."""

    differences: float = 0.0
    products: float = 0.0
    squares: float = 0.0
    baseline_squares: float = 0.0
    peak: float = 0.0

    def __or__(self, other: "Changed") -> "Changed":
        """These and those together."""
        return Changed(
            self.differences + other.differences,
            self.products + other.products,
            self.squares + other.squares,
            self.baseline_squares + other.baseline_squares,
            float(np.maximum(self.peak, other.peak)),
        )

    @property
    def frobenius(self) -> float:
        """Norm of the difference."""
        return sqrt(self.differences)

    @property
    def relative(self) -> float:
        """That, over the norm of the baseline's weights."""
        return sqrt(self.differences / self.baseline_squares) if self.baseline_squares else nan

    @property
    def cosine(self) -> float:
        """Between these weights and the baseline's."""
        size = sqrt(self.squares) * sqrt(self.baseline_squares)
        return self.products / size if size else nan


def extents(
    mapped: WeightMap,
    statistics: Mapping[str, TensorStatistics],
    components: Iterable[Component],
) -> dict[Component, dict[str, Extent]]:
    """The matrices that each component reads: by role in attention, else by name."""
    shape = mapped.architecture
    parts: dict[tuple[int, str], list[Extent]] = {}

    def attention(layer: int, role: str, head: int | None) -> Extent:
        n_parts = shape.n_kv_heads if role in ("W_K", "W_V") else shape.n_heads
        if (layer, role) not in parts:
            lines = mapped.projections[layer, role]
            size = (
                mapped.rows[lines.parameter].size // mapped.rows[lines.parameter].shape[lines.axis]
            )
            parts[layer, role] = _parts(statistics[lines.parameter], lines, n_parts, size)
        found = parts[layer, role]
        if head is None:
            return Extent.joined(found)
        return found[head if n_parts == shape.n_heads else shape.kv_head(head)]

    return {
        component: {role: attention(component.layer, role, component.index) for role in HEAD_ROLES}
        if component.kind in (Kind.HEAD, Kind.ATTN) and component.layer is not None
        else {
            name: _whole(statistics[name], mapped.rows[name].size)
            for name in mapped.parameters_of(component)
            if len(mapped.rows[name].shape) == 2
        }
        for component in components
    }


def _parts(
    statistics: TensorStatistics, lines: Lines, n_parts: int, line_size: int
) -> list[Extent]:
    """Equal runs of a matrix's lines."""
    numbers = lines.numbers.reshape(n_parts, -1)
    count = numbers.shape[1] * line_size
    sums, outliers = statistics.lines(lines.axis), statistics.line_outliers
    if sums is None or outliers is None:
        return [Extent(count, nan, nan, nan, nan)] * n_parts
    return [
        Extent(count, *values)
        for values in zip(
            sums.sums[numbers].sum(1).tolist(),
            sums.squares[numbers].sum(1).tolist(),
            outliers[numbers].sum(1).tolist(),
            sums.peaks[numbers].max(1).tolist(),
            strict=True,
        )
    ]


def _whole(statistics: TensorStatistics, count: int) -> Extent:
    if statistics.rows is None:
        return Extent(count, nan, nan, nan, nan)
    return Extent(
        count,
        float(statistics.rows.sums.sum()),
        float(statistics.rows.squares.sum()),
        statistics.outlier_share * count,
        statistics.max_abs,
    )


def changes(
    mapped: WeightMap, differences: Mapping[str, Change], components: Iterable[Component]
) -> dict[Component, Changed]:
    """How each component changed: every tensor that it reads; of a head, its slices of the matrices."""
    found: dict[Component, Changed] = {}
    for component in components:
        if component.kind is Kind.HEAD:
            parts = (
                _changed(differences[lines.parameter].lines(lines.axis), lines.numbers)
                for lines in mapped.attention(component).values()
            )
        else:
            parts = (
                _changed(differences[name].rows, slice(None))
                for name in mapped.parameters_of(component)
            )
        found[component] = reduce(Changed.__or__, parts, Changed())
    return found


def _changed(lines: LineChanges, which: slice | Indices) -> Changed:
    return Changed(
        float(lines.differences[which].sum()),
        float(lines.products[which].sum()),
        float(lines.squares[which].sum()),
        float(lines.baseline_squares[which].sum()),
        float(lines.peaks[which].max()),
    )
