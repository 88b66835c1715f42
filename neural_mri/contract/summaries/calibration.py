"""A calibration in short: where it comes from. Its tables are for programs."""

from neural_mri.contract.anomalies import Lens
from neural_mri.contract.results import provenance_of
from neural_mri.contract.summaries.base import Stored, SummaryBase

__all__ = ("TABLES", "CalibrationSummary", "calibration_summary")

TABLES = ("calibration_ordinary",)
"""Every table of a calibration says where it comes from; this one is small."""


class CalibrationSummary(SummaryBase, frozen=True, kw_only=True, tag="calibration"):
    """What scans of a model are read against."""

    key: str
    """Name it in a scan's `calibration` to have the scan read against this one."""
    source: str
    """`sampled` from the model itself, or given `texts`."""
    seed: int
    n_tokens: int
    """Of reference text."""
    n_positions: int
    """At which means were taken: 1 and later of each text."""
    lenses: tuple[Lens, ...]
    """Lenses whose ordinary values it holds: what they show can be called anomalous."""


def calibration_summary(stored: Stored) -> CalibrationSummary:
    """From what `calibration_ordinary` says of itself."""
    table = stored.tables["calibration_ordinary"]
    facts = provenance_of(table).parameters
    return CalibrationSummary(
        **stored.shared(table),
        key=stored.manifest.scan_key,
        source=facts["source"],
        seed=facts["seed"],
        n_tokens=facts["n_tokens"],
        n_positions=facts["n_positions"],
        lenses=tuple(Lens(lens) for lens in stored.manifest.request["lenses"]),
    )
