"""What each case says of one checkpoint: a score with an interval, and what carried the answers."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from neural_mri.contract.components import Component
from neural_mri.contract.findings import Carrier, CaseOutcome, Score
from neural_mri.contract.suites import Case, Expectation, Measure
from neural_mri.diagnostics.records import Block, Record
from neural_mri.diagnostics.statistics import (
    UNKNOWN,
    Groups,
    Welch,
    auroc_change_score,
    auroc_score,
    difference_score,
    mean_score,
    median_score,
    proportion_score,
)

__all__ = ("FEWEST_PROMPTS", "balance_p_value", "case_outcome", "fewest", "oriented", "rightly")

FEWEST_PROMPTS = 8
"""Of fewer prompts, or of a group of fewer, numbers are told and nothing is concluded from them."""
CARRIERS = 6
STRONGEST = 10
_CONSIDERED = 24

Bools = npt.NDArray[np.bool_]


def rightly(case: Case, record: Record) -> Bools | None:
    """Which prompts are answered as the case expects; None where a case is not about right and wrong."""
    match case.expectation:
        case Expectation.PREFER:
            name, sign, bound = "margin", 1.0, 0.0
        case Expectation.TOP:
            name, sign, bound = "answer_rank", -1.0, -0.5
        case _:
            return None
    block = record.block(Measure.SCORES, name)
    if block is None:
        return None
    found: Bools = sign * block.of_case(case.id).values[:, 0] > bound
    return found if len(found) else None


def fewest(case: Case, record: Record) -> int:
    """How many prompts a verdict on a case's score stands on: of two groups, as many as the smaller has."""
    match case.expectation:
        case Expectation.BALANCE:
            return min(map(len, _margins(case, record)))
        case Expectation.AWARENESS:
            return min(map(len, _supports(case, record)))
        case _:
            right = rightly(case, record)
            return 0 if right is None else len(right)


def balance_p_value(case: Case, record: Record) -> float:
    """How likely groups that are treated alike differ as much; of two or more prompts each."""
    return Welch.of(*_margins(case, record)).p_value


def _groups(case: Case, block: Block) -> tuple[Bools, Bools]:
    """Which of a block's prompts, all of this case, belong to the first group named, and to the other."""
    named = np.array([case.items[int(prompt.rpartition("/")[2])].group for prompt in block.prompts])
    first = "known" if case.expectation is Expectation.AWARENESS else case.items[0].group
    return named == first, named != first


def case_outcome(case: Case, record: Record, baseline: Record | None = None) -> CaseOutcome:
    """Everything about one case."""
    asked = _asked(case, record)
    carriers = record.block(Measure.ATTRIBUTION, "effect")
    mine = None if carriers is None else carriers.of_case(case.id)
    score = _score(case, record)
    return CaseOutcome(
        id=case.id,
        expectation=case.expectation,
        title=case.title,
        about=case.about,
        source=case.source,
        licence=case.licence,
        asked=asked,
        set_aside=len(case.items) - asked,
        score=score,
        chance=0.0 if case.expectation is Expectation.BALANCE else case.chance,
        baseline=None if baseline is None else _score(case, baseline),
        change=None if baseline is None else _change(case, record, baseline),
        margin=_over_prompts(case, record, Measure.SCORES, "margin"),
        carriers=() if mine is None or not mine.prompts else tuple(_carriers(case, mine)),
        attributed=0 if mine is None else len(mine.prompts),
        settles=_over_prompts(case, record, Measure.RISK, "depth", median=True),
        support=_over_prompts(case, record, Measure.RISK, "support"),
        entropy=_over_prompts(case, record, Measure.RISK, "entropy", least=0.0),
    )


def oriented(case: Case, block: Block) -> npt.NDArray[np.float64]:
    """Effects of a case's prompts, all meaning the same: in a balance case the other group's are turned."""
    values = block.values.astype(np.float64)
    if case.expectation is Expectation.BALANCE:
        _, other = _groups(case, block)
        values[other] *= -1
    return values


def _asked(case: Case, record: Record) -> int:
    aside = sum(name.rpartition("/")[0] == case.id for name in record.set_aside)
    return len(case.items) - aside


def _values(case: Case, record: Record, measure: Measure, name: str) -> Block | None:
    block = record.block(measure, name)
    mine = None if block is None else block.of_case(case.id)
    return mine if mine is not None and mine.prompts else None


def _over_prompts(
    case: Case,
    record: Record,
    measure: Measure,
    name: str,
    *,
    median: bool = False,
    least: float = UNKNOWN.low,
) -> Score | None:
    block = _values(case, record, measure, name)
    if block is None or not np.isfinite(block.values).any():
        return None
    values = block.values[:, 0]
    return median_score(values) if median else mean_score(values, least=least)


def _score(case: Case, record: Record) -> Score:
    right = rightly(case, record)
    if right is not None:
        return proportion_score(int(right.sum()), len(right))
    if case.expectation is Expectation.BALANCE:
        return difference_score(*_margins(case, record))
    known, unknown = _supports(case, record)
    return auroc_score(unknown, known)


_Values = npt.NDArray[np.float64]


def _margins(case: Case, record: Record) -> tuple[_Values, _Values]:
    """Of each group of a balance case, those that are known."""
    return _by_group(case, _values(case, record, Measure.SCORES, "margin"))


def _supports(case: Case, record: Record) -> tuple[_Values, _Values]:
    """Of what can be known, and of what cannot."""
    return _by_group(case, _values(case, record, Measure.RISK, "support"))


def _by_group(case: Case, block: Block | None) -> tuple[_Values, _Values]:
    if block is None:
        return np.empty(0), np.empty(0)
    values = block.values[:, 0].astype(np.float64)
    first, second = _groups(case, block)
    return values[first & np.isfinite(values)], values[second & np.isfinite(values)]


def _change(case: Case, record: Record, baseline: Record) -> Score | None:
    """What the score is more than the baseline's, in its own unit, with the same prompts resampled in both."""
    after, before = rightly(case, record), rightly(case, baseline)
    if after is not None and before is not None:
        if len(after) != len(before):
            return None
        gained = after.astype(np.float64) - before.astype(np.float64)
        return mean_score(gained, least=-1.0, most=1.0)
    if case.expectation is Expectation.BALANCE:
        of = Measure.SCORES, "margin"
    else:
        of = Measure.RISK, "support"
    here, there = (_values(case, each, *of) for each in (record, baseline))
    if here is None or there is None or here.prompts != there.prompts:
        return None
    first, second = _groups(case, here)
    if case.expectation is Expectation.BALANCE:
        change = here.values[:, 0] - there.values[:, 0]
        return difference_score(change[first], change[second])
    old, new = (Groups(each.values[second, 0], each.values[first, 0]) for each in (there, here))
    return auroc_change_score(old, new)


def _carriers(case: Case, block: Block) -> Sequence[Carrier]:
    """The components with the largest mean effect whose interval leaves 0 out, largest first; none of few prompts."""
    if len(block.prompts) < FEWEST_PROMPTS:
        return ()
    effects = oriented(case, block)
    means = effects.mean(0)
    strongest = np.argsort(-np.abs(effects), axis=1)[:, :STRONGEST]
    found = []
    for index in np.argsort(-np.abs(means), kind="stable")[:_CONSIDERED]:
        score = mean_score(effects[:, index])
        if score.interval.low <= 0 <= score.interval.high:
            continue
        name = block.components[index]
        share = float((strongest == index).any(1).mean())
        found.append(
            Carrier(component=name, label=Component.parse(name).label, effect=score, share=share)
        )
        if len(found) == CARRIERS:
            break
    return found
