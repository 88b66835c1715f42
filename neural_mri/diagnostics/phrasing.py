"""A diagnosis in words: sentences made from findings' numbers, in English or Korean."""

import math
import tomllib
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

from neural_mri.contract.findings import (
    EVERYWHERE,
    Diagnosis,
    Evidence,
    Finding,
    Interval,
    Score,
    Severity,
)
from neural_mri.contract.suites import Language

__all__ = ("Phrases", "Said", "is_boundless", "number")

_BOUNDLESS = 1e20
"""Larger is infinite, as JSON has to write it."""

_IN_PERCENT = ("share of prompts", "share of layers", "relative")


class Said(NamedTuple):
    """A finding in words."""

    title: str
    text: str
    means: str
    means_not: str
    next: str
    evidence: str


def is_boundless(interval: Interval) -> bool:
    """Whether nothing is known of where the value lies: there were too few to tell."""
    return interval.low < -_BOUNDLESS and interval.high > _BOUNDLESS


def number(value: float) -> str:
    """Three digits that count; no zeros for show."""
    if math.isnan(value):
        return "–"
    if math.isinf(value) or abs(value) > _BOUNDLESS:
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e6:
        short = f"{value:.3g}"
        shown = short if abs(float(short)) < 1000 else f"{value:,.0f}"
    else:
        shown = f"{value:.2g}"
    return shown.replace("-", "−")


class Phrases:
    """One language."""

    def __init__(self, language: Language) -> None:
        self.language = language
        words = _read(language)
        self._frame: dict[str, str] = words["report"]
        self._measures: dict[str, str] = words["measures"]
        self._units: dict[str, str] = words["units"]
        self._scans: dict[str, str] = words["scans"]
        self._quantities: dict[str, str] = words["quantities"]
        self._rules: dict[str, dict[str, str]] = words["rules"]

    def __call__(self, name: str, **filled: object) -> str:
        """A phrase of the report's frame."""
        return self._frame[name].format(**filled)

    def measure(self, name: str) -> str:
        """A measure, as a heading."""
        return self._measures[name]

    def unit(self, name: str) -> str:
        """A unit; one without a translation stands as it is."""
        return self._units.get(name, name)

    def scan(self, name: str) -> str:
        """A scan's name; a modality's is the same everywhere."""
        return self._scans.get(name, name)

    def place(self, label: str | None, diagnosis: Diagnosis) -> str:
        """Where something is: a component by its label, a case by its title, or everything at once."""
        if label is None:
            return "–"
        if label == EVERYWHERE:
            return self("all_components")
        titles = {case.id: self.of(case.title) for case in diagnosis.cases}
        return titles.get(label, label)

    def severity(self, severity: Severity | None) -> str:
        """A severity; `passed` where there is none."""
        return self("gate_passed" if severity is None else f"severity_{severity.value}")

    def of(self, texts: dict[Language, str]) -> str:
        """Of texts that come with a suite, the one in this language, or else any."""
        return texts.get(self.language) or next(iter(texts.values()), "")

    def amount(self, value: float, unit: str) -> str:
        """A number without its unit, for a sentence that has the unit in its words; shares in percent."""
        return f"{number(100 * value)} %" if unit in _IN_PERCENT else number(value)

    def quantity(self, value: float, unit: str) -> str:
        """A number with its unit."""
        amount = self.amount(value, unit)
        return amount if unit == "relative" else f"{amount} {self.unit(unit)}"

    def interval(self, interval: Interval | None, unit: str) -> str:
        """An interval's ends."""
        if interval is None:
            return "–"
        if unit in _IN_PERCENT:
            return f"{number(100 * interval.low)} – {number(100 * interval.high)} %"
        return f"{number(interval.low)} – {number(interval.high)}"

    def score(self, score: Score | None, unit: str) -> str:
        """A score with its interval, where there is one."""
        if score is None or not score.n:
            return "–"
        shown = self.amount(score.value, unit)
        if is_boundless(score.interval):
            return shown
        return f"{shown} ({self.interval(score.interval, unit)})"

    def say(self, finding: Finding, diagnosis: Diagnosis) -> Said:
        """A finding in words."""
        evidence = finding.evidence
        titles = {case.id: self.of(case.title) for case in diagnosis.cases}
        filled: dict[str, object] = {
            key: number(value) if isinstance(value, float) else value
            for key, value in finding.numbers.items()
        }
        if isinstance(share := finding.numbers.get("share"), float):
            filled["share"] = f"{100 * share:.0f} %"
        if isinstance(most := finding.numbers.get("most"), float):
            filled["most"] = self.quantity(most, evidence.unit)
        filled |= {
            "label": self.place(str(filled.get("label", "")), diagnosis),
            "case": titles.get(finding.case or "", finding.case or ""),
            "value": self.quantity(evidence.value, evidence.unit),
            "amount": self.amount(evidence.value, evidence.unit),
            "unit": self.unit(evidence.unit),
            "interval": self.interval(evidence.interval, evidence.unit),
            "component": evidence.component or "–",
            "layer": "–" if evidence.layer is None else evidence.layer,
            "n": evidence.n,
            "p": "–" if evidence.p_value is None else number(evidence.p_value),
            "quantity": self._quantities.get(evidence.quantity, evidence.quantity),
        }
        words = self._rules[finding.rule.value]
        said = {name: words[name].format(**filled) for name in Said._fields if name in words}
        # What is said of some findings of a rule and not of others.
        further = [words[f"text_{name}"] for name in finding.numbers if f"text_{name}" in words]
        said["text"] = " ".join([said["text"], *(each.format(**filled) for each in further)])
        return Said(**said, evidence=self._evidence(evidence))

    def _evidence(self, evidence: Evidence) -> str:
        parts = [
            self.measure(evidence.measure.value),
            evidence.component or "",
            self.quantity(evidence.value, evidence.unit),
        ]
        if evidence.interval is not None:
            parts.append(f"[{self.interval(evidence.interval, evidence.unit)}]")
        if evidence.noise is not None:
            parts.append(f"{self('noise').lower()} {number(evidence.noise)}")
        if evidence.p_value is not None:
            parts.append(f"p {number(evidence.p_value)}")
        if evidence.n:
            parts.append(f"n = {evidence.n}")
        parts += [
            f"{self('scan').lower()} {self.scan(evidence.scan)} {key[:16]}"
            for key in evidence.scan_keys[:1]
        ]
        return " · ".join(part for part in parts if part)


@cache
def _read(language: Language) -> dict[str, Any]:
    file = resources.files("neural_mri.diagnostics") / "phrases" / f"{language.value}.toml"
    return tomllib.loads(file.read_text("utf-8"))
