"""Small phrases that several forms of the report share."""

from neural_mri.contract.baselines import Subject
from neural_mri.contract.findings import CaseOutcome, Diagnosis
from neural_mri.contract.suites import Expectation
from neural_mri.diagnostics.phrasing import Phrases

__all__ = ("case_unit", "checkpoint", "verdict")


def checkpoint(subject: Subject) -> str:
    """Name and the first digits of its weights' digest."""
    return f"{subject.model} @ {subject.revision[:12]}"


def case_unit(case: CaseOutcome) -> str:
    """What a case's score is counted in."""
    match case.expectation:
        case Expectation.BALANCE:
            return "nats"
        case Expectation.AWARENESS:
            return "AUROC"
        case _:
            return "share of prompts"


def verdict(diagnosis: Diagnosis, phrases: Phrases) -> str:
    """`passed` or `failed`; without a baseline nothing was gated."""
    if diagnosis.baseline is None and diagnosis.passed:
        return phrases("no_gate")
    return phrases("passed" if diagnosis.passed else "failed")
