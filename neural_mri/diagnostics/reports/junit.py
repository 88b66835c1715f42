"""A diagnosis as JUnit XML: a test a gate, a test a case. What a CI system shows as red is a failed gate."""

from collections.abc import Iterator
from xml.sax.saxutils import escape, quoteattr

from neural_mri.contract.findings import Diagnosis, Finding, Severity
from neural_mri.diagnostics.phrasing import Phrases
from neural_mri.diagnostics.reports.wording import case_unit, checkpoint, legible

__all__ = ("junit",)


def junit(diagnosis: Diagnosis, phrases: Phrases) -> str:
    """The document."""
    suites = [_gates(diagnosis, phrases), _cases(diagnosis, phrases)]
    tests = sum(count for _, count, _ in suites)
    failures = sum(failed for _, _, failed in suites)
    body = "\n".join(text for text, _, _ in suites)
    return legible(
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f'<testsuites name="neural-mri {escape(diagnosis.suite)}" tests="{tests}" '
        f'failures="{failures}" errors="0">\n{body}\n</testsuites>\n'
    )


def _gates(diagnosis: Diagnosis, phrases: Phrases) -> tuple[str, int, int]:
    tests = []
    for gate in diagnosis.gates:
        mine = [
            finding
            for finding in diagnosis.findings
            if finding.evidence.measure is gate.measure
            and finding.rule.value.startswith("changed-")
        ]
        tests.append(
            _test(f"gates.{gate.measure.value}", gate.measure.value, mine, diagnosis, phrases)
        )
    other = [
        finding
        for finding in diagnosis.findings
        if finding.severity is Severity.FAILURE and not finding.rule.value.startswith("changed-")
    ]
    if other or not tests:
        tests.append(_test("gates.condition", "condition", other, diagnosis, phrases))
    failed = sum("<failure" in test for test in tests)
    return _suite("gates", tests, failed, diagnosis), len(tests), failed


def _cases(diagnosis: Diagnosis, phrases: Phrases) -> tuple[str, int, int]:
    tests = []
    for case in diagnosis.cases:
        mine = [
            finding
            for finding in diagnosis.findings
            if finding.case == case.id and not finding.rule.value.startswith("changed-")
        ]
        score = f"{phrases('score')} {phrases.score(case.score, case_unit(case))}"
        # A case of which nothing was asked has not passed.
        skipped = "" if case.asked else phrases("set_aside", count=case.set_aside)
        tests.append(_test(f"cases.{case.id}", case.id, mine, diagnosis, phrases, score, skipped))
    return _suite("cases", tests, 0, diagnosis), len(tests), 0


def _suite(name: str, tests: list[str], failed: int, diagnosis: Diagnosis) -> str:
    stamp = diagnosis.created_at.strftime("%Y-%m-%dT%H:%M:%S")
    n_skipped = sum("<skipped" in test for test in tests)
    seconds = sum(diagnosis.seconds.values())
    properties = "".join(
        f"<property name={quoteattr(key)} value={quoteattr(value)}/>"
        for key, value in (
            ("candidate", checkpoint(diagnosis.candidate)),
            ("baseline", checkpoint(diagnosis.baseline) if diagnosis.baseline else ""),
        )
    )
    inside = "\n".join(tests)
    return (
        f'  <testsuite name="{name}" tests="{len(tests)}" failures="{failed}" errors="0" '
        f'skipped="{n_skipped}" timestamp="{stamp}" time="{seconds:.3f}">\n    <properties>{properties}</properties>\n'
        f"{inside}\n  </testsuite>"
    )


def _test(
    address: str,
    name: str,
    findings: list[Finding],
    diagnosis: Diagnosis,
    phrases: Phrases,
    said_first: str = "",
    skipped: str = "",
) -> str:
    failures = [finding for finding in findings if finding.severity is Severity.FAILURE]
    others = [finding for finding in findings if finding.severity is not Severity.FAILURE]
    lines = [f"<skipped message={quoteattr(skipped)}/>"] if skipped else []
    for finding in failures:
        said = phrases.say(finding, diagnosis)
        body = escape(f"{said.text}\n{said.evidence}\n{phrases('next')}: {said.next}")
        lines.append(
            f"<failure type={quoteattr(finding.rule.value)} message={quoteattr(said.title)}>{body}</failure>"
        )
    output = "\n".join([said_first, *_told(others, diagnosis, phrases)]).strip()
    if output:
        lines.append(f"<system-out>{escape(output)}</system-out>")
    classname = quoteattr(f"neural-mri.{diagnosis.suite}.{address.partition('.')[0]}")
    inside = "".join(f"\n      {line}" for line in lines)
    end = "\n    " if lines else ""
    return f"    <testcase classname={classname} name={quoteattr(name)}>{inside}{end}</testcase>"


def _told(findings: list[Finding], diagnosis: Diagnosis, phrases: Phrases) -> Iterator[str]:
    for finding in findings:
        said = phrases.say(finding, diagnosis)
        yield f"[{phrases.severity(finding.severity)}] {said.title}. {said.text}"
