"""What several forms of the report share: small phrases, and what becomes of letters that nobody can see."""

import re

from neural_mri.contract.baselines import Subject
from neural_mri.contract.findings import CaseOutcome, Diagnosis
from neural_mri.contract.suites import Expectation
from neural_mri.diagnostics.phrasing import Phrases

__all__ = ("case_unit", "checkpoint", "legible", "verdict")

_UNSEEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufffe\uffff]")
"""Controls, which XML may not hold; and marks that write what follows the other way round."""
_PICTURES = 0x2400
"""From here on Unicode has a sign for each control."""


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


def legible(text: str) -> str:
    """A document with signs in the place of letters that nobody can see."""
    return _UNSEEN.sub(_sign, text)


def _sign(unseen: re.Match[str]) -> str:
    letter = ord(unseen[0])
    return chr(_PICTURES + letter) if letter < ord(" ") else "\ufffd"


def verdict(diagnosis: Diagnosis, phrases: Phrases) -> str:
    """`passed` or `failed`; without a baseline nothing was gated."""
    if diagnosis.baseline is None and diagnosis.passed:
        return phrases("no_gate")
    return phrases("passed" if diagnosis.passed else "failed")
