"""Gates: the same checkpoint never fails, a planted fault always does, and its place is named."""

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from neural_mri.contract.baselines import NotComparable
from neural_mri.contract.findings import Diagnosis, Rule, Severity
from neural_mri.contract.models import Numerics
from neural_mri.contract.problems import InvalidRequest, Unprocessable
from neural_mri.contract.scans import Scan, encode_scan
from neural_mri.contract.suites import Measure, Suite
from neural_mri.diagnostics import Record, Scanned, diagnose, measure
from neural_mri.diagnostics.asking import Aside, ask
from neural_mri.diagnostics.comparison import UNBOUNDED
from neural_mri.diagnostics.records import Block
from tests.diagnostics.making import InProcess, Weights, edited, measured, saved, tiny_suite

ALARMS = (Severity.FAILURE, Severity.WARNING)


def changes(diagnosis: Diagnosis) -> list[Rule]:
    """What is said to have changed."""
    return [
        finding.rule
        for finding in diagnosis.findings
        if finding.rule.value.startswith("changed-") and finding.severity in ALARMS
    ]


def origin(diagnosis: Diagnosis) -> tuple[int | None, int | None]:
    """Layer and head where the change is said to begin, by what the model computes."""
    [found] = [each for each in diagnosis.findings if each.rule is Rule.CHANGED_AT]
    return found.evidence.layer, found.evidence.head


@pytest.fixture
def two_threads() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_a_checkpoint_does_not_differ_from_itself_however_many_threads_compute_it(
    suite: Suite, tiny_folder: Path, baseline: Record, tmp_path: Path
) -> None:
    again = measured(suite, tiny_folder, tmp_path)
    diagnosis = diagnose(suite, again, baseline)
    assert diagnosis.passed
    assert not changes(diagnosis)
    assert diagnosis.tests == 60


def test_a_checkpoint_does_not_differ_from_itself_in_whatever_order_it_is_asked(
    suite: Suite, tiny_folder: Path, baseline: Record, tmp_path: Path
) -> None:
    orders: list[list[str]] = []

    class Noted(InProcess):
        def scan(self, scans: Sequence[Scan]) -> Iterator[Scanned]:
            orders.append([encode_scan(scan).decode() for scan in scans])
            yield from super().scan(scans)

    for seed in range(3):
        scans = Noted(tiny_folder, tmp_path / str(seed))
        again = measure(suite, scans, with_noise=False, order=random.Random(seed))
        assert again.blocks.keys() == baseline.blocks.keys()
        for quantity, block in again.blocks.items():
            assert block.prompts == baseline.blocks[quantity].prompts
        assert not changes(diagnose(suite, again, baseline))
    first, second, third = orders[1::2]  # the others are calibration and weights
    assert sorted(first) == sorted(second) == sorted(third)
    assert first != second != third != first


def test_no_false_alarm_in_a_hundred_comparisons_with_as_much_noise_as_was_measured(
    suite: Suite, baseline: Record
) -> None:
    # Each run draws, prompt by prompt, how a noise pair of the baseline differed, with either sign.
    draw = np.random.default_rng(1)
    alarms = sum(
        bool(changes(diagnose(suite, with_noise_drawn(baseline, draw), baseline)))
        for _ in range(100)
    )
    assert alarms == 0


def with_noise_drawn(record: Record, draw: np.random.Generator) -> Record:
    """The record as another run might have had it."""
    blocks = {}
    for quantity, block in record.blocks.items():
        again = record.noise.get(quantity)
        if again is None:
            blocks[quantity] = block
            continue
        noise = again.values - block.rows(again.prompts)
        rows = draw.integers(0, len(noise), len(block.prompts))
        signs = draw.choice([-1.0, 1.0], (len(rows), 1)).astype(np.float32)
        blocks[quantity] = Block(
            block.prompts, block.components, block.values + signs * noise[rows]
        )
    return msgspec.structs.replace(record, blocks=blocks)


def noise_in_a_head(weights: Weights) -> None:
    width = weights.shape[1] // 4
    mine = weights[:, width : 2 * width]
    mine += 0.02 * mine.std() * np.random.default_rng(0).standard_normal(mine.shape)


def a_head_zeroed(weights: Weights) -> None:
    width = weights.shape[1] // 4
    weights[:, 3 * width :] = 0


def scaled(weights: Weights) -> None:
    weights *= np.float32(1.05)


def shifted(weights: Weights) -> None:
    weights[0] += np.float32(0.01)


FAULTS: dict[str, tuple[str, str, Callable[[Weights], None], tuple[int, int | None]]] = {
    "noise in W_O": ("llama", "model.layers.1.self_attn.o_proj.weight", noise_in_a_head, (1, 1)),
    "a head zeroed": ("llama", "model.layers.2.self_attn.o_proj.weight", a_head_zeroed, (2, 3)),
    "an MLP scaled": ("llama", "model.layers.1.mlp.down_proj.weight", scaled, (1, None)),
    "a query bias": ("qwen2", "model.layers.1.self_attn.q_proj.bias", shifted, (1, 0)),
    "an MLP bias": ("gpt2", "transformer.h.1.mlp.c_proj.bias", shifted, (1, None)),
    "an attention bias": ("gpt2", "transformer.h.0.attn.c_proj.bias", shifted, (0, None)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught_and_its_place_named_by_what_is_computed_and_by_weights(
    fault: str, tmp_path: Path
) -> None:
    family, tensor, edit, place = FAULTS[fault]
    suite = tiny_suite(prompts=6, noise=4)
    main = saved(family, tmp_path / "main")
    there = measured(suite, main, tmp_path / "a", with_noise=True)
    broken = edited(main, tmp_path / "broken", tensor, edit)
    diagnosis = diagnose(suite, measured(suite, broken, tmp_path / "b"), there)
    assert not diagnosis.passed
    assert origin(diagnosis) == place
    [weights] = [each for each in diagnosis.findings if each.rule is Rule.CHANGED_WEIGHTS]
    assert weights.evidence.layer == place[0]
    assert weights.severity is Severity.WARNING


def test_what_lies_before_the_fault_is_told_to_be_as_it_was(
    suite: Suite, tiny_folder: Path, baseline: Record, tmp_path: Path
) -> None:
    tensor = "model.layers.2.mlp.down_proj.weight"
    broken = edited(tiny_folder, tmp_path / "broken", tensor, scaled)
    diagnosis = diagnose(suite, measured(suite, broken, tmp_path / "store"), baseline)
    [gate] = [gate for gate in diagnosis.gates if gate.measure is Measure.NORMS]
    assert (gate.where, gate.changed) == ("L2 MLP", 2)  # and the unembedding that reads it
    [attention] = [gate for gate in diagnosis.gates if gate.measure is Measure.ATTENTION]
    assert attention.severity is None


def test_a_profile_lets_pass_what_it_tolerates_and_is_refused_where_there_is_none(
    suite: Suite, candidate: Record, baseline: Record
) -> None:
    assert not diagnose(suite, candidate, baseline).passed
    assert diagnose(suite, candidate, baseline, profile="tuned").passed
    with pytest.raises(InvalidRequest, match="no profile 'loose'"):
        diagnose(suite, candidate, baseline, profile="loose")


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("tokenizer_digest", "f" * 64, "tokenizer"),
        ("numerics", Numerics(dtype="bfloat16"), "dtype"),
        ("numerics", Numerics(device="cuda"), "device"),
        ("numerics", Numerics(attention="eager"), "attention kernel"),
        ("n_layers", 4, "number of layers"),
        ("n_parameters", 7, "number of parameters"),
        ("scanner_version", "0", "scanner version"),
    ],
)
def test_what_cannot_be_compared_is_refused_by_name(
    suite: Suite, candidate: Record, baseline: Record, field: str, value: object, named: str
) -> None:
    subject = msgspec.structs.replace(candidate.subject, **{field: value})
    other = msgspec.structs.replace(candidate, subject=subject)
    with pytest.raises(NotComparable, match=f"the {named} is"):
        diagnose(suite, other, baseline)


def test_a_record_of_another_suite_or_without_noise_is_no_baseline(
    suite: Suite, candidate: Record, baseline: Record
) -> None:
    with pytest.raises(Unprocessable, match="no noise measured"):
        diagnose(suite, baseline, candidate)
    other = tiny_suite(prompts=9)
    with pytest.raises(Unprocessable, match="not of tiny"):
        diagnose(other, candidate, baseline)


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_what_is_no_number_any_more_fails_its_gate_and_is_no_silent_head(
    suite: Suite, baseline: Record, broken: float
) -> None:
    for measured_by, fails in (
        (Measure.NORMS, Rule.CHANGED_AT),
        (Measure.ATTRIBUTION, Rule.CHANGED_ATTRIBUTION),
        (Measure.LENS, Rule.CHANGED_LENS),
    ):
        blocks = {
            quantity: block._replace(values=block.values.copy())
            for quantity, block in baseline.blocks.items()
        }
        for quantity, block in blocks.items():
            if quantity.measure is measured_by:
                block.values[3:5, 1] = broken
        diagnosis = diagnose(suite, msgspec.structs.replace(baseline, blocks=blocks), baseline)
        assert not diagnosis.passed
        [found] = [each for each in diagnosis.findings if each.rule is fails]
        assert found.evidence.value >= UNBOUNDED / 100
        assert not [each for each in diagnosis.findings if each.rule is Rule.SILENT_HEAD]
        same = msgspec.structs.replace(baseline, blocks=blocks)
        assert not changes(diagnose(suite, same, same)), "what is none on both sides is the same"


def test_a_measure_that_a_suite_leaves_out_fails_nobody_though_a_scan_has_it(
    suite: Suite, candidate: Record, baseline: Record
) -> None:
    fewer = msgspec.structs.replace(suite, measures=(Measure.SCORES,))
    records = [
        msgspec.structs.replace(each, suite_digest=fewer.digest) for each in (candidate, baseline)
    ]
    diagnosis = diagnose(fewer, *records)
    assert {gate.measure for gate in diagnosis.gates} <= {Measure.SCORES, Measure.WEIGHTS}
    assert diagnosis.tests == 2


def test_weights_alone_are_compared_without_noise(
    suite: Suite, tiny_folder: Path, tmp_path: Path
) -> None:
    fewer = msgspec.structs.replace(suite, measures=(Measure.WEIGHTS,))
    before = measured(fewer, tiny_folder, tmp_path / "store", with_noise=True)
    folder = saved("llama", tmp_path / "other", seed=1)
    after = measured(fewer, folder, tmp_path / "store")
    assert not changes(diagnose(fewer, before, before))
    diagnosis = diagnose(fewer, after, before)
    assert changes(diagnosis) == [Rule.CHANGED_WEIGHTS]
    assert diagnosis.tests == 0


def test_the_change_of_a_case_is_what_its_score_changed_by(
    suite: Suite, candidate: Record, baseline: Record
) -> None:
    for case in diagnose(suite, candidate, baseline).cases:
        assert case.baseline is not None
        assert case.change is not None
        assert case.change.value == pytest.approx(case.score.value - case.baseline.value, abs=1e-6)
        assert case.change.interval.low <= case.change.value <= case.change.interval.high


def test_a_prompt_that_cannot_be_asked_says_why(suite: Suite, tiny_folder: Path) -> None:
    scans = InProcess(tiny_folder, tiny_folder)
    case = suite.cases[0]
    item = case.items[0]

    def refused(**changes: str) -> str:
        changed = msgspec.structs.replace(item, **changes)
        only = msgspec.structs.replace(case, items=(changed,))
        [aside] = ask(msgspec.structs.replace(suite, cases=(only,)), scans.tokenize)
        assert isinstance(aside, Aside)
        assert aside.name == "preference/0"
        return aside.reason

    assert refused(foil=item.answer) == (
        f"{item.answer!r} and {item.answer!r} begin with the same token"
    )
    assert refused(prompt="w4") == "'w4' is 1 token long, expected 2 or more"
    read_on = refused(prompt="w4 w5 w", answer="6")
    assert read_on == "'w4 w5 w' is read as other tokens where '6' follows"
    short = tuple(msgspec.structs.replace(each, prompt="w4") for each in case.items)
    none = msgspec.structs.replace(suite, cases=(msgspec.structs.replace(case, items=short),))
    with pytest.raises(Unprocessable, match="The first is preference/0: 'w4' is 1 token long"):
        measure(none, scans, with_noise=False)
