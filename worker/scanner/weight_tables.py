"""A T2 scan's numbers as Arrow tables."""

from collections.abc import Iterable, Mapping, Sequence
from math import nan
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from neural_mri.contract.components import Component, Kind
from neural_mri.contract.results import SCHEMAS, build, positions_column
from neural_mri.contract.weights import WeightScan
from worker.scanner.prompts import finished
from worker.scanner.weight_circuits import LayerCircuits
from worker.scanner.weight_difference import Change
from worker.scanner.weight_files import WeightFiles
from worker.scanner.weight_slices import HEAD_ROLES, WeightMap
from worker.scanner.weight_statistics import TensorStatistics, not_measured
from worker.scanner.weight_sums import Extent, changes, extents

__all__ = ("Findings", "weight_tables")

N_SINGULAR_VALUES = 8
N_NEURONS = 10
N_DIMENSIONS = 8

_AS_PUBLISHED = "weights as published, sums in float64"


class Findings(NamedTuple):
    """What was found in the files."""

    statistics: dict[str, TensorStatistics]
    circuits: dict[int, LayerCircuits]
    """By layer."""
    changes: dict[str, Change]


class Described(NamedTuple):
    """Rows of a table, and what they are."""

    rows: Iterable[Sequence[Any]]
    unit: str
    method: str
    value: tuple[pa.Field, pa.Array] | None = None


def weight_tables(
    request: WeightScan,
    mapped: WeightMap,
    components: Sequence[Component],
    files: WeightFiles,
    found: Findings,
    *,
    quantization: str | None,
) -> dict[str, pa.Table]:
    """The tables, each saying what it is."""
    described = {
        "tensors": _tensors(mapped, components, files, found.statistics),
        "histograms": _histograms(request, mapped, found.statistics),
        "outliers": _outliers(mapped, found.statistics),
        "weights": _weights(mapped, components, found.statistics),
        "circuits": _circuits(mapped, components, found.circuits),
        "neuron_weights": _neurons(mapped, components, found.statistics),
        "dimensions": _dimensions(mapped, found.statistics),
    }
    if request.baseline is not None:
        described["difference"] = _difference(mapped, components, found.changes)
    grid = "" if quantization is None else f"; values lie on the grid of their {quantization} file"
    return {
        name: finished(
            build(name, _columns(name, table.rows), table.value),
            name,
            unit=table.unit,
            method=table.method + grid,
            quantization=quantization,
            outlier_sigma=request.outlier_sigma,
            baseline=request.baseline,
        )
        for name, table in described.items()
    }


def _columns(schema: str, rows: Iterable[Sequence[Any]]) -> dict[str, pa.Array]:
    fields = SCHEMAS[schema].fields
    by_column = list(zip(*rows, strict=True)) or [()] * len(fields)
    return {
        field.name: pa.array(values, field.type)
        for field, values in zip(fields, by_column, strict=True)
    }


def _component(component: Component) -> tuple[str, str, int, int]:
    """The columns `component`, `kind`, `layer`, `head`."""
    head = component.index if component.kind is Kind.HEAD else None
    return (
        str(component),
        component.kind.value,
        -1 if component.layer is None else component.layer,
        -1 if head is None else head,
    )


def _measured(
    mapped: WeightMap, statistics: Mapping[str, TensorStatistics]
) -> list[tuple[str, str, str, TensorStatistics]]:
    """Name, component, role and statistics of the tensors, in the model's order."""
    return [
        (name, str(row.owner.component), row.owner.role, statistics[name])
        for name, row in mapped.rows.items()
        if name in statistics
    ]


def _tensors(
    mapped: WeightMap,
    components: Sequence[Component],
    files: WeightFiles,
    statistics: Mapping[str, TensorStatistics],
) -> Described:
    listed = [
        (name, component, role, files.parameters[name], found)
        for name, component, role, found in _measured(mapped, statistics)
    ]
    addresses = {str(component) for component in components}
    for name, tensor in files.buffers.items():
        component = mapped.component_of_buffer(name)
        if component is None or str(component) in addresses:
            address = "" if component is None else str(component)
            listed.append((name, address, "buffer", tensor, not_measured))
    return Described(
        [
            (
                name,
                component,
                role,
                tensor.dtype,
                tensor.shape,
                tensor.numel,
                found.nonfinite,
                found.mean,
                found.std,
                found.minimum,
                found.maximum,
                found.max_abs,
                found.rms,
                found.frobenius,
                found.kurtosis,
                found.outlier_share,
                *found.quantiles,
            )
            for name, component, role, tensor, found in listed
        ],
        unit="weight",
        method=f"{_AS_PUBLISHED}; quantiles of all values, linear between neighbours",
    )


def _histograms(
    request: WeightScan, mapped: WeightMap, statistics: Mapping[str, TensorStatistics]
) -> Described:
    listed = [entry for entry in _measured(mapped, statistics) if entry[-1].counts is not None]
    counts = [found.counts for *_, found in listed if found.counts is not None]
    flat = np.concatenate([np.empty(0, np.uint32), *counts])
    item = pa.field("item", pa.uint32(), nullable=False)
    kind = pa.list_(item, request.histogram_bins)
    return Described(
        [(*names, found.minimum, found.maximum) for *names, found in listed],
        unit="weights",
        method="every value counted, in bins of equal width from the smallest to the largest",
        value=(
            pa.field("counts", kind, nullable=False),
            pa.FixedSizeListArray.from_arrays(pa.array(flat), type=kind),
        ),
    )


def _outliers(mapped: WeightMap, statistics: Mapping[str, TensorStatistics]) -> Described:
    rows = []
    for *names, found in _measured(mapped, statistics):
        is_vector = len(mapped.rows[names[0]].shape) < 2
        for rank, outlier in enumerate(found.outliers):
            place = (outlier.column, -1) if is_vector else (outlier.row, outlier.column)
            rows.append((*names, rank, *place, outlier.value, outlier.z))
    return Described(
        rows,
        unit="standard deviations",
        method="(w - mean) / std of the tensor, largest size first",
    )


def _weights(
    mapped: WeightMap,
    components: Sequence[Component],
    statistics: Mapping[str, TensorStatistics],
) -> Described:
    rows = []
    for component, parts in extents(mapped, statistics, components).items():
        whole = Extent.joined(parts.values())
        rows.append(
            (
                *_component(component),
                whole.rms,
                whole.frobenius,
                whole.peak,
                whole.mean,
                whole.std,
                whole.outlier_share,
                *(parts[role].rms if role in parts else nan for role in HEAD_ROLES),
            )
        )
    return Described(
        rows,
        unit="weight",
        method=f"{_AS_PUBLISHED}; matrices only; an outlier is one of the tensor that it stands in",
    )


def _circuits(
    mapped: WeightMap, components: Sequence[Component], circuits: Mapping[int, LayerCircuits]
) -> Described:
    shape = mapped.architecture
    width = min(N_SINGULAR_VALUES, shape.d_head, shape.d_model)
    rows = []
    largest = [np.empty(0, np.float32)]
    for component in components:
        if component.kind is not Kind.HEAD or component.layer is None:
            continue
        for name, circuit in zip(("QK", "OV"), circuits[component.layer], strict=True):
            values = circuit.singular_values[component.index].numpy()
            spectral, squares = float(values[0]), float(np.square(values).sum())
            rows.append(
                (
                    *_component(component),
                    name,
                    spectral,
                    squares**0.5,
                    squares / spectral**2 if spectral else nan,
                    float(circuit.copying[component.index]),
                )
            )
            largest.append(values[:width].astype(np.float32))
    return Described(
        rows,
        unit="singular value",
        method="W_Q W_K^T and W_V W_O from d_head x d_head products in float64; no norm folded in, no "
        "rotation, no scaling by sqrt(d_head), no norm of queries and keys",
        value=positions_column(pa.array(np.concatenate(largest)), width),
    )


def _norms(
    mapped: WeightMap, statistics: Mapping[str, TensorStatistics], layer: int, role: str
) -> npt.NDArray[np.float64] | None:
    """Of each neuron's line in a matrix; None where the model has no such matrix or it was not measured."""
    lines = mapped.projections.get((layer, role))
    sums = None if lines is None else statistics[lines.parameter].lines(lines.axis)
    if lines is None or sums is None:
        return None
    return np.sqrt(sums.squares[lines.numbers])


def _neurons(
    mapped: WeightMap,
    components: Sequence[Component],
    statistics: Mapping[str, TensorStatistics],
) -> Described:
    rows = []
    for component in components:
        if component.kind is not Kind.MLP or component.layer is None:
            continue
        read, written, gates = (
            _norms(mapped, statistics, component.layer, role)
            for role in ("W_in", "W_out", "W_gate")
        )
        if read is None or written is None:
            continue
        products = read * written
        for rank, neuron in enumerate(_strongest(products, N_NEURONS)):
            rows.append(
                (
                    str(component),
                    component.layer,
                    rank,
                    neuron,
                    products[neuron],
                    read[neuron],
                    written[neuron],
                    nan if gates is None else gates[neuron],
                )
            )
    return Described(
        rows,
        unit="L2 norm",
        method="product |w_in| |w_out| of each neuron; where the MLP is gated, w_in multiplies the gate",
    )


def _dimensions(mapped: WeightMap, statistics: Mapping[str, TensorStatistics]) -> Described:
    rows = []
    for *names, found in _measured(mapped, statistics):
        axis = mapped.written_axis(names[0])
        lines = None if axis is None else found.lines(axis)
        if lines is None:
            continue
        norms = np.sqrt(lines.squares)
        middle = float(np.median(norms))
        layer = mapped.rows[names[0]].owner.component.layer
        for rank, dimension in enumerate(_strongest(norms, N_DIMENSIONS)):
            norm = float(norms[dimension])
            ratio = norm / middle if middle else nan
            rows.append((*names, -1 if layer is None else layer, rank, dimension, norm, ratio))
    return Described(
        rows, unit="L2 norm", method="norm of the weights that write to a residual dimension"
    )


def _strongest(values: npt.NDArray[np.float64], n_values: int) -> list[int]:
    """Indices of the largest values, largest first, ties in order."""
    order: list[int] = np.argsort(-values, kind="stable")[:n_values].tolist()
    return order


def _difference(
    mapped: WeightMap, components: Sequence[Component], found: Mapping[str, Change]
) -> Described:
    return Described(
        [
            (*_component(component), change.frobenius, change.relative, change.peak, change.cosine)
            for component, change in changes(mapped, found, components).items()
        ],
        unit="L2 norm",
        method="W - W_baseline, sums in float64; relative to the norm of W_baseline",
    )
