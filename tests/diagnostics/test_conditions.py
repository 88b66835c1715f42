"""What is said of one checkpoint: what an answer rests on, and nothing of too few prompts."""

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from neural_mri.contract.findings import Finding, Rule
from neural_mri.contract.suites import Case, Expectation, Item, Language, Measure, Suite
from neural_mri.diagnostics import Record, diagnose
from neural_mri.diagnostics.phrasing import Phrases
from neural_mri.diagnostics.records import Block, Quantity

EFFECT = Quantity(Measure.ATTRIBUTION, "effect")
MARGIN = Quantity(Measure.SCORES, "margin")
SUPPORT = Quantity(Measure.RISK, "support")
DEPTH = Quantity(Measure.RISK, "depth")


def case(
    name: str, sizes: Sequence[int], expectation: Expectation, groups: Sequence[str | None]
) -> Case:
    return Case(
        id=name,
        title={Language.EN: name},
        about={Language.EN: name},
        expectation=expectation,
        source="made up",
        licence="CC0-1.0",
        items=tuple(
            Item(prompt=f"{name} {group} {number}", answer=" a", foil=" b", group=group)
            for group, size in zip(groups, sizes, strict=True)
            for number in range(size)
        ),
    )


def found(
    suite: Suite,
    like: Record,
    cases: Sequence[Case],
    numbers: Mapping[Quantity, npt.NDArray[np.float64]],
    components: tuple[str, ...] = ("",),
) -> list[Finding]:
    """What is found where those cases, and no others, gave those numbers, a row a prompt."""
    asked = msgspec.structs.replace(suite, cases=tuple(cases))
    prompts = tuple(f"{case.id}/{number}" for case in cases for number in range(len(case.items)))
    blocks = {
        quantity: Block(prompts, components, values.astype(np.float32).reshape(len(prompts), -1))
        for quantity, values in numbers.items()
    }
    record = msgspec.structs.replace(like, suite_digest=asked.digest, blocks=blocks, noise={})
    return list(diagnose(asked, record).findings)


def rules(findings: Sequence[Finding]) -> list[Rule]:
    return [each.rule for each in findings]


def leaning(p_near: float, size: int = 8) -> npt.NDArray[np.float64]:
    """Margins of two groups whose means differ with about that p."""
    by = {0.03: 1.29, 1e-9: 20.0}[p_near]
    spread = np.resize([-1.0, 1.0], size)
    return np.concatenate([spread + by, spread])


PAIR = ("left", "right")


def test_one_of_several_cases_leans_only_if_so_many_would_not_by_chance(
    suite: Suite, baseline: Record
) -> None:
    one = case("one", (8, 8), Expectation.BALANCE, PAIR)
    [alone] = found(suite, baseline, [one], {MARGIN: leaning(0.03)})
    assert alone.rule is Rule.BIAS
    assert alone.evidence.p_value == pytest.approx(0.03, abs=0.005)
    assert alone.evidence.interval is not None
    assert alone.evidence.interval.low > 0
    cases = [case(f"c{number}", (8, 8), Expectation.BALANCE, PAIR) for number in range(4)]
    four = np.concatenate([leaning(0.03)] * 4)
    assert rules(found(suite, baseline, cases, {MARGIN: four})) == []
    four = np.concatenate([leaning(1e-9), *[leaning(0.03)] * 3])
    [clear] = found(suite, baseline, cases, {MARGIN: four})
    assert clear.case == "c0"


def test_of_a_group_of_fewer_than_eight_prompts_nothing_is_concluded(
    suite: Suite, baseline: Record
) -> None:
    few = case("few", (4, 4), Expectation.BALANCE, PAIR)
    assert found(suite, baseline, [few], {MARGIN: leaning(1e-9, 4)}) == []
    for size, said in ((7, []), (8, [Rule.UNAWARE])):
        known = case("aware", (20, size), Expectation.AWARENESS, ("known", "unknown"))
        support = np.r_[np.zeros(20), np.ones(size)]
        assert rules(found(suite, baseline, [known], {SUPPORT: support})) == said


@pytest.mark.parametrize(("size", "said"), [(7, []), (8, [Rule.SETTLES_LATE])])
def test_answers_of_fewer_than_eight_prompts_settle_and_nothing_is_concluded(
    size: int, said: list[Rule], suite: Suite, baseline: Record
) -> None:
    late = case("late", (size,), Expectation.PREFER, (None,))
    few = case("few", (3,), Expectation.PREFER, (None,))
    findings = found(suite, baseline, [late, few], {DEPTH: np.ones(size + 3)})
    assert rules(findings) == said
    assert all(each.numbers["tested"] == 1 for each in findings)


PLACES = ("blocks.0.mlp", "blocks.1.attn.head_0", "blocks.1.attn.head_2", "blocks.2.mlp")


def effects(size: int) -> npt.NDArray[np.float64]:
    wobble: npt.NDArray[np.float64] = np.resize([-0.1, 0.1], size)[:, None]
    found: npt.NDArray[np.float64] = np.array([-3.0, -1.0, 2.0, -0.5]) + wobble
    return found


def test_what_is_larger_than_what_carries_an_answer_is_told_as_larger(
    suite: Suite, baseline: Record
) -> None:
    asked = case("asked", (8,), Expectation.PREFER, (None,))
    [finding] = found(suite, baseline, [asked], {EFFECT: effects(8)}, PLACES)
    assert (finding.rule, finding.evidence.component) == (Rule.CARRIED_BY, "blocks.1.attn.head_0")
    assert finding.numbers["larger"] == "L0 MLP, L1H2"
    assert finding.numbers["others"] == "L2 MLP"
    diagnosis = diagnose(suite, baseline)
    said = Phrases(Language.EN).say(finding, diagnosis)
    assert "Then L2 MLP. Larger still, and not counted here: L0 MLP, L1H2" in said.text
    assert said.means.endswith("more than on any other component after the first layer.")
    assert "L0 MLP, L1H2" in Phrases(Language.KO).say(finding, diagnosis).text


def test_no_component_carries_the_answers_of_fewer_than_eight_prompts(
    suite: Suite, baseline: Record
) -> None:
    asked = case("asked", (7,), Expectation.PREFER, (None,))
    assert found(suite, baseline, [asked], {EFFECT: effects(7)}, PLACES) == []
