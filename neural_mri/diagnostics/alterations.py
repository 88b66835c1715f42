"""Findings about what changed from the baseline. Each names the component it stands on.

Norms and attention patterns are computed in order: what lies before the place that changed is as it was, so
the first component that left the noise is where the change is. What follows it is its consequence.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from msgspec.structs import replace

from neural_mri.contract.components import Component, Kind
from neural_mri.contract.findings import (
    EVERYWHERE,
    CaseOutcome,
    Evidence,
    Finding,
    GateOutcome,
    Rule,
    Severity,
)
from neural_mri.contract.problems import InvalidAddress
from neural_mri.contract.suites import GATED, Measure, Suite, Verdict
from neural_mri.diagnostics.comparison import Comparison, Tested, WeightChange
from neural_mri.diagnostics.records import Record
from neural_mri.diagnostics.statistics import rms_score

__all__ = ("altered", "gate_outcomes")

_SCAN = {
    Measure.NORMS: "fMRI",
    Measure.ATTENTION: "attention",
    Measure.LENS: "FLAIR",
    Measure.ATTRIBUTION: "DTI",
    Measure.RISK: "FLAIR",
    Measure.SCORES: "FLAIR",
    Measure.WEIGHTS: "T2",
}
_RULE = {
    Measure.ATTENTION: Rule.CHANGED_ATTENTION,
    Measure.LENS: Rule.CHANGED_LENS,
    Measure.ATTRIBUTION: Rule.CHANGED_ATTRIBUTION,
    Measure.RISK: Rule.CHANGED_RISK,
    Measure.SCORES: Rule.CHANGED_SCORE,
}
_BY_VERDICT = {Verdict.FAIL: Severity.FAILURE, Verdict.WARN: Severity.WARNING}


def altered(
    suite: Suite,
    comparison: Comparison,
    candidate: Record,
    cases: Sequence[CaseOutcome],
    profile: str | None,
) -> Iterator[Finding]:
    """Everything that changed by more than its gate allows; nothing of gates that are ignored."""
    for tested in _telling(comparison):
        severity = _BY_VERDICT.get(suite.gate(tested.quantity.measure, profile).verdict)
        if severity is not None:
            yield from _of_tested(suite, tested, candidate, severity)
    yield from _of_scores(suite, comparison, candidate, cases, profile)
    severity = _BY_VERDICT.get(suite.gate(Measure.WEIGHTS, profile).verdict)
    if severity is not None and comparison.weights:
        yield _of_weights(comparison, severity)


def _telling(comparison: Comparison) -> list[Tested]:
    """Of each measure's quantities that changed, the one farthest beyond its noise; ranks for themselves."""
    found: dict[tuple[Measure, bool], Tested] = {}
    for tested in comparison.tested:
        if not len(tested.changed):
            continue
        kind = (tested.quantity.measure, tested.quantity.name == "ranks")
        if kind not in found or _tells(tested) > _tells(found[kind]):
            found[kind] = tested
    return list(found.values())


def _tells(tested: Tested) -> tuple[bool, float]:
    """How well a quantity says where the change is: a divergence from the end changes with the end."""
    return tested.quantity.name != "kl", _ratio(tested)


def _ratio(tested: Tested) -> float:
    return float((tested.effect / tested.noise).max())


def _of_tested(
    suite: Suite, tested: Tested, record: Record, severity: Severity
) -> Iterator[Finding]:
    changed = tested.changed
    if tested.quantity.measure is not Measure.NORMS or (origin := tested.origin) is None:
        most = int(changed[np.argmax((tested.effect / tested.noise)[changed])])
        rule = (
            Rule.CHANGED_RANKS
            if tested.quantity.name == "ranks"
            else _RULE[tested.quantity.measure]
        )
        yield _finding(suite, tested, record, most, rule, severity)
        return
    found = _finding(suite, tested, record, origin, Rule.CHANGED_AT, severity)
    if origin not in changed:
        largest = int(changed[np.argmax(tested.effect[changed])])
        numbers = {
            "most": float(tested.effect[largest]),
            "most_label": Component.parse(tested.components[largest]).label,
        }
        found = replace(found, numbers=found.numbers | numbers)
    yield found
    later = [int(index) for index in changed if tested.step(index) > tested.step(origin)]
    if later:
        most = max(later, key=lambda index: tested.effect[index])
        yield _finding(suite, tested, record, most, Rule.CHANGED_DOWNSTREAM, Severity.NOTE)


def _finding(
    suite: Suite, tested: Tested, record: Record, index: int, rule: Rule, severity: Severity
) -> Finding:
    measure = tested.quantity.measure
    column = tested.distances[:, index]
    shown = tested.prompts[int(np.argmax(np.abs(column)))]
    place = _place(tested.components[index])
    score = rms_score(column)
    ratio = float(tested.effect[index] / tested.noise[index])
    return Finding(
        rule=rule,
        severity=severity,
        case=shown.rpartition("/")[0] or None,
        strength=_ORDER[rule] * 1e6 + min(ratio, 1e5),
        evidence=Evidence(
            measure=measure,
            quantity=tested.quantity.name,
            scan=_SCAN[measure],
            component=tested.components[index] or None,
            layer=place.layer if place else None,
            head=place.index if place and place.kind is Kind.HEAD else None,
            value=float(tested.effect[index]),
            unit=tested.unit,
            interval=score.interval,
            p_value=float(tested.adjusted[index]),
            noise=float(tested.noise[index]),
            n=len(tested.prompts),
            scan_keys=record.scan_key(_SCAN[measure], shown),
            prompt=prompt_text(suite, shown),
        ),
        numbers={
            "label": place.label if place else tested.components[index] or EVERYWHERE,
            "changed": len(tested.changed),
            "tested": len(tested.components),
            "mean": float(np.clip(column.mean(), -1e30, 1e30)),
            "ratio": ratio,
        },
    )


_ORDER = {
    Rule.CHANGED_AT: 9,
    Rule.CHANGED_SCORE: 8,
    Rule.CHANGED_LENS: 7,
    Rule.CHANGED_ATTRIBUTION: 6,
    Rule.CHANGED_RANKS: 5,
    Rule.CHANGED_ATTENTION: 4,
    Rule.CHANGED_RISK: 3,
    Rule.CHANGED_DOWNSTREAM: 2,
    Rule.CHANGED_WEIGHTS: 1,
}
"""Where it began comes first."""


def prompt_text(suite: Suite, name: str) -> str:
    """The prompt of that name."""
    case, _, number = name.rpartition("/")
    return suite.case(case).items[int(number)].prompt


def _place(name: str) -> Component | None:
    try:
        return Component.parse(name)
    except InvalidAddress:
        return None


def _of_scores(
    suite: Suite,
    comparison: Comparison,
    candidate: Record,
    cases: Sequence[CaseOutcome],
    profile: str | None,
) -> Iterator[Finding]:
    """Cases that are answered rightly more often, or less."""
    gate = suite.gate(Measure.SCORES, profile)
    severity = _BY_VERDICT.get(gate.verdict)
    outcomes = {case.id: case for case in cases}
    for change in comparison.scores:
        outcome = outcomes[change.case]
        difference = float(change.after.mean() - change.before.mean())
        tolerated = abs(difference) <= gate.share_tolerance
        if severity is None or change.p_value >= suite.alpha or tolerated:
            continue
        better = difference > 0
        yield Finding(
            rule=Rule.CHANGED_SCORE,
            severity=Severity.NOTE if better else severity,
            case=change.case,
            strength=_ORDER[Rule.CHANGED_SCORE] * 1e6 + 1e5 + abs(difference),
            evidence=Evidence(
                measure=Measure.SCORES,
                quantity="right",
                scan="FLAIR",
                value=difference,
                unit="share of prompts",
                interval=outcome.change.interval if outcome.change else None,
                p_value=change.p_value,
                n=len(change.after),
                scan_keys=candidate.scan_key("FLAIR", f"{change.case}/0"),
            ),
            numbers={
                "label": outcome.id,
                "before": float(change.before.mean()),
                "after": float(change.after.mean()),
                "changed": int((change.after != change.before).sum()),
                "tested": len(change.after),
            },
        )


def _of_weights(comparison: Comparison, severity: Severity) -> Finding:
    change = _most_local(comparison.weights)
    place = _place(change.name.partition(":")[0])
    return Finding(
        rule=Rule.CHANGED_WEIGHTS,
        severity=severity,
        strength=_ORDER[Rule.CHANGED_WEIGHTS] * 1e6 + change.relative,
        evidence=Evidence(
            measure=Measure.WEIGHTS,
            quantity=change.statistic,
            scan="T2",
            component=str(place) if place else change.name,
            layer=place.layer if place else None,
            head=place.index if place and place.kind is Kind.HEAD else None,
            value=change.relative,
            unit="relative",
            p_value=0.0,
            noise=0.0,
        ),
        numbers={
            "label": place.label if place else change.name,
            "name": change.name,
            "changed": len(comparison.weights),
            "tested": comparison.n_weights,
        },
    )


def _most_local(changes: Sequence[WeightChange]) -> WeightChange:
    """A head, where one changed: its layer's attention and its tensor changed with it."""
    heads = [
        change
        for change in changes
        if (place := _place(change.name)) is not None and place.kind is Kind.HEAD
    ]
    return (heads or list(changes))[0]


def gate_outcomes(
    suite: Suite, comparison: Comparison, findings: Sequence[Finding], profile: str | None
) -> Iterator[GateOutcome]:
    """A line for each measure that was compared."""
    for measure in GATED:
        tested = [each for each in comparison.tested if each.quantity.measure is measure]
        mine = [each for each in findings if each.evidence.measure is measure and _is_change(each)]
        worst = min(
            (each.severity for each in mine if each.severity is not Severity.NOTE),
            key=list(Severity).index,
            default=None,
        )
        lead = max(mine, key=lambda each: each.strength, default=None)
        where = lead.numbers.get("label") if lead is not None else None
        gate = suite.gate(measure, profile)
        if measure is Measure.WEIGHTS and comparison.n_weights:
            changes = comparison.weights
            yield GateOutcome(
                measure=measure,
                severity=worst,
                tested=comparison.n_weights,
                changed=len(changes),
                largest=changes[0].relative if changes else 0.0,
                unit="relative",
                noise=0.0,
                tolerance=gate.tolerance,
                p_value=0.0 if changes else 1.0,
                where=None if where is None else str(where),
            )
        elif tested:
            # The quantity that decides is the one that lies farthest beyond its noise.
            deciding = max(tested, key=_ratio)
            yield GateOutcome(
                measure=measure,
                severity=worst,
                tested=sum(len(each.components) for each in tested),
                changed=sum(len(each.changed) for each in tested),
                largest=float(min(deciding.effect.max(), 1e30)),
                unit=deciding.unit,
                noise=float(np.median(deciding.noise)),
                tolerance=gate.tolerance,
                p_value=float(min(each.adjusted.min() for each in tested)),
                where=None if where is None else str(where),
            )


def _is_change(finding: Finding) -> bool:
    return finding.rule.value.startswith("changed-")
