"""Jobs to test with."""

from typing import Any

from neural_mri.backing.jobs import LeaseOwner, Submission
from neural_mri.contract.jobs import JobKind
from neural_mri.contract.tokens import Span, Tokens

__all__ = ("ELSEWHERE", "QUEUE", "submission", "tokens")

QUEUE = "scan.0123456789abcdef"
ELSEWHERE = LeaseOwner("another-host", 4242, 99)
"""A process of which nothing can be proved here."""


def tokens(count: int) -> Tokens:
    return Tokens(
        ids=tuple(range(count)),
        texts=tuple(f"t{index}" for index in range(count)),
        spans=tuple(Span(2 * index, 2 * index + 2) for index in range(count)),
    )


def submission(**changes: Any) -> Submission:
    fields = {
        "owner": "ada",
        "kind": JobKind.SCAN,
        "model": "tiny",
        "revision": "0123456789abcdef" * 4,
        "queue": QUEUE,
        "request": b'{"scan_mode":"fMRI","prompt":"Hello","model":"tiny"}',
        "tokens": tokens(8),
    }
    return Submission(**{**fields, **changes})
