"""From records to a diagnosis: cases, gates, findings ranked, and the numbers behind the pictures."""

from collections.abc import Iterator
from datetime import UTC, datetime

from msgspec.structs import replace

from neural_mri.contract.findings import Diagnosis, Finding, GateOutcome, Severity
from neural_mri.contract.suites import Suite
from neural_mri.diagnostics.alterations import altered, gate_outcomes
from neural_mri.diagnostics.comparison import compare
from neural_mri.diagnostics.conditions import conditions
from neural_mri.diagnostics.grids import grids, trajectories
from neural_mri.diagnostics.outcomes import case_outcome
from neural_mri.diagnostics.records import Record

__all__ = ("diagnose",)

_RANK = {Severity.FAILURE: 0, Severity.WARNING: 1, Severity.NOTE: 2}


def diagnose(
    suite: Suite,
    candidate: Record,
    baseline: Record | None = None,
    *,
    profile: str | None = None,
    created_at: datetime | None = None,
    seconds: dict[str, float] | None = None,
) -> Diagnosis:
    """What the records say: of the candidate, and where there is a baseline, of what changed from it.

    Raises `NotComparable` where the two cannot be compared, and `InvalidRequest` for an unknown profile.
    """
    comparison = None
    if baseline is not None:
        comparison = compare(suite, candidate, baseline, profile=profile)
    p_values = {} if comparison is None else {each.case: each.p_value for each in comparison.scores}
    cases = tuple(
        replace(case_outcome(case, candidate, baseline), p_value=p_values.get(case.id))
        for case in suite.cases
    )
    findings = list(conditions(suite, candidate, cases))
    gates: tuple[GateOutcome, ...] = ()
    if comparison is not None:
        findings += altered(suite, comparison, candidate, cases, profile)
        gates = tuple(gate_outcomes(suite, comparison, findings, profile))
    return Diagnosis(
        suite=suite.name,
        suite_version=suite.version,
        suite_digest=suite.digest,
        suite_title=suite.title,
        created_at=created_at or datetime.now(UTC),
        candidate=candidate.subject,
        baseline=None if baseline is None else baseline.subject,
        profile=profile,
        passed=all(finding.severity is not Severity.FAILURE for finding in findings),
        alpha=suite.alpha,
        tests=0 if comparison is None else comparison.n_tests,
        cases=cases,
        gates=gates,
        findings=tuple(_ranked(findings)),
        grids=tuple(grids(suite, candidate, comparison)),
        trajectories=tuple(trajectories(candidate, baseline)),
        seconds=seconds or {},
    )


def _ranked(findings: list[Finding]) -> Iterator[Finding]:
    yield from sorted(findings, key=lambda each: (_RANK[each.severity], -each.strength))
