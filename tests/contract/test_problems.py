"""Refusals."""

import re

import pytest

from neural_mri.contract import problems
from neural_mri.contract.problems import Problem, UnknownComponent


def family(kind: type[Problem]) -> list[type[Problem]]:
    """The contract's own refusals; other rooms have some of theirs."""
    kin = [kind, *(kin for child in kind.__subclasses__() for kin in family(child))]
    return [each for each in kin if each.__module__ == problems.__name__]


FAMILY = sorted(family(Problem), key=lambda kind: kind.__name__)


@pytest.mark.parametrize("kind", FAMILY)
def test_every_refusal_has_a_type_a_title_and_a_status_of_its_own_kind(kind: type[Problem]) -> None:
    document = kind("what and why", component="blocks.40.mlp").document()
    assert re.fullmatch(r"urn:neural-mri:problem:[a-z]+(-[a-z]+)*", document["type"])
    assert document["title"]
    assert not document["title"].endswith(".")
    assert document["status"] in {400, 404, 409, 410, 422, 429, 503}
    assert document["detail"] == "what and why"
    assert document["component"] == "blocks.40.mlp"


def test_types_are_never_shared() -> None:
    assert len({kind.type_urn() for kind in FAMILY}) == len(FAMILY)
    assert UnknownComponent.type_urn() == "urn:neural-mri:problem:unknown-component"


def test_the_module_exports_and_draws_every_refusal() -> None:
    for kind in FAMILY:
        assert kind.__name__ in problems.__all__
        assert kind.__name__ in (problems.__doc__ or "")
