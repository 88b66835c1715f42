"""How prompts are asked: with what text after them noise is measured, and against what they are read."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest

from neural_mri.client import Refused
from neural_mri.contract.anomalies import CalibrationScan
from neural_mri.contract.problems import PromptTooLong, Unprocessable
from neural_mri.contract.scans import Scan
from neural_mri.contract.suites import Gate, Item, Measure, Suite, Verdict
from neural_mri.contract.tokens import Tokens
from neural_mri.diagnostics import Record, Scanned, diagnose, measure
from neural_mri.diagnostics.asking import SUFFIXES, Aside, Asked, ask
from neural_mri.diagnostics.records import Quantity
from tests.diagnostics.making import InProcess, tiny_suite


class Reading:
    """Tokens as Qwen-2.5 and Llama-3 cut text: a mark and the ends of lines after it are one."""

    def __init__(self, cut: str = r" ?\w+| ?[^\s\w]+[\r\n]*|\s+") -> None:
        self._cut = re.compile(cut)
        self._ids: dict[str, int] = {}
        self.asked: list[str] = []

    def __call__(self, texts: Sequence[str]) -> list[Tokens]:
        self.asked += texts
        return [self._tokens(text) for text in texts]

    def _tokens(self, text: str) -> Tokens:
        pieces = tuple(self._cut.findall(text))
        ids = tuple(self._ids.setdefault(piece, len(self._ids)) for piece in pieces)
        return Tokens(ids=ids, texts=pieces, spans=())


def of_prompts(suite: Suite, *prompts: str) -> Suite:
    """The suite with these prompts and no others."""
    items = tuple(Item(prompt=prompt, answer=" w9", foil=" w11") for prompt in prompts)
    case = msgspec.structs.replace(suite.cases[0], items=items)
    return msgspec.structs.replace(suite, cases=(case,))


def longer(found: Sequence[Asked | Aside]) -> list[str | None]:
    assert all(isinstance(each, Asked) for each in found)
    return [each.longer for each in found if isinstance(each, Asked)]


def test_a_suite_of_questions_has_another_text_after_them_and_no_other_suite_has(
    suite: Suite,
) -> None:
    first, second = SUFFIXES
    questions = ("Q: one two\nA:", "Q: three four\nA:")
    assert longer(ask(of_prompts(suite, *questions), Reading())) == [
        prompt + second for prompt in questions
    ]
    mixed = Reading()
    assert longer(ask(of_prompts(suite, *questions, "one two"), mixed)) == [
        None,
        None,
        "one two" + first,
    ]
    assert not any(text.endswith(second) for text in mixed.asked)


class Unread(InProcess):
    """Reads whatever is longer than a prompt and one token as something else."""

    def tokenize(self, texts: Sequence[str]) -> list[Tokens]:
        return [
            msgspec.structs.replace(tokens, ids=tokens.ids[::-1]) if len(tokens) > 12 else tokens
            for tokens in super().tokenize(texts)
        ]

    def scan(self, scans: Sequence[Scan]) -> Iterator[Scanned]:
        raise AssertionError("nothing is scanned in vain")


def test_a_baseline_whose_noise_no_prompt_can_show_is_refused_before_it_is_scanned(
    suite: Suite, tiny_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(Unprocessable, match="noise cannot be measured with suite tiny"):
        measure(suite, Unread(tiny_folder, tmp_path), with_noise=True)


class EndsApart(InProcess):
    """Reads the first and the last prompt otherwise where the text goes on."""

    apart: Sequence[str] = ()

    def tokenize(self, texts: Sequence[str]) -> list[Tokens]:
        return [
            msgspec.structs.replace(tokens, ids=tokens.ids[::-1])
            if any(text == prompt + suffix for prompt in self.apart for suffix in SUFFIXES)
            else tokens
            for text, tokens in zip(texts, super().tokenize(texts), strict=True)
        ]


def test_attention_has_noise_of_its_own_where_none_of_its_prompts_is_among_the_noisy(
    tiny_folder: Path, tmp_path: Path
) -> None:
    few = msgspec.structs.replace(
        tiny_suite(noise=2), attention_prompts=3, measures=(Measure.NORMS, Measure.ATTENTION)
    )
    scans = EndsApart(tiny_folder, tmp_path)
    scans.apart = [few.cases[0].items[0].prompt, few.cases[-1].items[-1].prompt]
    there = measure(few, scans, with_noise=True)
    norms, entropy = Quantity(Measure.NORMS, "l2_norm"), Quantity(Measure.ATTENTION, "entropy")
    assert there.noise[norms].prompts == ("preference/1", "awareness/6")
    assert there.blocks[entropy].prompts == ("preference/0", "balance/0", "awareness/7")
    assert there.noise[entropy].prompts == ("balance/0",)
    block = there.blocks[entropy]
    turned = msgspec.structs.replace(
        there, blocks={**there.blocks, entropy: block._replace(values=1 - block.values)}
    )
    assert diagnose(few, there, there).passed
    assert not diagnose(few, turned, there).passed


def test_a_gate_that_cannot_be_judged_for_want_of_noise_is_refused_by_name_unless_ignored(
    suite: Suite, baseline: Record
) -> None:
    noise = {name: block for name, block in baseline.noise.items() if name.measure != "attention"}
    without = msgspec.structs.replace(baseline, noise=noise)
    with pytest.raises(Unprocessable, match=rf"no noise of attention.* Delete {baseline.key}"):
        diagnose(suite, baseline, without)
    blind = {"blind": {Measure.ATTENTION: Gate(verdict=Verdict.IGNORE)}}
    loose = msgspec.structs.replace(suite, profiles=blind)
    diagnosis = diagnose(loose, baseline, without, profile="blind")
    assert diagnosis.passed
    assert Measure.ATTENTION not in {gate.measure for gate in diagnosis.gates}


@pytest.mark.parametrize("by", ["scanner", "service"])
def test_a_prompt_with_no_room_for_more_text_goes_without_noise(
    by: str, suite: Suite, tiny_folder: Path, tmp_path: Path
) -> None:
    scans = InProcess(tiny_folder, tmp_path)

    def tokenize(texts: Sequence[str]) -> list[Tokens]:
        try:
            return scans.tokenize(texts)
        except PromptTooLong as problem:
            if by == "scanner":
                raise
            raise Refused(problem.document()) from problem

    full = " ".join(["w7"] * 60)
    prompts = ("w3 w4 w5", full, "w6 w7 w8")
    assert [text is not None for text in longer(ask(of_prompts(suite, *prompts), tokenize))] == [
        True,
        False,
        True,
    ]
    with pytest.raises((PromptTooLong, Refused), match="65 tokens"):
        ask(of_prompts(suite, *prompts, " ".join(["w7"] * 65)), tokenize)


def test_a_suite_of_little_text_is_read_against_its_prompts_over_again_and_no_other_is(
    suite: Suite, tiny_folder: Path, tmp_path: Path
) -> None:
    calibrations: list[CalibrationScan] = []

    class Noted(InProcess):
        def scan(self, scans: Sequence[Scan]) -> Iterator[Scanned]:
            calibrations.extend(each for each in scans if isinstance(each, CalibrationScan))
            yield from super().scan(scans)

    scans = Noted(tiny_folder, tmp_path)
    for asked in (tiny_suite(prompts=3), suite):
        scores = msgspec.structs.replace(asked, measures=(Measure.SCORES,))
        record = measure(scores, scans, with_noise=False)
        assert np.isfinite(record.blocks[Quantity(Measure.SCORES, "margin")].values).all()
    few, enough = (list(each.texts) for each in calibrations)
    assert len(few) == 16, "of 8 tokens each"
    assert few == [*few[:12], *few[:4]]
    assert len(set(enough)) == len(enough) == suite.n_items
