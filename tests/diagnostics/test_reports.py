"""Reports: one diagnosis, told to people, to CI systems and to programs, in two languages."""

import html
import re
import string
import tomllib
from importlib import resources
from typing import Any
from xml.etree import ElementTree as ET

import msgspec
import numpy as np
import pytest

from neural_mri.contract.findings import Diagnosis, Rule, Severity
from neural_mri.contract.problems import InvalidRequest
from neural_mri.contract.suites import Expectation, Language, Measure, Suite
from neural_mri.diagnostics import FORMATS, Record, diagnose, render
from neural_mri.diagnostics.comparison import UNITS
from neural_mri.diagnostics.phrasing import Phrases, number
from neural_mri.diagnostics.pictures import intervals
from neural_mri.diagnostics.records import Quantity
from neural_mri.diagnostics.reports import read_diagnosis
from neural_mri.diagnostics.statistics import UNKNOWN


@pytest.fixture(scope="module")
def failed(suite: Suite, candidate: Record, baseline: Record) -> Diagnosis:
    return diagnose(suite, candidate, baseline)


@pytest.fixture(scope="module")
def alone(suite: Suite, candidate: Record) -> Diagnosis:
    return diagnose(suite, candidate)


def phrases(language: Language) -> dict[str, Any]:
    file = resources.files("neural_mri.diagnostics") / "phrases" / f"{language.value}.toml"
    return tomllib.loads(file.read_text("utf-8"))


def placeholders(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name}


def test_both_languages_say_the_same_things_with_the_same_numbers() -> None:
    english, korean = phrases(Language.EN), phrases(Language.KO)
    assert english.keys() == korean.keys()
    assert set(english["rules"]) == set(korean["rules"]) == {rule.value for rule in Rule}
    for section in ("report", "scans", "quantities", "measures", "units"):
        assert english[section].keys() == korean[section].keys()
        for name, text in english[section].items():
            assert placeholders(text) == placeholders(korean[section][name]), name
    for rule, words in english["rules"].items():
        assert words.keys() == korean["rules"][rule].keys()
        for name, text in words.items():
            assert placeholders(text) == placeholders(korean["rules"][rule][name]), (rule, name)


@pytest.mark.parametrize("language", Language)
@pytest.mark.parametrize("form", FORMATS)
def test_every_form_tells_every_diagnosis(
    form: str, language: Language, failed: Diagnosis, alone: Diagnosis
) -> None:
    for diagnosis in (failed, alone):
        text = render(diagnosis, form, language)
        assert diagnosis.candidate.model in text
        assert not re.search(r"\{[a-z_]+\}", text) or form in ("html", "json", "sarif")
        assert "nan" not in re.findall(r"[\w.]+", text)


MEANT = """
    NEURAL Neural MRI Model Resonance Imaging Holm MLP RMS UTC AUROC nats ablation neural mri jobs scan key local
    fMRI DTI FLAIR T2 llama float32 cpu eager sdpa Embed Unembed tensor NaN CC0 tiny
"""
"""Latin letters that a Korean reader reads as they stand: names, units, a command."""


def told(page: str) -> str:
    """What a page shows and what it says to a screen reader; prompts, sources and addresses left out."""
    spoken = " ".join(re.findall(r'aria-label="([^"]*)"', page))
    page = re.sub(
        r"<style>.*?</style>|<q>.*?</q>|<small class=source>.*?</small>", " ", page, flags=re.DOTALL
    )
    text = re.sub(r"<[^>]+>", " ", page) + spoken
    return re.sub(
        r"`[^`]*`|\b(blocks|embed|unembed|ln_final|pos_embed)[\w.:]*|[0-9a-f]{12,}", " ", text
    )


def english(text: str, diagnosis: Diagnosis) -> set[str]:
    words = re.findall(r"[A-Za-z][A-Za-z0-9]+", text)
    names = {*re.findall(r"\w+", MEANT), *re.findall(r"\w+", diagnosis.candidate.model), "main"}
    names |= {
        case.id for case in diagnosis.cases
    }  # their Korean titles are made of them, in the tests
    names |= {str(group) for each in diagnosis.findings if (group := each.numbers.get("group"))}
    return {word for word in words if word not in names and not re.fullmatch(r"[LHw]\d+\w*", word)}


@pytest.mark.parametrize("form", ["html", "md"])
def test_a_korean_report_is_korean_but_for_names_units_and_what_was_asked(
    form: str, failed: Diagnosis, alone: Diagnosis
) -> None:
    assert {gate.where for gate in failed.gates} >= {"all components"}
    for diagnosis in (failed, alone):
        assert english(told(render(diagnosis, form, Language.KO)), diagnosis) == set()
        assert len(english(told(render(diagnosis, form)), diagnosis)) > 100


@pytest.mark.parametrize("language", Language)
def test_every_unit_and_quantity_has_words_in_every_language(language: Language) -> None:
    known = phrases(language)
    assert {*UNITS.values(), "share of layers", "weights"} - {"logits"} <= known["units"].keys()
    risk = {each.name for each in UNITS if each.measure is Measure.RISK}
    assert risk == known["quantities"].keys()


def test_a_diagnosis_comes_back_from_its_json(failed: Diagnosis, alone: Diagnosis) -> None:
    for diagnosis in (failed, alone):
        body = render(diagnosis, "json").encode()
        assert read_diagnosis(body) == diagnosis
        said = msgspec.json.decode(body)["findings"][0]["said"]
        assert said["title"]
        assert said["means_not"]
    with pytest.raises(InvalidRequest, match="not a diagnosis"):
        read_diagnosis(b"{}")


def test_junit_has_a_red_test_for_each_failed_gate_and_names_the_place(failed: Diagnosis) -> None:
    root = ET.fromstring(render(failed, "junit").encode())  # noqa: S314 -- our own
    gates, cases = root.findall("testsuite")
    red = {
        test.get("name") for test in gates.findall("testcase") if test.find("failure") is not None
    }
    assert red == {gate.measure.value for gate in failed.gates if gate.severity is Severity.FAILURE}
    assert len(red) == int(root.get("failures", "")) == int(gates.get("failures", ""))
    assert len(cases.findall("testcase")) == len(failed.cases)
    norms = next(test for test in gates if test.get("name") == "norms")
    failure = norms.find("failure")
    assert failure is not None
    assert "Embed is where the change begins" in (failure.get("message") or "")


def test_a_diagnosis_without_a_baseline_fails_no_test(alone: Diagnosis) -> None:
    root = ET.fromstring(render(alone, "junit").encode())  # noqa: S314
    assert root.get("failures") == "0"
    assert alone.passed
    assert not alone.gates


def test_sarif_has_a_result_a_finding_with_the_component_as_its_place(failed: Diagnosis) -> None:
    document = msgspec.json.decode(render(failed, "sarif"))
    assert document["version"] == "2.1.0"
    [run] = document["runs"]
    rules = run["tool"]["driver"]["rules"]
    assert len(run["results"]) == len(failed.findings)
    for result, finding in zip(run["results"], failed.findings, strict=True):
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"] == finding.rule.value
        [location] = result["locations"]
        [place] = location["logicalLocations"]
        assert place["name"] == (finding.evidence.component or finding.case or "model")
    # Up to its last slash a name of the run's own would be a host's category, whatever the uploader calls it.
    assert "automationDetails" not in run
    levels = [result["level"] for result in run["results"]]
    assert levels.count("error") == sum(f.severity is Severity.FAILURE for f in failed.findings)


def test_the_page_needs_nothing_beside_itself_and_shows_what_a_suite_says_as_text(
    failed: Diagnosis,
) -> None:
    page = render(failed, "html")
    assert "About preference &amp; &lt;others&gt;." in page
    assert "<others>" not in page
    assert not re.search(r"(src|href|@import|url)\s*[=(]", page)
    assert "<script" not in page
    assert "default-src 'none'" in page
    for picture in ET.fromstring(f"<all>{''.join(re.findall('<svg.*?</svg>', page))}</all>"):  # noqa: S314
        assert picture.get("aria-label")


def test_a_scale_ends_where_it_says_though_nothing_changed(suite: Suite, baseline: Record) -> None:
    page = render(diagnose(suite, baseline, baseline), "html")
    ends = re.findall(r'<text class="tick" x="\d+" y="9.0">([^<]+)</text>', page)
    assert ends[:2] == ["10", "10"]


def test_too_few_prompts_to_tell_have_no_interval_and_no_verdict(
    suite: Suite, candidate: Record
) -> None:
    seen = diagnose(suite, candidate)
    outcome = msgspec.structs.replace(
        seen.cases[0],
        expectation=Expectation.BALANCE,
        score=msgspec.structs.replace(seen.cases[0].score, value=1.07, n=2, interval=UNKNOWN),
    )
    assert "∞" not in intervals([outcome], Phrases(Language.EN))
    assert 'class="dot unclear"' in intervals([outcome], Phrases(Language.EN))
    assert Phrases(Language.EN).score(outcome.score, "nats") == "1.07"


ODD = "`a|b` \u202eשלום\n<img src=x> 👩\u200d👧 [l](//x) *b* _c_ d_e \\| \b\f\x00 {0}"
LEGIBLE = ODD.translate({0x202E: "\ufffd", 0: "␀", 8: "␈", 12: "␌"})
"""What a person sees of it: every letter, and a sign for those that nobody could see."""


def odd(diagnosis: Diagnosis) -> Diagnosis:
    """The same, its suite written by somebody who tries what a text may hold."""
    replace, texts = msgspec.structs.replace, dict.fromkeys(Language, ODD)
    return replace(
        diagnosis,
        suite_title=texts,
        cases=tuple(
            replace(case, title=texts, about=texts, source=ODD, licence=ODD)
            for case in diagnosis.cases
        ),
        findings=tuple(
            replace(finding, evidence=replace(finding.evidence, prompt=ODD))
            for finding in diagnosis.findings
        ),
    )


def test_no_form_is_broken_by_what_a_suite_says(failed: Diagnosis, alone: Diagnosis) -> None:
    for diagnosis in (odd(failed), odd(alone)):
        tests = ET.fromstring(render(diagnosis, "junit").encode())  # noqa: S314 -- our own
        assert LEGIBLE.strip() in "".join(tests.itertext())
        assert read_diagnosis(render(diagnosis, "json").encode()) == diagnosis
        [run] = msgspec.json.decode(render(diagnosis, "sarif"))["runs"]
        assert any(LEGIBLE in result["message"]["text"] for result in run["results"])
        assert html.escape(LEGIBLE) in render(diagnosis, "html")
        for form in ("html", "md", "junit"):
            text = render(diagnosis, form)
            assert "<img" not in re.sub(r"``.*``", "", text)
            assert not re.search("[\u202e\x00\b\f]", text)


def test_markdown_shows_what_a_suite_says_as_text(failed: Diagnosis) -> None:
    text = render(odd(failed), "md")
    assert text.startswith("## 🔴 Neural MRI")
    line = LEGIBLE.replace("\n", " ")
    escaped = html.escape(line, quote=False)
    for letter in "\\`*[":
        escaped = escaped.replace(letter, f"\\{letter}")
    escaped = escaped.replace("_c_", "\\_c\\_")
    assert f"Suite {escaped} {failed.suite_version}" in text
    row = escaped.replace("|", "\\|")
    assert len(re.findall(rf"^\| {re.escape(row)} \| ", text, re.MULTILINE)) == len(failed.cases)
    assert f"<b>Weak: {html.escape(line, quote=False)}</b>" in text, "no Markdown in HTML"
    assert f": `` {LEGIBLE.replace(chr(10), '⏎')} ``\n" in text


def test_of_a_case_whose_prompts_are_all_set_aside_every_form_says_so(
    suite: Suite, candidate: Record
) -> None:
    lost = [f"recall/{number}" for number in range(len(suite.case("recall").items))]
    blocks = {
        quantity: block._replace(
            prompts=tuple(name for name in block.prompts if name not in lost),
            values=block.values[[name not in lost for name in block.prompts]],
        )
        for quantity, block in candidate.blocks.items()
    }
    record = msgspec.structs.replace(candidate, blocks=blocks, set_aside=tuple(lost))
    diagnosis = diagnose(suite, record)
    said = Phrases(Language.EN)("set_aside", count=len(lost))
    for form in ("html", "md", "junit"):
        assert said in render(diagnosis, form), form
    cases = ET.fromstring(render(diagnosis, "junit").encode()).findall("testsuite")[1]  # noqa: S314
    assert cases.get("skipped") == "1"
    [skipped] = [
        test.get("name") for test in cases.iter("testcase") if test.find("skipped") is not None
    ]
    assert skipped == "recall"
    assert read_diagnosis(render(diagnosis, "json").encode()) == diagnosis


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_a_number_that_is_none_is_read_in_every_form(
    suite: Suite, candidate: Record, baseline: Record, broken: float
) -> None:
    blocks = dict(candidate.blocks)
    for at in (Quantity(Measure.NORMS, "l2_norm"), Quantity(Measure.SCORES, "margin")):
        values = blocks[at].values.copy()
        values[:, -1] = broken
        blocks[at] = blocks[at]._replace(values=values)
    record = msgspec.structs.replace(candidate, blocks=blocks)
    for diagnosis in (diagnose(suite, record, baseline), diagnose(suite, record)):
        assert read_diagnosis(render(diagnosis, "json").encode()) == diagnosis
        ET.fromstring(render(diagnosis, "junit").encode())  # noqa: S314 -- our own
        for form in FORMATS:
            assert not re.search(r"(?i)\b(nan|inf|infinity)\b", render(diagnosis, form)), form


def test_findings_are_ranked_failures_first_and_where_it_began_before_what_followed(
    failed: Diagnosis,
) -> None:
    order = [list(Severity).index(finding.severity) for finding in failed.findings]
    assert order == sorted(order)
    assert failed.findings[0].rule is Rule.CHANGED_AT


def test_a_form_that_is_none_is_refused(alone: Diagnosis) -> None:
    with pytest.raises(InvalidRequest, match="'pdf' is no form"):
        render(alone, "pdf")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0"),
        (0.04567, "0.0457"),
        (-2.5, "−2.5"),
        (999.4, "999"),
        (999.7, "1,000"),
        (-999.99, "−1,000"),
        (1234.5, "1,234"),
        (3e-9, "3e−09"),
        (1e30, "∞"),
    ],
)
def test_numbers_are_written_with_the_digits_that_count(value: float, shown: str) -> None:
    assert number(value) == shown


@pytest.mark.parametrize("language", Language)
def test_no_sentence_says_a_unit_twice(language: Language, failed: Diagnosis) -> None:
    said = Phrases(language)
    example = failed.findings[0]
    for rule, unit, value in (
        (Rule.SETTLES_LATE, "share of layers", 0.97),
        (Rule.UNAWARE, "AUROC", 0.5),
        (Rule.SILENT_HEAD, "of its layer's median head", 0.0),
        (Rule.NONFINITE, "weights", 3.0),
        (Rule.OUTLYING_TENSOR, "excess kurtosis", 123.0),
    ):
        evidence = msgspec.structs.replace(example.evidence, unit=unit, value=value)
        numbers = {"label": "-", "name": "-", "changed": 1, "tested": 2}
        finding = msgspec.structs.replace(example, rule=rule, evidence=evidence, numbers=numbers)
        text = said.say(finding, failed).text
        assert said.amount(value, unit) in text
        assert text.count(said.unit(unit)) <= 1, text
        assert said.quantity(value, unit) not in text or text.count(said.unit(unit)) == 1
