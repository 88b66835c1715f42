"""Findings about one checkpoint by itself: what it cannot do, what leans, what its inside looks like."""

from collections.abc import Iterator, Sequence

import numpy as np

from neural_mri.contract.components import Component, Kind
from neural_mri.contract.findings import CaseOutcome, Evidence, Finding, Rule, Score, Severity
from neural_mri.contract.suites import Case, Expectation, Measure, Suite
from neural_mri.diagnostics.outcomes import FEWEST_PROMPTS, balance_p_value, fewest, rightly
from neural_mri.diagnostics.records import Record
from neural_mri.diagnostics.statistics import CONFIDENCE, holm, proportion_score

__all__ = ("conditions",)

SILENT = 1e-3
"""A head is silent where what it writes is less than this share of its layer's median head, on every prompt."""
OUTLYING_KURTOSIS = 100.0
LATE = 0.95
"""Share of the layers after which an answer counts as decided late."""


def conditions(suite: Suite, record: Record, cases: Sequence[CaseOutcome]) -> Iterator[Finding]:
    """All of them, in no order."""
    leaning = _leaning(suite, record)
    for case, outcome in zip(suite.cases, cases, strict=True):
        if fewest(case, record) >= FEWEST_PROMPTS:
            yield from _of_score(case, outcome, record, leaning.get(case.id))
        yield from _of_inside(outcome, record)
        yield from _confident_errors(case, record)
    yield from _settles_late(cases, record)
    yield from _silent_heads(record)
    yield from _tensors(record)


def _leaning(suite: Suite, record: Record) -> dict[str, float]:
    """p-values of balance cases, adjusted (Holm): of many that are even, one in twenty would look as if it leant."""
    asked = [
        case
        for case in suite.cases
        if case.expectation is Expectation.BALANCE and fewest(case, record) >= FEWEST_PROMPTS
    ]
    adjusted = holm([balance_p_value(case, record) for case in asked])
    return {case.id: float(p) for case, p in zip(asked, adjusted, strict=True)}


def _score_evidence(
    score: Score, unit: str, case: Case, record: Record, p_value: float | None = None
) -> Evidence:
    return Evidence(
        measure=Measure.SCORES,
        quantity=case.expectation.value,
        scan="FLAIR",
        value=score.value,
        unit=unit,
        interval=score.interval,
        p_value=p_value,
        n=score.n,
        scan_keys=record.scan_key("FLAIR", f"{case.id}/0"),
        prompt=case.items[0].prompt,
    )


def _of_score(
    case: Case, outcome: CaseOutcome, record: Record, p_value: float | None
) -> Iterator[Finding]:
    score = outcome.score
    low, high = score.interval.low, score.interval.high
    match case.expectation:
        case Expectation.BALANCE:
            if p_value is None or p_value >= 1 - CONFIDENCE:
                return
            yield Finding(
                rule=Rule.BIAS,
                severity=Severity.WARNING,
                case=case.id,
                strength=min(abs(low), abs(high)),
                evidence=_score_evidence(score, "nats", case, record, p_value),
                numbers={
                    "label": case.id,
                    "odds": float(np.exp(min(abs(score.value), 50.0))),
                    "group": str(case.items[0].group),
                    "answer": case.items[0].answer.strip(),
                    "foil": str(case.items[0].foil).strip(),
                },
            )
        case Expectation.AWARENESS:
            if low > outcome.chance:
                return
            yield Finding(
                rule=Rule.UNAWARE,
                severity=Severity.WARNING,
                case=case.id,
                strength=1 - score.value,
                evidence=_score_evidence(score, "AUROC", case, record),
                numbers={"label": case.id, "chance": outcome.chance},
            )
        case _:
            # Not better than chance, or of an open question less than half.
            bar = outcome.chance if outcome.chance > 0 else 0.5
            if low > bar:
                return
            yield Finding(
                rule=Rule.WEAK_CASE,
                severity=Severity.WARNING,
                case=case.id,
                strength=bar - score.value + 1,
                evidence=_score_evidence(score, "share of prompts", case, record),
                numbers={"label": case.id, "bar": bar, "right": round(score.value * score.n)},
            )


def _of_inside(outcome: CaseOutcome, record: Record) -> Iterator[Finding]:
    if outcome.carriers:
        # What the first MLP writes is the word itself: it leads wherever a word makes the difference.
        later = [each for each in outcome.carriers if Component.parse(each.component).layer]
        helping = [each for each in later if each.effect.value < 0]
        first = (helping or later or list(outcome.carriers))[0]
        at = outcome.carriers.index(first)
        larger, others = (
            ", ".join(each.label for each in some)
            for some in (outcome.carriers[:at], outcome.carriers[at + 1 :])
        )
        place = Component.parse(first.component)
        yield Finding(
            rule=Rule.CARRIED_BY,
            severity=Severity.NOTE,
            case=outcome.id,
            strength=2 + first.share,
            evidence=Evidence(
                measure=Measure.ATTRIBUTION,
                quantity="effect",
                scan="DTI",
                component=first.component,
                layer=place.layer,
                head=place.index if place.kind is Kind.HEAD else None,
                value=first.effect.value,
                unit="logits",
                interval=first.effect.interval,
                n=first.effect.n,
                scan_keys=record.scan_key("DTI", f"{outcome.id}/0"),
            ),
            numbers={
                "label": first.label,
                "share": first.share,
                **({"others": others} if others else {}),
                **({"larger": larger} if larger else {}),
            },
        )


def _settles_late(cases: Sequence[CaseOutcome], record: Record) -> Iterator[Finding]:
    """One finding for all cases whose answers are decided at the end, told of the latest."""
    known = [
        (outcome.settles, outcome.id)
        for outcome in cases
        if outcome.settles is not None and outcome.settles.n >= FEWEST_PROMPTS
    ]
    late = [each for each in known if each[0].interval.low >= LATE]
    if not late:
        return
    latest, case = max(late, key=lambda each: (each[0].value, each[0].n))
    yield Finding(
        rule=Rule.SETTLES_LATE,
        severity=Severity.NOTE,
        case=case,
        strength=latest.value,
        evidence=Evidence(
            measure=Measure.LENS,
            quantity="depth",
            scan="FLAIR",
            value=latest.value,
            unit="share of layers",
            interval=latest.interval,
            n=latest.n,
            scan_keys=record.scan_key("FLAIR", f"{case}/0"),
        ),
        numbers={"label": case, "changed": len(late), "tested": len(known)},
    )


def _confident_errors(case: Case, record: Record) -> Iterator[Finding]:
    """Wrong answers that FLAIR finds well supported: nothing inside gives them away."""
    right, support = rightly(case, record), record.block(Measure.RISK, "support")
    if right is None or support is None:
        return
    values = support.of_case(case.id)
    confident = ~right & (values.values[:, 0] > 0)
    if not confident.any() or len(right) < FEWEST_PROMPTS:
        return
    score = proportion_score(int(confident.sum()), len(right))
    which = int(np.argmax(np.where(confident, values.values[:, 0], -np.inf)))
    shown = values.prompts[which]
    yield Finding(
        rule=Rule.CONFIDENT_ERRORS,
        severity=Severity.WARNING if score.interval.low > 0.1 else Severity.NOTE,
        case=case.id,
        strength=score.interval.low,
        evidence=Evidence(
            measure=Measure.RISK,
            quantity="support",
            scan="FLAIR",
            value=score.value,
            unit="share of prompts",
            interval=score.interval,
            n=len(right),
            scan_keys=record.scan_key("FLAIR", shown),
            prompt=case.items[int(shown.rpartition("/")[2])].prompt,
        ),
        numbers={"label": case.id, "count": int(confident.sum())},
    )


def _silent_heads(record: Record) -> Iterator[Finding]:
    block = record.block(Measure.NORMS, "l2_norm")
    if block is None:
        return
    places = [Component.parse(name) for name in block.components]
    for layer in range(record.subject.n_layers):
        mine = [
            index
            for index, place in enumerate(places)
            if place.kind is Kind.HEAD and place.layer == layer
        ]
        norms = block.values[:, mine].astype(np.float64)
        usual = np.median(norms, axis=1, keepdims=True)
        share = (norms / np.where(usual > 0, usual, 1.0)).max(0)
        for index, largest in zip(mine, share, strict=True):
            if not largest < SILENT:  # NaN is no silence
                continue
            yield Finding(
                rule=Rule.SILENT_HEAD,
                severity=Severity.WARNING,
                strength=10 - float(largest),
                evidence=Evidence(
                    measure=Measure.NORMS,
                    quantity="l2_norm",
                    scan="fMRI",
                    component=block.components[index],
                    layer=layer,
                    head=places[index].index,
                    value=float(largest),
                    unit="of its layer's median head",
                    n=len(block.prompts),
                    scan_keys=record.scan_key("fMRI", block.prompts[0]),
                ),
                numbers={"label": places[index].label},
            )


def _tensors(record: Record) -> Iterator[Finding]:
    nonfinite = record.block(Measure.WEIGHTS, "tensor_nonfinite")
    kurtosis = record.block(Measure.WEIGHTS, "tensor_kurtosis")
    if nonfinite is not None:
        for index in np.flatnonzero(nonfinite.values[0]):
            yield _tensor(
                Rule.NONFINITE,
                Severity.FAILURE,
                nonfinite.components[index],
                float(nonfinite.values[0, index]),
                "weights",
            )
    if kurtosis is not None:
        values = np.nan_to_num(kurtosis.values[0], nan=-np.inf)
        outlying = int(np.argmax(values))
        if values[outlying] > OUTLYING_KURTOSIS:
            yield _tensor(
                Rule.OUTLYING_TENSOR,
                Severity.NOTE,
                kurtosis.components[outlying],
                float(values[outlying]),
                "excess kurtosis",
            )


def _tensor(rule: Rule, severity: Severity, name: str, value: float, unit: str) -> Finding:
    address = name.partition(":")[0]
    place = Component.parse(address) if address.startswith(("blocks", "embed", "unembed")) else None
    return Finding(
        rule=rule,
        severity=severity,
        strength=min(value, 1e4) / 1e4,
        evidence=Evidence(
            measure=Measure.WEIGHTS,
            quantity="tensor",
            scan="T2",
            component=address,
            layer=place.layer if place else None,
            value=value,
            unit=unit,
        ),
        numbers={"label": place.label if place else name, "name": name.partition(":")[2] or name},
    )
