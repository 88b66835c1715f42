"""Suites as they are written, and those that come with the package."""

import unicodedata
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from neural_mri.contract.problems import InvalidRequest
from neural_mri.contract.suites import Expectation, Gate, Language, Measure, Suite, decode_suite
from neural_mri.diagnostics import load_suite, suite_names

BATTERY = {
    "factual-recall",
    "open-recall",
    "bias-occupation-gender",
    "bias-trait-gender",
    "bias-degree-gender",
    "bias-occupation-age",
    "agreement",
    "negation",
    "induction",
    "arithmetic",
    "indirect-object",
    "greater-than",
    "copying",
    "known-unknown",
}


def test_the_battery_asks_every_ability_with_many_prompts() -> None:
    suite = load_suite("standard")
    assert {case.id for case in suite.cases} == BATTERY
    assert all(len(case.items) >= 16 for case in suite.cases)


def test_the_quick_suite_has_twenty_prompts() -> None:
    assert load_suite("quick").n_items == 20


@pytest.mark.parametrize("name", suite_names())
def test_every_case_says_where_its_prompts_come_from_in_both_languages(name: str) -> None:
    for case in load_suite(name).cases:
        assert case.source
        assert case.licence in {"MIT", "Apache-2.0"}
        assert set(case.title) == set(case.about) == set(Language)


@pytest.mark.parametrize("name", suite_names())
def test_a_prompt_with_a_corrupt_one_asks_for_something_else_there(name: str) -> None:
    for case in load_suite(name).cases:
        for item in case.items:
            assert item.corrupt != item.prompt
            assert item.answer != item.foil


@pytest.mark.parametrize("name", suite_names())
def test_no_text_of_a_suite_holds_an_escape_that_was_meant_for_another_format(name: str) -> None:
    texts = _texts(msgspec.to_builtins(load_suite(name)))
    assert [
        text for text in texts if "\\" in text or text != unicodedata.normalize("NFC", text)
    ] == []


@pytest.mark.parametrize("name", suite_names())
def test_no_case_asks_one_prompt_twice(name: str) -> None:
    for case in load_suite(name).cases:
        prompts = [item.prompt for item in case.items]
        assert sorted(set(prompts)) == sorted(prompts)


@pytest.mark.parametrize("name", suite_names())
def test_sums_are_right_and_none_of_them_stands_among_the_examples(name: str) -> None:
    for item in load_suite(name).case("arithmetic").items:
        *examples, asked = item.prompt.split("\n")
        assert item.corrupt is not None
        *_, asked_instead = item.corrupt.split("\n")
        assert item.answer == str(_sum(asked))
        assert item.foil == str(_sum(asked_instead))
        assert all(example == f"{_terms(example)}={_sum(example)}" for example in examples)
        assert not {_terms(asked), _terms(asked_instead)} & {_terms(each) for each in examples}


@pytest.mark.parametrize("name", suite_names())
def test_what_was_said_before_is_the_answer_where_a_case_asks_to_repeat_it(name: str) -> None:
    suite = load_suite(name)
    for item in suite.case("induction").items:
        words = item.prompt.split()
        begun = words[words.index(words[0], 1) :]
        assert words[: len(begun) + 1] == [*begun, item.answer.strip()]
        assert item.corrupt == item.prompt.replace(item.answer, str(item.foil))
    for item in suite.case("indirect-object").items:
        assert item.prompt.count(item.answer) == 1
        assert item.prompt.count(str(item.foil)) == 2
    for item in suite.case("greater-than").items:
        begun_in = int(item.prompt.split("year ")[1][2:4])
        assert int(str(item.foil)) < begun_in < int(item.answer)


def _texts(value: object) -> Iterator[str]:
    match value:
        case str():
            yield value
        case dict():
            yield from _texts(list(value.values()))
        case list() | tuple():
            for each in value:
                yield from _texts(each)


def _terms(line: str) -> str:
    return line.partition("=")[0]


def _sum(line: str) -> int:
    return sum(int(term) for term in _terms(line).split("+"))


def test_the_digest_is_of_what_is_asked_not_of_how_it_is_told_or_judged() -> None:
    suite = load_suite("quick")
    retold = msgspec.structs.replace(
        suite,
        title={Language.EN: "Another"},
        version="9.9.9",
        alpha=0.2,
        gates={Measure.NORMS: Gate(tolerance=1.0), Measure.SCORES: Gate(share_tolerance=0.5)},
    )
    assert retold.digest == suite.digest
    for change in ({"exact": 5}, {"noise_prompts": 3}, {"cases": suite.cases[:-1]}):
        assert msgspec.structs.replace(suite, **change).digest != suite.digest


SUITE = """
name = "mine"
version = "1.0.0"
title = { en = "Mine" }
[[cases]]
id = "one"
title = { en = "One" }
about = { en = "About" }
expectation = "prefer"
source = "me"
licence = "CC0-1.0"
items = [
  { prompt = "a b", answer = " c", foil = " d" },
  { prompt = "e f", answer = " g", foil = " h" },
]
"""


def test_a_suite_of_ones_own_is_read_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(SUITE)
    suite = load_suite(str(path))
    assert suite == decode_suite(SUITE, "mine")
    assert suite.cases[0].expectation is Expectation.PREFER


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (('foil = " d"', 'foul = " d"'), "foul"),
        ((', foil = " d"', ""), "expected a foil"),
        (('"prefer"', '"balance"'), "one of two groups"),
        (('"prefer"', '"awareness"'), "'known' or 'unknown'"),
        (('id = "one"', 'id = "One!"'), "id"),
        (('version = "1.0.0"', 'version = "1"'), "version"),
        (("[[cases]]", "[cases"), "mine"),
        (
            ("[[cases]]", "[gates.norms]\nshare_tolerance = 0.1\n[[cases]]"),
            "gate norms: only scores",
        ),
    ],
)
def test_a_suite_that_contradicts_itself_is_refused_by_name(
    change: tuple[str, str], named: str
) -> None:
    with pytest.raises(InvalidRequest, match=named):
        decode_suite(SUITE.replace(*change), "mine")


def test_a_suite_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="quick, standard"):
        load_suite("thorough")
    with pytest.raises(InvalidRequest, match="No such file"):
        load_suite(str(tmp_path / "none.toml"))


def test_a_case_is_never_there_twice() -> None:
    suite = load_suite("quick")
    with pytest.raises(ValueError, match="twice"):
        Suite(
            name="double",
            version="1.0.0",
            title=suite.title,
            cases=(suite.cases[0], suite.cases[0]),
        )


@pytest.mark.parametrize("body", [SUITE.replace("One", "caf\xe9").encode("latin-1"), b"\xff\xfe"])
def test_a_suite_that_is_not_utf_8_is_refused_by_name(body: bytes, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(body)
    with pytest.raises(InvalidRequest, match=r"mine.toml is not UTF-8: .* byte 0x"):
        load_suite(str(path))
