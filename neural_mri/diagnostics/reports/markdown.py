"""A diagnosis in Markdown: short enough for a pull request's comment, whole enough to act on."""

import re
from collections.abc import Iterator, Sequence
from html import escape

from neural_mri.contract.findings import Diagnosis, Severity
from neural_mri.diagnostics.phrasing import Phrases, number
from neural_mri.diagnostics.reports.wording import case_unit, checkpoint, legible, verdict

__all__ = ("markdown",)

_SIGNS = {Severity.FAILURE: "🔴", Severity.WARNING: "🟠", Severity.NOTE: "⚪", None: "🟢"}
_MARKUP = re.compile(r"[\\`*\[~]|(?<![^\W_])_|_(?![^\W_])")
"""What makes markup of a line's inside; an underscore does at a word's end alone, so that addresses stay as they are."""
_LINE_ENDS = re.compile(r"\r\n|\r|\n")
MOST_FINDINGS = 20


def markdown(diagnosis: Diagnosis, phrases: Phrases) -> str:
    """The report."""
    return legible("\n".join(_lines(diagnosis, phrases)) + "\n")


def _lines(diagnosis: Diagnosis, phrases: Phrases) -> Iterator[str]:
    sign = "🟢" if diagnosis.passed else "🔴"
    title = phrases.of(diagnosis.suite_title)
    yield f"## {sign} Neural MRI · {phrases('title')}: {verdict(diagnosis, phrases)}"
    yield ""
    yield (
        f"{phrases('candidate')} **{_text(checkpoint(diagnosis.candidate))}**"
        + (
            f" · {phrases('baseline')} **{_text(checkpoint(diagnosis.baseline))}**"
            if diagnosis.baseline
            else ""
        )
        + f" · {phrases('suite')} {_text(title)} {diagnosis.suite_version}"
    )
    if diagnosis.gates:
        yield ""
        yield f"### {phrases('gates')}"
        yield ""
        yield from _table(
            [
                phrases(key)
                for key in ("measure", "outcome", "changed", "largest", "noise", "p_value", "where")
            ],
            [
                (
                    phrases.measure(gate.measure.value),
                    f"{_SIGNS[gate.severity]} {phrases.severity(gate.severity)}",
                    f"{gate.changed} / {gate.tested}",
                    phrases.quantity(gate.largest, gate.unit),
                    number(gate.noise),
                    number(gate.p_value),
                    phrases.place(gate.where, diagnosis),
                )
                for gate in diagnosis.gates
            ],
        )
        yield ""
        yield phrases("gates_about", tests=diagnosis.tests, alpha=number(diagnosis.alpha))
    yield ""
    yield f"### {phrases('findings')}"
    if not diagnosis.findings:
        yield ""
        yield phrases("none")
    for finding in diagnosis.findings[:MOST_FINDINGS]:
        said = phrases.say(finding, diagnosis)
        yield ""
        yield f"<details><summary>{_SIGNS[finding.severity]} <b>{_html(said.title)}</b></summary>"
        yield ""
        yield _text(said.text)
        yield ""
        yield f"- **{phrases('means')}**: {_text(said.means)}"
        yield f"- **{phrases('means_not')}**: {_text(said.means_not)}"
        yield f"- **{phrases('next')}**: {_text(said.next)}"
        yield f"- **{phrases('evidence')}**: {_text(said.evidence)}"
        if finding.evidence.prompt:
            yield f"- **{phrases('prompt')}**: {_code(finding.evidence.prompt)}"
        yield ""
        yield "</details>"
    if len(diagnosis.findings) > MOST_FINDINGS:
        yield ""
        yield f"… +{len(diagnosis.findings) - MOST_FINDINGS}"
    yield ""
    yield f"### {phrases('cases')}"
    yield ""
    compared = diagnosis.baseline is not None
    heads = ["case", "score", "chance", *(["before"] if compared else []), "carriers", "settles"]
    yield from _table(
        [phrases(key) for key in heads],
        [
            (
                phrases.of(case.title),
                phrases.score(case.score, case_unit(case)),
                number(case.chance),
                *([phrases.score(case.baseline, case_unit(case))] if compared else []),
                ", ".join(each.label for each in case.carriers[:3]) or "–",
                phrases.score(case.settles, "share of layers"),
            )
            for case in diagnosis.cases
        ],
    )
    yield from _set_aside(diagnosis, phrases)
    yield ""
    yield f"<sub>{phrases('foot')}</sub>"


def _set_aside(diagnosis: Diagnosis, phrases: Phrases) -> Iterator[str]:
    """Why a case has fewer prompts than its suite says, or none."""
    cases = [case for case in diagnosis.cases if case.set_aside]
    if cases:
        yield ""
    for case in cases:
        yield f"- {_text(phrases.of(case.title))}: {phrases('set_aside', count=case.set_aside)}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(heads) + " |"
    yield "|" + "---|" * len(heads)
    for row in rows:
        yield "| " + " | ".join(_text(cell).replace("|", "\\|") for cell in row) + " |"


def _text(text: str) -> str:
    """Text that cannot be markup: what a suite says is somebody's."""
    return _MARKUP.sub(r"\\\g<0>", _html(text))


def _html(text: str) -> str:
    """The same within a line of HTML, where Markdown's own signs are letters."""
    return _LINE_ENDS.sub(" ", escape(text, quote=False))


def _code(text: str) -> str:
    """A code span, fenced by more backticks than the text has in a row."""
    fence = "`"
    while fence in text:
        fence += "`"
    return f"{fence} {_LINE_ENDS.sub('⏎', text)} {fence}"
