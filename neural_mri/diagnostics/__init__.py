"""Diagnoses: from a suite's prompts and the scanner's tables to findings, gates and reports.

Knows the contract, numpy and pyarrow. It asks for scans through `Scans` and never learns whether a service
or a process of its own answers; what it measured of a checkpoint is a `Record`, kept under its key.
"""

from neural_mri.diagnostics.catalogue import load_suite, suite_names
from neural_mri.diagnostics.diagnosis import diagnose
from neural_mri.diagnostics.measuring import Scanned, Scans, measure
from neural_mri.diagnostics.records import Record, Records
from neural_mri.diagnostics.reports import FORMATS, render

__all__ = (
    "FORMATS",
    "Record",
    "Records",
    "Scanned",
    "Scans",
    "diagnose",
    "load_suite",
    "measure",
    "render",
    "suite_names",
)
