"""T2 in short: a component's weights in a dozen numbers. Histograms are fetched by URL."""

from collections import defaultdict
from typing import Any

import msgspec
import pyarrow as pa

from neural_mri.contract.components import Kind
from neural_mri.contract.results import provenance_of
from neural_mri.contract.summaries.base import Measured, Stored, SummaryBase, absent, records

__all__ = ("TABLES", "WeightSummary", "weight_summary")

TABLES = ("weights", "circuits", "difference")


class WeightCircuit(msgspec.Struct, frozen=True, kw_only=True):
    """What a head's matrices do together."""

    spectral_norm: Measured
    """The largest singular value."""
    frobenius: Measured
    stable_rank: Measured
    """|.|_F^2 / |.|_2^2: in how many directions it acts, about."""
    copying: Measured
    """sum(Re eigenvalue) / sum |eigenvalue|, from -1 to 1; null for QK."""


class WeightChange(msgspec.Struct, frozen=True, kw_only=True):
    """How weights differ from the baseline's."""

    frobenius: Measured
    """Norm of the difference."""
    relative: Measured
    """That over the norm of the baseline's weights."""
    max_abs: Measured
    cosine: Measured


class Weights(msgspec.Struct, frozen=True, kw_only=True):
    """The matrices that a component reads, as published."""

    type: Kind
    layer: int | None
    head: int | None
    rms: Measured
    frobenius: Measured
    max_abs: Measured
    mean: Measured
    std: Measured
    outlier_share: Measured
    """Share of weights beyond `outlier_sigma` standard deviations from their tensor's mean."""
    rms_q: Measured
    rms_k: Measured
    rms_v: Measured
    rms_o: Measured
    circuits: dict[str, WeightCircuit] = {}
    """Of a head, `QK` (W_Q W_K^T) and `OV` (W_V W_O)."""
    difference: WeightChange | None = None
    """From the baseline, where the scan has one."""


class WeightSummary(SummaryBase, frozen=True, kw_only=True, tag="T2"):
    """T2: what each component's weights are like."""

    outlier_sigma: float
    quantization: str | None
    """What the published file was quantised to: the values lie on its grid."""
    baseline: str | None
    data: dict[str, Weights]


def weight_summary(stored: Stored) -> WeightSummary:
    """From `weights`, `circuits`, and `difference` where there is one."""
    table = stored.tables["weights"]
    parameters = provenance_of(table).parameters
    circuits: defaultdict[str, dict[str, WeightCircuit]] = defaultdict(dict)
    for row in records(stored.tables["circuits"]):
        circuits[row["component"]][row["circuit"]] = _fields(WeightCircuit, row)
    changes: dict[str, WeightChange] = {}
    if "difference" in stored.tables:
        changes = _changes(stored.tables["difference"])
    return WeightSummary(
        **stored.shared(table),
        outlier_sigma=parameters["outlier_sigma"],
        quantization=parameters["quantization"],
        baseline=parameters["baseline"],
        data={
            row["component"]: Weights(
                type=Kind(row["kind"]),
                layer=absent(row["layer"]),
                head=absent(row["head"]),
                **{name: row[name] for name in _STATISTICS},
                circuits=circuits.get(row["component"], {}),
                difference=changes.get(row["component"]),
            )
            for row in records(table)
        },
    )


_STATISTICS = (
    "rms",
    "frobenius",
    "max_abs",
    "mean",
    "std",
    "outlier_share",
    "rms_q",
    "rms_k",
    "rms_v",
    "rms_o",
)


def _changes(table: pa.Table) -> dict[str, WeightChange]:
    return {row["component"]: _fields(WeightChange, row) for row in records(table)}


def _fields(kind: Any, row: dict[str, Any]) -> Any:
    """A struct whose fields bear the names of the table's columns."""
    return kind(**{name: row[name] for name in kind.__struct_fields__})
