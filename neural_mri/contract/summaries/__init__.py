"""A result in short: what a shell, a notebook or a report reads without an Arrow reader.

A module a modality. The numbers are the tables' own float32 values, exactly; where a table says NaN, not
measured, JSON says null. Tensors are never inlined: they are named by URL, as every table is.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

import pyarrow as pa

from neural_mri.contract.models import Architecture
from neural_mri.contract.results import Manifest, TableRef
from neural_mri.contract.scans import ScanKind
from neural_mri.contract.summaries import (
    activations,
    anomalies,
    calibration,
    circuits,
    maps,
    perturbation,
    topology,
    weights,
)
from neural_mri.contract.summaries.activations import ActivationSummary, activation_summary
from neural_mri.contract.summaries.anomalies import AnomalySummary, anomaly_summary
from neural_mri.contract.summaries.attention import AttentionSummary, attention_summary
from neural_mri.contract.summaries.base import Metadata, Stored
from neural_mri.contract.summaries.calibration import CalibrationSummary, calibration_summary
from neural_mri.contract.summaries.circuits import CircuitSummary, circuit_summary
from neural_mri.contract.summaries.maps import (
    PatchingSummary,
    TracingSummary,
    patching_summary,
    tracing_summary,
)
from neural_mri.contract.summaries.perturbation import PerturbationSummary, perturbation_summary
from neural_mri.contract.summaries.topology import TopologySummary, topology_summary
from neural_mri.contract.summaries.weights import WeightSummary, weight_summary

__all__ = (
    "ActivationSummary",
    "AnomalySummary",
    "AttentionSummary",
    "CalibrationSummary",
    "CircuitSummary",
    "Metadata",
    "PatchingSummary",
    "PerturbationSummary",
    "Summary",
    "TopologySummary",
    "TracingSummary",
    "WeightSummary",
    "main_table",
    "summarise",
    "tables_needed",
)

Summary: TypeAlias = (
    TopologySummary
    | WeightSummary
    | ActivationSummary
    | AttentionSummary
    | CircuitSummary
    | AnomalySummary
    | PerturbationSummary
    | PatchingSummary
    | TracingSummary
    | CalibrationSummary
)


class _Reading(NamedTuple):
    """How results of one kind are read."""

    tables: tuple[str, ...]
    """What a summary reads of them: the small ones. The first is what the result is mainly about."""
    summarise: Callable[[Stored], Summary]


def main_table(manifest: Manifest) -> TableRef:
    """The table that a result is mainly about."""
    (name, *_) = _reading(manifest).tables
    return next((ref for ref in manifest.tables if ref.name == name), manifest.tables[0])


def tables_needed(manifest: Manifest) -> tuple[str, ...]:
    """Names of the tables that a summary reads: the small ones."""
    wanted = _reading(manifest).tables
    return tuple(ref.name for ref in manifest.tables if ref.name in wanted)


def summarise(
    manifest: Manifest, tables: Mapping[str, pa.Table], architecture: Architecture, *, job_url: str
) -> Summary:
    """The summary of a result, from the tables that `tables_needed` names.

    Args:
        manifest: The result's manifest.
        tables: Its tables by name.
        architecture: Of the model that was scanned.
        job_url: Address of the job, without a trailing slash: URLs of tables and tensors begin with it.
    """
    return _reading(manifest).summarise(Stored(manifest, tables, architecture, job_url))


def _reading(manifest: Manifest) -> _Reading:  # noqa: C901  # a case a kind
    match manifest.kind:
        case ScanKind.T1:
            return _Reading(topology.TABLES, topology_summary)
        case ScanKind.T2:
            return _Reading(weights.TABLES, weight_summary)
        case ScanKind.FMRI:
            return _Reading(activations.TABLES, activation_summary)
        case ScanKind.ATTENTION:
            # A table a layer, all alike.
            return _Reading((manifest.tables[0].name,), attention_summary)
        case ScanKind.DTI:
            return _Reading(circuits.TABLES, circuit_summary)
        case ScanKind.FLAIR:
            return _Reading(anomalies.TABLES, anomaly_summary)
        case ScanKind.PERTURBATION:
            return _Reading(perturbation.TABLES, perturbation_summary)
        case ScanKind.PATCHING:
            return _Reading(maps.PATCHING_TABLES, patching_summary)
        case ScanKind.TRACING:
            return _Reading(maps.TRACING_TABLES, tracing_summary)
        case ScanKind.CALIBRATION:
            return _Reading(calibration.TABLES, calibration_summary)
