"""What gates let pass: where a change begins all the same, in which unit, and what a profile leaves unsaid."""

from collections.abc import Mapping

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from neural_mri.contract.findings import Diagnosis, Finding, Rule, Severity
from neural_mri.contract.suites import Gate, Language, Limits, Measure, Suite, Verdict
from neural_mri.diagnostics import Record, diagnose, load_suite, suite_names
from neural_mri.diagnostics.phrasing import Phrases
from neural_mri.diagnostics.records import Quantity

NORMS = Quantity(Measure.NORMS, "l2_norm")


def with_values(record: Record, changes: Mapping[Quantity, npt.NDArray[np.float32]]) -> Record:
    """The record with other numbers."""
    blocks = dict(record.blocks)
    for quantity, values in changes.items():
        blocks[quantity] = blocks[quantity]._replace(values=values.astype(np.float32))
    return msgspec.structs.replace(record, blocks=blocks)


def scaled(record: Record, factors: Mapping[str, float]) -> Record:
    """The record with some components writing more."""
    block = record.blocks[NORMS]
    values = block.values.copy()
    for component, factor in factors.items():
        values[:, block.components.index(component)] *= factor
    return with_values(record, {NORMS: values})


def judged(suite: Suite, **gates: Gate) -> Suite:
    named = {Measure(name): gate for name, gate in gates.items()}
    return msgspec.structs.replace(suite, gates=named, profiles={})


def found(diagnosis: Diagnosis, rule: Rule) -> list[Finding]:
    return [each for each in diagnosis.findings if each.rule is rule]


def test_a_change_begins_where_it_leaves_the_noise_though_so_much_is_tolerated_there(
    suite: Suite, baseline: Record
) -> None:
    changed = scaled(baseline, {"blocks.1.attn.head_1": 1.05, "blocks.2.attn.head_3": 1.25})
    loose = judged(suite, norms=Gate(tolerance=0.1))
    diagnosis = diagnose(loose, changed, baseline)
    assert not diagnosis.passed
    [origin] = found(diagnosis, Rule.CHANGED_AT)
    assert (origin.evidence.layer, origin.evidence.head) == (1, 1)
    assert origin.evidence.value == pytest.approx(1 - 1 / 1.05, rel=1e-4)
    text = Phrases(Language.EN).say(origin, diagnosis).text
    assert "1 of 20 components differ by more than is tolerated, L2H3 most, by 20 %" in text
    [grid] = [grid for grid in diagnosis.grids if grid.name == "norms change"]
    assert grid.marked == ((1, 1),)
    [gate] = [gate for gate in diagnosis.gates if gate.measure is Measure.NORMS]
    assert (gate.changed, gate.where) == (1, "L1H1")

    [plain] = found(diagnose(judged(suite), changed, baseline), Rule.CHANGED_AT)
    assert "most" not in plain.numbers

    alone = diagnose(loose, scaled(baseline, {"blocks.1.attn.head_1": 1.05}), baseline)
    assert alone.passed
    assert [grid.marked for grid in alone.grids if grid.name == "norms change"] == [()]


def test_a_head_is_no_consequence_of_another_of_its_layer(suite: Suite, baseline: Record) -> None:
    both = scaled(baseline, {"blocks.1.attn.head_1": 1.3, "blocks.1.attn.head_2": 1.2})
    diagnosis = diagnose(suite, both, baseline)
    assert len(found(diagnosis, Rule.CHANGED_AT)) == 1
    assert not found(diagnosis, Rule.CHANGED_DOWNSTREAM)


MARGIN = Quantity(Measure.SCORES, "margin")
LOG_P = Quantity(Measure.SCORES, "answer_log_probability")


def test_scores_are_tolerated_in_nats_and_in_shares_of_prompts_each_by_its_own_number(
    suite: Suite, baseline: Record
) -> None:
    def scores(changed: Record, gate: Gate, before: Record = baseline) -> list[Finding]:
        strict = msgspec.structs.replace(judged(suite, scores=gate), alpha=0.05)
        return found(diagnose(strict, changed, before), Rule.CHANGED_SCORE)

    nudged = with_values(baseline, {LOG_P: baseline.blocks[LOG_P].values - 0.12})
    assert [each.evidence.unit for each in scores(nudged, Gate(share_tolerance=0.1))] == ["nats"]
    assert scores(nudged, Gate(tolerance=0.5, share_tolerance=0.1)) == []

    right = with_values(baseline, {MARGIN: np.ones_like(baseline.blocks[MARGIN].values)})
    wrong = with_values(right, {MARGIN: -right.blocks[MARGIN].values})
    [fewer] = scores(wrong, Gate(tolerance=5, share_tolerance=0.1), right)
    assert (fewer.case, fewer.evidence.unit, fewer.evidence.value) == (
        "preference",
        "share of prompts",
        -1,
    )
    assert scores(wrong, Gate(tolerance=5, share_tolerance=1), right) == []


@pytest.mark.parametrize("name", suite_names())
def test_a_tuned_checkpoint_may_be_half_a_nat_less_sure_and_wrong_on_a_tenth(name: str) -> None:
    assert load_suite(name).gate(Measure.SCORES, "tuned") == Limits(0.5, 0.1, Verdict.FAIL)


def test_weights_have_a_tolerance_and_only_warn_unless_told_otherwise(
    suite: Suite, baseline: Record
) -> None:
    rms = Quantity(Measure.WEIGHTS, "rms")
    changed = with_values(baseline, {rms: baseline.blocks[rms].values * np.float32(1.001)})

    def severities(**gates: Gate) -> list[Severity]:
        diagnosis = diagnose(judged(suite, **gates), changed, baseline)
        return [each.severity for each in found(diagnosis, Rule.CHANGED_WEIGHTS)]

    assert severities() == [Severity.WARNING]
    assert severities(weights=Gate(tolerance=1e-4)) == [Severity.WARNING]
    assert severities(weights=Gate(tolerance=0.01)) == []
    assert severities(weights=Gate(verdict=Verdict.FAIL)) == [Severity.FAILURE]


def test_what_a_profile_leaves_out_is_as_the_suite_has_it(suite: Suite) -> None:
    both = msgspec.structs.replace(
        suite,
        gates={Measure.NORMS: Gate(tolerance=0.2, verdict=Verdict.WARN)},
        profiles={
            "loose": {Measure.NORMS: Gate(tolerance=0.5)},
            "strict": {Measure.NORMS: Gate(verdict=Verdict.FAIL), Measure.LENS: Gate(tolerance=1)},
        },
    )
    assert both.gate(Measure.NORMS, "loose") == Limits(0.5, 0, Verdict.WARN)
    assert both.gate(Measure.NORMS, "strict") == Limits(0.2, 0, Verdict.FAIL)
    assert both.gate(Measure.LENS, "strict") == Limits(1, 0, Verdict.FAIL)
    assert both.gate(Measure.WEIGHTS, "strict") == Limits(0, 0, Verdict.WARN)
