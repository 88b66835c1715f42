"""Finished scans as text, a module a scan: what a person wants to know first, each number with its unit."""

from neural_mri.cli.reports.calibration import print_calibration
from neural_mri.cli.reports.circuits import print_circuit
from neural_mri.cli.reports.lens import print_lens
from neural_mri.cli.reports.restoration import print_restoration
from neural_mri.cli.reports.stimulation import print_comparison
from neural_mri.cli.reports.weights import print_weights

__all__ = (
    "print_calibration",
    "print_circuit",
    "print_comparison",
    "print_lens",
    "print_restoration",
    "print_weights",
)
